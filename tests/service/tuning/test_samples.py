"""Which items a pipeline is measured with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from modalkit.service.settings import BatchConfig
from modalkit.service.tuning import TuningError
from modalkit.service.tuning.measuring import measure
from modalkit.service.tuning.samples import MadeUpSamples, OwnSamples
from tests.support.length_model import LengthPipeline, Text


class Sampleless(LengthPipeline):
    def sample_items(self, n: int, size: int) -> list[BaseModel]:
        return []


class Unsized(Sampleless):
    def item_size(self, item: BaseModel) -> int:
        raise LookupError("no size")


def own(*lengths: int) -> OwnSamples:
    return OwnSamples(Sampleless(), [Text(text="x" * length) for length in lengths])


def lengths_of(items: list[BaseModel]) -> list[int]:
    return [LengthPipeline().item_size(item) for item in items]


def test_groups_stand_for_their_largest_item() -> None:
    samples = own(*range(1, 601))
    assert samples.sizes == [100, 200, 300, 400, 600]
    assert lengths_of(samples.of_size(1, 300)) == [300]
    assert lengths_of(samples.of_size(4, 300)) == [300, 275, 250, 225]


def test_sizes_that_are_close_are_one_group() -> None:
    assert own(*range(100, 120)).sizes == [119]
    assert own(*[5] * 50).sizes == [5]


def test_a_few_items_are_taken_again() -> None:
    samples = own(7, 90)
    assert samples.sizes == [7, 90]
    assert lengths_of(samples.of_size(5, 90)) == [90] * 5


@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=60), n=st.integers(1, 200))
def test_every_group_is_made_of_given_items_and_its_largest_is_there(lengths: list[int], n: int) -> None:
    samples = own(*lengths)
    assert samples.sizes[-1] == max(lengths)
    assert len(samples.sizes) <= 6
    previous = 0
    for size in samples.sizes:
        got = lengths_of(samples.of_size(n, size))
        assert len(got) == n
        assert max(got) == size
        assert set(got) <= set(lengths)
        assert min(got) >= previous
        previous = size
    assert sorted(lengths_of(samples.mixed(samples.sizes)[0])) == sorted(lengths)


def test_a_pipeline_without_samples_is_measured_by_items_that_are_given() -> None:
    pipeline = Sampleless()
    items = [Text(text="x" * length) for length in (10, 12, 300)]
    measured = measure(pipeline, BatchConfig(), 60, samples=OwnSamples(pipeline, items))
    assert {(1, 12), (128, 12), (1, 300), (128, 300)} <= {(m.count, m.longest) for m in measured.measurements}
    assert all(m.total <= m.count * m.longest for m in measured.measurements)
    assert len(pipeline.batches[0]) == 1, "the first batch warms it up"


def test_without_any_items_both_remedies_are_named() -> None:
    with pytest.raises(TuningError, match=r"Sampleless makes up no items .* implement sample_items.* --samples FILE"):
        MadeUpSamples(Sampleless())


def test_an_item_without_a_size_is_told_of() -> None:
    with pytest.raises(TuningError, match=r"Unsized\.item_size failed for an item of --samples: LookupError: no size"):
        OwnSamples(Unsized(), [Text(text="x")])
