"""``modalkit serve``: the HTTP service over the models of the configuration."""

import logging
import os
import shlex
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import anyio
import typer
from anyio.abc import TaskGroup
from pydantic import BaseModel

from modalkit.batching.task_groups import plain_task_group
from modalkit.service.cli.common import EXIT_USAGE, POSITIVE, ConfigFiles, notices, one_of, try_api_keys, whole
from modalkit.service.cli.stopping import EXIT_BROKEN, Stop, summarize
from modalkit.service.errors import Readiness
from modalkit.service.loading import LoadError
from modalkit.service.local_gateway import LocalGateway, LocalModel
from modalkit.service.logs import LogFormat, LogLevel, configure_logging
from modalkit.service.made_up_items import MadeUpItems, NoItemsError, make_up_items
from modalkit.service.outputs import plain_value
from modalkit.service.serving import Server, inherited_listeners, listening, listening_on_path, tune_interpreter
from modalkit.service.settings import ServerConfig, Settings
from modalkit.service.settings.layers import CONFIG_VARIABLE, DEFAULT_FILE, LOG_FORMAT_VARIABLE
from modalkit.service.tracing import enable_tracing_from_environment
from modalkit.service.version import VERSION
from modalkit.service.web.app import configured_app
from modalkit.service.web.auth import refuse_strangers, scheme_of
from modalkit.service.web.server import LimitedServer, server_of

