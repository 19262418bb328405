"""Torch's threads on a CPU are divided between the batches that run at once."""

import hashlib
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest
import torch

from modalkit.pipelines import memory
from modalkit.pipelines.cpu_threads import (
    MAX_IN_FLIGHT,
    MAX_PAUSE,
    MIN_PAUSE,
    MOVE_AFTER,
    CpuThreads,
    cpu_threads,
    waited_s,
)
from modalkit.pipelines.sentiment import SentimentPipeline, SentimentRequest, SentimentResponse
from modalkit.service.settings import Settings
from modalkit.service.worker import InferenceWorker


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = cpu_threads().total
    cpu_threads().set_total(4)
    yield
    cpu_threads().set_total(before)


def test_a_forked_process_shares_threads_too() -> None:
    cpu_threads().share(cpu_threads().total + 1)  # the thread that sets numbers back runs here; it is not in the fork
    torch.set_num_threads(cpu_threads().total)
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which is what is tested
        process = context.Process(target=share_and_exit, daemon=True)
        process.start()
    process.join(60)
    assert process.exitcode == 0


def share_and_exit() -> None:
    torch.set_num_threads(2)
    cpu_threads().set_total(2)
    cpu_threads().share(2)
    os._exit(torch.get_num_threads() - 1)


def threads_in_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as new:
        return new.submit(torch.get_num_threads).result()


@pytest.mark.usefixtures("four_threads")
def test_only_the_thread_of_lone_batches_has_all_threads() -> None:
    machine = Machine(1.5)
    threads = machine.threads
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        while first.submit(machine.run).result() != 4:
            pass
        assert second.submit(part_of, threads, 1).result() == 2
        assert second.submit(part_of, threads, 4).result() == 1
        assert first.submit(part_of, threads, 1).result() == 4
        parts = [second.submit(part_of, threads, 1).result() for _ in range(MOVE_AFTER)]
        assert parts == [2] * (MOVE_AFTER - 1) + [4]  # the first one computes no lone batches any more
        assert first.submit(part_of, threads, 1).result() == 2
    with ThreadPoolExecutor(1) as next_one:  # in place of one that has ended
        assert next_one.submit(part_of, threads, 1).result() == 4


class Machine:
    """Computes lone batches of two engines, in no real time; with one thread they take `ratio` times as long."""

    def __init__(self, ratio: float) -> None:
        self.ratio, self.scale = ratio, 1.0
        self.now_s = self.best_s = 0.0
        self._random = random.Random(1)
        self.threads = CpuThreads(lambda: self.now_s)

    def run(self) -> int:
        """Compute a lone batch. Returns its threads."""
        engine, size = self._random.choice([(1, 1.0), (2, 30.0)]), self._random.randint(10, 300)
        part = part_of(self.threads, 1)
        with self.threads.timed(engine[0], {"ids": torch.empty(size)}):
            seconds = self.scale * engine[1] * (20 + size) * self._random.lognormvariate(0, 0.2)
            self.now_s += seconds * (self.ratio if part == 1 else 1)
            self.best_s += seconds * min(1, self.ratio)
        return part

    def parts(self, count: int) -> list[int]:
        """The threads of some lone batches in one thread."""
        with ThreadPoolExecutor(1) as batch:
            return [batch.submit(self.run).result() for _ in range(count)]


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("ratio", "part"), [(1.5, 4), (1.25, 4), (0.95, 1), (0.5, 1), (0.01, 1)])
def test_lone_batches_have_the_threads_with_which_they_take_less_time(ratio: float, part: int) -> None:
    machine = Machine(ratio)
    machine.parts(200)
    parts = machine.parts(4000)
    assert parts.count(part) > 0.85 * len(parts)


@pytest.mark.usefixtures("four_threads")
def test_lone_batches_get_a_part_of_the_threads_at_once_where_all_of_them_take_longer() -> None:
    machine = Machine(1.5)
    machine.parts(200)
    while machine.parts(1) != [4]:
        pass
    machine.ratio, machine.scale = 0.02, 50  # another process needs the cores
    assert machine.parts(10).count(4) < 3
    machine.ratio, machine.scale = 1.5, 1.0  # it has ended
    assert machine.parts(MAX_PAUSE + 1000).count(4) > 0.8 * 1000


@pytest.mark.usefixtures("four_threads")
def test_trials_of_all_threads_lose_little_where_a_batch_takes_a_hundred_times_as_long() -> None:
    machine = Machine(0.01)
    machine.parts(4000)
    took_s = machine.now_s
    machine.parts(40_000)
    best_s, took_s = machine.best_s * 10 / 11, machine.now_s - took_s
    assert best_s < took_s < 1.05 * best_s


