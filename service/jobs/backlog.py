"""An upper bound of the jobs that wait in the store, so that new ones can bypass it while all have room."""

from collections.abc import Awaitable, Callable, Sequence

from modalkit.service.jobs.model import Job

UNKNOWN = 2**40
"""The bound where the number of waiting jobs is not known."""


class Backlog:
    """An upper bound of the jobs that wait in the store to be claimed by one task, or are being claimed by it.

    If there is room for a new job beside `at_most` others, it can start at once, without being read from the store.
    """

    def __init__(self) -> None:
        self.at_most = UNKNOWN
        self._has_probe = False

    def add(self, jobs: int = UNKNOWN) -> None:
        """Count new waiting jobs; without a number, any number of jobs may wait from now on."""
        self.at_most += jobs

    async def claim(self, limit: int, claim: Callable[[int], Awaitable[Sequence[Job]]]) -> Sequence[Job]:
        """Claim up to `limit` jobs and lower the bound. `claim` gets the number of jobs to claim.

        It may return fewer jobs than wait, but none only where none waits.
        """
        before = self.at_most
        claimed = await claim(min(limit, before))
        if len(claimed) < min(limit, before):
            # Probably all that waited. The next claim asks for one job, to see whether that is so.
            self._has_probe = len(claimed) > 0
            self.at_most += self._has_probe - before
        else:
            self.at_most -= len(claimed)
            if self._has_probe and not self.at_most:
                self.add()
        return claimed
