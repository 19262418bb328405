"""Torch as an engine, and what the other engines need of a torch module."""

import copy
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from modalkit.pipelines.cpu_threads import cpu_threads
from modalkit.pipelines.engines.packed import pack_linears
from modalkit.pipelines.engines.settings import DTYPES, Candidate, DTypeName
from modalkit.pipelines.errors import EngineError

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Computes one batch."""


def device_of(module: nn.Module) -> torch.device:
    """Where the weights are; the CPU for a module without weights."""
    return next((tensor.device for tensor in module.parameters()), torch.device("cpu"))


def dtype_of(module: nn.Module) -> DTypeName:
    """The number format of the first weights with a fraction; float32 for a module without any."""
    kinds: dict[torch.dtype, DTypeName] = {getattr(torch, name): name for name in DTYPES}
    return next((kinds[tensor.dtype] for tensor in module.parameters() if tensor.dtype in kinds), "float32")


def weight_bytes(module: nn.Module) -> int:
    """The memory of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def named_outputs(outputs: object) -> dict[str, Tensor]:
    """A module's outputs by name, those with a fraction in float32.

    A mapping keeps its names; a lone tensor is called ``output``, and those of a tuple ``output_0`` and so on.
    Raises `TypeError` for other outputs.
    """
    if isinstance(outputs, Tensor):
        named = {"output": outputs}
    elif isinstance(outputs, Mapping):
        named = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
    elif isinstance(outputs, tuple | list):
        named = {f"output_{i}": value for i, value in enumerate(outputs) if isinstance(value, Tensor)}
    else:
        raise TypeError(f"a module must return tensors, by name or in a tuple, not {type(outputs).__name__}")
    return {name: value.float() if value.is_floating_point() else value for name, value in named.items()}


def torch_run(module: nn.Module, candidate: Candidate, example: Mapping[str, Tensor], *, may_copy: bool = True) -> Run:
    """Run a module by torch. To change its weights, a copy is made if `may_copy`, else the module is changed.

    `example` is a batch. Raises `EngineError` where torch cannot compile.
    """
    dtype: torch.dtype = getattr(torch, candidate.dtype)
    device = device_of(module)
    own: Callable[..., object] = module
    timed = partial(cpu_threads().timed, object()) if device.type == "cpu" else nullcontext

    def placed(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
            for name, tensor in inputs.items()
        }

    if dtype_of(module) != candidate.dtype or candidate.engine in ("torch-packed", "torch-unpadded"):
        changed = (copy.deepcopy(module) if may_copy else module).to(dtype=dtype)
        if candidate.engine == "torch-unpadded":
            from modalkit.pipelines.engines.unpadded import remove_padding

            remove_padding(changed, placed(example))
        if candidate.engine in ("torch-packed", "torch-unpadded") and device.type == "cpu":
            pack_linears(changed)
        own = changed
    if candidate.engine == "torch-compile":
        _require_compiler(device)
        own = torch.compile(own, dynamic=True)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode(), timed(inputs):
            return named_outputs(own(**placed(inputs)))

    return run


def _require_compiler(device: torch.device) -> None:
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise EngineError("torch-compile needs a C++ compiler on a CPU: install g++, or set engine to torch")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise EngineError("torch-compile needs the package triton on CUDA: install it, or set engine to torch")


def changing_dimensions(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, list[int]]:
    """For each input, the dimensions whose size is not the same in all batches."""
    return {
        name: [d for d in range(batches[0][name].dim()) if len({batch[name].shape[d] for batch in batches}) > 1]
        for name in batches[0]
    }


def example_of(batches: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """The smallest batch in which no dimension is 1: exporters take 1 for a constant."""
    by_size = sorted(batches, key=lambda batch: sum(tensor.numel() for tensor in batch.values()))
    return next((b for b in by_size if all(size > 1 for t in b.values() for size in t.shape)), by_size[-1])
