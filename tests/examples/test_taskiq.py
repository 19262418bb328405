"""The programs of docs/taskiq-integration.md work, and are quoted there as they are."""

import importlib
import json
import re
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from redis.asyncio import Redis

from modalkit.benchmarks.redis_server import RedisServer
from tests.support import processes
from tests.support.command_line import serving
from tests.support.taskiq_worker import TaskiqWorker

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "taskiq"
GUIDE = (ROOT / "docs" / "taskiq-integration.md").read_text()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the example."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "example"))


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer(append_only=True) as started:
        yield started


@pytest.fixture
def environment(server: RedisServer) -> dict[str, str]:
    return {
        "REDIS_URL": server.url,
        "MODALKIT_APP_SETTINGS__QUEUE_CONFIG__BROKER_URL": server.url,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Any]:
    async with Redis.from_url(server.url, decode_responses=True) as client:
        yield client


async def until(redis: Any, key: str, **expected: Any) -> dict[str, str]:
    """Wait until a hash has these fields."""
    with anyio.fail_after(60):
        while True:
            found: dict[str, str] = await redis.hgetall(key)
            if expected.items() <= found.items():
                return found
            await anyio.sleep(0.02)


def submission(text: str) -> dict[str, Any]:
    queues = {"success_queue": "word_counts", "failure_queue": "word_count_errors"}
    return {"message": {"text": text}, **queues, "meta": {"user_id": "ann"}}


async def test_results_and_errors_reach_their_tasks_through_the_service(
    folder: Path, environment: dict[str, str], redis: Any
) -> None:
    with serving(folder, environment) as (_, client):
        answers = [client.post("/async/predict", json=submission(text)) for text in ("one two three", "four", "")]
        assert [answer.status_code for answer in answers] == [202] * 3
        with TaskiqWorker("tasks:broker", folder=folder, env=environment, log=folder / "log"):
            await until(redis, "words_by_user", ann="4")
            await until(redis, "errors_by_job", **{answers[2].json()["job_id"]: "there are no words in this text"})
        refused = client.post("/async/predict", json=submission("x") | {"success_queue": "no_such_task"})
        assert refused.status_code in (400, 403, 422)


async def test_a_program_sends_its_results_to_the_same_tasks(
    folder: Path, environment: dict[str, str], redis: Any
) -> None:
    command = ["in_code.py", "one two three"]
    await anyio.to_thread.run_sync(lambda: processes.run(command, check=True, cwd=folder, env=environment))
    with TaskiqWorker("tasks:broker", folder=folder, env=environment, log=folder / "log"):
        await until(redis, "words_by_user", unknown="3")


async def test_what_fails_is_retried_and_then_kept(folder: Path, environment: dict[str, str], redis: Any) -> None:
    log, scheduler_log = folder / "log", folder / "scheduler.log"
    scheduler = TaskiqWorker(
        *("tasks:scheduler", "--update-interval", "1"),
        folder=folder,
        env=environment,
        log=scheduler_log,
        command="scheduler",
    )
    command = ["in_code.py", "word " * 1001]
    await anyio.to_thread.run_sync(lambda: processes.run(command, check=True, cwd=folder, env=environment))
    with TaskiqWorker("tasks:broker", folder=folder, env=environment, log=log), scheduler:
        with anyio.fail_after(60):
            while not (letters := await redis.xrange("dead_letters")):
                await anyio.sleep(0.02)
    [(_, letter)] = letters
    assert letter["error"] == "ValueError('1001 words are too many for us')"
    assert json.loads(letter["message"])["result"]["words"] == 1001
    assert log.read_text().count("ValueError: 1001 words are too many for us") == 3
    assert await redis.keys("handled:*") == []


async def test_a_message_that_comes_twice_counts_once(folder: Path, environment: dict[str, str], redis: Any) -> None:
    command = ["in_code.py", "one two three"]
    await anyio.to_thread.run_sync(lambda: processes.run(command, check=True, cwd=folder, env=environment))
    [(_, fields)] = await redis.xrange("modalkit:word_counts")
    await redis.xadd("modalkit:word_counts", fields)
    with TaskiqWorker("tasks:broker", folder=folder, env=environment, log=folder / "log"):
        with anyio.fail_after(60):
            while True:
                [group] = await redis.xinfo_groups("modalkit:word_counts") or [{}]
                last = (await redis.xinfo_stream("modalkit:word_counts"))["last-generated-id"]
                if group and group["pending"] == 0 and group["last-delivered-id"] == last:
                    break
                await anyio.sleep(0.02)
    assert await redis.hgetall("words_by_user") == {"unknown": "3"}


KILLED_WORKER = """
import asyncio, sys
from once import once
from redis.asyncio import Redis

async def main():
    async with once(Redis.from_url(sys.argv[1]), sys.argv[2]):
        print("runs", flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


async def test_a_message_that_a_dead_worker_had_waits_and_is_handled_once(
    folder: Path, environment: dict[str, str], redis: Any, server: RedisServer
) -> None:
    command = ["in_code.py", "one two three"]
    await anyio.to_thread.run_sync(lambda: processes.run(command, check=True, cwd=folder, env=environment))
    [(_, fields)] = await redis.xrange("modalkit:word_counts")
    await redis.xadd("modalkit:word_counts", fields)
    job_id = json.loads(json.loads(fields["data"])["args"][0])["job_id"]
    command = [sys.executable, "-c", KILLED_WORKER, server.url, job_id]
    async with await anyio.open_process(command, cwd=folder, env=environment, stderr=None) as process:
        assert process.stdout is not None
        with anyio.fail_after(60):
            assert await process.stdout.receive() == b"runs\n"
        process.kill()
    with TaskiqWorker("tasks:broker", folder=folder, env=environment, log=folder / "log"):
        with anyio.fail_after(60):
            while not (groups := await redis.xinfo_groups("modalkit:word_counts")) or groups[0]["pending"] < 2:
                await anyio.sleep(0.02)
        for key in await redis.keys(f"*:{job_id}"):
            assert 0 < await redis.pttl(key) <= 30_000  # it would not take longer
            await redis.pexpire(key, 500)
        await until(redis, "words_by_user", unknown="3")
        with anyio.fail_after(60):
            while (await redis.xinfo_groups("modalkit:word_counts"))[0]["pending"]:
                await anyio.sleep(0.02)
    assert await redis.hgetall("words_by_user") == {"unknown": "3"}
    assert await redis.xlen("dead_letters") == 0


async def test_a_running_task_keeps_others_from_its_job(redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    module = importlib.import_module("once")
    monkeypatch.delitem(sys.modules, "once")
    monkeypatch.setattr(module, "LOCKED_S", 0.6)
    once = module.once
    first_of: list[bool] = []

    async def handle() -> None:
        async with once(redis, "job") as first:
            first_of.append(first)

    async with anyio.create_task_group() as task_group:
        async with once(redis, "job"):
            task_group.start_soon(handle)
            renewals, before = 0, 600
            with anyio.fail_after(30):
                while renewals < 4:  # longer than the lock holds by itself
                    left = await redis.pttl("running:job")
                    renewals += left > before
                    before = left
                    await anyio.sleep(0.01)
            assert first_of == []
    assert first_of == [False]


def test_the_guide_quotes_the_programs_as_they_are() -> None:
    quoted = dict(
        re.findall(r"^```(?:python|yaml)\n# examples/taskiq/(\S+)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    )
    files = {path.name: path.read_text() for path in EXAMPLE.iterdir() if path.suffix in (".py", ".yaml")}
    assert quoted == files
