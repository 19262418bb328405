"""``modalkit bench`` on real services, from the load to the page."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.main import get_command

from modalkit.benchmarks.bench import cli
from modalkit.benchmarks.bench.assemble import Options, as_settings
from modalkit.benchmarks.bench.cli import app
from modalkit.benchmarks.bench.results import Cell, Results
from modalkit.benchmarks.bench.session import OnRun
from modalkit.benchmarks.load import BenchError
from tests.benchmarks.bench.conftest import MEASURE_ITSELF, Bench, cell_of
from tests.support.command_line import CONFIGURATION, MODALKIT
from tests.support.guides import guide

ResultsOf = Callable[[], Any]


def test_a_service_is_measured_and_shown(bench: Bench, service: str, results: ResultsOf, folder: Path) -> None:
    older = Results(target="", settings={}, cells=[cell_of("2 clients", {}, items_per_s=1e9)])
    (folder / "old.json").write_text(json.dumps(older.document()))
    done = bench(
        *(MEASURE_ITSELF, service, "--key", "secret", "--repeats", "2", "--price-per-hour", "0.5"),
        *("--length-mix", "4:3,9:1"),
        *("--compare", "old.json"),
    )
    assert "2 clients" in done.output
    assert "sync, 2 clients: items_per_s is worse" in done.output
    assert done.exit_code == 1
    document = results()
    (cell,) = document["cells"]
    assert cell["answered"] > 0
    assert cell["errors"] == {}
    figures = cell["figures"]
    assert figures["items_per_s"]["low"] < figures["items_per_s"]["mean"] < figures["items_per_s"]["high"]
    assert figures["p50_ms"]["mean"] <= figures["p99_ms"]["mean"]
    assert cell["server"]["queue_s"] >= 0
    assert cell["server"]["rest_s"] >= 0
    assert sum(cell["server"]["batch_sizes"].values()) > 0
    assert cell["cost_per_million"] == pytest.approx(0.5 / 3600 / figures["items_per_s"]["mean"] * 1e6)
    assert document["own_capacity"]["requests_per_s"] > 0
    assert document["machine"]["cores"]
    assert "secret" not in json.dumps(document)
    page = (folder / "bench" / "results.html").read_text()
    assert page.count("<svg") >= 5
    assert not re.search(r'(src|href)="|url\(|@import', page), "the page needs another file"
    table = (folder / "bench" / "results.md").read_text()
    assert "| load | items/s | p50 ms |" in table
    assert "| **worse** |" in table


def test_a_stream_is_counted_by_its_items(bench: Bench, service: str, results: ResultsOf) -> None:
    bench(service, "--key", "secret", "--mode", "ndjson", "--list-length", "5", "--length-mix", "3")
    (cell,) = results()["cells"]
    assert cell["mode"] == "ndjson of 5"
    assert cell["answered"] > 0
    assert cell["answered"] % 5 == 0
    assert cell["server"]["rest_s"] is None, "several batches answer a request"


def test_items_that_fail_in_a_list_are_counted_and_told(
    bench: Bench, service: str, results: ResultsOf, folder: Path
) -> None:
    (folder / "some.jsonl").write_text('{"text": "good"}\n{"text": "poison"}\n{"text": "fine"}\n')
    done = bench(service, "--key", "secret", "--mode", "batch", "--list-length", "3", "-i", "some.jsonl")
    (cell,) = results()["cells"]
    assert cell["answered"] == 2 * cell["errors"]["an error in place of the result"] > 0
    assert "x an error in place of the result" in done.output


def test_settings_are_changed_while_a_service_runs_and_changed_back(
    bench: Bench, service: str, results: ResultsOf
) -> None:
    def limit() -> int:
        answer = httpx.get(f"{service}/admin/models/lengths", headers={"Authorization": "Bearer secret"})
        found: int = answer.json()["batch_config"]["max_batch_size"]
        return found

    before = limit()
    done = bench(service, "--key", "secret", "--sweep", "max_batch_size=1,4", "--mode", "batch", "--length-mix", "3")
    cells = results()["cells"]
    assert [cell["variant"] for cell in cells] == [{"max_batch_size": "1"}, {"max_batch_size": "4"}]
    assert cells[0]["server"]["mean_batch_size"] == 1
    assert "most items/s with max_batch_size" in done.output
    assert limit() == before


def test_a_request_that_is_refused_shows_the_answer(bench: Bench, service: str) -> None:
    done = bench(f"{service}/sync/predict", "--key", "secret", "--body", '{"txt": "$text"}')
    assert isinstance(done.exception, BenchError)
    assert "HTTP 422" in str(done.exception)
    assert "txt" in str(done.exception)


def test_settings_that_cannot_be_changed_say_why(bench: Bench, service: str) -> None:
    done = bench(service, "--key", "secret", "--sweep", "max_batch_size=-1")
    assert isinstance(done.exception, BenchError)
    assert "while it runs: HTTP 422: {" in str(done.exception)
    assert "max_batch_size" in str(done.exception)


def test_a_service_that_sends_results_elsewhere_is_refused_before_any_load(
    bench: Bench, service: str, folder: Path
) -> None:
    done = bench(service, "--key", "secret", "--mode", "async")
    assert isinstance(done.exception, BenchError)
    assert "does not send results of jobs to --queue: they stay in its memory; set its queue_config" in str(
        done.exception
    )
    assert not (folder / "bench").exists()


def test_an_open_loop_with_a_label_gives_rate_and_accuracy(
    bench: Bench, service: str, results: ResultsOf, folder: Path
) -> None:
    (folder / "labelled.csv").write_text("text,size\nfour,4\nthree,6\n")
    bench(service, "--key", "secret", "--rate", "40", "-i", "labelled.csv", "--label", "size", "--answer", "length")
    (cell,) = results()["cells"]
    assert (cell["open"], cell["rate_per_s"]) == (True, 40)
    assert 0 < cell["accuracy"] < 1


def test_each_run_of_an_open_loop_has_random_times_of_its_own(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: set[int] = set()

    @contextmanager
    def progress() -> Iterator[OnRun]:
        yield lambda _, load, *__: seeds.add(load.seed)

    monkeypatch.setattr(cli, "_progress", progress)
    assert bench("worker", "--rate", "20", "--repeats", "2", "--length-mix", "3").exit_code == 0
    assert seeds == {1, 2}


def test_an_answer_without_a_label_at_its_path_is_refused_before_any_load(
    bench: Bench, service: str, folder: Path
) -> None:
    (folder / "labelled.csv").write_text("text,size\nfour,4\n")
    done = bench(service, "--key", "secret", "-i", "labelled.csv", "--label", "size", "--answer", "data.length")
    assert isinstance(done.exception, BenchError)
    assert "--answer 'data.length' is the path of no label" in str(done.exception)
    assert '"length":4' in str(done.exception), "the answer is shown"


def test_a_search_that_is_interrupted_keeps_what_it_measured(
    bench: Bench, results: ResultsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = [cell_of("8 clients", {}, 100.0), cell_of("16 clients", {}, 200.0)]

    def measure(*_: object) -> Cell:
        if not measured:
            raise KeyboardInterrupt
        return measured.pop(0)

    monkeypatch.setattr(cli, "_measured", measure)
    assert bench("worker", "--p99-ms", "50", "--length-mix", "3").exit_code != 0
    assert [cell["load"] for cell in results()["cells"]] == ["8 clients", "16 clients"]


def test_older_results_of_other_loads_are_no_silent_pass(bench: Bench, folder: Path) -> None:
    older = Results(target="", settings={}, cells=[cell_of("3 clients", {}, items_per_s=1.0)])
    (folder / "old.json").write_text(json.dumps(older.document()))
    done = bench("worker", "--length-mix", "3", "--compare", "old.json")
    assert done.exit_code == 1
    assert "--compare old.json has none of these loads" in done.output


def test_items_that_all_fail_are_told_by_their_error(bench: Bench, folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"foo": 1}\n')
    done = bench("worker", "-i", "bad.jsonl")
    assert done.exit_code == 1
    assert "sync, 2 clients: nothing was answered: text: is missing" in done.output
    assert "--list-length" not in done.output


def test_a_throughput_that_is_not_steady_in_time_is_told(bench: Bench) -> None:
    told = "sync, 2 clients: the throughput was not steady within --seconds, in 1 of the runs."
    assert told in bench("worker", "--length-mix", "3", "--until-steady").output
    assert told not in bench("worker", "--length-mix", "3").output


def test_a_worker_is_measured_without_http(bench: Bench, results: ResultsOf) -> None:
    bench("worker", "--length-mix", "3,5")
    (cell,) = results()["cells"]
    assert cell["answered"] > 0
    assert cell["server"]["mean_batch_size"] >= 1
    assert 0 < cell["server"]["utilisation"] <= 1
    assert cell["limited"] == []


def test_what_bench_serves_leaves_the_jobs_of_the_service_alone(
    bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODALKIT_APP_SETTINGS__ASYNC_CONFIG__STORE_PATH", str(folder / "mine.db"))
    assert bench("serve", "--length-mix", "3").exit_code == 0
    assert not list(folder.glob("*.db")), "neither the store of the variable nor that of the file"


def test_what_bench_serves_listens_on_a_port_of_its_own_without_tls(bench: Bench, folder: Path) -> None:
    server_config = "  server_config: {unix_socket: mine.sock, tls_certificate: mine.pem, tls_key: key.pem}\n"
    (folder / "modalkit.yaml").write_text(CONFIGURATION.replace("app_settings:\n", f"app_settings:\n{server_config}"))
    assert bench("serve", "--length-mix", "3").exit_code == 0
    assert not (folder / "mine.sock").exists()


def test_no_proxy_of_the_environment_is_between_bench_and_the_server(
    bench: Bench, service: str, results: ResultsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    done = bench(service, "--key", "secret", "--sweep", "max_batch_size=4", "--samples")
    assert done.exit_code == 0, done.exception
    assert results()["cells"][0]["server"]["mean_batch_size"] >= 1, "its metrics were read"


HANGING = """
import threading
from tests.support.length_model import LengthPipeline

