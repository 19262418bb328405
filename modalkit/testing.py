"""For tests of your own: a worker and a service without configuration and port, and things that go wrong on demand."""

from modalkit.service.calls.in_process import Faults, InProcessEngine, WorkerLostError, in_process_gateway
from modalkit.service.testing import FakeClock, client_of, poisoned, worker_of

__all__ = [
    "FakeClock",
    "Faults",
    "InProcessEngine",
    "WorkerLostError",
    "client_of",
    "in_process_gateway",
    "poisoned",
    "worker_of",
]
