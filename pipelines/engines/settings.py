"""What to load an engine by, and what was chosen. Imports no engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field

EngineName = Literal["torch", "torch-packed", "torch-unpadded", "torch-compile", "openvino", "onnx"]
DTypeName = Literal["float32", "bfloat16", "float16"]

DTYPES: tuple[DTypeName, ...] = get_args(DTypeName)
CONVERTED: tuple[EngineName, ...] = ("openvino", "onnx")
"""Engines that run a converted module."""


class Candidate(NamedTuple):
    """An engine and the number format that it computes in."""

    engine: EngineName
    dtype: DTypeName

    def __str__(self) -> str:
        return f"{self.engine} {self.dtype}"


REFERENCE = Candidate("torch", "float32")
"""What other candidates are compared with."""


class Sameness(BaseModel):
    """How far the outputs of an engine may be from those of torch in float32."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label_agreement: float = Field(default=0.995, ge=0, le=1)
    """Least share of the samples, ties excepted, that keep their label."""
    tie: float = Field(default=0.02, ge=0)
    """The two best labels of a sample whose probabilities differ by at most this are a tie."""
    confidence_change: float = Field(default=0.02, ge=0)
    """What 99 of 100 samples' probability of the best label may change by at most."""
    cosine: float = Field(default=0.999, le=1)
    """For outputs that are no labels: the least cosine similarity that 99 of 100 vectors must have."""


class EngineOptions(BaseModel):
    """How engines are measured and kept, for all models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache_folder: Path | None = None
    """Folder of converted models and of choices; null: ``modalkit/engines`` in the user's cache folder."""
    sameness: Sameness = Sameness()
    """The limits for outputs beside float32."""
    max_copied_bytes: int = Field(default=2**30, ge=0)
    """A module with more bytes of weights is not loaded twice, so nothing is measured: torch runs it as it is."""
    measure_seconds: float = Field(default=2.4, ge=0)
    """Maximum seconds that conversions and measuring add to a start; 0 measures nothing."""


class EngineSettings(EngineOptions):
    """How `load_engine` chooses."""

    engine: Literal["auto", EngineName] = "auto"
    """``auto`` measures the engines of this device; another one is used, or `EngineError` is raised."""
    dtype: Literal["auto", DTypeName] = "auto"
    """The number format to compute in; ``auto`` measures those of the engine."""
    use_kept_choice: bool = True
    """Whether an earlier choice for these weights, device and packages is used without measuring."""


class EngineChoice(BaseModel):
    """Which engine runs a module, and why."""

    model_config = ConfigDict(frozen=True)

    engine: EngineName
    dtype: DTypeName
    reason: str
    """Why it runs, where it was not measured."""
    speeds: Mapping[str, float] = {}
    """How fast each measured candidate was beside torch float32, by its name."""
    refused: Mapping[str, str] = {}
    """Why a candidate cannot be taken, by its name."""
    samples: int = 0
    """The number of samples whose outputs were compared."""
    unfinished: tuple[str, ...] = ()
    """Engines whose conversion took longer than the start may; a later start measures them."""
    is_tentative: bool = False
    """Whether too few samples could be compared in `EngineOptions.measure_seconds`; a later start measures again."""
    attempts: int = 1
    """The number of starts that measured."""

    @property
    def candidate(self) -> Candidate:
        """The engine with its number format."""
        return Candidate(self.engine, self.dtype)

    def __str__(self) -> str:
        """One line for the log: what runs, what it beat, and by how much."""
        text = f"{self.candidate}, {self.reason}"
        own = self.speeds.get(str(self.candidate), 1.0)
        beaten = sorted(((own / speed, name) for name, speed in self.speeds.items() if name != str(self.candidate)))
        if beaten:
            text += ": " + ", ".join(f"{ratio:.2f} x {name}" for ratio, name in beaten)
        if self.samples:
            text += f"; outputs compared on {self.samples} samples"
        if self.refused:
            text += "; not taken: " + ", ".join(f"{name} ({why})" for name, why in self.refused.items())
        if self.unfinished:
            text += f"; still to be measured: {', '.join(self.unfinished)}"
        return text
