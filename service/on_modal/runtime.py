"""What Modal's runtime says of the process that this is."""

import modal
import modal.experimental


def takes_one_input_at_a_time() -> bool:
    """Whether this is a container of a function or class that is not decorated with `modal.concurrent`."""
    return not modal.is_local() and modal.experimental.get_local_input_concurrency() == 1  # type: ignore[no-untyped-call]  # Modal leaves it so
