"""``modalkit reload``: has a running service load its models anew, by its configuration as it is now."""

from typing import Annotated
from urllib.parse import quote

import httpx
import typer
from pydantic import RootModel

from modalkit.service.cli.common import EXIT_FAILURE, AsJson, ConfigFiles, notices
from modalkit.service.cli.jobs import Key, Url
from modalkit.service.cli.jobs_client import AwayError, JobsClient, JobsError
from modalkit.service.settings import Settings
from modalkit.service.web.answers import ModelView

DEFAULT_URL = httpx.URL("http://127.0.0.1:8000")


def reload(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL", help="Which models; all if left out.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    config: ConfigFiles = None,
    as_json: AsJson = False,
) -> None:
    """Have a running service load models anew, beside those that run; no request fails for it.

    The service reads its configuration again: weights, arguments of the pipeline and limits of batches are as they are
    there now. A model that cannot be loaded goes on as it was, and the exit code is 1. Code of Python is not read
    again. The service must have an API key, with the scope admin; without one, send its process the signal SIGHUP.

    [bold]Examples[/bold]

    modalkit reload --key secret

    modalkit reload sentiment --url http://127.0.0.1:9000
    """
    header = Settings.load(config).app_settings.auth_config.auth_header
    failed = False
    with JobsClient.of_service(url or DEFAULT_URL, key, header).opened() as client:
        for name in models or [model.name for model in client.send(_Models, "GET", "/admin/models").root]:
            try:
                model = client.send(ModelView, "POST", f"/admin/models/{quote(name, safe='')}/reload")
            except AwayError:
                raise
            except JobsError as error:
                notices.print(f"modalkit: error: {error}")
                failed = True
            else:
                typer.echo(model.model_dump_json() if as_json else f"{name} was reloaded.")
    if failed:
        raise typer.Exit(EXIT_FAILURE)


class _Models(RootModel[list[ModelView]]):
    """The answer of ``GET /admin/models``."""
