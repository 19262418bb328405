"""Times engines in turns on sample batches, and compares their outputs with those of torch float32."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor
from torch.cuda import synchronize

from modalkit.pipelines.cpu_threads import waited_s
from modalkit.pipelines.engines.sameness import Outputs, Same
from modalkit.pipelines.engines.settings import REFERENCE, Candidate, EngineChoice
from modalkit.pipelines.engines.torch_engine import Run
from modalkit.pipelines.errors import describe

MIN_GAIN = 1.05  # a candidate that is less faster than torch float32 is not worth other numbers
SHORT_S = 0.05  # a batch that takes less is timed twice, because a disturbance would count too much
JUDGED_AFTER = 5  # batches after which hopeless candidates are left out
HOPELESS = 1.3  # times slower than the fastest
PAUSE_S = 0.005  # in which the threads of the engine that ran before stop spinning
MIN_SAMPLES = 32  # to compare; fewer only where there are no more
DISTURBED = 0.3  # of a batch's time, that its threads wait for a core; measured with two: up to 0.26, or 0.37 and more


@dataclass
class Contender:
    """A candidate in the race."""

    candidate: Candidate
    run: Run
    seconds: list[float] = field(default_factory=list)
    outputs: list[Outputs] = field(default_factory=list)
    error: str | None = None


class Race:
    """All candidates on the same batches: the smallest one first, then large and small ones in turn.

    Candidates begin with all threads of torch. Where other processes need cores, the kernel may leave several of these
    threads on one core, and each layer then waits until all of them had their turn: a batch takes up to 100 times as
    long. After the first such batch the race calls `fewer_threads`, once, and times that batch anew.
    `waited_s` tells the seconds that the threads of this process have waited for a core; torch has `threads` of them.
    """

    def __init__(
        self,
        reference: Run,
        batches: Sequence[Mapping[str, Tensor]],
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
        fewer_threads: Callable[[], object] | None = None,
        waited_s: Callable[[], float] = waited_s,
        threads: int | None = None,
    ) -> None:
        self._reference = Contender(REFERENCE, reference)
        self._contenders: list[Contender] = []
        by_size = sorted(batches, key=lambda batch: (_elements(batch), -_rows(batch)))  # many samples early
        half = -(-len(by_size) // 2)
        pairs = zip_longest(by_size[:half], by_size[half:])
        self._batches = [batch for pair in pairs for batch in pair if batch is not None]
        self._clock = clock
        self._sleep = sleep
        self._fewer_threads = fewer_threads  # None once it was called
        self._waited_s = waited_s
        self._threads = threads or torch.get_num_threads()

    def enter(self, candidate: Candidate, load: Callable[[Candidate], Run]) -> None:
        """Let a candidate take part. Torch float32 runs already; others are loaded, which may raise anything."""
        contender = self._reference
        if candidate != REFERENCE:
            contender = Contender(candidate, self._reference.run)
            try:
                contender.run = load(candidate)
            except Exception as error:  # noqa: BLE001  # a broken candidate must not stop the start
                contender.error = describe(error)
        self._contenders.append(contender)

    def runs(self) -> dict[Candidate, Run]:
        """What computes each candidate that can run."""
        return {c.candidate: c.run for c in self._contenders if c.error is None}

    def errors(self) -> dict[str, str]:
        """Why candidates cannot run, by their names."""
        return {str(c.candidate): c.error for c in self._contenders if c.error is not None}

    def run(self, deadline_s: float) -> None:
        """Time the candidates until about `deadline_s` of the clock, or until all batches have run."""
        racing = [self._reference, *(c for c in self._contenders if c is not self._reference and c.error is None)]
        for contender in racing:
            self._attempt(contender, self._batches[0])  # what the first call prepares is not timed
        rounds_s: list[float] = []
        for index, batch in enumerate(self._batches):
            round_started_s = self._clock()
            racing = [c for c in racing if c.error is None]
            turn = index % len(racing)
            self._run_round(racing[turn:] + racing[:turn], batch)
            if index + 1 >= JUDGED_AFTER:
                fastest = max(self.speed(c) for c in racing)
                racing = [
                    c for c in racing if c is self._reference or len(racing) <= 2 or self.speed(c) * HOPELESS >= fastest
                ]
            rounds_s.append(self._clock() - round_started_s)
            if self._clock() + rounds_s[-2:][0] > deadline_s:  # the next batch is about as large as the last but one
                break

    def speed(self, contender: Contender) -> float:
        """How many times as fast as torch float32 it is, as the geometric mean of the batches.

        One that was left out ran only some of them. On these it is compared with the fastest that ran all.
        """
        ran_all = [c for c in self._contenders if len(c.seconds) == len(self._reference.seconds)]
        fastest = max(ran_all, key=lambda c: _speed_beside(self._reference, c), default=self._reference)
        return _speed_beside(fastest, contender) * _speed_beside(self._reference, fastest)

    def choose(self, same: Same, default: Candidate) -> EngineChoice:
        """The fastest whose outputs are the same; without one, or with too little gain, the default."""
        compared = self._reference.outputs
        samples = _samples(compared)
        refused: dict[str, str] = {}
        running = [c for c in self._contenders if c.error is None and c.seconds]
        speeds = {str(REFERENCE): 1.0} | {str(c.candidate): round(self.speed(c), 3) for c in running}
        least_speed = MIN_GAIN * speeds.get(str(default), 0.0)
        chosen, reason = default, "nothing else is faster"
        is_tentative = len(compared) < len(self._batches) and samples < MIN_SAMPLES
        if is_tentative:
            reason = f"only {samples} samples could be compared in measure_seconds, so nothing else is used"
            running = []
        # One that was left out has run fewer batches; it counts where those that ran all are refused.
        for contender in sorted(running, key=lambda c: (len(c.outputs), self.speed(c)), reverse=True):
            reference = compared[: len(contender.outputs)]
            is_slow = contender.candidate == default or self.speed(contender) < least_speed
            if is_slow or _samples(reference) < min(MIN_SAMPLES, samples):
                continue
            if (why := same(reference, contender.outputs)) is None:
                chosen, reason = contender.candidate, "the fastest"
                break
            refused[str(contender.candidate)] = why
        return EngineChoice(
            engine=chosen.engine,
            dtype=chosen.dtype,
            reason=reason,
            speeds=speeds,
            refused=refused,
            samples=samples,
            is_tentative=is_tentative,
        )

    def _run_round(self, racing: Sequence[Contender], batch: Mapping[str, Tensor]) -> None:
        """Time a batch; from the beginning if there are fewer threads from one of its runs on."""
        fewer_threads = self._fewer_threads
        timed = []
        for contender in racing:
            outputs, seconds = self._time(contender, batch)
            if self._fewer_threads is not fewer_threads:
                self._run_round([c for c in racing if c.error is None], batch)
                return
            if outputs is not None:
                timed.append((contender, outputs, seconds))
        for contender, outputs, seconds in timed:
            contender.seconds.append(max(seconds, 1e-9))
            contender.outputs.append(outputs)

    def _time(self, contender: Contender, batch: Mapping[str, Tensor]) -> tuple[Outputs | None, float]:
        self._sleep(PAUSE_S)
        outputs, seconds = self._attempt(contender, batch)
        if outputs is not None and seconds < SHORT_S:
            seconds = min(seconds, self._attempt(contender, batch)[1])
        return outputs, seconds

    def _attempt(self, contender: Contender, batch: Mapping[str, Tensor]) -> tuple[Outputs | None, float]:
        waited_s, started_s = self._waited_s(), self._clock()
        try:
            outputs = contender.run(batch)
            if any(tensor.is_cuda for tensor in outputs.values()):
                synchronize()
        except Exception as error:
            if contender is self._reference:
                raise
            contender.error = describe(error)
            return None, 0.0
        seconds = self._clock() - started_s
        is_disturbed = self._waited_s() - waited_s >= DISTURBED * self._threads * seconds
        if self._fewer_threads and seconds >= SHORT_S and is_disturbed:
            self._fewer_threads()
            self._fewer_threads = None
        return outputs, seconds


def _speed_beside(other: Contender, contender: Contender) -> float:
    pairs = list(zip(other.seconds, contender.seconds, strict=False))
    return math.exp(sum(math.log(a / b) for a, b in pairs) / len(pairs)) if pairs else 0.0


def _samples(batches: Sequence[Outputs]) -> int:
    return sum(len(next(iter(outputs.values()))) for outputs in batches)


def _elements(batch: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in batch.values())


def _rows(batch: Mapping[str, Tensor]) -> int:
    return max((tensor.shape[0] for tensor in batch.values() if tensor.dim()), default=0)
