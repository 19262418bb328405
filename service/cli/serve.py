"""``modalkit serve``: the HTTP service over the models of the configuration."""

import logging
import shlex
import socket
import time
from typing import Annotated, Literal

import anyio
import typer
import uvicorn
from anyio.abc import TaskGroup

from modalkit.batching.task_groups import plain_task_group
from modalkit.service.cli.common import ConfigFiles, notices, one_of, try_api_key
from modalkit.service.cli.stopping import EXIT_BROKEN, Stop, summarize
from modalkit.service.errors import Readiness
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.logs import LogFormat, configure_logging
from modalkit.service.serving import Server, freeze_gc, listening
from modalkit.service.settings import Settings
from modalkit.service.tracing import enable_tracing_from_environment
from modalkit.service.version import VERSION
from modalkit.service.web import create_app

GRACE_S = 30
"""Seconds that open HTTP requests may take after the first signal to stop."""


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes any free one.")] = 8000,
    config: ConfigFiles = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(case_sensitive=False, help="What is logged.")
    ] = "warning",
    log_format: Annotated[
        LogFormat,
        typer.Option(
            **one_of(LogFormat), envvar="MODALKIT_LOG_FORMAT", help="auto is text at a terminal, and JSON elsewhere."
        ),
    ] = LogFormat.AUTO,
) -> None:
    """Serve the configured models over HTTP until interrupted; then finish what was accepted.

    The first SIGTERM or Ctrl-C stops it gently: open requests are finished, and jobs that have not begun stay stored.
    The second one stops it at once, with the exit code 1; so does the end of the grace. A model that cannot be loaded
    leaves the others alone; without any that can, the exit code is 2. When a model breaks down and cannot be restarted,
    the server stops with the exit code 3, so that a supervisor starts it again.

    [bold]Examples[/bold]

    modalkit serve

    modalkit serve --host 0.0.0.0 --port 80 --config production.yaml
    """
    configure_logging(log_format)
    logging.getLogger().setLevel(log_level.upper())
    enable_tracing_from_environment()
    settings = Settings.load(config)
    try_api_key(settings.app_settings.auth_config)  # uvicorn would show an error as a traceback, and exit with code 0
    gateway = LocalGateway(settings)
    app = create_app(
        gateway,
        auth=settings.app_settings.auth_config,
        owns_gateway=False,
        require_all_models=settings.app_settings.require_all_models,
    )
    is_access_logged = log_level in ("debug", "info")
    http = uvicorn.Config(app, log_config=None, access_log=is_access_logged, timeout_graceful_shutdown=GRACE_S)
    with listening(host, port) as listener:
        anyio.run(_serve, Server(http), gateway, listener, settings, backend_options={"use_uvloop": True})


async def _serve(server: Server, gateway: LocalGateway, listener: socket.socket, settings: Settings) -> None:
    stop = Stop(server, gateway, GRACE_S, is_durable=settings.app_settings.async_config.store != "memory")
    async with plain_task_group() as outer:
        outer.start_soon(stop.on_signals, outer)
        async with gateway, plain_task_group() as task_group:
            task_group.start_soon(_announce, server, gateway, listener, settings)
            task_group.start_soon(_stop_when_broken, stop, gateway, outer)
            await server.serve([listener])
            task_group.cancel_scope.cancel()
            notices.print("Finishing what was accepted ...")
        outer.cancel_scope.cancel()
    summarize(gateway, at_once=False)
    if any(model.readiness is Readiness.BROKEN for model in gateway.models.values()):
        raise typer.Exit(EXIT_BROKEN)
    if len(_failed(gateway)) == len(gateway.models):
        raise typer.Exit(2)


def _failed(gateway: LocalGateway) -> list[str]:
    return [name for name, model in gateway.models.items() if model.readiness is Readiness.FAILED]


async def _stop_when_broken(stop: Stop, gateway: LocalGateway, background: TaskGroup) -> None:
    """Stop when a model broke down, so that a supervisor sees the exit code and starts the process again."""
    await gateway.wait_until_broken()
    stop.begin(background)


async def _announce(server: Server, gateway: LocalGateway, listener: socket.socket, settings: Settings) -> None:
    """Print how to use the service once it is ready; stop it when no model could be loaded, which has been logged."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    notices.print(f"modalkit {VERSION} on {url}: loading {', '.join(gateway.models)} ...")
    started_s = time.perf_counter()
    await gateway.wait_until_settled()
    freeze_gc()
    failed = _failed(gateway)
    if len(failed) == len(gateway.models):
        server.should_exit = True
        return
    for model in gateway.models.values():
        if model.engine_choice is not None:
            notices.print(f"{model.name}: engine {model.engine_choice}", markup=False)
    without = f", without {', '.join(failed)} (see the errors above)" if failed else ""
    notices.print(
        f"Ready after {time.perf_counter() - started_s:.1f} s{without}. Ctrl-C stops.",
        _things_to_try(url, gateway, settings),
    )


def _things_to_try(url: str, gateway: LocalGateway, settings: Settings) -> str:
    auth = settings.app_settings.auth_config
    scheme = "Bearer " if auth.auth_header.lower() == "authorization" else ""
    key = "" if auth.api_key is None and auth.ssm_key is None else f" -H '{auth.auth_header}: {scheme}<your key>'"

    def curl(path: str, body: str) -> str:
        return f"  curl {url}{path}{key} -d {shlex.quote(body)}"

    lines = ["", "Try:"]
    if "text" in next(iter(gateway.models.values())).input_model.model_fields:
        lines += [
            curl("/sync/predict", '{"text": "What a lovely day!"}'),
            curl("/batch/predict", '[{"text": "I love it"}, {"text": "It broke after a week"}]'),
            curl("/async/predict", '{"message": {"text": "Great value for the money"}, "success_queue": "results"}'),
            f"  curl{key} '{url}/jobs/<the job_id>?wait=10'",
        ]
    return "\n".join([*lines, f"  {url}/docs in a browser"])
