"""A task of razors-edge-batching-scheduler that does nothing, where its process can import it."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from razors_edge.razors_edge_compute_task import RazorsEdgeComputeTask

SIZES = [1, 16, 32, 64]
NANOSECONDS = 1_000
MAX_BATCH_SIZE = 255
"""It keeps the sizes of batches in a byte."""


class _DoNothing(RazorsEdgeComputeTask):
    """Answers each item with itself. A batch of any size is said to take the same time, so batches are full."""

    batch_size = 32

    @property
    def batch_benchmark_sizes(self) -> list[int]:
        return [1, 2, self.batch_size]

    @property
    def min_input_size(self) -> int:
        return SIZES[0]

    @property
    def max_input_size(self) -> int:
        return SIZES[-1]

    def get_batch_timing_data(self) -> list[tuple[list[int], list[int]]]:
        return [(SIZES, [NANOSECONDS] * len(SIZES)) for _ in self.batch_benchmark_sizes]

    def load_model(self, model_pool: ThreadPoolExecutor) -> Any:  # noqa: ARG002  # part of the interface
        return lambda items: items

    def get_input_size(self, input_data: Any, preprocessed_input: Any) -> int:  # noqa: ARG002  # all are alike
        return SIZES[0]

    def create_batch(self, to_batch: list[Any]) -> tuple[tuple[list[Any]], dict[str, Any]]:
        return (to_batch,), {}

    def postprocess_output(self, call_output: Any) -> Any:
        return call_output


class DoNothing32(_DoNothing):
    """Batches of at most 32."""


class DoNothing256(_DoNothing):
    """Batches of at most 255, the most that are possible."""

    batch_size = MAX_BATCH_SIZE


def task_of(batch_size: int) -> type[_DoNothing]:
    """The task with batches of about this size at most, 32 or 256."""
    return {32: DoNothing32, 256: DoNothing256}[batch_size]
