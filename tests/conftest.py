"""Fixtures that tests of several folders share, and what all of them run with."""

import os

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says nothing on a machine that does other things as well.
settings.register_profile("modalkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("modalkit")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run each asynchronous test on both event loops that the scheduler supports."""
    backend: str = request.param
    return backend
