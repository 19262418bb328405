"""Finds the guilty items of a batch that failed, at a bounded cost."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Bisection(Generic[T]):
    """Says which parts of a batch to run, given which parts failed, until the guilty items are alone.

    The first part is the whole batch. A part that fails is halved, and the halves take their turn behind the parts that
    wait, so large parts (with most of the innocent items) come first. One guilty item among n costs at most
    2·⌈log2 n⌉ runs beyond the first; in all there are at most twice as many, enough to isolate any two guilty items.
    A batch in which everything fails is therefore given up long before each item has run alone.
    """

    def __init__(self, items: list[T]) -> None:
        self._parts: deque[tuple[list[T], Exception | None]] = deque([(items, None)])
        self._runs_left = 1 + 4 * (len(items) - 1).bit_length()

    def __iter__(self) -> Iterator[list[T]]:
        """The parts to run, each once; call `failed` for a part that fails before asking for the next."""
        while self._parts and self._runs_left:
            self._runs_left -= 1
            yield self._parts.popleft()[0]

    def failed(self, part: list[T], error: Exception, *, blameless: bool = False) -> list[T]:
        """Take note that running `part` raised `error`; returns the items that are thereby known to be guilty.

        A `blameless` failure says nothing of the items, only that they were too many at once: the runs of its halves
        are not counted.
        """
        if len(part) == 1:
            return part
        if blameless:
            self._runs_left += 2
        middle = len(part) // 2
        self._parts += [(part[:middle], error), (part[middle:], error)]
        return []

    def given_up(self) -> Iterator[tuple[T, Exception]]:
        """After the iteration: the items that no run told apart, each with the error of the last part it was in."""
        for part, error in self._parts:
            if error is None:
                raise AssertionError("a part that never ran was given up: this is a bug in modalkit")
            yield from ((item, error) for item in part)
