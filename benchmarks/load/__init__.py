"""The load generator: closed and open loops against any HTTP server, from processes of their own.

``run_load(preset("ours", "http://127.0.0.1:8000"), items, Load(clients=64, seconds=10))``; `modalkit bench` is built on
it, and so are the other benchmarks over HTTP.
"""

from modalkit.benchmarks.load.capacity import own_capacity
from modalkit.benchmarks.load.endpoint import PRESETS, Endpoint, preset
from modalkit.benchmarks.load.figures import Measured
from modalkit.benchmarks.load.plan import BenchError, Load, OptionError
from modalkit.benchmarks.load.processes import run_load

__all__ = ["PRESETS", "BenchError", "Endpoint", "Load", "Measured", "OptionError", "own_capacity", "preset", "run_load"]
