"""How many jobs wait in the store for one claimer, so that new ones need not wait there where there is room for all."""

from collections.abc import Awaitable, Callable, Sequence

from modalkit.service.jobs.model import Job

UNKNOWN = 2**40
"""Stands for any number of jobs."""


class Backlog:
    """An upper bound of the jobs that wait in the store to be claimed, or are being claimed; at first it is not known.

    What comes meanwhile goes past the store where there is room for it beside `at_most` others.
    """

    def __init__(self) -> None:
        self.at_most = UNKNOWN
        self._has_probe = False

    def add(self, jobs: int = UNKNOWN) -> None:
        """So many jobs more wait, or any number."""
        self.at_most += jobs

    async def claim(self, limit: int, claim: Callable[[int], Awaitable[Sequence[Job]]]) -> Sequence[Job]:
        """Claim up to `limit` jobs by `claim`, which gets the number; it may return fewer than wait, but not none."""
        before = self.at_most
        claimed = await claim(min(limit, before))
        if len(claimed) < min(limit, before):
            # Probably all that waited. One more is asked for, to see whether that is so.
            self._has_probe = len(claimed) > 0
            self.at_most += self._has_probe - before
        else:
            self.at_most -= len(claimed)
            if self._has_probe and not self.at_most:
                self.add()
        return claimed
