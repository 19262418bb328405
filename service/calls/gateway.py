"""The gateway to models that are run by calls, whatever engine carries these."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Self

from anyio import AsyncContextManagerMixin

from modalkit.service.calls.jobs import CallJobs
from modalkit.service.gateway import Model


class CallGateway(AsyncContextManagerMixin):
    """Models and jobs over an engine. Entering it enters what it `opens`, in that order, and then the jobs."""

    def __init__(
        self, models: Mapping[str, Model], jobs: CallJobs, *, opens: Sequence[AbstractAsyncContextManager[Any]]
    ) -> None:
        self.models = models
        self.jobs = jobs
        self._opens = opens

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        async with AsyncExitStack() as stack:
            for resource in self._opens:
                await stack.enter_async_context(resource)
            await stack.enter_async_context(self.jobs)
            yield self
