"""How many jobs wait in the store for one claimer, so that new ones go past the store where none do."""

from collections.abc import Awaitable, Callable, Sequence

from modalkit.service.jobs.model import Job

UNKNOWN = 2**40
"""Stands for any number of jobs."""


class Backlog:
    """An upper bound of the jobs that wait in the store to be claimed; at first it is not known.

    What comes while `is_claimed` need not wait in the store: nothing waits there that is not being claimed already.
    """

    def __init__(self) -> None:
        self._at_most = UNKNOWN
        self._has_probe = False
        self.claiming = 0
        """How many jobs are being claimed."""

    def add(self, jobs: int = UNKNOWN) -> None:
        """So many jobs more wait, or any number."""
        self._at_most += jobs

    def __bool__(self) -> bool:
        """Whether any may wait."""
        return self._at_most > 0

    @property
    def is_claimed(self) -> bool:
        """Whether none waits but those that are being claimed."""
        return self._at_most == self.claiming

    async def claim(self, limit: int, claim: Callable[[int], Awaitable[Sequence[Job]]]) -> Sequence[Job]:
        """Claim up to `limit` jobs by `claim`, which gets the number; it may return fewer than wait, but not none."""
        before = self._at_most
        self.claiming = min(limit, before)
        try:
            claimed = await claim(self.claiming)
            if len(claimed) < self.claiming:
                # Probably all that waited. One more is asked for, to see whether that is so.
                self._has_probe = len(claimed) > 0
                self._at_most += self._has_probe - before
            else:
                self._at_most -= self.claiming
                if self._has_probe and not self._at_most:
                    self.add()
        finally:
            self.claiming = 0
        return claimed
