"""`load_engine`: an engine for a torch module, named by the settings or chosen by measuring. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from modalkit.pipelines.engines.sameness import Same
from modalkit.pipelines.engines.settings import EngineChoice, EngineSettings
from modalkit.pipelines.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modalkit.pipelines.engines.torch_engine import Run


class Engine:
    """Computes a model: call it with a batch of tensors by name. Several threads may call it at a time."""

    def __init__(self, run: Run, choice: EngineChoice) -> None:
        self._run = run
        self.choice = choice
        """What computes, and why."""

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The outputs by name, on the module's device; those with a fraction are float32.

        A module that returns one tensor has the output ``output``; one that returns a tuple, ``output_0`` and so on.
        """
        return self._run(inputs)

    def close(self) -> None:
        """Free what the engine holds beside the module; a call after it raises `EngineError`."""
        self._run = _closed


def load_engine(
    module: nn.Module,
    example_inputs: Sequence[Mapping[str, Tensor]],
    settings: EngineSettings | None = None,
    *,
    same: Same | None = None,
) -> Engine:
    """An engine for a module in evaluation mode, on the device where its weights are.

    `example_inputs` are batches like those of real use, of several shapes. Engines are timed and compared on them, and
    a dimension that differs between them may have any size later. Some 100 varied samples make a good comparison.
    `same` says what "the same outputs" means; by default it is `same_labels` where there is an output ``logits``, else
    `same_vectors`.

    The engine may use the module itself, so it must not be changed afterwards. Raises `EngineError` if an engine or a
    number format that the settings name cannot run the module here. Whatever else fails is logged as a warning, and
    another candidate runs.
    """
    from modalkit.pipelines.engines.choosing import Chooser

    chooser = Chooser(module, list(example_inputs), settings or EngineSettings(), same)
    # In a thread of its own: OpenMP keeps threads for each thread that computed, and too many slow all others down.
    with ThreadPoolExecutor(1, "load engine") as thread:
        return Engine(*thread.submit(chooser.choose).result())


def _closed(_: Mapping[str, Tensor]) -> dict[str, Tensor]:
    raise EngineError("this engine is closed: load another one")
