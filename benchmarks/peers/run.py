"""What is measured when. Each step is kept, so that a run goes on where it was broken off."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from modalkit.benchmarks.corpus import mixed_length_texts
from modalkit.benchmarks.load import BenchError
from modalkit.benchmarks.peers.contenders import CONTENDERS, OURS, UNBATCHED, Contender, contender, with_best_types
from modalkit.benchmarks.peers.jobs import ROUTES, kill_with_jobs
from modalkit.benchmarks.peers.measures import LOADS, Durations, Texts, closed_loop, idle, open_loop, poisoned
from modalkit.benchmarks.peers.process import serving
from modalkit.benchmarks.peers.settings import Settings

TEXTS, TEXTS_KEY = 500, "texts"
FEW, MANY = 64, 256
"""The numbers of clients."""
CONVERSIONS_S = 15
RIVAL_LOAD = 0.6
RIVAL_ROUNDS = 2
ERRORS_ALLOWED = 0.01
NORMAL = Durations(warm_up_s=1, throughput_s=3, open_loop_s=5, idle_s=3)
QUICK = Durations(warm_up_s=0.5, throughput_s=1, open_loop_s=1, idle_s=1, is_quick=True)

Step = dict[str, Any]


class Run:
    """The steps of a run, in a file. Those that are in the file already are not repeated."""

    def __init__(
        self,
        file: Path,
        names: Sequence[str],
        durations: Durations,
        head: Mapping[str, object],
        show: Callable[[str], None],
    ) -> None:
        self._file = file
        self._show = show
        self._durations = durations
        self._ours = [found for found in CONTENDERS if found.name in names and found.name == OURS]
        self._peers = [found for found in CONTENDERS if found.name in names and found.name != OURS]
        self.document: dict[str, Any] = dict(head)
        if file.exists():
            self.document = json.loads(file.read_text(encoding="utf-8"))
        self._steps: dict[str, Step] = self.document.setdefault("steps", {})
        found = self._step(TEXTS_KEY, _texts_and_labels)
        self._texts = Texts(found["texts"], found["labels"])

    def all(self) -> None:
        """Run all steps that are missing."""
        for peer in self._peers:
            self._sweep(peer)
        everyone = [*self._peers, *self._ours]
        for found in everyone:
            self._step(f"float32/{found.name}", partial(self._everything, found))
        self._rivals("float32", self._best)
        for found in reversed(everyone):
            self._step(f"again/{found.name}", partial(self._throughput, found, self._best(found)))
        for found in self._ours:
            self._step("engines", partial(self._choose_engine, found))
        for found in everyone:
            for index, settings in enumerate(self._of_types(found)):
                self._step(f"types/{found.name}/{index}", partial(self._throughput, found, settings))
        self._rivals("types", self._best_of_types)
        for found in everyone:
            if found.name in ROUTES:
                self._step(
                    f"killed/{found.name}",
                    partial(kill_with_jobs, found, self._best(found), self._texts),
                )

    def best_peer(self, kind: str = "float32") -> str | None:
        """The batching peer with the highest throughput, in float32 or with the best engines and types."""
        peers = [peer.name for peer in self._peers if peer.name != UNBATCHED]
        rates = {name: max(map(_rate, steps_of(self._steps, kind, name)), default=0.0) for name in peers}
        return max(rates, key=rates.__getitem__) if any(rates.values()) else None

    def _step(self, key: str, measure: Callable[[], Step]) -> Step:
        if key not in self._steps:
            self._show(key)
            try:
                self._steps[key] = measure()
            except BenchError as error:
                self._steps[key] = {"failed": str(error)}
                self._show(f"{key}: {error}")
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        return self._steps[key]

    def _sweep(self, peer: Contender) -> None:
        self._step(f"documented/{peer.name}", partial(self._throughput, peer, peer.documented, (FEW, MANY)))
        for index, settings in enumerate(peer.sweep[: 1 if self._durations.is_quick else None]):
            self._step(f"sweep/{peer.name}/{index}", partial(self._throughput, peer, settings))

    def ranked(self, found: Contender) -> list[Settings]:
        """The settings that were tried, the best first."""
        tried = {f"documented/{found.name}": found.documented}
        tried |= {f"sweep/{found.name}/{index}": settings for index, settings in enumerate(found.sweep)}
        keys = sorted(tried, key=lambda key: _rate(self._steps.get(key, {})), reverse=True)
        return [tried[key] for key in keys]

    def _best(self, found: Contender) -> Settings:
        return self.ranked(found)[0]

    def _throughput(self, found: Contender, settings: Settings, clients: Sequence[int] = (FEW,)) -> Step:
        with serving(found, settings) as server:
            told: Step = {"settings": asdict(settings), "told": str(settings), "started_in_s": server.started_in_s}
            for count in clients:
                told[f"clients_{count}"] = closed_loop(server, self._texts, count, self._durations)
        return told

    def _everything(self, found: Contender) -> Step:
        settings = self._best(found)
        with serving(found, settings) as server:
            told: Step = {"settings": asdict(settings), "told": str(settings), "started_in_s": server.started_in_s}
            told["memory_idle_mib"] = server.memory_mib()
            told["idle"] = idle(server, self._texts, self._durations)
            for count in (FEW, MANY):
                told[f"clients_{count}"] = closed_loop(server, self._texts, count, self._durations)
            told["memory_mib"] = server.memory_mib()
            capacity = max(told[f"clients_{count}"]["per_s"] for count in (FEW, MANY))
            for share in LOADS:
                told[f"load_{share:.0%}"] = open_loop(server, self._texts, share * capacity, self._durations)
            if not found.runs_own_code:
                told["poisoned"] = poisoned(server, self._texts)
        return told

    def _rivals(self, kind: str, settings_of: Callable[[Contender], Settings]) -> None:
        """Latencies of the best batching peer and of ours at 60 % of that peer's capacity, in turn."""
        rival = self.best_peer(kind)
        if rival is None or not self._ours:
            return
        per_second = RIVAL_LOAD * max(
            step[f"clients_{count}"]["per_s"]
            for step in steps_of(self._steps, kind, rival)
            for count in (FEW, MANY)
            if f"clients_{count}" in step
        )
        longer = replace(self._durations, open_loop_s=2 * self._durations.open_loop_s)

        def measure(name: str) -> Step:
            found = contender(name)
            with serving(found, settings_of(found)) as server:
                closed_loop(server, self._texts, FEW, replace(self._durations, throughput_s=1))
                return open_loop(server, self._texts, per_second, longer)

        for turn in range(1 if self._durations.is_quick else RIVAL_ROUNDS):
            for name in (rival, OURS):
                self._step(f"rival of {kind}/{name}/{turn}", partial(measure, name))

    def _choose_engine(self, found: Contender) -> Step:
        """Start once, and let the conversions end that go on after the start: the choice is kept for all."""
        with serving(found, with_best_types(self._best(found), found.name)) as server:
            time.sleep(0 if self._durations.is_quick else CONVERSIONS_S)
            return {"started_in_s": server.started_in_s}

    def _of_types(self, found: Contender) -> list[Settings]:
        """The settings that were tried, with the best engines and types."""
        ranked = self.ranked(found)[: 1 if self._durations.is_quick else None]
        return [with_best_types(settings, found.name) for settings in ranked]

    def _best_of_types(self, found: Contender) -> Settings:
        rates = [_rate(self._steps[f"types/{found.name}/{index}"]) for index in range(len(self._of_types(found)))]
        return self._of_types(found)[rates.index(max(rates))]


def steps_of(steps: Mapping[str, Mapping[str, Any]], kind: str, name: str) -> list[Mapping[str, Any]]:
    """The steps of one kind of a server, those that failed left out."""
    keys = [f"{kind}/{name}", *(key for key in steps if key.startswith(f"{kind}/{name}/"))]
    return [step for key in keys if "failed" not in (step := steps.get(key, {"failed": ""}))]


def _rate(step: Mapping[str, Any]) -> float:
    """Items per second with 64 clients; 0 if it failed, or if more than one in a hundred did."""
    found = step.get(f"clients_{FEW}")
    if found is None or sum(found["errors"].values()) > ERRORS_ALLOWED * (found["answered"] + 1):
        return 0.0
    rate: float = found["per_s"]
    return rate


def _texts_and_labels() -> Step:
    """Some texts of the corpus, and their labels by the pipeline in float32, found in a process of its own."""
    texts = mixed_length_texts(TEXTS)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return {"texts": texts, "labels": process.submit(_labels, texts).result()}


def _labels(texts: list[str]) -> list[str]:
    from modalkit.benchmarks.peers.servers.pipeline import Model

    model = Model(Settings(threads=1))
    return [answer["sentiment"] for text in texts for answer in model([{"text": text}])]
