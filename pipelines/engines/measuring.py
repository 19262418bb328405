"""Times engines in turns on sample batches, and compares their outputs with those of torch float32."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from torch import Tensor
from torch.cuda import synchronize

from modalkit.pipelines.engines.sameness import Outputs, Same
from modalkit.pipelines.engines.settings import REFERENCE, Candidate, EngineChoice
from modalkit.pipelines.engines.torch_engine import Run

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
        by_size = sorted(batches, key=_elements)
        half = -(-len(by_size) // 2)
        pairs = zip_longest(by_size[:half], by_size[half:])
        self._batches = [batch for pair in pairs for batch in pair if batch is not None]
        self._clock = clock
        self._sleep = sleep

    @property
    def reference_outputs(self) -> list[Outputs]:
        """What torch float32 returned for the batches so far."""
        return self._reference.outputs

    def contender(self, candidate: Candidate, load: Callable[[Candidate], Run]) -> Contender:
        """A contender for a candidate. Torch float32 runs already; others are loaded, which may raise anything."""
        return self._reference if candidate == REFERENCE else Contender(candidate, load(candidate))

    def run(self, contenders: Iterable[Contender], deadline_s: float) -> None:
        """Time the contenders until `deadline_s` of the clock, or until all batches have run."""
        racing = [self._reference, *(c for c in contenders if c is not self._reference)]
        for contender in racing:
            self._attempt(contender, self._batches[0])  # what the first call prepares is not timed
        for index, batch in enumerate(self._batches):
            turn = index % len(racing)
            for contender in racing[turn:] + racing[:turn]:
                self._time(contender, batch)
            if len(self._reference.seconds) <= index:
                break
            racing = [c for c in racing if c.error is None]
            if index + 1 >= JUDGED_AFTER:
                fastest = max(self.speed(c) for c in racing)
                racing = [
                    c for c in racing if c is self._reference or len(racing) <= 2 or self.speed(c) * HOPELESS >= fastest
                ]
            if self._clock() > deadline_s:
                break

    def speed(self, contender: Contender) -> float:
        """How many times as fast as torch float32 it is, as the geometric mean of the batches that it ran."""
        return _ratio(self._reference, contender)

    def choose(self, contenders: Sequence[Contender], same: Same, default: Candidate) -> EngineChoice:
        """The fastest whose outputs are the same; without one, or with too little gain, the default."""
        compared = self._reference.outputs
        samples = _samples(compared)
        refused: dict[str, str] = {}
        running = [c for c in contenders if c.error is None and c.seconds]
        # Speeds of those that were left out are those of fewer batches: they are compared with the leader on these.
        leader = max((c for c in running if len(c.seconds) == len(compared)), key=self.speed, default=self._reference)
        speed_of = {c.candidate: self.speed(leader) / _ratio(c, leader) for c in running}
        ranked = sorted(running, key=lambda c: speed_of[c.candidate], reverse=True)
        speeds = {str(REFERENCE): 1.0} | {str(c): round(speed, 3) for c, speed in speed_of.items()}
        default_speed = speeds.get(str(default), 0.0)
        chosen, reason = default, "nothing else is faster"
        if len(compared) < len(self._batches) and samples < MIN_SAMPLES:
            reason = f"only {samples} samples could be compared in measure_seconds, so nothing else is used"
            ranked = []
        for contender in ranked:
            if contender.candidate == default or speed_of[contender.candidate] < MIN_GAIN * default_speed:
                break
            # One that was left out has run fewer batches; it counts where the faster ones are refused.
            reference = compared[: len(contender.outputs)]
            if _samples(reference) < min(MIN_SAMPLES, samples):
                continue
            if (why := same(reference, contender.outputs)) is None:
                chosen, reason = contender.candidate, "the fastest"
                break
            refused[str(contender.candidate)] = why
        return EngineChoice(
            engine=chosen.engine, dtype=chosen.dtype, reason=reason, speeds=speeds, refused=refused, samples=samples
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
        if contender.error is not None:
            return None, 0.0
        started_s = self._clock()
        try:
            outputs = contender.run(batch)
            if any(tensor.is_cuda for tensor in outputs.values()):
                synchronize()
        except Exception as error:
            if contender is self._reference:
                raise
            contender.error = f"{type(error).__name__}: {error}"
            return None, 0.0
        return outputs, self._clock() - started_s


def _samples(batches: Sequence[Outputs]) -> int:
    return sum(len(next(iter(outputs.values()))) for outputs in batches)


def _ratio(slower: Contender, faster: Contender) -> float:
    """How many times as fast the second one is, as the geometric mean of the batches that both ran."""
    pairs = list(zip(slower.seconds, faster.seconds, strict=False))
    return math.exp(sum(math.log(a / b) for a, b in pairs) / len(pairs)) if pairs else 0.0


def _elements(batch: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in batch.values())
