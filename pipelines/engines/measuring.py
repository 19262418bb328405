"""Times engines in turns on sample batches, and compares their outputs with those of torch float32."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from torch import Tensor
from torch.cuda import synchronize

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


@dataclass
class Contender:
    """A candidate in the race."""

    candidate: Candidate
    run: Run
    seconds: list[float] = field(default_factory=list)
    outputs: list[Outputs] = field(default_factory=list)
    error: str | None = None


class Race:
    """All candidates on the same batches: the smallest one first, then large and small ones in turn."""

    def __init__(
        self,
        reference: Run,
        batches: Sequence[Mapping[str, Tensor]],
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._reference = Contender(REFERENCE, reference)
        self._contenders: list[Contender] = []
        by_size = sorted(batches, key=_elements)
        half = -(-len(by_size) // 2)
        pairs = zip_longest(by_size[:half], by_size[half:])
        self._batches = [batch for pair in pairs for batch in pair if batch is not None]
        self._clock = clock
        self._sleep = sleep

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
        for index, batch in enumerate(self._batches):
            round_started_s = self._clock()
            racing = [c for c in racing if c.error is None]
            turn = index % len(racing)
            for contender in racing[turn:] + racing[:turn]:
                self._time(contender, batch)
            if index + 1 >= JUDGED_AFTER:
                fastest = max(self.speed(c) for c in racing)
                racing = [
                    c for c in racing if c is self._reference or len(racing) <= 2 or self.speed(c) * HOPELESS >= fastest
                ]
            if 2 * self._clock() - round_started_s > deadline_s:  # the next round may take as long
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

    def _time(self, contender: Contender, batch: Mapping[str, Tensor]) -> None:
        self._sleep(PAUSE_S)
        outputs, seconds = self._attempt(contender, batch)
        if outputs is not None and seconds < SHORT_S:
            seconds = min(seconds, self._attempt(contender, batch)[1])
        if outputs is not None:
            contender.seconds.append(max(seconds, 1e-9))
            contender.outputs.append(outputs)

    def _attempt(self, contender: Contender, batch: Mapping[str, Tensor]) -> tuple[Outputs | None, float]:
        started_s = self._clock()
        try:
            outputs = contender.run(batch)
            if any(tensor.is_cuda for tensor in outputs.values()):
                synchronize()
        except Exception as error:
            if contender is self._reference:
                raise
            contender.error = describe(error)
            return None, 0.0
        return outputs, self._clock() - started_s


def _speed_beside(other: Contender, contender: Contender) -> float:
    pairs = list(zip(other.seconds, contender.seconds, strict=False))
    return math.exp(sum(math.log(a / b) for a, b in pairs) / len(pairs)) if pairs else 0.0


def _samples(batches: Sequence[Outputs]) -> int:
    return sum(len(next(iter(outputs.values()))) for outputs in batches)


def _elements(batch: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in batch.values())
