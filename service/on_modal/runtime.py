"""What Modal's runtime says of the process that this is."""

import modal
import modal.experimental


def takes_one_input_at_a_time() -> bool:
    """Whether this is a container of a function or class that is not decorated with `modal.concurrent`."""
    if modal.is_local():
        return False
    try:
        concurrency: int = modal.experimental.get_local_input_concurrency()  # type: ignore[no-untyped-call]  # Modal leaves it so
    except (AssertionError, AttributeError):  # a server has no inputs; Modal only asserts that there are some
        return False
    return concurrency == 1
