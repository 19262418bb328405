"""``kill -9`` with 1,000 asynchronous jobs accepted: how many results there are after a restart."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modalkit.benchmarks.load import Load, run_load
from modalkit.benchmarks.peers.contenders import OURS, UNBATCHED, Contender
from modalkit.benchmarks.peers.measures import Texts
from modalkit.benchmarks.peers.process import Server, ask, get_json, serving
from modalkit.benchmarks.peers.settings import Settings

JOBS = 1_000
WITHIN_S = 60
"""Seconds after the restart in which results must appear."""
QUIET_S = 8
"""Seconds without another result, after which no more are expected."""


@dataclass(frozen=True, slots=True)
class JobRoutes:
    """How a server takes jobs."""

    what: str
    path: str
    body: Any
    count: Callable[[Server, Sequence[dict[str, Any]]], int]
    """Results that can be had now, of the jobs with these answers to their submission."""


def _ours(server: Server, _: Sequence[dict[str, Any]]) -> int:
    lines = ask(_url(server, "/metrics"), None, "GET")[1].decode().splitlines()
    mark = 'modalkit_jobs{status="succeeded"} '
    return sum(int(float(line.removeprefix(mark))) for line in lines if line.startswith(mark))


def _bentoml(server: Server, answers: Sequence[dict[str, Any]]) -> int:
    told = (get_json(_url(server, f"/jobs/status?task_id={answer['task_id']}")) for answer in answers)
    return sum(isinstance(status, dict) and status.get("status") == "completed" for status in told)


def _fastapi(server: Server, _: Sequence[dict[str, Any]]) -> int:
    found = get_json(_url(server, "/jobs"))
    return found if isinstance(found, int) else 0


ROUTES = {
    "bentoml": JobRoutes("tasks", "/jobs/submit", {"inputs": ["$item"]}, _bentoml),
    UNBATCHED: JobRoutes("BackgroundTasks", "/jobs", "$item", _fastapi),
    OURS: JobRoutes("jobs", "/async/predict", {"message": "$item", "success_queue": "results"}, _ours),
}


def kill_with_jobs(contender: Contender, settings: Settings, texts: Texts) -> dict[str, object]:
    """Submit 1,000 jobs, kill all processes, start again in the same folder, and count the results."""
    routes = ROUTES[contender.name]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(contender, settings, folder) as server:
            endpoint = replace(server.endpoint, url=_url(server, routes.path), body=routes.body)
            submitted = run_load(endpoint, texts.items, Load(clients=64, requests=JOBS), keeps_bodies=True)
            answers = [json.loads(body) for _, _, body in submitted.kept]
            before = routes.count(server, answers)
            server.kill()
        with serving(contender, settings, folder) as server:
            after = _settled(lambda: routes.count(server, answers))
    return {"by": routes.what, "accepted": submitted.answered, "done_before": before, "results_after": after}


def _settled(count: Callable[[], int]) -> int:
    """The count once all results are there, or none has been added for some seconds."""
    deadline_s = time.perf_counter() + WITHIN_S
    last, since_s = count(), time.perf_counter()
    while last < JOBS and time.perf_counter() < min(deadline_s, since_s + QUIET_S):
        time.sleep(0.2)
        if (now := count()) != last:
            last, since_s = now, time.perf_counter()
    return last


def _url(server: Server, path: str) -> str:
    return f"http://127.0.0.1:{server.settings.port}{path}"
