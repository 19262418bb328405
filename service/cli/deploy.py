"""``modalkit deploy``: the service on Modal, by Modal's own command."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from pydantic_core import to_json

from modalkit.service.cli.common import AsJson, ConfigFiles, notices
from modalkit.service.errors import describe_error
from modalkit.service.loading import LoadError
from modalkit.service.settings import Settings
from modalkit.service.settings.layers import CONFIG_VARIABLE
from modalkit.service.settings.yaml_text import dump_yaml

DEFAULT_APP = "modalkit.service.modal_app"
NOT_SHOWN = (
    "this is the image of {app} and what its ModalConfig has for each decorator; which of it the app uses, and what it "
    "says beside it, is in its source only"
)


def deploy(
    app: Annotated[
        str, typer.Argument(help="The Modal app: a module, or a .py file. Left out: the configured models.")
    ] = DEFAULT_APP,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent to Modal; needs no network and no token.")
    ] = False,
    as_json: AsJson = False,
    config: ConfigFiles = None,
    name: Annotated[str | None, typer.Option(help="Name of the deployment; the app's own if left out.")] = None,
    env: Annotated[str | None, typer.Option(help="Modal environment to deploy to; its default if left out.")] = None,
    tag: Annotated[str | None, typer.Option(help="A version to tag the deployment with.")] = None,
) -> None:
    """Deploy the configured service, or an app of your own, to Modal.

    Runs `modal deploy`, whose exit code is passed on. With --dry-run, warnings name the imports and the files of your
    modules that the image would lack, as far as their source tells. A dry run of an app of your own prints its image
    and its ModalConfig, by default that of the configuration, not what its decorators say beside it.

    [bold]Examples[/bold]

    modalkit deploy --dry-run

    modalkit deploy --config production.yaml

    modalkit deploy my_app.py --env staging
    """
    if as_json and not dry_run:
        raise typer.BadParameter("what would be sent is printed with --dry-run only: add it, or leave --json out")
    environ = dict(os.environ)
    if config:
        files = [str(file) for file in config]
        if odd := [file for file in files if "," in file]:
            raise typer.BadParameter(f"{odd[0]!r} has a comma in its name, which separates files in {CONFIG_VARIABLE}")
        environ[CONFIG_VARIABLE] = ",".join(files)
    module = app.partition("::")[0]
    mode = [] if module.endswith(".py") else ["-m"]
    if not mode and not Path(module).is_file():
        raise typer.BadParameter(f"there is no file {module}; check its name", param_hint="APP")
    if dry_run:
        from modalkit.service.on_modal.config import ModalConfig, describe_deployment
        from modalkit.service.on_modal.image_gaps import image_gaps

        modal_config = ModalConfig(environ=environ)
        if app != DEFAULT_APP:
            os.environ.update(environ)
            found = vars(_import_app(app, module)).values()
            modal_config = next((value for value in found if isinstance(value, ModalConfig)), modal_config)
            notices.print(f"modalkit: note: {NOT_SHOWN.format(app=app)}")
        described = describe_deployment(modal_config)
        if as_json:
            typer.echo(to_json(described))
        else:
            typer.echo(dump_yaml(described), nl=False)
        for gap in image_gaps(modal_config.plan_image(), modal_config.settings, Path.cwd()):
            notices.print(f"modalkit: warning: {gap}")
        return
    Settings.load(environ=environ)  # an error is one message here; Modal's command would print a traceback
    options = [f"--{option}={value}" for option, value in {"name": name, "env": env, "tag": tag}.items() if value]
    done = subprocess.run(
        [sys.executable, "-m", "modal", "deploy", *mode, *options, "--", app], check=False, env=environ
    )
    # The code of a process that a signal ended is negative; shells show it as 128 plus the signal.
    raise typer.Exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)


def _import_app(app: str, module: str) -> ModuleType:
    """Import the app as Modal does: the local modules that it imports become part of the image."""
    if module.endswith(".py"):
        file = Path(module).resolve()
        sys.path.insert(0, str(file.parent))
        module = file.stem
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise LoadError(f"the app {app!r} cannot be imported: {describe_error(error)}") from error
