"""What users of modalkit import; everything here is defined in `batching`, `pipelines` and `service`."""

from importlib import import_module as _import_module
from pathlib import Path as _Path


def _check_packages() -> None:
    """Refuse to start on another project's packages: our names are general, and a folder may hide them."""
    home = _Path(__file__).parent.parent
    for name in ("batching", "benchmarks", "pipelines", "service"):
        found = getattr(_import_module(name), "__file__", None)
        if found is None or _Path(found).parent.parent != home:
            place = "a folder without __init__.py" if found is None else str(_Path(found).parent)
            raise ImportError(
                f"modalkit needs its own package {name!r} in {home}, but Python finds {place}: rename that, or take "
                "its parent folder off the module search path"
            )


_check_packages()

from batching import (  # noqa: E402  # only once they are known to be ours
    BatchPolicy,
    BatchRecord,
    BatchScheduler,
    Failure,
    Stages,
    Success,
)
from service.worker import InferenceWorker  # noqa: E402  # as above

__all__ = ["BatchPolicy", "BatchRecord", "BatchScheduler", "Failure", "InferenceWorker", "Stages", "Success"]
