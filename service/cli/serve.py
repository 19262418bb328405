"""``modalkit serve``: the HTTP service over the models of the configuration."""

import logging
import shlex
import signal
import socket
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Literal

import anyio
import typer
import uvicorn

from modalkit.batching.task_groups import plain_task_group
from modalkit.service.cli.common import ConfigFiles, notices, one_of, try_api_key
from modalkit.service.errors import Readiness
from modalkit.service.jobs import JobStoreError
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.logs import LogFormat, configure_logging
from modalkit.service.serving import Server, freeze_gc, listening
from modalkit.service.settings import Settings
from modalkit.service.tracing import enable_tracing_from_environment
from modalkit.service.version import VERSION
from modalkit.service.web import create_app

COUNTING_S = 2
"""Seconds within which the store must say how many jobs have not ended, when the service stops at once."""
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

    A model that cannot be loaded leaves the others alone; without any that can, the exit code is 2. When no model can
    run anything any more, the server stops; the exit code is 1 if one that was ready broke down.

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
    stop = _Stop(server, gateway)
    async with plain_task_group() as outer:
        outer.start_soon(stop.on_signals, outer.cancel_scope)
        async with gateway, plain_task_group() as task_group:
            task_group.start_soon(_announce, server, gateway, listener, settings)
            task_group.start_soon(_stop_when_broken, server, gateway)
            await server.serve([listener])
            task_group.cancel_scope.cancel()
            notices.print("Finishing what was accepted ...")
        outer.cancel_scope.cancel()
    _summarize(gateway, at_once=stop.at_once)
    if stop.at_once:
        is_lost = settings.app_settings.async_config.store == "memory"
        fate = "lost, as the store is in memory" if is_lost else "kept, and run after the next start"
        notices.print(f"Stopped at once. {stop.unfinished_jobs}{fate}." if stop.unfinished_jobs else "Stopped at once.")
        raise typer.Exit(1)
    if any(model.readiness is Readiness.BROKEN for model in gateway.models.values()):
        raise typer.Exit(1)
    if len(_failed(gateway)) == len(gateway.models):
        raise typer.Exit(2)


def _failed(gateway: LocalGateway) -> list[str]:
    return [name for name, model in gateway.models.items() if model.readiness is Readiness.FAILED]


@dataclass
class _Stop:
    """Stops on signals: on the first one finishes what was accepted, on the second one stops at once."""

    server: Server
    gateway: LocalGateway
    at_once: bool = False
    unfinished_jobs: str = "Jobs that had not ended: "
    """How many jobs had not ended when it stopped at once; empty for none."""

    async def on_signals(self, everything: anyio.CancelScope) -> None:
        """Wait for signals, until cancelled; the second one cancels `everything`."""
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                if self.server.should_exit and not self.at_once:
                    self.at_once = True
                    await self._count_jobs()
                    everything.cancel()
                self.server.should_exit = True
                self.gateway.jobs.stop_waiting()  # a client that waits for the end of a job would keep the server open

    async def _count_jobs(self) -> None:
        with suppress(JobStoreError), anyio.move_on_after(COUNTING_S):
            counts = await self.gateway.jobs.counts()
            jobs = sum(count for status, count in counts.statuses.items() if not status.has_ended)
            self.unfinished_jobs = f"{jobs} job{'' if jobs == 1 else 's'} had not ended: " if jobs else ""


async def _stop_when_broken(server: Server, gateway: LocalGateway) -> None:
    """Stop when no model can run any more, so that a supervisor sees the exit code and starts the process again."""
    await gateway.wait_until_broken()
    server.should_exit = True
    gateway.jobs.stop_waiting()


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


def _summarize(gateway: LocalGateway, *, at_once: bool) -> None:
    for model_name, model in gateway.models.items():
        if (done := model.statistics()) is None:
            continue
        spread = ""
        if sizes := sorted(Counter(done.batch_sizes).elements()):
            spread = f" (middle half {sizes[len(sizes) // 4]} to {sizes[3 * len(sizes) // 4]}, largest {sizes[-1]})"
        ended_early = "stopped before their end" if at_once else "cancelled"
        notices.print(
            f"{model_name}: {done.succeeded} succeeded, {done.failed} failed, {done.expired} expired, "
            f"{done.cancelled} {ended_early}; {done.batches} batches, {done.mean_batch_size:.1f} items each on average"
            f"{spread}"
        )
