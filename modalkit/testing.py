"""For tests of your own: an engine that carries calls within this process, with faults that can be switched on."""

from modalkit.service.calls.in_process import Faults, InProcessEngine, WorkerLostError, in_process_gateway

__all__ = ["Faults", "InProcessEngine", "WorkerLostError", "in_process_gateway"]
