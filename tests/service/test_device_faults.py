"""Which errors mean that the device is lost for this process."""

import pickle

import anyio
import pytest
import torch

from modalkit.batching import BatchRecord, BatchScheduler
from modalkit.pipelines import BatchTooLargeError
from modalkit.service.errors import ContainerFaultError, DeviceFaultError
from modalkit.service.health import Health
from modalkit.service.pipeline_batches import is_device_fault

FAULTS = [
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported at some other API",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: unspecified launch failure",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: the launch timed out and was terminated",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "HIP error: an illegal memory access was encountered",
]
OTHERS = [
    "CUDA error: out of memory",
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.57 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.",
    "CUDA error: invalid argument",
    "CUDA error: invalid configuration argument",
    "CUDA error: invalid device ordinal",
    "CUDA error: no kernel image is available for execution on the device",
    "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm( handle, opa, opb, m, n, k)`",
    "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(...)`",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "the size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0",
]


@pytest.mark.parametrize("text", FAULTS)
@pytest.mark.parametrize("error_type", [RuntimeError, torch.AcceleratorError])
def test_after_these_the_device_is_lost(text: str, error_type: type[RuntimeError]) -> None:
    assert is_device_fault(error_type(text))


@pytest.mark.parametrize("text", OTHERS)
def test_after_these_it_goes_on_working(text: str) -> None:
    assert not is_device_fault(RuntimeError(text))


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory", "CUDA error: invalid argument", "CUDA error: no kernel image is available"]
)
def test_torchs_own_error_of_a_device_may_be_the_fault_of_a_call(text: str) -> None:
    assert not is_device_fault(torch.AcceleratorError(text))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA error: device-side assert triggered"),
        KeyError("CUDA error: device-side assert triggered"),
        MemoryError(),
        BatchTooLargeError("CUDA error: device-side assert triggered"),
        torch.OutOfMemoryError("CUDA error: device-side assert triggered"),
    ],
)
def test_errors_of_other_kinds_are_not_of_the_device_whatever_they_say(error: Exception) -> None:
    assert not is_device_fault(error)


def test_real_errors_of_torch_on_a_cpu_are_the_batchs() -> None:
    with pytest.raises(RuntimeError) as wrong_shape:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    with pytest.raises(IndexError) as wrong_index:
        torch.nn.functional.embedding(torch.tensor([7]), torch.zeros(2, 3))
    with pytest.raises(RuntimeError) as too_large:
        torch.empty(1 << 60)
    for raised in (wrong_shape, wrong_index, too_large):
        assert not is_device_fault(raised.value)


@pytest.mark.anyio
async def test_the_first_device_is_lost_though_batches_succeed_on_others() -> None:
    def lost(_: list[int]) -> list[int]:
        raise RuntimeError(FAULTS[0])

    records = dict[int, BatchRecord]()
    async with BatchScheduler(
        [lost, lambda items: items], on_batch=lambda record: records.update({record.device: record})
    ) as scheduler:
        while len(records) < 2:
            await anyio.wait_all_tasks_blocked()
            await scheduler.submit_many([1])
    health = Health(scheduler)
    for device in (0, 1, 0):
        health(records[device])
    assert "its device is broken: RuntimeError: CUDA error: device-side assert" in str(health.problem)


def test_the_error_survives_the_way_to_its_caller() -> None:
    error = DeviceFaultError("RuntimeError: CUDA error: device-side assert triggered")
    travelled = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own
    assert type(travelled) is DeviceFaultError
    assert isinstance(travelled, ContainerFaultError)
    assert (str(travelled), travelled.fault) == (str(error), error.fault)
