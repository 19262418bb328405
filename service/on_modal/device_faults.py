"""Tells a device that is broken, for this process at least, from errors of a batch."""

import re
import sys

from modalkit.service.errors import error_text
from modalkit.service.pipeline_batches import is_too_large

_OF_THE_DEVICE = re.compile(
    r"CUDA error|HIP error|device-side assert|an illegal memory access|unspecified launch failure"
    r"|CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)"
    r"|CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
)
# After these a context goes on working; they are the fault of a call, or of the build ("cudaError", CUDA Runtime API).
_OF_THE_CALL = re.compile(
    r"invalid (configuration )?argument|invalid device (function|ordinal)|no kernel image"
    r"|CUBLAS_STATUS_(INVALID_VALUE|NOT_SUPPORTED|ARCH_MISMATCH)"
)


def is_device_fault(error: Exception) -> bool:
    """Whether no later batch of this process can succeed, because its CUDA context is lost. Out of memory is not so."""
    if is_too_large(error):
        return False
    # torch has an error of its own for it since 2.8; not imported here, for a pipeline may do without.
    accelerator_error: tuple[()] | type[Exception] = getattr(sys.modules.get("torch"), "AcceleratorError", ())
    text = error_text(error)
    if not isinstance(error, accelerator_error) and not (
        isinstance(error, RuntimeError) and _OF_THE_DEVICE.search(text)
    ):
        return False
    return _OF_THE_CALL.search(text) is None
