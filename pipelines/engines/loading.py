"""`load_engine`: an engine for a torch module, named by the settings or chosen by measuring."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

from modalkit.pipelines.engines.sameness import Same, default_same
from modalkit.pipelines.engines.settings import (
    CONVERTED,
    DTYPES,
    REFERENCE,
    Candidate,
    DTypeName,
    EngineChoice,
    EngineName,
    EngineSettings,
)
from modalkit.pipelines.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modalkit.pipelines.engines.kept import Kept
    from modalkit.pipelines.engines.measuring import Contender
    from modalkit.pipelines.engines.probe import Conversion
    from modalkit.pipelines.engines.torch_engine import Run

logger = logging.getLogger(__name__)

CONVERSION_SHARE = 0.6  # of `measure_seconds`, after which conversions are not waited for
MAX_ATTEMPTS = 3  # starts that wait for a conversion that takes longer


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
    loader = _Loader(module, list(example_inputs), settings or EngineSettings(), same)
    # In a thread of its own: OpenMP keeps threads for each thread that computed, and too many slow all others down.
    with ThreadPoolExecutor(1, "load engine") as thread:
        return thread.submit(loader.load).result()


class _Loader:
    """One call of `load_engine`."""

    def __init__(
        self, module: nn.Module, batches: list[Mapping[str, Tensor]], settings: EngineSettings, same: Same | None
    ) -> None:
        from modalkit.pipelines.engines.torch_engine import device_of, dtype_of, weight_bytes

        if not batches:
            raise ValueError("example_inputs is empty: give at least one batch of tensors by name")
        self._module = module
        self._batches = batches
        self._settings = settings
        self._same = same
        self._started_s = time.perf_counter()
        self._device = device_of(module)
        self._own_dtype = dtype_of(module)
        self._bytes = weight_bytes(module)

    @cached_property
    def _kept(self) -> Kept:
        """What is kept for the module. Reads all its weights."""
        from modalkit.pipelines.engines.kept import Kept

        return Kept(self._module, self._batches, self._settings, self._same)

    def load(self) -> Engine:
        asked = self._settings
        candidates = self._candidates()
        default = candidates[0]
        if len(candidates) == 1:
            return self._load(default, "as configured" if asked.engine != "auto" else "the only one possible here")
        if self._bytes > asked.max_copied_bytes:
            sizes = f"its {self._bytes / 2**20:,.0f} MiB are more than max_copied_bytes"
            return self._load(default, f"not measured, because the model is not loaded twice: {sizes}")
        try:
            engine = self._kept_engine()
        except Exception as error:  # noqa: BLE001  # no home folder, weights of a kind of their own
            logger.warning("Engines are not measured: %s", _text(error))
            return self._load(default, "not measured, because nothing can be kept for it")
        if engine is not None:
            return engine
        if asked.measure_seconds == 0:
            return self._load(default, "not measured, because measure_seconds is 0")
        return self._measured_engine(candidates)

    def _candidates(self) -> list[Candidate]:
        """What the settings allow on this device; first the one that runs where nothing is measured.

        Raises `EngineError` if an engine or number format is asked for that this machine does not have.
        """
        asked = self._settings
        if asked.engine != "auto":
            dtypes = self._dtypes(asked.engine)
            if found := [Candidate(asked.engine, dtype) for dtype in dtypes if asked.dtype in ("auto", dtype)]:
                return found
            able = f"computes in {' or '.join(dtypes)} only" if dtypes else "cannot compute"
            wish = "engine to auto" if asked.dtype == "auto" or not dtypes else "dtype or engine to auto"
            raise EngineError(f"engine {asked.engine} {able} on this device ({self._device.type}): set {wish}")
        found = []
        # Compiling takes longer than a start may, so that has to be asked for.
        engines: tuple[EngineName, ...] = ("torch", "torch-packed", *CONVERTED)
        for engine in engines:
            try:
                dtypes = self._dtypes(engine)
            except Exception as error:  # noqa: BLE001  # a broken installation raises anything
                if not isinstance(error, EngineError):
                    logger.warning("Engine %s cannot be used: %s", engine, _text(error))
                continue
            found += [Candidate(engine, dtype) for dtype in dtypes if asked.dtype in ("auto", dtype)]
        return found

    def _dtypes(self, engine: EngineName) -> list[DTypeName]:
        from modalkit.pipelines.engines.exported import dtypes_of
        from modalkit.pipelines.engines.packed import packable_dtypes

        if engine in CONVERTED:
            return dtypes_of(engine, self._device)
        if engine == "torch-packed":
            return packable_dtypes() if self._device.type == "cpu" else []
        if self._settings.dtype != "auto":
            return [self._settings.dtype]
        if engine == "torch-compile":
            return [self._own_dtype]
        sensible = list(DTYPES)
        if self._device.type == "cpu":  # which does not compute quickly in float16
            sensible = ["float32", "bfloat16"]
            if self._settings.engine == "auto" and "bfloat16" in packable_dtypes():  # packed, it is never slower
                sensible = ["float32"]
        return [self._own_dtype, *(dtype for dtype in sensible if dtype != self._own_dtype)]

    def _load(self, candidate: Candidate, reason: str) -> Engine:
        """Load one engine without comparing it. Raises `EngineError`."""
        choice = EngineChoice(engine=candidate.engine, dtype=candidate.dtype, reason=reason)
        try:
            if candidate.engine in CONVERTED and not self._kept.export_folder(candidate.engine).is_dir():
                self._convert([candidate]).require_success()
            engine = Engine(self._open(candidate), choice)
            engine(**self._batches[0])
        except Exception as error:
            raise EngineError(
                f"engine {candidate} cannot run this model: {_text(error)}. Set engine and dtype to auto, or to torch "
                "and float32"
            ) from error
        return engine

    def _kept_engine(self) -> Engine | None:
        """The engine of an earlier choice, if that was a complete one and can be used again."""
        choice = self._kept.choice() if self._settings.use_kept_choice else None
        if choice is None or (choice.unfinished and choice.attempts < MAX_ATTEMPTS):
            return None
        try:
            engine = Engine(self._open(choice.candidate), choice)
            engine(**self._batches[0])
        except Exception as error:  # noqa: BLE001  # whatever an engine raises, measuring finds another one
            logger.warning("%s, chosen earlier, fails: %s. Measuring again", choice.candidate, _text(error))
            return None
        return engine

    def _measured_engine(self, candidates: list[Candidate]) -> Engine:
        from modalkit.pipelines.engines.measuring import Race
        from modalkit.pipelines.engines.torch_engine import torch_run

        conversions = self._start_conversions(candidates)
        try:
            race = Race(torch_run(self._module, REFERENCE), self._batches)
            refused = self._finish(conversions)
            contenders: list[Contender] = []
            unfinished = tuple(conversion.engine for conversion in conversions if not conversion.has_ended)
            for candidate in candidates:
                if candidate.engine in (*unfinished, *refused):
                    continue
                try:
                    contenders.append(race.contender(candidate, self._open))
                except Exception as error:  # noqa: BLE001  # a broken candidate must not stop the start
                    refused[str(candidate)] = _text(error)
            race.run(contenders, self._started_s + self._settings.measure_seconds)
        finally:
            for conversion in conversions:
                conversion.go_on()
        for contender in contenders:
            if contender.error is not None:
                refused[str(contender.candidate)] = contender.error
        for name, why in refused.items():
            logger.warning("Engine %s cannot run this model: %s", name, why)
        runs = {contender.candidate: contender.run for contender in contenders if contender.error is None}
        if candidates[0] not in runs:
            return self._load(candidates[0], "as configured")
        same = self._same or default_same(self._settings.sameness, race.reference_outputs[0])
        try:
            choice = race.choose(contenders, same, candidates[0])
        except Exception as error:  # noqa: BLE001  # a comparison of the user's may raise anything
            logger.warning("Outputs of engines cannot be compared: %s", _text(error))
            default = candidates[0]
            reason = "outputs could not be compared, so nothing else is used"
            return Engine(runs[default], EngineChoice(engine=default.engine, dtype=default.dtype, reason=reason))
        earlier = self._kept.choice()
        choice = choice.model_copy(
            update={
                "refused": {**refused, **choice.refused},
                "unfinished": unfinished,
                "attempts": 1 if earlier is None else earlier.attempts + 1,
            }
        )
        self._kept.keep(choice)
        return Engine(runs[choice.candidate], choice)

    def _start_conversions(self, candidates: list[Candidate]) -> list[Conversion]:
        started = []
        for engine in CONVERTED:
            wanted = [candidate for candidate in candidates if candidate.engine == engine]
            try:
                if wanted and not self._kept.export_folder(engine).is_dir():
                    started.append(self._convert(wanted))
            except Exception as error:  # noqa: BLE001  # no folder, no process: nothing that stops a start
                logger.warning("Engine %s cannot be tried: %s", engine, _text(error))
        return started

    def _convert(self, candidates: list[Candidate]) -> Conversion:
        from modalkit.pipelines.engines.probe import Conversion

        folder = self._kept.export_folder(candidates[0].engine)
        return Conversion(candidates, self._module, self._batches, folder)

    def _finish(self, conversions: list[Conversion]) -> dict[str, str]:
        """Wait for conversions as long as a start may; those that take longer go on. Returns errors by engine.

        The conversion for an engine that is asked for is waited for until it has ended.
        """
        limit_s = self._started_s + CONVERSION_SHARE * self._settings.measure_seconds
        for conversion in conversions:
            conversion.wait(None if self._settings.engine in CONVERTED else limit_s - time.perf_counter())
        return {c.engine: c.error for c in conversions if c.has_ended and c.error is not None}

    def _open(self, candidate: Candidate) -> Run:
        from modalkit.pipelines.engines.exported import open_converted
        from modalkit.pipelines.engines.torch_engine import torch_run

        if candidate.engine in CONVERTED:
            return open_converted(candidate, self._kept.export_folder(candidate.engine), self._device)
        return torch_run(self._module, candidate, may_copy=self._bytes <= self._settings.max_copied_bytes)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
