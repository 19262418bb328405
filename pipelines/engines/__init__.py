"""Engines: what computes a model. Torch, torch.compile, OpenVINO or ONNX Runtime, in float32 or a shorter type.

`load_engine` takes a torch module and returns an `Engine`, which is called with named tensors. By default it measures
what this device and the installed packages allow, and takes the fastest whose outputs are those of torch in float32.
Nothing here imports torch, OpenVINO or ONNX Runtime before it is needed.
"""

from modalkit.pipelines.engines.loading import Engine, load_engine
from modalkit.pipelines.engines.sameness import Outputs, Same, same_labels, same_vectors
from modalkit.pipelines.engines.settings import Candidate, EngineChoice, EngineSettings, Sameness

__all__ = [
    "Candidate",
    "Engine",
    "EngineChoice",
    "EngineSettings",
    "Outputs",
    "Same",
    "Sameness",
    "load_engine",
    "same_labels",
    "same_vectors",
]