@pytest.mark.usefixtures("four_threads")
def test_batches_that_did_not_begin_alone_say_nothing() -> None:
    now_s = 0.0
    threads = CpuThreads(lambda: now_s)

    def run() -> int:
        nonlocal now_s
        part = part_of(threads, 1)
        threads.share(2)
        with threads.timed(1, {"ids": torch.empty(1)}):
            now_s += 1
        return part

    with ThreadPoolExecutor(1) as batch:
        assert {batch.submit(run).result() for _ in range(10 * MIN_PAUSE)} == {1}  # no trial


def part_of(threads: CpuThreads, in_flight: int) -> int:
    threads.share(in_flight)
    return torch.get_num_threads()


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("in_flight", "part"), [(1, 1), (2, 2), (3, 1), (4, 1), (9, 1)])
def test_a_thread_has_its_part_and_all_others_have_what_they_had(in_flight: int, part: int) -> None:
    threads = CpuThreads()
    with ThreadPoolExecutor(1) as batch:
        batch.submit(threads.share, in_flight).result()
        assert batch.submit(torch.get_num_threads).result() == part
        assert torch.get_num_threads() == 4
        assert threads_in_a_new_thread() == 4


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(
    ("files", "total"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1600000 100000\n"}, 4),
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({}, 4),
        ({"system.slice/a.service/cpu.max": "50000 100000\n", "system.slice/cpu.max": "max 100000\n"}, 1),
        ({"system.slice/a.service/cpu.max": "max 100000\n", "system.slice/cpu.max": "300000 100000\n"}, 3),
        ({"system.slice/b.service/cpu.max": "100000 100000\n"}, 4),
    ],
)
def test_there_are_no_more_threads_than_a_container_or_a_service_may_use_cores(
    files: dict[str, str], total: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text("1:cpu:/other\n0::/system.slice/a.service\n")
    monkeypatch.setattr(memory, "OWN_GROUP", tmp_path / "own")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    threads = CpuThreads()
    threads.limit_to_quota(tmp_path)
    assert (threads.total, torch.get_num_threads(), threads_in_a_new_thread()) == (total,) * 3


def test_models_that_load_at_once_share_the_threads() -> None:
    program = (
        "import sys, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from modalkit.pipelines.cpu_threads import cpu_threads\n"
        "sys.setswitchinterval(1e-6)\n"
        "all_of_them = threading.Barrier(8)\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    asked = pool.map(lambda _: (all_of_them.wait(), cpu_threads())[1], range(8))\n"
        "print(len(set(asked)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(("total", "in_flight"), [(1, 1), (2, 2), (64, MAX_IN_FLIGHT)])
def test_no_batch_is_without_a_thread_and_there_are_not_too_many(total: int, in_flight: int) -> None:
    before = cpu_threads().total
    try:
        cpu_threads().set_total(total)
        assert cpu_threads().max_in_flight == in_flight
    finally:
        cpu_threads().set_total(before)


@pytest.mark.anyio
@pytest.mark.usefixtures("four_threads")
async def test_the_bundled_model_gives_each_caller_its_own_result_with_batches_at_once(
    bundled: SentimentPipeline,
) -> None:
    texts = [f"{word} {number}" for number in range(20) for word in ("wonderful", "awful")]
    items = [SentimentRequest(text=text) for text in texts]
    expected = [bundled.run_inference([item])[0] for item in items]
    settings = Settings(app_settings={"batch_config": {"max_batch_size": 4, "calibration": {"enabled": False}}})
    outputs: dict[int, object] = {}

    worker = InferenceWorker(bundled, settings=settings, owns_pipeline=False)
    async with worker, anyio.create_task_group() as task_group:

        async def predict(number: int) -> None:
            outputs[number] = await worker.predict(items[number])

        for number in range(len(items)):
            task_group.start_soon(predict, number)
    for number, wanted in enumerate(expected):
        found = outputs[number]
        assert isinstance(found, SentimentResponse)
        assert isinstance(wanted, SentimentResponse)
        assert found.sentiment == wanted.sentiment
        assert found.confidence == pytest.approx(wanted.confidence, abs=1e-4)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs two threads on one core: Linux only")
def test_threads_that_share_a_core_wait_for_it() -> None:
    core = {min(os.sched_getaffinity(0))}
    both = threading.Barrier(2)
    data = bytes(50_000_000)

    def compute() -> float:
        os.sched_setaffinity(0, core)  # of this thread
        both.wait()
        waited_before_s = waited_s()
        hashlib.sha256(data)  # without the lock of the interpreter
        both.wait()
        return waited_s() - waited_before_s

    with ThreadPoolExecutor(2) as pool:
        waits_s = [task.result() for task in [pool.submit(compute), pool.submit(compute)]]
    assert all(wait_s > 0 for wait_s in waits_s)
