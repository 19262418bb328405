"""The items for measuring a pipeline: made up by the pipeline, or the user's own."""

import math
from collections.abc import Sequence

from pydantic import BaseModel

from modalkit.pipelines import InferencePipeline
from modalkit.service.errors import describe_with_line
from modalkit.service.tuning import TuningError

ITEMS_OF_EACH_SIZE = 16
SIZE_GROUPS = 6
MIN_SIZE_RATIO = 1.25  # between groups; the times of closer ones hardly differ


class MadeUpSamples:
    """The items that a pipeline's `sample_items` returns. Raises `TuningError` if it returns none."""

    sizes: Sequence[int] | None = None
    """Sizes to ask for; None: any."""

    def __init__(self, pipeline: InferencePipeline) -> None:
        self._pipeline = pipeline
        try:
            items = pipeline.sample_items(1, 1)
        except Exception as error:
            raise TuningError(f"sample_items(1, 1) failed: {describe_with_line(error)}") from error
        if not items:
            raise TuningError(
                f"{type(pipeline).__name__} makes up no items to measure: implement sample_items(n, size), which "
                "returns a list of n items of about that size, or give items of your own: --samples FILE"
            )

    def of_size(self, n: int, size: int) -> list[BaseModel]:
        """`n` items of about `size`."""
        return self._pipeline.sample_items(n, size)

    def mixed(self, sizes: Sequence[int]) -> list[list[BaseModel]]:
        """Groups of items; a trial draws equally often from each."""
        return [self._pipeline.sample_items(ITEMS_OF_EACH_SIZE, size) for size in sizes]


class OwnSamples:
    """The user's items, sorted by size and split into up to six groups of equal length.

    The size of a group is that of its largest item; `sizes` are ascending. Raises `TuningError` if `item_size` fails.
    """

    def __init__(self, pipeline: InferencePipeline, items: Sequence[BaseModel]) -> None:
        try:
            sized = sorted(((math.ceil(pipeline.item_size(item)), item) for item in items), key=lambda pair: pair[0])
        except Exception as error:
            raise TuningError(
                f"{type(pipeline).__name__}.item_size failed for an item of --samples: {describe_with_line(error)}"
            ) from error
        self._items = list(items)
        self._groups: dict[int, list[BaseModel]] = {}
        ends = sorted({len(sized) * (group + 1) // SIZE_GROUPS for group in range(SIZE_GROUPS)} - {0})
        begin = 0
        for end, next_end in zip(ends, [*ends[1:], None], strict=True):
            size = sized[end - 1][0]
            if next_end is None or sized[next_end - 1][0] >= MIN_SIZE_RATIO * size:
                self._groups[size] = [item for _, item in reversed(sized[begin:end])]
                begin = end
        self.sizes: Sequence[int] = list(self._groups)

    def of_size(self, n: int, size: int) -> list[BaseModel]:
        """`n` items of the group of `size`, largest first, repeated if the group has fewer."""
        group = self._groups[min(self.sizes, key=lambda other: abs(other - size))]
        return [group[index * max(1, len(group) // n) % len(group)] for index in range(n)]

    def mixed(self, sizes: Sequence[int]) -> list[list[BaseModel]]:  # noqa: ARG002  # the mix is the user's own
        """All items in one group, as frequent as given."""
        return [self._items]


Samples = MadeUpSamples | OwnSamples
