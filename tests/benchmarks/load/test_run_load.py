"""Loads on a real server, from real processes."""

import gc
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from modalkit.benchmarks.load import BenchError, Endpoint, Load, Measured, processes, run_load
from modalkit.benchmarks.load.capacity import instant_server
from modalkit.benchmarks.load.client import HttpTarget
from modalkit.benchmarks.load.figures import measured_of
from modalkit.benchmarks.load.processes import is_steady
from modalkit.benchmarks.load.spawned import FILES_WITHOUT_LIMIT, raise_open_files, spawned
from modalkit.benchmarks.load.worker_process import GO, READY, STOP, Part, PartResult, run_part
from tests.support.guides import blocks, guide

ITEMS = [{"text": "a"}, {"text": "b"}, {"text": "c"}]


def load_on(url: str, **options: object) -> Measured:
    chosen = {"clients": 3, "requests": 12, "processes": 1, "timeout_s": 10, **options}
    return run_load(Endpoint(url), ITEMS, Load(**chosen))  # type: ignore[arg-type]  # of a test


def test_every_request_is_answered_and_counted(server: str) -> None:
    found = load_on(server + "/close")
    assert (found.answered, found.errors) == (12, {})
    assert len(found.latencies_s) == len(found.ended[0]) == 12
    assert 0 < found.p50_s <= found.p99_s <= found.latency_s(1)


