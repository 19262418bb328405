"""Fixtures that tests of several folders share."""

import pytest


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run each asynchronous test on both event loops that the scheduler supports."""
    backend: str = request.param
    return backend