class Hanging(LengthPipeline):
    def __init__(self, *args, **entry):
        threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["serve", "-i", "items.txt"], "modalkit serve"),
        (["worker", "-i", "items.txt"], "the target"),
        (["worker", "--length-mix", "3"], "the model that makes items up"),
    ],
)
def test_a_model_that_hangs_in_its_start_is_given_up_in_time(
    bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], what: str
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (folder / "hanging.py").write_text(HANGING)
    (folder / "items.txt").write_text("one\n")
    (folder / "modalkit.yaml").write_text('model_settings: {model_entries: {h: {pipeline: "hanging:Hanging"}}}')
    done = bench(*arguments, "--start-timeout", "0.1")
    assert isinstance(done.exception, BenchError)
    assert f"{what} was not ready within 0.1 s" in str(done.exception)


LOGGING_PID = """
import os
from pathlib import Path
from tests.support.length_model import LengthPipeline

print("see http://10.0.0.1/1", flush=True)  # no address of the service

class LoggingPid(LengthPipeline):
    def warm_up(self):
        Path("pid").write_text(f"{os.getpid()}")
"""


def test_sigterm_stops_what_was_started(folder: Path) -> None:
    (folder / "logging_pid.py").write_text(LOGGING_PID)
    (folder / "items.txt").write_text("one\n")
    entry = 'model_settings: {model_entries: {l: {pipeline: "logging_pid:LoggingPid"}}}'
    (folder / "modalkit.yaml").write_text(entry)
    command = [sys.executable, *MODALKIT, "bench", "serve", "-i", "items.txt", "--seconds", "60", "--clients", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        while "The load generator itself" not in (line := running.stderr.readline()):
            assert line
        running.send_signal(signal.SIGTERM)
        running.stderr.read()
    assert running.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)


