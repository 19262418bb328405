"""How a process that serves for long sets Python's garbage collector."""

import gc

COLLECTED_FROM_OBJECTS = 10_000


def spare_the_garbage_collector() -> None:
    """Let it pass over what is there for good, and look at the rest less often: it took a third of a job's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTED_FROM_OBJECTS)
