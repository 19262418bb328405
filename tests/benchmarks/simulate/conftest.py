from collections.abc import Callable

import pytest

from modalkit.batching import Request
from modalkit.benchmarks.simulate.workload import IndexedRequest

MakeRequests = Callable[..., list[IndexedRequest]]


@pytest.fixture
def make_requests() -> MakeRequests:
    """Requests of the given sizes, a millisecond apart unless told otherwise; the first comes at 0."""

    def make(*sizes: int, gap_s: float = 0.001) -> list[IndexedRequest]:
        return [Request(index, size, arrival_s=index * gap_s) for index, size in enumerate(sizes)]

    return make