SAMPLE_SIZE = 8
"""Size of the sample items in the commands that are shown."""
MAX_SHOWN_CHARACTERS = 500
"""Limit of the characters of an item in them."""


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes any free one.", **whole(0, 65535))] = 8000,
    config: ConfigFiles = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen without an API key on an address that others can reach.")
    ] = False,
    log_level: Annotated[LogLevel, typer.Option(help="What is logged.", **one_of(LogLevel))] = LogLevel.WARNING,
    log_format: Annotated[
        LogFormat,
        typer.Option(
            **one_of(LogFormat), envvar=LOG_FORMAT_VARIABLE, help="auto is text at a terminal, and JSON elsewhere."
        ),
    ] = LogFormat.AUTO,
    unix_socket: Annotated[
        Path | None, typer.Option(help="A Unix socket to listen on, in place of an address and a port.")
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file with the certificate and its chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file with its key, if that has its own.")] = None,
    root_path: Annotated[str | None, typer.Option(help="Path below which a proxy shows the service.")] = None,
    trusted_proxy: Annotated[
        list[str] | None, typer.Option(help="Address or network whose X-Forwarded-… headers count; may be repeated.")
    ] = None,
    access_log: Annotated[bool | None, typer.Option(help="Log a line for each request.")] = None,
    grace: Annotated[
        float | None, typer.Option(help="Seconds for open requests after the signal to stop.", **POSITIVE)
    ] = None,
) -> None:
    """Serve the configured models over HTTP until interrupted; then finish what was accepted.

    Sockets that systemd has opened (socket activation) are used in place of an address and a port. The options for
    TLS, proxies, the Unix socket, the access log and the grace are settings of `app_settings.server_config` as well.

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
    given = {
        "unix_socket": unix_socket,
        "tls_certificate": tls_certificate,
        "tls_key": tls_key,
        "root_path": root_path,
        "trusted_proxies": trusted_proxy,
        "access_log": access_log,
        "grace_seconds": grace,
    }
    server_options = {key: value for key, value in given.items() if value is not None}
    settings = Settings(config, app_settings={"server_config": server_options})
    has_file = config or os.environ.get(CONFIG_VARIABLE) or DEFAULT_FILE.exists()
    if not has_file and settings.origin("model_settings", "model_entries") == "default":
        notices.print(f"no {DEFAULT_FILE} here: serving the bundled model")
    try_api_keys(settings.app_settings.auth_config)  # uvicorn would show an error as a traceback, and exit with code 0
    gateway = LocalGateway(settings)
    app = configured_app(gateway, settings.app_settings, owns_gateway=False)
    server_config = settings.app_settings.server_config
    has_access_log = server_config.access_log
    if has_access_log is None:
        has_access_log = log_level in (LogLevel.DEBUG, LogLevel.INFO)
    elif has_access_log:
        logging.getLogger("uvicorn.access").setLevel("INFO")
    server = server_of(app, server_config, access_log=has_access_log)
    _load_certificate(server, server_config)
    with _listeners(host, port, server_config) as listeners:
        if not insecure:
            for listener in listeners:
                refuse_strangers(settings.app_settings.auth_config, listener)
        anyio.run(_serve, server, gateway, listeners, settings, backend_options={"use_uvloop": True})


def _load_certificate(server: LimitedServer, config: ServerConfig) -> None:
    try:
        server.config.load()
    except OSError as error:  # also those of TLS
        reason = (error.strerror if not isinstance(error, ssl.SSLError) else error.reason) or error
        files = " and ".join(str(file) for file in (config.tls_certificate, config.tls_key) if file is not None)
        raise LoadError(
            f"app_settings.server_config.tls_certificate: {files}: {reason}; give the PEM files of a certificate and "
            "its key, and the key's password if it has one"
        ) from error


@contextmanager
def _listeners(host: str, port: int, config: ServerConfig) -> Iterator[list[socket.socket]]:
    """The sockets to serve: those of systemd, else the Unix socket, else the address. Raises `AddressError`."""
    if listeners := inherited_listeners():
        yield listeners
    else:
        with listening(host, port) if config.unix_socket is None else listening_on_path(config.unix_socket) as listener:
            yield [listener]


async def _serve(server: Server, gateway: LocalGateway, listeners: list[socket.socket], settings: Settings) -> None:
    app_settings = settings.app_settings
    is_durable = app_settings.async_config.store != "memory"
    stop = Stop(server, gateway, app_settings.server_config.grace_seconds, is_durable=is_durable)
    async with plain_task_group() as outer:
        outer.start_soon(stop.on_signals, outer)
        async with gateway, plain_task_group() as task_group:
            task_group.start_soon(_announce, server, gateway, listeners, settings)
            task_group.start_soon(_stop_when_broken, stop, gateway, outer)
            await server.serve(listeners)
            task_group.cancel_scope.cancel()
            notices.print("Finishing what was accepted ...")
        outer.cancel_scope.cancel()
    summarize(gateway, at_once=False)
    if any(model.readiness is Readiness.BROKEN for model in gateway.models.values()):
        raise typer.Exit(EXIT_BROKEN)
    if len(_failed(gateway)) == len(gateway.models):
        raise typer.Exit(EXIT_USAGE)


def _failed(gateway: LocalGateway) -> list[str]:
    return [name for name, model in gateway.models.items() if model.readiness is Readiness.FAILED]


async def _stop_when_broken(stop: Stop, gateway: LocalGateway, background: TaskGroup) -> None:
    """Stop when a model broke down, so that a supervisor sees the exit code and starts the process again."""
    await gateway.wait_until_broken()
    stop.begin(background)


def _address(listener: socket.socket, config: ServerConfig) -> tuple[str, str, str]:
    """The address to show for a socket, and the options of `curl` and the URL that use it."""
    scheme = "http" if config.tls_certificate is None else "https"
    if listener.family == socket.AF_UNIX:
        path = listener.getsockname()
        return f"unix:{path}", f" --unix-socket {shlex.quote(path)}", f"{scheme}://localhost"
    host, port = listener.getsockname()[:2]
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    return url, "", url


async def _announce(
    server: Server, gateway: LocalGateway, listeners: Sequence[socket.socket], settings: Settings
) -> None:
    """Print how to use the service once it is ready; stop it when no model could be loaded, which has been logged."""
    addresses = [_address(listener, settings.app_settings.server_config) for listener in listeners]
    shown = ", ".join(address for address, _, _ in addresses)
    notices.print(f"modalkit {VERSION} on {shown}: loading {', '.join(gateway.models)} ...")
    started_s = time.perf_counter()
    await gateway.wait_until_settled()
    tune_interpreter()
    failed = _failed(gateway)
    if len(failed) == len(gateway.models):
        server.should_exit = True
        return
    for model in gateway.models.values():
        if model.engine_choice is not None:
            notices.print(f"{model.name}: engine {model.engine_choice}")
    without = f", without {', '.join(failed)} (see the errors above)" if failed else ""
    notices.print(
        f"Ready after {time.perf_counter() - started_s:.1f} s{without}. Ctrl-C stops.",
        _things_to_try(*addresses[0][1:], gateway, settings),
    )


def _things_to_try(options: str, url: str, gateway: LocalGateway, settings: Settings) -> str:
    """Commands that work as they are, with items of the first model that is ready; only the link without any."""
    auth = settings.app_settings.auth_config
    key = f" -H '{auth.auth_header}: {scheme_of(auth.auth_header)}<your key>'" if auth.asks_for_key else ""
    model = next((model for model in gateway.models.values() if model.readiness is Readiness.READY), None)
    is_first = model is next(iter(gateway.models.values()))
    query = "" if model is None or is_first else f"?model_name={quote(model.name, safe='')}"

    def curl(path: str, body: str) -> str:
        return f"  curl{options} {shlex.quote(f'{url}{path}{query}')}{key} -d {shlex.quote(body)}"

    lines = ["", "Try:"]
    if model is not None and (items := _items_to_try(model)):
        lines += [
            curl("/sync/predict", items[0]),
            curl("/batch/predict", f"[{', '.join(items)}]"),
            curl("/async/predict", f'{{"message": {items[0]}}}'),
            f"  curl{options}{key} '{url}/jobs/<the job_id>?wait=10'",
        ]
    if options:  # no browser opens a Unix socket
        page = f"  curl{options} {url}/openapi.json"
    elif settings.app_settings.ui:
        page = f"  {url} in a browser shows what happens, {url}/docs all routes"
    else:
        page = f"  {url}/docs in a browser"
    return "\n".join([*lines, page])


def _items_to_try(model: LocalModel) -> list[str]:
    """Two valid items in JSON: the author's examples, else sample items, else made-up ones. None if they are long."""
    found: Sequence[BaseModel] = ()
    try:
        made_up = make_up_items(model.input_model, 2)
    except NoItemsError:
        made_up = MadeUpItems((), are_guessed=True, has_fields=True)
    try:
        if made_up.are_guessed:
            found = model.ready_worker().pipeline.sample_items(2, SAMPLE_SIZE)
        items = [
            item.model_dump_json(exclude_unset=True, by_alias=True, fallback=plain_value)
            for item in (found or made_up.items)
        ]
        for item in items:
            model.input_model.model_validate_json(item)
    except Exception:  # noqa: BLE001  # of the user's pipeline or model: then there is nothing to show
        return []
    return items if max(map(len, items), default=0) <= MAX_SHOWN_CHARACTERS else []
