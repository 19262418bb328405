"""What docs/streaming.md shows works as printed."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modalkit.service.settings import RequestConfig
from modalkit.service.streams import MAX_UNREAD_PIECES
from modalkit.service.web import lines, prediction_stream
from modalkit.service.web.events import HEARTBEAT_S
from modalkit.service.web.job_routes import MAX_WATCHED_JOBS
from tests.support import processes
from tests.support.command_line import serving
from tests.support.guides import ROOT, blocks, guide, section

GUIDE = guide("streaming.md")
FILES = {
    named[1]: block
    for block in blocks(GUIDE, "python") + blocks(GUIDE, "yaml")
    if (named := re.match(r"# (\w+\.(?:py|yaml))\n", block))
}


@pytest.fixture
def environment() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}


@pytest.fixture
def url(tmp_path: Path, environment: dict[str, str]) -> Iterator[str]:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    with serving(tmp_path, environment) as (_, client):
        yield str(client.base_url).rstrip("/")


@pytest.mark.parametrize("title", ["Many items", "Parts of a result"])
def test_the_commands_print_what_is_shown(tmp_path: Path, environment: dict[str, str], url: str, title: str) -> None:
    (command,), (shown,) = blocks(section(GUIDE, title), "bash"), blocks(section(GUIDE, title), "")
    done = subprocess.run(
        ["/bin/sh", "-c", command.replace("curl ", "curl -sS ", 1)],
        check=True,
        cwd=tmp_path,
        env={**environment, "url": url},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.stdout == shown


def test_the_programs_do_what_is_said(tmp_path: Path, environment: dict[str, str], url: str) -> None:
    (tmp_path / "items.ndjson").write_text('{"text": "one"}\n{"text": 2}\n' + '{"text": "three"}\n' * 20_000)

    def run(*arguments: str) -> list[str]:
        return processes.run(list(arguments), check=True, cwd=tmp_path, env=environment).stdout.splitlines()

    shouted = run("predict_file.py", url, "items.ndjson")
    assert shouted == ["ONE", "text: must be a text, a JSON string", *["THREE"] * 20_000]
    *_, last = run("watch.py", url, "so far so good")
    assert last == "result succeeded {'status': 'success', 'error': None, 'meta': {}, 'text': 'so far so good'}"


def test_the_limits_are_those_it_says() -> None:
    text = " ".join(GUIDE.split())
    for said in (
        f"{prediction_stream.MAX_ITEMS_IN_FLIGHT:,} items of a stream",
        f"A line may have {RequestConfig().max_line_bytes // 2**20} MiB",
        f"After {lines.MAX_UNREAD_BYTES // 2**20} MiB that you have not read",
        f"have {lines.MAX_UNREAD_BYTES_IN_ALL // 2**20} MiB together",
        f"after {HEARTBEAT_S:g} seconds without an event",
        f"more than {MAX_UNREAD_PIECES} pieces",
        f"up to {MAX_WATCHED_JOBS} jobs",
    ):
        assert said in text, said
