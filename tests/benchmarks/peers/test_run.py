"""A run goes on where it was broken off, and its pages show what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from modalkit.benchmarks.load import BenchError
from modalkit.benchmarks.peers import run as run_module
from modalkit.benchmarks.peers.contenders import CONTENDERS, Contender
from modalkit.benchmarks.peers.page import as_html, as_markdown
from modalkit.benchmarks.peers.run import NORMAL, Run
from modalkit.benchmarks.peers.settings import Settings
from modalkit.benchmarks.peers.tables import targets_of


def part(per_s: float, **errors: int) -> dict[str, Any]:
    return {"per_s": per_s, "p50_ms": 1.0, "p99_ms": 2.0, "answered": 100, "errors": errors, "accuracy": 1.0}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "run.json"
    found.write_text(json.dumps({"steps": {"texts": {"texts": ["good"], "labels": ["positive"]}}}))
    return found


def run_of(file: Path, *names: str) -> Run:
    return Run(file, names, NORMAL, {}, lambda _: None)


def test_steps_that_are_done_are_not_repeated_and_one_that_fails_is_kept(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def throughput(_: Run, found: Contender, settings: Settings, clients: object = ()) -> dict[str, Any]:
        measured.append(str(settings))
        if len(measured) == 2:
            raise BenchError("no port")
        if len(measured) == 3:
            raise KeyboardInterrupt
        return {"clients_64": part(len(measured))}

    monkeypatch.setattr(Run, "_throughput", throughput)
    with pytest.raises(KeyboardInterrupt):
        run_of(file, "mosec").all()
    kept = json.loads(file.read_text())["steps"]
    assert list(kept) == ["texts", "documented/mosec", "sweep/mosec/0"]
    assert kept["sweep/mosec/0"] == {"failed": "no port"}
    monkeypatch.setattr(Run, "_everything", lambda *_: {"clients_64": part(9)})
    monkeypatch.setattr(run_module, "kill_with_jobs", None)
    run_of(file, "mosec").all()
    mosec = next(one for one in CONTENDERS if one.name == "mosec")
    # The one that was broken off; again with the best, which it is; all with the best types, the best first.
    best = str(mosec.sweep[1])
    assert measured[3:] == [best, best, best, str(mosec.documented), str(mosec.sweep[0])]


def test_settings_with_errors_are_not_the_best(file: Path) -> None:
    run = run_of(file, "mosec")
    steps = run.document["steps"]
    steps["documented/mosec"] = {"clients_64": part(10)}
    steps["sweep/mosec/0"] = {"clients_64": part(90, **{"HTTP 503": 50})}
    steps["float32/mosec"] = {"clients_64": part(10), "clients_256": part(10)}
    mosec = next(one for one in CONTENDERS if one.name == "mosec")
    assert run.ranked(mosec)[0] == mosec.documented
    assert run.best_peer() == "mosec"


@pytest.fixture
def document() -> dict[str, Any]:
    def step(per_s: float, memory_mib: float) -> dict[str, Any]:
        return {
            "told": "batches of 8",
            "started_in_s": 3.0,
            "memory_mib": memory_mib,
            "idle": part(10),
            "clients_64": part(per_s),
            "clients_256": part(per_s, **{"HTTP 500": 3}),
            **{f"load_{share}%": {**part(per_s), "rate": 0.3 * per_s} for share in (30, 60, 80)},
            "poisoned": {"others": 31, "failed": 7.5, "failed_at_most": 9},
        }

    steps = {
        "documented/mosec": {"told": "batches of 32", "clients_64": part(40), "clients_256": part(40)},
        "documented/infinity": {"told": "batches of 32", "clients_64": part(80), "clients_256": part(80)},
        "float32/mosec": step(100, 500),
        "float32/infinity": step(90, 510),
        "float32/fastapi": step(150, 500),
        "float32/ray": {"failed": "no port"},
        "float32/litserve": {**step(0, 500), "idle": {**part(0), "p50_ms": None, "p99_ms": None, "accuracy": None}},
        "float32/modalkit": step(300, 540),
        "again/modalkit": {"clients_64": part(340)},
        "types/mosec/0": {"told": "batches of 8", "clients_64": part(150)},
        "types/mosec/1": {"told": "batches of 2", "clients_64": part(180)},
        "types/infinity/0": {"told": "batches of 8", "clients_64": part(20)},
        "types/modalkit/0": {"told": "batches of 32", "clients_64": part(900)},
        **{f"rival of types/mosec/{turn}": {"p99_ms": ms} for turn, ms in enumerate((90.0, 110.0))},
        **{f"rival of types/modalkit/{turn}": {"p99_ms": 20.0} for turn in range(2)},
        "killed/modalkit": {"by": "jobs", "accepted": 1000, "done_before": 10, "results_after": 1000},
    }
    return {"date": "2026-11-28T20:00:00", "machine": "a <machine>", "versions": {"mosec": "0.9.8"}, "steps": steps}


def test_the_targets_are_judged_by_the_mean_of_the_rounds(document: dict[str, Any]) -> None:
    found = {target.what: target for target in targets_of(document["steps"])}
    items = "items/s, 64 clients, float32, others"
    batching = found[f"{items} at the best of a sweep: ours / the best batching peer"]
    assert (round(batching.value, 1), batching.is_met, batching.detail) == (3.2, True, "mosec")
    assert round(found[f"{items} at the best of a sweep: ours / FastAPI without batching"].value, 2) == 2.13
    documented = found[f"{items} as their documentation recommends: ours / the best batching peer"]
    assert (documented.value, documented.detail) == (4.0, "Infinity")
    fastest = found["items/s, 64 clients, the best engines and types: ours / the best batching peer"]
    assert (fastest.value, fastest.is_met, fastest.detail) == (5.0, True, "mosec")
    p99 = found["p99 at 60% of the best batching peer's capacity, the best engines and types: ours / that peer"]
    assert (p99.value, p99.is_met, p99.detail) == (0.2, True, "mosec: 100 ms, ours 20 ms")
    memory = found["memory under load: ours / the leanest peer"]
    assert (round(memory.value, 2), memory.is_met) == (1.08, True)


def test_both_pages_show_the_servers_their_errors_and_what_was_lost(document: dict[str, Any]) -> None:
    document["steps"]["float32/fastapi"]["clients_64"]["per_s"] = 200
    markdown, page = as_markdown(document), as_html(document)
    assert "| LitServe | batches of 8 | 0 | 0 | - | 500 | 3.0 | - | 3 x HTTP 500 |" in markdown
    assert "| mosec | batches of 8 | 100 | 100 | 1.0 / 2.0 | 500 | 3.0 | 100.0% | 3 x HTTP 500 |" in markdown
    assert "| mosec | batches of 2 | 180 | none |" in markdown
    assert "| Infinity | batches of 8 | 90 | 3 x HTTP 500 |" in markdown
    assert "| modalkit | jobs | 1000 | 10 | 1000 | 0 |" in markdown
    assert "FastAPI without batching | 1.60 | ≥ 2 | **missed** | FastAPI, unbatched |" in markdown
    assert "<strong>missed</strong>" in page
    assert "a &lt;machine&gt;" in page
    assert "<title>modalkit, at the best of a sweep: 320</title>" in page


def test_figures_that_the_load_generator_limited_are_marked(document: dict[str, Any]) -> None:
    assert "(!)" not in as_markdown(document)
    document["steps"]["float32/mosec"]["load_80%"]["generator_was_the_limit"] = ["requests were sent up to 9 ms late"]
    markdown = as_markdown(document)
    assert "| mosec | 30/s: 1.0 / 2.0 | 30/s: 1.0 / 2.0 | 30/s: 1.0 / 2.0 (!) |" in markdown
    assert markdown.count("(!): the load generator was the limit.") == 1