def test_requests_that_end_before_this_process_has_its_next_turn_are_counted(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        """A pipe that says go and returns once there is an answer."""

        def __init__(self, pipe: Connection) -> None:
            self.fileno, self.recv, self.poll, self._pipe = pipe.fileno, pipe.recv, pipe.poll, pipe

        def send(self, message: object) -> None:
            self._pipe.send(message)
            if message == GO:
                self._pipe.poll(60)

    @contextmanager
    def slow(*arguments: Any) -> Iterator[list[Slow]]:
        with spawned(*arguments) as pipes:
            yield [Slow(pipe) for pipe in pipes]

    monkeypatch.setattr(processes, "spawned", slow)
    assert load_on(server + "/echo").answered == 12


def test_what_fails_is_counted_by_its_reason(server: str) -> None:
    found = load_on(server + "/503")
    assert (found.answered, found.errors) == (0, {"HTTP 503": 12})
    assert np.isnan(found.p99_s)


def test_an_open_loop_counts_from_when_a_request_was_due(server: str) -> None:
    found = load_on(server + "/echo", requests=30, rate_per_s=300, arrivals="bursty")
    assert found.answered == 30
    assert (found.latencies_s >= 0).all()


def test_a_rate_that_cannot_be_sent_ends_in_time_and_is_marked() -> None:
    load = Load(rate_per_s=1e6, arrivals="constant", seconds=0.2, warm_up_s=0, timeout_s=1, processes=1)
    with instant_server() as url:
        found = run_load(Endpoint(url), ITEMS, load)
    assert found.limited[0].startswith("requests were sent up to")


def test_requests_that_wait_for_a_connection_at_the_end_are_given_up_at_once(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "END_S", 4.0)
    load = Load(rate_per_s=1e6, arrivals="constant", seconds=1.5, warm_up_s=0, timeout_s=1, max_connections=2)
    found = run_load(Endpoint(f"{server}/hang"), ITEMS, load)
    assert found.answered == 0
    assert found.errors["no answer 1 s after the end"] > 1000


def test_the_processes_share_the_requests_and_the_clients(server: str) -> None:
    found = load_on(server + "/echo", processes=2, requests=7)
    assert (found.answered, found.processes) == (7, 2)


def test_a_short_limit_for_answers_leaves_the_processes_time_to_end(server: str) -> None:
    found = load_on(server + "/hang", requests=None, seconds=0.2, warm_up_s=0, timeout_s=0.001)
    assert found.answered == 0
    assert set(found.errors) <= {"no answer within 0.001 s", "no connection within 0.001 s"}


def test_requests_that_are_never_answered_fail_also_where_that_shows_after_the_end(server: str) -> None:
    found = load_on(server + "/hang", requests=None, seconds=1, warm_up_s=0, timeout_s=2)
    assert found.errors == {"no answer within 2 s": 3}


def test_a_load_of_some_seconds_leaves_out_the_warm_up(server: str) -> None:
    found = load_on(server + "/echo", requests=None, seconds=0.3, warm_up_s=0.1)
    assert found.answered > 0
    assert found.ended[0].min() >= 0
    assert 0.3 <= found.elapsed_s < 5


def test_labels_show_a_server_that_answers_wrong(server: str) -> None:
    load = Load(clients=2, requests=6, processes=1)
    found = run_load(Endpoint(f"{server}/echo", answer="text"), ITEMS, load, labels=["A", "b", "other"])
    assert found.accuracy == pytest.approx(2 / 3)


def test_items_that_fail_in_a_list_are_no_answers(server: str) -> None:
    endpoint = Endpoint(f"{server}/echo", {"$each": "$item"}, list_length=3, error_mark=b'"b"')
    found = run_load(endpoint, ITEMS, Load(clients=1, requests=2, processes=1))
    assert (found.answered, found.errors) == (4, {"an error in place of the result": 2})
    assert found.requests_per_s * found.elapsed_s == pytest.approx(2)


def test_all_items_of_a_list_fail_with_its_request(server: str) -> None:
    endpoint = Endpoint(f"{server}/503", {"$each": "$item"}, list_length=3)
    assert run_load(endpoint, ITEMS, Load(clients=1, requests=2, processes=1)).errors == {"HTTP 503": 6}


def test_an_address_without_a_server_is_no_measurement() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(BenchError, match="ConnectionRefusedError"):
        load_on(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(("limit", "answered"), [("-Sn", True), ("-n", False)])
def test_clients_beyond_the_limit_of_open_files_are_no_fault_of_the_server(limit: str, answered: bool) -> None:
    program = (
        "from modalkit.benchmarks.load import *\n"
        "found = own_capacity(Endpoint('http://h'), [{}], clients=100, seconds=0.3)\n"
        "print(len(found.errors), *found.limited)\n"
    )
    command = ["bash", "-c", f'ulimit {limit} 60 && exec "$0" -c "$1"', sys.executable, program]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if answered:
        assert said.startswith("0"), "the limit that it may raise is raised"
    else:
        assert said.endswith("the load generator may open no more connections: Too many open files")


@pytest.mark.parametrize(("soft", "most"), [(256, FILES_WITHOUT_LIMIT), (50_000, 50_000)])
def test_files_may_be_opened_where_the_system_names_no_limit(
    monkeypatch: pytest.MonkeyPatch, soft: int, most: int
) -> None:
    limits = [(soft, resource.RLIM_INFINITY)]

    def set_limits(_: int, wanted: tuple[int, int]) -> None:
        if wanted[0] == resource.RLIM_INFINITY:
            raise ValueError("current limit exceeds maximum limit")  # as macOS does
        limits.append(wanted)

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", set_limits)
    raise_open_files()
    assert limits[-1] == (most, resource.RLIM_INFINITY)


def test_garbage_is_collected_before_the_load_and_not_in_its_time(server: str) -> None:
    class Pipe:
        """What the parent says, and how many objects were frozen when the process was ready."""

        def __init__(self, part: Part) -> None:
            self._words = SimpleQueue[object]()
            self._words.put(part)
            self.frozen = 0

        def recv(self) -> object:
            return self._words.get()

        def send(self, message: object) -> None:
            if message == READY:
                self.frozen = gc.get_freeze_count()
                self._words.put(GO)
            elif isinstance(message, PartResult):
                self._words.put(STOP)

    endpoint = Endpoint(server + "/echo")
    target = HttpTarget(url=endpoint.url, requests=endpoint.requests(ITEMS))
    pipe = Pipe(Part(target, Load(clients=1, requests=1)))
    gc.unfreeze()
    try:
        run_part(pipe)  # type: ignore[arg-type]  # as far as it is used
    finally:
        gc.unfreeze()
    assert pipe.frozen > 0


def test_each_client_has_a_connection(server: str) -> None:
    found = load_on(server + "/together", clients=5, requests=5, max_connections=2)
    assert (found.answered, found.errors) == (5, {})


def test_a_load_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(BenchError, match="seconds must be above 0"):
        Load(seconds=0)


def test_a_script_without_a_main_guard_can_use_it(server: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from modalkit.benchmarks.load import *\n"
        f"print(run_load(Endpoint({server + '/echo'!r}), [{{}}], Load(requests=3, processes=1)).answered)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


def test_the_processes_end_with_the_one_that_started_them(server: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom modalkit.benchmarks.load import *\n"
        "def tell(*_):\n    print(os.getpid(), flush=True)\n"
        f"run_load(Endpoint({server + '/echo'!r}), [{{}}], Load(clients=1, seconds=600), on_progress=tell)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            process.kill()
            pytest.skip("this system does not list the children of a process")
        (child,) = map(int, children.read_text().split())
        process.send_signal(signal.SIGKILL)
        process.wait()
    with open(os.pidfd_open(child)) as ended:  # noqa: PTH123  # a number, no path
        import select

        assert select.select([ended], [], [], 60)[0], "the process still runs"


def result(
    due_s: list[float], ended_s: list[float], answered: list[int], reasons: list[str] | None = None
) -> PartResult:
    times_s = np.array([due_s, due_s, ended_s])
    return PartResult(times_s, np.array(answered), reasons or [], 0.1)


def test_figures_are_of_the_measured_time() -> None:
    part = result([0.0, 1.0, 1.5, 2.9], [0.9, 1.4, 1.9, 3.4], [1, 1, -1, 1], ["HTTP 500"])
    found = measured_of([part], Load(), begin_s=1.0, end_s=3.0)
    assert (found.answered, found.items_per_s, found.errors) == (1, 0.5, {"HTTP 500": 1})
    assert found.latencies_s.tolist() == pytest.approx([0.4])
    open_loop = measured_of([part], Load(rate_per_s=1), begin_s=1.0, end_s=3.0)
    assert open_loop.latencies_s.tolist() == pytest.approx([0.4, 0.5]), "what was due counts, even if it ended later"
    late = measured_of(
        [result([0.0, 1.0, 2.9], [1.5, 2.5, 3.4], [2, 2, 2])], Load(rate_per_s=1), begin_s=1.0, end_s=3.0
    )
    assert late.ended.T.tolist() == [pytest.approx([0.5, 1.5, 2]), pytest.approx([1.5, 1.5, 2])], "what ended, in time"


@pytest.mark.parametrize(("rate", "name"), [(0.5, "0.5"), (12.345, "12.3"), (1234.5, "1234"), (20_000, "20000")])
def test_a_load_is_named_by_its_rate(rate: float, name: str) -> None:
    assert str(Load(rate_per_s=rate)) == f"{name}/s poisson"


def test_a_generator_that_is_late_or_busy_was_the_limit() -> None:
    times_s = np.array([[1.0, 2.0], [1.1, 2.1], [1.2, 2.2]])
    part = PartResult(times_s, np.array([1, 1]), [], 0.99)
    busy = measured_of([part], Load(), begin_s=0, end_s=3)
    late = measured_of([part], Load(rate_per_s=1), begin_s=0, end_s=3)
    assert busy.limited[0] == "a process of the load generator used 99% of a core"
    assert late.limited == ("requests were sent up to 100 ms late",), "it is busy while it waits, too"


def test_a_level_throughput_is_steady() -> None:
    level = [(0.25 * step, 25 * step) for step in range(60)]
    assert is_steady(level, warm_up_s=2)
    assert not is_steady(level, warm_up_s=12)
    assert not is_steady([(0.25 * step, step * step) for step in range(60)], warm_up_s=2)


def test_the_program_of_the_guide_runs(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks(guide("benchmarking.md"), "python")
    quick = program.replace("http://127.0.0.1:8000", server).replace("seconds=5", "requests=9")
    exec(compile(quick, "benchmarking.md", "exec"), {})  # noqa: S102  # our own guide
    assert capsys.readouterr().out.endswith("{} ()\n")
