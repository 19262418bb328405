"""``modalkit jobs list | show | replay | retry | purge``: jobs of a running service, or in the store's file."""

import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import httpx
import typer
from pydantic_core import to_json
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from modalkit.service.cli.common import EXIT_FAILURE, AsJson, ConfigFiles, notices, one_of, whole
from modalkit.service.cli.jobs_client import JobRefusedError, JobsClient
from modalkit.service.jobs import DeliveryStatus, JobStatus
from modalkit.service.settings import Settings
from modalkit.service.web.answers import JobDetails, JobPageView, JobView, Purged, Replayed, Retried

PAGE_SIZE = 200
MAX_AGE_S = 100 * 365 * 86_400
ID_WIDTH = 36
OTHER_COLUMNS_WIDTH = 68  # columns of a line for id, states and age, gaps included
MAX_PORT = 65_535
MIN_MODEL_WIDTH = 12
UNITS_S = {"d": 86_400, "h": 3600, "m": 60, "s": 1}

_URL = re.compile(r"(\w+://)(?:[^\s/?#'\"]*@)?([^\s/?#'\"]+)([^\s'\"]*)")

app = typer.Typer(name="jobs", no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def jobs() -> None:
    """See to jobs: list and show them, send undelivered results once more, run failed ones again, remove old ones.

    With --url, by way of a running service. Without, in the SQLite file of the configuration (async_config.store_path),
    while no service has it open.
    """


def _url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL()
    is_port = url.port is None or 0 < url.port <= MAX_PORT
    if url.scheme not in ("http", "https") or not url.host or not is_port or url.query or url.fragment:
        raise typer.BadParameter(f"it must be an address such as http://127.0.0.1:8000, not {text!r}")
    return url


def seconds_of(duration: str) -> int:
    """The seconds of a duration such as 90s, 15m, 2h or 7d. Raises `typer.BadParameter` for any other text."""
    parts = re.fullmatch(r"(\d{1,9})([smhd])", duration, re.ASCII)
    seconds = int(parts[1]) * UNITS_S[parts[2]] if parts else 0
    if not 0 < seconds <= MAX_AGE_S:
        raise typer.BadParameter(f"it must be a duration up to 36500d, such as 90s, 15m, 2h or 7d, not {duration!r}")
    return seconds


Url = Annotated[httpx.URL | None, typer.Option(parser=_url, metavar="URL", help="The address of a running service.")]
Key = Annotated[str | None, typer.Option(envvar="MODALKIT_API_KEY", help="The API key of that service.")]
Statuses = Annotated[
    list[JobStatus] | None,
    typer.Option("--status", help="Only jobs in this state; may be repeated.", **one_of(JobStatus)),
]
Deliveries = Annotated[
    list[DeliveryStatus] | None,
    typer.Option("--delivery", help="Only jobs with such a delivery; may be repeated.", **one_of(DeliveryStatus)),
]
OfModel = Annotated[str | None, typer.Option("--model", "-m", help="Only jobs of this model.")]
OfBatch = Annotated[str | None, typer.Option("--batch", help="Only jobs of this batch of jobs, by its id.")]


@app.command("list")
def list_jobs(
    status: Statuses = None,
    delivery: Deliveries = None,
    model: OfModel = None,
    batch: OfBatch = None,
    limit: Annotated[int, typer.Option(help="Maximum jobs to list.", **whole(1))] = 20,
    everything: Annotated[bool, typer.Option("--all", help="List all there are, whatever the limit.")] = False,
    cursor: Annotated[int | None, typer.Option(help="Where to go on, as told before.", **whole(0, 2**63 - 1))] = None,
    as_json: AsJson = False,
    url: Url = None,
    key: Key = None,
    config: ConfigFiles = None,
) -> None:
    """List jobs, the newest first; of a failed one, or an undelivered result, with the error.

    URLs in errors are cut short, because those of webhooks may hold secrets; not so with --json.

    [bold]Examples[/bold]

    modalkit jobs list --delivery undelivered

    modalkit jobs list --url http://127.0.0.1:8000 --status failed --status expired --all --json
    """
    parameters = {"status": status, "delivery": delivery, "model_name": model, "batch_id": batch}
    listed = 0
    shown: list[JobView] = []
    with _jobs(url, key, config).opened() as client:
        while everything or listed < limit:
            size = PAGE_SIZE if everything else min(PAGE_SIZE, limit - listed)
            page = client.ask(JobPageView, "GET", parameters=parameters | {"limit": size, "cursor": cursor})
            listed, cursor = listed + len(page.jobs), page.next_cursor
            if as_json:
                _print_json(page.jobs)
            else:
                shown += page.jobs
            if cursor is None:
                break
    if not as_json:
        output = Console(highlight=False, markup=False, emoji=False)
        output.print(job_table(shown, output.width) if shown else "There are no such jobs.")
    if cursor is not None:
        notices.print(f"There are more: --cursor {cursor} lists the next ones, --all all of them.")


@app.command()
def show(
    job_ids: Annotated[list[str], typer.Argument(metavar="JOB_ID", help="As given by /async/predict.")],
    as_json: AsJson = False,
    url: Url = None,
    key: Key = None,
    config: ConfigFiles = None,
) -> None:
    """Show all that is known of jobs.

    The names of queues are among it, and those of webhooks may hold secrets.

    [bold]Examples[/bold]

    modalkit jobs show 019a6b5e-8c3f-7a41-9d52-0f6f3d1c2b7a

    modalkit jobs show 019a6b5e-8c3f-7a41-9d52-0f6f3d1c2b7a --url http://127.0.0.1:8000 --json
    """
    with _jobs(url, key, config).opened() as client:
        answers = [_ask_about(client, job_id, "GET") for job_id in _distinct(job_ids)]
    found = [job for job in answers if job is not None]
    if as_json:
        _print_json(found)
    elif found:
        typer.echo("\n\n".join(map(job_text, found)))
    if len(found) < len(answers):
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def replay(
    job_ids: Annotated[list[str] | None, typer.Argument(metavar="JOB_ID", help="Whose results to send.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Send every undelivered result once more.")] = False,
    url: Url = None,
    key: Key = None,
    config: ConfigFiles = None,
) -> None:
    """Send undelivered results once more, with all their attempts.

    [bold]Examples[/bold]

    modalkit jobs replay 019a6b5e-8c3f-7a41-9d52-0f6f3d1c2b7a

    modalkit jobs replay --all --url http://127.0.0.1:8000
    """
    if bool(job_ids) == everything:
        raise typer.BadParameter("give the ids of jobs, or --all for every undelivered result, and not both")
    with _jobs(url, key, config).opened() as client:
        count = _each(client, job_ids, "/replay") if job_ids else client.ask(Replayed, "POST", "/replay").replayed
    done = f"{count} result{'' if count == 1 else 's'} will be sent once more, {client.sent_when}."
    _report(count, job_ids, done, "There are no undelivered results.")


@app.command()
def retry(
    job_ids: Annotated[list[str] | None, typer.Argument(metavar="JOB_ID", help="Which jobs to run.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Run every failed job once more.")] = False,
    status: Statuses = None,
    model: OfModel = None,
    batch: OfBatch = None,
    url: Url = None,
    key: Key = None,
    config: ConfigFiles = None,
) -> None:
    """Run failed, expired or cancelled jobs once more: the same jobs, with their ids and idempotency keys.

    With --all, every failed job, or those that --status, --model and --batch select. A job whose error was sent to a
    queue sends a second message then, with the same job_id.

    [bold]Examples[/bold]

    modalkit jobs retry 019a6b5e-8c3f-7a41-9d52-0f6f3d1c2b7a

    modalkit jobs retry --all --status failed --status expired --url http://127.0.0.1:8000
    """
    if bool(job_ids) == everything:
        raise typer.BadParameter("give the ids of jobs, or --all for every failed job, and not both")
    if job_ids and (status or model or batch):
        raise typer.BadParameter("--status, --model and --batch select from --all; leave them out, or the ids")
    with _jobs(url, key, config).opened() as client:
        if job_ids:
            count = _each(client, job_ids, "/retry")
        else:
            parameters = {"status": status, "model_name": model, "batch_id": batch}
            count = client.ask(Retried, "POST", "/retry", parameters=parameters).retried
    done = f"{count} job{' runs' if count == 1 else 's run'} once more, {client.sent_when}."
    _report(count, job_ids, done, "There are no such jobs.")


@app.command()
def purge(
    status: Statuses = None,
    delivery: Deliveries = None,
    model: OfModel = None,
    batch: OfBatch = None,
    older_than: Annotated[
        int | None,
        typer.Option(parser=seconds_of, metavar="DURATION", help="Only jobs that ended so long ago: 90s, 15m, 2h, 7d."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    key: Key = None,
    config: ConfigFiles = None,
) -> None:
    """Remove jobs that have ended, with their results, for good.

    Undelivered results are removed too, those about to be sent are not.

    [bold]Examples[/bold]

    modalkit jobs purge --status failed --older-than 7d

    modalkit jobs purge --delivery undelivered --url http://127.0.0.1:8000 --yes
    """
    if not status and not delivery and batch is None and older_than is None:
        raise typer.BadParameter("say which jobs to remove: by --status, --delivery, --batch or --older-than")
    if active := [state for state in status or () if not state.has_ended]:
        raise typer.BadParameter(
            f"only jobs that have ended are removed, {active[0]} ones are not", param_hint="--status"
        )
    if DeliveryStatus.PENDING in (delivery or ()):
        raise typer.BadParameter("results that are about to be sent are not removed", param_hint="--delivery")
    client = _jobs(url, key, config)
    if not yes:
        _confirm(status, delivery, model, batch, older_than, client.name)
    parameters = {"status": status, "delivery": delivery, "model_name": model, "batch_id": batch}
    with client.opened():
        purged = client.ask(Purged, "DELETE", parameters=parameters | {"older_than": older_than}).purged
    typer.echo(f"Removed {purged} job{'' if purged == 1 else 's'}.")


def _confirm(
    statuses: Statuses,
    deliveries: Deliveries,
    model_name: str | None,
    batch_id: str | None,
    older_than_s: int | None,
    where: str,
) -> None:
    """Ask whether to remove these jobs. Raises `typer.Abort` for a no."""
    if not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to ask at: give --yes to remove the jobs unasked")
    parts = [f"in the state {' or '.join(statuses)}"] if statuses else []
    if deliveries:
        parts.append(f"with the delivery {' or '.join(deliveries)}")
    if model_name is not None:
        parts.append(f"of the model {model_name}")
    if batch_id is not None:
        parts.append(f"of the batch of jobs {batch_id}")
    if older_than_s is not None:
        parts.append(f"that ended more than {duration_text(older_than_s)} ago")
    typer.confirm(f"Remove from {where} all ended jobs {', '.join(parts)}?", abort=True, err=True)


def _jobs(url: httpx.URL | None, key: str | None, config: ConfigFiles) -> JobsClient:
    """A client of the service, or of the configured file; it is not entered yet."""
    settings = Settings.load(config).app_settings
    if url is not None:
        return JobsClient.of_service(url, key, settings.auth_config.auth_header)
    if settings.async_config.store == "memory":
        raise typer.BadParameter(
            "the service keeps its jobs in its memory (async_config.store: memory), so ask it: give its address, as in "
            "--url http://127.0.0.1:8000"
        )
    return JobsClient.of_file(settings.async_config.store_path)


def _distinct(job_ids: Sequence[str]) -> list[str]:
    if "" in job_ids:
        raise typer.BadParameter("it must not be empty", param_hint="JOB_ID")
    return list(dict.fromkeys(job_ids))


def _print_json(jobs: Sequence[JobView]) -> None:
    # As bytes: JSON is UTF-8, whatever the encoding of standard output.
    if jobs:
        typer.echo(b"\n".join(job.model_dump_json().encode() for job in jobs))


def _ask_about(client: JobsClient, job_id: str, method: str, path: str = "") -> JobDetails | None:
    """The answer for one job; None, with a message, if it is refused."""
    try:
        return client.ask(JobDetails, method, path, job_id=job_id)
    except JobRefusedError as error:
        notices.print(f"modalkit: error: {error}")
        return None


def _each(client: JobsClient, job_ids: Sequence[str], path: str) -> int:
    """Send a request for each of these jobs; returns how many were accepted."""
    return sum(_ask_about(client, job_id, "POST", path) is not None for job_id in _distinct(job_ids))


def _report(count: int, job_ids: Sequence[str] | None, done: str, nothing: str) -> None:
    """Print what was `done` to `count` jobs. Raises `typer.Exit` where that was not all that were named."""
    if count or not job_ids:
        typer.echo(done if count else nothing)
    if count < len(set(job_ids or ())):
        raise typer.Exit(EXIT_FAILURE)


def job_table(jobs: Sequence[JobView], width: int) -> Table:
    """A table of jobs for terminals of 80 columns or more. A job with an error takes two lines."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("job", min_width=ID_WIDTH)
    table.add_column("status", no_wrap=True)
    table.add_column("delivery", no_wrap=True)
    table.add_column("model", max_width=max(MIN_MODEL_WIDTH, width - OTHER_COLUMNS_WIDTH))
    table.add_column("age", no_wrap=True, justify="right")
    now = datetime.now(UTC)
    for job in jobs:
        undelivered = job.delivery is DeliveryStatus.UNDELIVERED
        error = (undelivered and job.delivery_error) or job.error or job.delivery_error
        lines = [Text(job.job_id, overflow="fold")]
        if error:
            lines.append(Text(f"  {_without_secrets(_one_line(error))}", "dim", no_wrap=True, overflow="ellipsis"))
        model = Text(_one_line(job.model_name), no_wrap=True, overflow="ellipsis")
        table.add_row(Group(*lines), job.status, job.delivery, model, _age(now - job.created_at))
    return table


def job_text(job: JobView) -> str:
    """All fields of a job, one a line; JSON is indented over several lines."""
    fields = {name: getattr(job, name) for name in type(job).model_fields}
    width = max(map(len, fields)) + 2
    return "\n".join(f"{name:<{width}}{_value_text(value, width)}" for name, value in fields.items())


def duration_text(seconds: int) -> str:
    """The shortest text of which `seconds_of` returns `seconds`."""
    unit, unit_s = next(item for item in UNITS_S.items() if seconds % item[1] == 0)
    return f"{seconds // unit_s}{unit}"


def _value_text(value: Any, indentation: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict | list):
        value = to_json(value, indent=2).decode().replace("\n", "\n" + " " * indentation)
    return "\n".join(_printable(line) for line in str(value).splitlines())


def _age(elapsed: timedelta) -> str:
    """The time in its largest whole unit; 0s where this machine's clock is behind that of the service."""
    seconds = max(0, int(elapsed.total_seconds()))
    unit, unit_s = next((item for item in UNITS_S.items() if seconds >= item[1]), ("s", 1))
    return f"{seconds // unit_s}{unit}"


def _one_line(text: str) -> str:
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    """The text without control characters, which a caller may have sent and an error may quote."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _without_secrets(text: str) -> str:
    """The text with each URL cut to scheme and host: URLs of webhooks may hold secrets."""
    return _URL.sub(lambda url: url[1] + url[2] + ("/…" if url[3] else ""), text)
