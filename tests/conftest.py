"""Fixtures that tests of several folders share, and what all of them run with."""

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

gc.disable()  # while the tests are imported, whose objects stay anyway; each process would collect for 4 s

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch at its import; each core has a worker already

# A busy machine is no reason to fail. The second one is for `pytest --hypothesis-profile=thorough`.
settings.register_profile("modalkit", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("modalkit")
settings.register_profile("thorough", max_examples=2000)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which one may do without
def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores, because tests wait about as long as they compute; 8 at most."""
    return min((os.cpu_count() or 1) + 1, 8)


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run each asynchronous test on both event loops that the scheduler supports."""
    backend: str = request.param
    return backend


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> None:
    """Keep the garbage collector from what the imports have made: a collection of all of it takes 0.3 s."""
    gc.collect()
    gc.freeze()
