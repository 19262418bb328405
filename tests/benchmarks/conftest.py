from typing import Any

import pytest
from trio.testing import MockClock

from modalkit.benchmarks.in_process import BundledPipeline


@pytest.fixture
def virtual_time() -> tuple[str, dict[str, Any]]:
    """An event loop whose clock jumps to the next timer whenever nothing else is to be done."""
    return "trio", {"clock": MockClock(autojump_threshold=0)}


@pytest.fixture(scope="session")
def bundled_pipeline() -> BundledPipeline:
    """The bundled model, loaded once."""
    return BundledPipeline()
