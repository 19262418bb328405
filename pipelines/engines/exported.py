"""OpenVINO and ONNX Runtime: converts a torch module into a folder, and runs what is there."""

import copy
import importlib.util
import json
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modalkit.pipelines.cpu_threads import cpu_threads
from modalkit.pipelines.engines.settings import Candidate, DTypeName
from modalkit.pipelines.engines.torch_engine import device_of, named_outputs
from modalkit.pipelines.errors import EngineError

PACKAGES = {"openvino": ("openvino",), "onnx": ("onnxruntime", "onnx", "onnxscript")}
OUTPUTS_FILE = "outputs.json"
Compute = Callable[[dict[str, Any]], list[Any]]
ONNX_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def missing_packages(engine: str) -> list[str]:
    """The packages that an engine needs and that are not installed."""
    return [name for name in PACKAGES.get(engine, ()) if importlib.util.find_spec(name) is None]


def dtypes_of(engine: str, device: torch.device) -> list[DTypeName]:
    """The number formats in which a converted module can be computed on a device; none where the engine has no way.

    Imports the engine. Raises `EngineError` for a package that is missing.
    """
    if missing := missing_packages(engine):
        remedy = f"run pip install {' '.join(missing)}, or set engine to auto"
        raise EngineError(f"engine {engine} needs the package {missing[0]}: {remedy}")
    if engine == "onnx":
        import onnxruntime

        return ["float32"] if ONNX_PROVIDERS.get(device.type) in onnxruntime.get_available_providers() else []
    if device.type != "cpu":
        return []
    import openvino

    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names: dict[str, DTypeName] = {"FP32": "float32", "BF16": "bfloat16", "FP16": "float16"}
    return [dtype for name, dtype in names.items() if name in able]


def convert(
    engine: str, module: nn.Module, example: Mapping[str, Tensor], changing: Mapping[str, list[int]], folder: Path
) -> None:
    """Write the module, as the engine reads it, and the names of its outputs into a folder that exists."""
    with torch.inference_mode():
        names = list(named_outputs(module(**example)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn of their own future
        (_to_openvino if engine == "openvino" else _to_onnx)(module, example, changing, folder)
    (folder / OUTPUTS_FILE).write_text(json.dumps(names), encoding="utf-8")


def _to_openvino(
    module: nn.Module, example: Mapping[str, Tensor], changing: Mapping[str, list[int]], folder: Path
) -> None:
    import openvino

    model = openvino.convert_model(module, example_input=dict(example))
    model.reshape(
        {
            name: openvino.PartialShape([-1 if d in changing[name] else size for d, size in enumerate(tensor.shape)])
            for name, tensor in example.items()
        }
    )
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def _to_onnx(module: nn.Module, example: Mapping[str, Tensor], changing: Mapping[str, list[int]], folder: Path) -> None:
    shapes = {name: dict.fromkeys(dimensions, torch.export.Dim.DYNAMIC) for name, dimensions in changing.items()}
    torch.onnx.export(
        module, (), folder / "model.onnx", kwargs=dict(example), dynamo=True, dynamic_shapes=shapes, verbose=False
    )


class Converted:
    """Runs what `convert` wrote. The constructor raises what the engine raises if it cannot read or compile it."""

    def __init__(self, candidate: Candidate, folder: Path, device: torch.device) -> None:
        self._names: list[str] = json.loads((folder / OUTPUTS_FILE).read_text(encoding="utf-8"))
        self._device = device
        self._threads = cpu_threads().total
        self._in_flight = cpu_threads().max_in_flight if device.type == "cpu" else 1
        self._load = partial(_openvino if candidate.engine == "openvino" else _onnx, candidate, folder, device)
        self._alone = self._beside_others = self._load(self._threads, 1)
        self._timed = partial(cpu_threads().timed, object()) if device.type == "cpu" else nullcontext

    def prepare(self) -> None:
        """Load a second instance for batches that run at once, so that they do not wait for each other.

        It computes where `CpuThreads.share` gives the calling thread but a part of the threads.
        """
        if self._in_flight > 1:
            self._beside_others = self._load(self._threads // self._in_flight, self._in_flight)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute a batch."""
        compute = self._alone if torch.get_num_threads() >= self._threads else self._beside_others
        with self._timed(inputs):
            found = compute({name: tensor.numpy(force=True) for name, tensor in inputs.items()})
        # OpenVINO reuses the memory of its outputs in the next call.
        tensors = {n: torch.from_numpy(a.copy()).to(self._device) for n, a in zip(self._names, found, strict=True)}
        return named_outputs(tensors)


def _openvino(candidate: Candidate, folder: Path, _: torch.device, threads: int, at_once: int) -> Compute:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[candidate.dtype],
        "INFERENCE_NUM_THREADS": threads * at_once,
        "NUM_STREAMS": at_once,
    }
    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", options)
    local = threading.local()  # a request can be used by one thread at a time

    def run(arrays: dict[str, Any]) -> list[Any]:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return list(local.request.infer(arrays, share_inputs=True, share_outputs=True).values())

    return run


def _onnx(_: Candidate, folder: Path, device: torch.device, threads: int, at_once: int) -> Compute:  # noqa: ARG001  # threads of a session are shared
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings go to the standard error output, past all logging
    providers = list(dict.fromkeys([ONNX_PROVIDERS[device.type], ONNX_PROVIDERS["cpu"]]))
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=providers)

    def run(arrays: dict[str, Any]) -> list[Any]:
        found: list[Any] = session.run(None, arrays)
        return found

    return run


def on_cpu(module: nn.Module) -> nn.Module:
    """The module, or a float32 copy on the CPU, which is what can be converted."""
    is_ready = device_of(module).type == "cpu" and all(
        tensor.dtype is torch.float32 for tensor in module.parameters() if tensor.is_floating_point()
    )
    return module if is_ready else copy.deepcopy(module).to(device="cpu", dtype=torch.float32)