def test_a_model_that_the_service_cannot_load_is_told_at_once(bench: Bench, folder: Path) -> None:
    fails = '    fails: {pipeline: "tests.support.length_model:UnloadablePipeline"}\n'
    (folder / "modalkit.yaml").write_text(CONFIGURATION + fails)
    (folder / "items.txt").write_text("one\n")
    done = bench("serve", "--model", "fails", "-i", "items.txt")
    assert isinstance(done.exception, BenchError)
    assert "modalkit serve could not load fails: " in str(done.exception)
    assert "the weights are not there" in str(done.exception)


@pytest.mark.parametrize("queue", ["webhook", "redis"])
def test_jobs_are_followed_to_their_delivery(bench: Bench, results: ResultsOf, queue: str) -> None:
    bench("serve", "--mode", "async", "--queue", queue, "--list-length", "10", "--length-mix", "3")
    document = results()
    assert document["cold_start_s"]["as configured"] > 0
    (cell,) = document["cells"]
    delivery = cell["delivery"]
    assert delivery["accepted"] == delivery["delivered"] > 0
    assert (delivery["lost"], delivery["duplicates"]) == (0, 0)
    assert cell["figures"]["delivered_per_s"]["mean"] > 0
    assert cell["figures"]["delivery_p99_ms"]["mean"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["somewhere"], "is no target"),
        (["--as", "torchserve"], "--as 'torchserve'"),
        (["--mode", "telepathy"], "--mode 'telepathy'"),
        (["http://127.0.0.1:1", "--body", "{text}"], "--body is not JSON"),
        (["http://127.0.0.1:1/x", "--mode", "batch"], "this --body sends one item, not the 32 of a request"),
        (["http://127.0.0.1:1", "--body", '"$item"', "--list-length", "8"], "sends one item, not the 8"),
        (["http://127.0.0.1:1", "--header", "x"], "--header 'x': give NAME: VALUE"),
        (["http://127.0.0.1:1"], "the first request failed: ConnectError"),
        (["http://127.0.0.1:1", "--clients", "many"], "--clients 'many'"),
        (["http://127.0.0.1:1", "--sweep", "size"], "--sweep 'size'"),
        (["--sweep", "foo=1"], "'foo' is no setting; give one of device, engine, dtype, max_in_flight, "),
        (["http://127.0.0.1:1", "--sweep", "engine=onnx"], "'engine' is no setting; give one of max_batch_size, "),
        (["http://127.0.0.1:1", "--rate", "0"], "--rate '0': give numbers above 0"),
        (["http://127.0.0.1:1", "--arrivals", "burst"], "--arrivals: [Errno 2]"),
        (["worker", "--length-mix", "0:1"], "--length-mix '0:1'"),
        (["worker", "--label", "y"], "--label compares answers over HTTP"),
        (["--mode", "async", "--label", "y"], "--mode async gets none"),
        (["worker", "--tool", "wrk"], "--tool sends HTTP requests"),
        (["http://127.0.0.1:1", "--arrivals", "bursty"], "--arrivals bursty is of an open loop: give its --rate"),
        (["--capacity", "--rate", "5"], "leave out --rate"),
        (["--p99-ms", "5", "--arrivals", "t.txt"], "a search takes poisson, constant, bursty"),
        (
            ["--sweep", "engine=torch/float32", "--sweep", "dtype=bfloat16"],
            "--sweep sets engine, dtype, dtype: give all values of a setting in one --sweep",
        ),
        (["worker", "--mode", "batch"], "called with one item at a time"),
        (["modal:app/Model", "--mode", "async"], "called with one item at a time"),
        (["docker:image", "--mode", "async"], "no container is given the queue that bench reads. Start it with"),
        (["docker:image", "--sweep", "engine=onnx"], "needs --model"),
        (["--mode", "async", "--queue", "sqs"], "--queue 'sqs'"),
        (
            ["--mode", "async", "--queue", "redis://127.0.0.1:99999"],
            "Port out of range 0-65535; give the URL",
        ),
        (["modal:app"], "give modal:APP/CLASS"),
        (["docker:"], "is no target"),
        (["http://"], "names no server"),
        (["http://me:word@127.0.0.1:1"], "give a user and password by --header 'Authorization: Basic ...'"),
    ],
)
def test_what_cannot_be_measured_is_said_with_the_remedy(bench: Bench, arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert isinstance(done.exception, BenchError), done.exception
    assert message in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["worker", "--rate", "5", "--clients", "2"], "--clients is of closed loops"),
        (["worker", "--capacity", "--clients", "2"], "search the number of clients: leave out --clients"),
        (["worker", "--p99-ms", "5", "--clients", "2"], "search the number of clients: leave out --clients"),
        (["worker", "--capacity", "--arrivals", "bursty"], "leave out --arrivals, or give --p99-ms"),
        (["worker", "--list-length", "8"], "called with one item at a time"),
        (["worker", "--processes", "2"], "leave out --processes"),
        (["worker", "--queue", "redis"], "--queue is of --mode async"),
        (["worker", "--column", "text"], "--column and --format are of --input FILE"),
        (["worker", "--samples", "--length-mix", "3"], "leave one of them out"),
        (["worker", "-i", "modalkit.yaml", "--samples"], "--input gives the items"),
        (["worker", "-i", "modalkit.yaml", "--length-mix", "3"], "--input gives the items"),
        (["http://127.0.0.1:1", "--as", "tei", "--samples"], "--samples needs a model of this folder"),
        (["http://127.0.0.1:1", "--samples"], "publishes no schema for --samples"),
        (["http://127.0.0.1:1", "--as", "tei", "--body", "1"], "--body is for servers that --as does not know"),
        (["http://127.0.0.1:1", "--config", "modalkit.yaml"], "--config is of what bench starts from this folder"),
        (["docker:x", "--as", "tei", "--model", "m", "--sweep", "max_batch_size=1,2"], "and --as tei is none"),
        (["--tool", "wrk", "--sweep", "max_batch_size=1,2"], "--tool checks one setting at a time"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(bench: Bench, arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert isinstance(done.exception, BenchError), done.exception
    assert message in str(done.exception)


def test_a_trace_that_is_over_within_the_warm_up_is_refused(bench: Bench, folder: Path) -> None:
    (folder / "short.txt").write_text("0\n0.5\n")
    done = bench("worker", "--arrivals", "short.txt", "--warm-up", "1")
    assert "--arrivals short.txt: its 0.5 s are over within the warm-up" in str(done.exception)
    done = bench("worker", "--arrivals", "short.txt", "--rate", "4", "--warm-up", "1")
    assert "--arrivals 4/s short.txt: its 0.5 s are over" in str(done.exception)


def test_a_password_in_the_url_of_a_queue_is_in_no_result() -> None:
    for url, shown in {"redis://:word@h:1/0": "redis://h:1/0", "redis": "redis"}.items():
        given: dict[str, Any] = {field.name: None for field in fields(Options)} | {"queue": url}
        assert as_settings(Options(**given))["queue"] == shown


@pytest.mark.parametrize("option", ["--seconds", "--timeout", "--p99-ms", "--price-per-hour"])
@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf"])
def test_a_number_that_is_not_positive_is_refused(bench: Bench, option: str, value: str) -> None:
    done = bench("worker", option, value)
    assert done.exit_code == 2
    assert f"must be a number above 0, not {value}" in done.output


def test_the_command_is_found_by_its_entry_point(folder: Path) -> None:
    (plugin,) = entry_points(group="modalkit.commands", name="bench")
    assert plugin.load() is app
    program = "from modalkit.service.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, "bench", "somewhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("modalkit: error: 'somewhere' is no target")


def test_serving_imports_no_benchmark() -> None:
    program = "import sys, modalkit.service.cli.main; print([n for n in sys.modules if 'modalkit.bench' in n])"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_guide_names_no_option_that_is_not_there() -> None:
    there = {name for parameter in get_command(app).params for name in (*parameter.opts, *parameter.secondary_opts)}
    of_others = {"--write", "--gpus"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", guide("benchmarking.md")))
    assert named - of_others <= there
    assert len(named) > 20
