"""How long to wait between attempts, the one backoff of all retries of modalkit; and a clock for such times."""

import random
import time

FIRST_RETRY_S = 0.5
MAX_RETRY_S = 300.0


def backoff_with_jitter(
    attempt: int, *, first_s: float = FIRST_RETRY_S, longest_s: float = MAX_RETRY_S, factor: float = 4.0
) -> float:
    """Seconds to wait after failed attempt number `attempt`, which counts from 1.

    At most `first_s` after the first attempt, `factor` times as long after each further one, and `longest_s` at last.
    Half of it is random, so that what failed together is not repeated together ("equal jitter", AWS Architecture Blog,
    "Exponential Backoff And Jitter", 2015). With the defaults, the pauses between eight attempts last 6 to 13 minutes.
    """
    ceiling_s = min(longest_s, first_s * factor ** (min(attempt, 64) - 1))
    return ceiling_s * (0.5 + random.random() / 2)  # noqa: S311  # spreads load, keeps no secret


class SteadyClock:
    """Wall-clock Unix seconds at its making, and the seconds since then: setting the machine's clock changes nothing.

    What is due in ten seconds is due in ten seconds, also where the machine's clock is set back by an hour.
    """

    # Linux's other clock stands still while the machine is suspended.
    _CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def __init__(self) -> None:
        self._offset_s = time.time() - time.clock_gettime(self._CLOCK)

    def __call__(self) -> float:
        """The time."""
        return self._offset_s + time.clock_gettime(self._CLOCK)
