"""How long a server is measured."""

from dataclasses import replace

import pytest

from modalkit.benchmarks.load import Load, Measured
from modalkit.benchmarks.peers import measures
from modalkit.benchmarks.peers.contenders import contender
from modalkit.benchmarks.peers.measures import Texts, closed_loop
from modalkit.benchmarks.peers.process import Server
from modalkit.benchmarks.peers.run import NORMAL
from modalkit.benchmarks.peers.settings import Settings
from tests.benchmarks.bench.test_results import timeline_run


@pytest.mark.parametrize(("answered", "seconds"), [(0, [3, 15]), (31, [3, 15]), (32, [3])])
def test_a_server_whose_answers_take_longer_than_the_time_is_measured_for_longer(
    monkeypatch: pytest.MonkeyPatch, answered: int, seconds: list[float]
) -> None:
    loads: list[Load] = []

    def run_load(_: object, __: object, load: Load) -> Measured:
        loads.append(load)
        return replace(timeline_run([0.1], items=1), answered=answered)

    monkeypatch.setattr(measures, "run_load", run_load)
    settings = Settings(port=1)
    found = contender("fastapi")
    server = Server(
        contender=found, settings=settings, endpoint=found.endpoint(settings), started_in_s=1.0, mark="none"
    )
    closed_loop(server, Texts(["good"], ["positive"]), 64, NORMAL)
    assert [load.seconds for load in loads] == seconds
