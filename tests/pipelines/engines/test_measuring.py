"""Which candidate wins, on a clock that the candidates themselves advance."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from modalkit.pipelines.engines import Candidate, Sameness, same_labels, same_vectors
from modalkit.pipelines.engines.measuring import JUDGED_AFTER, MIN_SAMPLES, Race
from modalkit.pipelines.engines.settings import REFERENCE
from modalkit.pipelines.engines.torch_engine import Run
from modalkit.pipelines.text_samples import SAMPLE_SHAPES

BFLOAT16 = Candidate("torch", "bfloat16")
OPENVINO = Candidate("openvino", "float32")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def sample_batches(count: int = 8) -> list[Mapping[str, Tensor]]:
    return [{"scale": torch.tensor(1.0), "x": torch.full((8, 2), float(i + 1))} for i in range(count)]


def logits(inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([inputs["x"][:, 0], -inputs["x"][:, 0]], dim=-1)


class Timed:
    """Takes so many seconds for a batch, and gives the logits times a factor."""

    def __init__(self, clock: Clock, seconds: float, factor: float = 1.0) -> None:
        self._clock, self._seconds, self._factor = clock, seconds, factor
        self.calls = 0

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        self._clock.now_s += self._seconds
        return {"logits": logits(inputs) * self._factor}


def test_the_fastest_whose_outputs_are_the_same_is_taken() -> None:
    clock = Clock()
    race = Race(Timed(clock, 0.2), sample_batches(), clock, clock.sleep)
    race.enter(BFLOAT16, lambda _: Timed(clock, 0.1))
    race.enter(OPENVINO, lambda _: Timed(clock, 0.09, factor=-1))
    race.run(1000)
    choice = race.choose(same_labels(), REFERENCE)
    assert choice.candidate == BFLOAT16
    assert choice.speeds == pytest.approx(
        {"torch float32": 1, "torch bfloat16": 2, "openvino float32": 2.222}, rel=0.01
    )
    assert "labels agree on 0.0% of the samples" in choice.refused["openvino float32"]
    assert str(choice).startswith("torch bfloat16, the fastest: 0.90 x openvino float32, 2.00 x torch float32; outputs")


def test_a_small_gain_is_not_worth_other_numbers() -> None:
    clock = Clock()
    race = Race(Timed(clock, 0.2), sample_batches(), clock, clock.sleep)
    race.enter(BFLOAT16, lambda _: Timed(clock, 0.195))
    race.run(1000)
    assert race.choose(same_labels(), REFERENCE).candidate == REFERENCE


def test_a_hopeless_candidate_is_left_out_early() -> None:
    clock = Clock()
    slow = Timed(clock, 2.0)
    race = Race(Timed(clock, 0.2), sample_batches(), clock, clock.sleep)
    race.enter(BFLOAT16, lambda _: slow)
    race.enter(OPENVINO, lambda _: Timed(clock, 0.1))
    race.run(1000)
    assert slow.calls < 8
    assert race.choose(same_labels(), REFERENCE).candidate == OPENVINO


def test_one_that_was_left_out_is_compared_on_the_batches_that_it_ran() -> None:
    class SlowerLater(Timed):
        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self._seconds = 0.1 if self.calls <= JUDGED_AFTER else 0.3
            return super().__call__(inputs)

    clock = Clock()
    race = Race(Timed(clock, 0.4), sample_batches(10), clock, clock.sleep)
    race.enter(BFLOAT16, lambda _: Timed(clock, 0.2))
    race.enter(OPENVINO, lambda _: SlowerLater(clock, 0.1))
    race.run(1000)
    choice = race.choose(same_labels(), REFERENCE)
    assert choice.candidate == OPENVINO
    assert choice.speeds["openvino float32"] / choice.speeds["torch bfloat16"] == pytest.approx(2, rel=0.01)


def test_with_too_little_time_to_compare_nothing_else_is_taken() -> None:
    clock = Clock()
    race = Race(Timed(clock, 5.0), sample_batches(), clock, clock.sleep)
    race.enter(BFLOAT16, lambda _: Timed(clock, 1.0))
    race.run(3)
    choice = race.choose(same_labels(), REFERENCE)
    assert choice.candidate == REFERENCE
    assert "only 8 samples could be compared" in choice.reason


def test_no_round_begins_that_would_end_after_the_deadline() -> None:
    clock = Clock()
    reference = Timed(clock, 1.0)
    race = Race(reference, sample_batches(), clock, clock.sleep)
    race.enter(BFLOAT16, lambda _: Timed(clock, 1.0))
    race.run(5.5)  # two calls to warm up, and two in a round
    assert reference.calls == 2


class Machine:
    """Two cores, and from some second on a process that needs one of them."""

    def __init__(self, clock: Clock, busy_from_s: float) -> None:
        self.threads, self.waited_s = 2, 0.0
        self._clock, self._busy_from_s = clock, busy_from_s

    def torch(self, seconds: float) -> Run:
        """Takes so many seconds with two threads, and 100 times as long where they have one core."""

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            is_disturbed = self.threads > 1 and self._clock.now_s >= self._busy_from_s
            took_s = seconds * (100 if is_disturbed else 2 / self.threads)
            self._clock.now_s += took_s
            self.waited_s += took_s if is_disturbed else 0.1 * took_s
            return {"logits": logits(inputs)}

        return run

    def use_one_thread(self) -> None:
        self.threads = 1


@pytest.mark.parametrize("busy_from_s", [0, 0.05, 0.1, 0.15, 0.2, 1000])
def test_processes_that_need_the_cores_change_neither_the_winner_nor_its_speed(busy_from_s: float) -> None:
    clock = Clock()
    machine = Machine(clock, busy_from_s)
    race = Race(
        machine.torch(0.004),
        sample_batches(),
        clock,
        clock.sleep,
        fewer_threads=machine.use_one_thread,
        waited_s=lambda: machine.waited_s,
        threads=2,
    )
    race.enter(BFLOAT16, lambda _: machine.torch(0.002))
    race.enter(OPENVINO, lambda _: machine.torch(0.003))
    race.run(1.2)
    choice = race.choose(same_labels(), REFERENCE)
    assert choice.candidate == BFLOAT16
    assert choice.speeds == pytest.approx({"torch float32": 1, "torch bfloat16": 2, "openvino float32": 1.333}, 0.01)
    assert choice.samples == 64
    assert not choice.is_tentative
    assert machine.threads == (2 if busy_from_s == 1000 else 1)


def test_a_long_batch_that_has_its_cores_keeps_all_threads() -> None:
    clock = Clock()
    machine = Machine(clock, 1000)
    race = Race(
        machine.torch(0.2), sample_batches(), clock, clock.sleep, machine.use_one_thread, lambda: machine.waited_s, 2
    )
    race.run(1000)
    assert machine.threads == 2


def test_two_rounds_compare_enough_samples() -> None:
    clock = Clock()
    race = Race(Timed(clock, 0.2), [{"x": torch.ones(shape)} for shape in SAMPLE_SHAPES], clock, clock.sleep)
    race.run(0.7)
    choice = race.choose(same_labels(), REFERENCE)
    assert MIN_SAMPLES <= choice.samples < sum(count for count, _ in SAMPLE_SHAPES)


def test_a_candidate_that_raises_takes_no_part() -> None:
    def broken(_: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise RuntimeError("no kernel for this")

    def cannot_be_loaded(_: Candidate) -> Run:
        raise OSError("no such file")

    clock = Clock()
    race = Race(Timed(clock, 0.2), sample_batches(), clock, clock.sleep)
    race.enter(BFLOAT16, lambda _: broken)
    race.enter(OPENVINO, cannot_be_loaded)
    race.run(1000)
    assert race.errors() == {
        "torch bfloat16": "RuntimeError: no kernel for this",
        "openvino float32": "OSError: no such file",
    }
    assert race.runs() == {}
    assert race.choose(same_labels(), REFERENCE).candidate == REFERENCE


def outputs(*rows: tuple[float, ...]) -> list[dict[str, Tensor]]:
    return [{"logits": torch.tensor(rows).log()}]


def test_labels_of_ties_may_change_and_others_may_not() -> None:
    clear, tie = (0.8, 0.2), (0.505, 0.495)
    assert same_labels()(outputs(clear, tie), outputs(clear, tie[::-1])) is None
    assert same_labels()(outputs(clear, tie), outputs(clear[::-1], tie)) == "labels agree on 0.0% of the samples"
    assert same_labels()(outputs(clear), outputs((0.77, 0.23))) == "confidences change by up to 0.030"
    assert same_labels(Sameness(confidence_change=0.05))(outputs(clear), outputs((0.77, 0.23))) is None
    assert same_labels()(outputs(clear), outputs((float("nan"), 1.0))) == "outputs that are no numbers"


def test_vectors_must_keep_their_direction() -> None:
    one, same, other = ([{"v": torch.tensor([v])}] for v in ((1.0, 0.0), (2.0, 0.01), (0.0, 1.0)))
    assert same_vectors()(one, same) is None
    assert same_vectors()(one, other) == "the cosine similarity of v falls to 0.0000"


def test_where_the_fastest_is_refused_one_that_was_left_out_is_taken() -> None:
    clock = Clock()
    race = Race(Timed(clock, 0.4), sample_batches(), clock, clock.sleep)
    slow = Timed(clock, 0.2)
    race.enter(OPENVINO, lambda _: Timed(clock, 0.1, factor=-1))
    race.enter(BFLOAT16, lambda _: slow)
    race.run(1000)
    assert slow.calls < 8
    choice = race.choose(same_labels(), REFERENCE)
    assert choice.candidate == BFLOAT16
    assert choice.speeds == {"torch float32": 1.0, "torch bfloat16": 2.0, "openvino float32": 4.0}
