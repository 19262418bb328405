"""Chooses what computes a torch module: as the settings say, as an earlier start found, or by measuring."""

import logging
import sys
import time
from collections.abc import Mapping
from functools import cached_property

from torch import Tensor, nn

from modalkit.pipelines.cpu_threads import cpu_threads
from modalkit.pipelines.engines.exported import Converted, dtypes_of
from modalkit.pipelines.engines.kept import Kept
from modalkit.pipelines.engines.measuring import Race
from modalkit.pipelines.engines.packed import packable_dtypes
from modalkit.pipelines.engines.probe import Conversion
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
from modalkit.pipelines.engines.torch_engine import Run, device_of, dtype_of, example_of, torch_run, weight_bytes
from modalkit.pipelines.errors import EngineError, describe
from modalkit.pipelines.memory import free_bytes

logger = logging.getLogger(__name__)

CONVERSION_SHARE = 0.6  # of `measure_seconds`, after which conversions are not waited for
ONNX_EXPORT_S = 5.0  # what an export for ONNX Runtime takes at least; where no start waits so long, it comes after it
MAX_ATTEMPTS = 3  # starts that measure, where a conversion took longer or too few samples were compared

Chosen = tuple[Run, EngineChoice]


class Chooser:
    """One call of `load_engine`."""

    def __init__(
        self, module: nn.Module, batches: list[Mapping[str, Tensor]], settings: EngineSettings, same: Same | None
    ) -> None:
        if not batches:
            raise ValueError("example_inputs is empty: give at least one batch of tensors by name")
        self._module = module
        self._batches = batches
        self._settings = settings
        self._same = same or default_same(settings.sameness)
        self._started_s = time.perf_counter()
        self._device = device_of(module)
        self._own_dtype = dtype_of(module)
        self._bytes = weight_bytes(module)

    @cached_property
    def _kept(self) -> Kept:
        """What is kept for the module. Reads all its weights."""
        return Kept(self._module, self._batches, self._settings, self._same, self._candidates())

    def choose(self) -> Chosen:
        """What computes the module, and why. Raises `EngineError`."""
        asked = self._settings
        candidates = self._candidates()
        default = candidates[0]
        if len(candidates) == 1:
            return self._load(default, "as configured" if asked.engine != "auto" else "the only one possible here")
        if self._bytes > asked.max_copied_bytes:
            sizes = f"its {self._bytes / 2**20:,.0f} MiB are more than max_copied_bytes"
            return self._load(default, f"not measured, because the model is not loaded twice: {sizes}")
        try:
            kept = self._kept_engine()
        except Exception as error:  # noqa: BLE001  # no home folder, weights of a kind of their own
            logger.warning("Engines are not measured: %s", describe(error))
            return self._load(default, "not measured, because nothing can be kept for it")
        if kept is not None:
            return kept
        if asked.measure_seconds == 0:
            return self._load(default, "not measured, because measure_seconds is 0")
        copied_bytes, free = (len(candidates) - 1) * self._bytes, free_bytes()
        if self._device.type == "cpu" and free is not None and free < copied_bytes:
            sizes = f"its copies need {copied_bytes / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB of memory are free"
            return self._load(default, f"not measured, because {sizes}")
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
        engines: tuple[EngineName, ...] = ("torch", "torch-packed", "torch-unpadded", *CONVERTED)
        for engine in engines:
            try:
                found += [Candidate(engine, dtype) for dtype in self._dtypes(engine) if asked.dtype in ("auto", dtype)]
            except EngineError:
                continue  # it is not installed
            except Exception as error:  # noqa: BLE001  # a broken installation raises anything
                logger.warning("Engine %s cannot be used: %s", engine, describe(error))
        return found

    def _dtypes(self, engine: EngineName) -> list[DTypeName]:
        if engine in CONVERTED:
            return dtypes_of(engine, self._device)
        if engine == "torch-packed":
            return packable_dtypes() if self._device.type == "cpu" else []
        if engine == "torch-unpadded":
            if "transformers" not in sys.modules:  # so the module is none of its models, and importing it takes seconds
                return []
            from modalkit.pipelines.engines.unpadded import unpaddable_dtypes

            return unpaddable_dtypes(self._module, self._device)
        if self._settings.dtype != "auto":
            return [self._settings.dtype]
        if engine == "torch-compile":
            return [self._own_dtype]
        sensible = list(DTYPES)
        if self._device.type == "cpu":  # which does not compute quickly in float16
            # A CPU that computes quickly in bfloat16 has it packed, which is never slower; on others it is the slowest.
            sensible = ["float32"] if self._settings.engine == "auto" else ["float32", "bfloat16"]
        return [self._own_dtype, *(dtype for dtype in sensible if dtype != self._own_dtype)]

    def _load(self, candidate: Candidate, reason: str) -> Chosen:
        """Load one engine without comparing it. Raises `EngineError`."""
        try:
            if candidate.engine in CONVERTED and not self._kept.is_converted(candidate.engine):
                self._convert([candidate]).require_success()
            return self._tried(EngineChoice(engine=candidate.engine, dtype=candidate.dtype, reason=reason))
        except Exception as error:
            raise EngineError(
                f"engine {candidate} cannot run this model: {describe(error)}. Set engine and dtype to auto, or to "
                "torch and float32"
            ) from error

    def _tried(self, choice: EngineChoice) -> Chosen:
        """What computes a choice, once it has computed a batch."""
        run = self._open(choice.candidate)
        if isinstance(run, Converted):
            run.prepare()
        run(self._batches[0])
        return run, choice

    def _kept_engine(self) -> Chosen | None:
        """The engine of an earlier choice, if that was a complete one and can be used again."""
        choice = self._kept.choice() if self._settings.use_kept_choice else None
        if choice is None or ((choice.unfinished or choice.is_tentative) and choice.attempts < MAX_ATTEMPTS):
            return None
        try:
            return self._tried(choice)
        except Exception as error:  # noqa: BLE001  # whatever an engine raises, measuring finds another one
            logger.warning("%s, chosen earlier, fails: %s. Measuring again", choice.candidate, describe(error))
            return None

    def _measured_engine(self, candidates: list[Candidate]) -> Chosen:
        race = Race(
            torch_run(self._module, REFERENCE, self._batches[0]), self._batches, fewer_threads=self._fewer_threads
        )
        refused, unfinished = self._race(race, candidates)
        for name, why in refused.items():
            logger.warning("Engine %s cannot run this model: %s", name, why)
        default, runs = candidates[0], race.runs()
        if default not in runs:
            return self._load(default, "as configured")
        earlier = self._kept.choice()
        try:
            choice = race.choose(self._same, default)
            if choice.is_tentative and earlier and earlier.samples >= choice.samples and earlier.candidate in runs:
                choice = earlier
            run = runs[choice.candidate]
            if isinstance(run, Converted):
                run.prepare()
        except Exception as error:  # noqa: BLE001  # a comparison of the user's may raise anything
            logger.warning("Outputs of engines cannot be compared: %s", describe(error))
            reason = "outputs could not be compared, so nothing else is used"
            return runs[default], EngineChoice(engine=default.engine, dtype=default.dtype, reason=reason)
        choice = choice.model_copy(
            update={
                "refused": {**refused, **choice.refused},
                "unfinished": unfinished,
                "attempts": 1 if earlier is None else earlier.attempts + 1,
            }
        )
        self._kept.keep(choice)
        return run, choice

    def _race(self, race: Race, candidates: list[Candidate]) -> tuple[dict[str, str], tuple[EngineName, ...]]:
        """Time the candidates. Returns why engines or candidates cannot run, and the engines to be converted yet."""
        converted = [each for each in candidates if each.engine in CONVERTED]
        waits_for_onnx = CONVERSION_SHARE * self._settings.measure_seconds >= ONNX_EXPORT_S
        later = [each for each in converted if each.engine == "onnx" and not waits_for_onnx]
        conversions = self._start_conversions([each for each in converted if each not in later])
        try:
            self._fewer_threads()  # conversions need the cores
            for candidate in candidates:
                if candidate not in converted:  # the others are converted meanwhile
                    race.enter(candidate, self._open)
            refused = self._finish(conversions)
            cpu_threads().use(cpu_threads().total)
            ready = [each for each in converted if self._kept.is_converted(each.engine)]
            for candidate in ready:
                race.enter(candidate, self._open)
            race.run(self._started_s + self._settings.measure_seconds)
        finally:
            for conversion in (*conversions, *self._start_conversions(later)):
                conversion.go_on()
        unfinished = dict.fromkeys(
            each.engine for each in converted if each not in ready and each.engine not in refused
        )
        return refused | race.errors(), tuple(unfinished)

    def _fewer_threads(self) -> None:
        """Give torch what one of several batches at once has; in this thread only, which ends with the choice."""
        if self._device.type == "cpu":
            cpu_threads().use(cpu_threads().total // cpu_threads().max_in_flight)

    def _start_conversions(self, candidates: list[Candidate]) -> list[Conversion]:
        """Start a conversion for each engine that has none yet; one that cannot start is logged."""
        started = []
        for engine in CONVERTED:
            wanted = [candidate for candidate in candidates if candidate.engine == engine]
            try:
                if wanted and not self._kept.is_converted(engine):
                    started.append(self._convert(wanted))
            except Exception as error:  # noqa: BLE001  # no folder, no process: nothing that stops a start
                logger.warning("Engine %s cannot be tried: %s", engine, describe(error))
        return started

    def _convert(self, candidates: list[Candidate]) -> Conversion:
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
        if candidate.engine in CONVERTED:
            return Converted(candidate, self._kept.export_folder(candidate.engine), self._device)
        may_copy = self._bytes <= self._settings.max_copied_bytes
        return torch_run(self._module, candidate, example_of(self._batches), may_copy=may_copy)
