"""The interface of a model that a worker runs in batches."""

from __future__ import annotations

import inspect
import os
import platform
import threading
from collections.abc import AsyncIterable, Awaitable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel

from modalkit.pipelines.engines.settings import EngineChoice
from modalkit.pipelines.iomodel import AnyInput, InferenceOutputModel

if TYPE_CHECKING:
    import torch

STAGES = ("preprocess", "predict", "postprocess")
"""The stages of a batch, in their order."""
TRANSFORMERS_LOADING = threading.RLock()
"""Held while transformers loads a model: two at once, in two threads, leave weights of one of them out."""
IN_PLACE_OF_STAGES = ("run_inference", "predict_stream")


class InferencePipeline:
    """One model: turns a list of items into a list of outputs, of the same length and order.

    A batch goes through `preprocess`, `predict` and `postprocess`, one after the other. While one batch is in
    `predict`, another may be in `preprocess` or `postprocess`, on another thread. So pass the data of a batch in the
    dictionaries between the stages, not on `self`. If a stage raises an exception, the worker searches for the failing
    items and fails only those. A class that overrides `run_inference` needs no stages.

    Each of these four methods may be an ``async def``, for a model behind a network: it runs in the event loop, and the
    others in threads. `max_in_flight` batches then wait for the network at once. Their costs are not measured at start.

    A pipeline is ready when it is constructed. Its constructor may have any parameters: modalkit passes to it the keys
    of the model's entry, and those of `model_name`, `all_model_data_folder` and `common_settings` that it names. These
    are attributes as well, set before the constructor runs, so it need not call ``super().__init__``.
    """

    model_name: str
    """The entry's name in ``model_settings.model_entries``; the name of the class where modalkit does not construct."""

    all_model_data_folder: str
    """The folder of local models."""

    common_settings: dict[str, Any]
    """The settings of all models (``model_settings.common``), with the device of this one."""

    model_entry: dict[str, Any]
    """The keys of the entry, without those that modalkit itself uses."""

    input_model: ClassVar[type[BaseModel]] = AnyInput
    """The model that each item is validated by before it reaches the pipeline."""

    output_model: ClassVar[type[InferenceOutputModel]] = InferenceOutputModel
    """What each output is: an instance, or another `InferenceOutputModel` that has its fields. Others fail alone."""

    cost_feature: Literal["padded", "total"] = "padded"
    """What the time of a batch grows with: the sizes after padding to the longest, or their sum without padding."""

    retryable_errors: ClassVar[type[Exception] | tuple[type[Exception], ...]] = ()
    """Errors that pass, such as those of a connection: jobs that fail by one run again later, other callers get 503."""

    engine_choice: EngineChoice | None = None
    """What computes the model, if the pipeline has loaded it by `load_engine`: shown by the service."""

    max_in_flight: int = 1
    """How many batches may run at once; ``batch_config.max_in_flight`` may change it. Each has a thread of its own.

    More than one pays where one batch leaves a part of the device idle. Read when a worker is made. With more than one,
    two batches may be in the same stage.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Raise `TypeError` for a class whose `input_model` or `output_model` is of another kind."""
        super().__init_subclass__(**options)
        for name, base in (("input_model", BaseModel), ("output_model", InferenceOutputModel)):
            model = getattr(cls, name)
            if not (inspect.isclass(model) and issubclass(model, base)):
                raise TypeError(f"{cls.__name__}.{name} must be a subclass of {base.__name__}, it is {model!r}")

    def __new__(cls, *_args: Any, **_options: Any) -> Self:
        """Make an instance that has the attributes of the constructor before it is called, or where it is not.

        Raises `TypeError` for a class that lacks a stage, and has nothing in place of them, for a `predict_stream` that
        is an ``async def`` without ``yield``, and for `retryable_errors` in a list.
        """
        if inspect.iscoroutinefunction(cls.predict_stream):
            raise TypeError(
                f"{cls.__name__}.predict_stream must yield a list with a piece for each item, not return it"
            )
        if isinstance(cls.retryable_errors, list | set | frozenset):
            raise TypeError(f"{cls.__name__}.retryable_errors must be a class of errors, or a tuple of them")
        missing = [name for name in STAGES if not has_own(cls, name)]
        if missing and not any(has_own(cls, name) for name in IN_PLACE_OF_STAGES):
            raise TypeError(f"{cls.__name__} must define {', '.join(missing)}; or {' or '.join(IN_PLACE_OF_STAGES)}")
        self = super().__new__(cls)
        self.model_name = cls.__name__
        self.all_model_data_folder = "."
        self.common_settings = {}
        self.model_entry = {}
        return self

    def __init__(
        self,
        model_name: str | None = None,
        all_model_data_folder: str | None = None,
        common_settings: dict[str, Any] | None = None,
        **model_entry: Any,
    ) -> None:
        """Set the attributes; those that are left out stay as modalkit set them."""
        if model_name is not None:
            self.model_name = model_name
        if all_model_data_folder is not None:
            self.all_model_data_folder = all_model_data_folder
        if common_settings is not None:
            self.common_settings = common_settings
        if model_entry:
            self.model_entry = model_entry

    @cached_property
    def device(self) -> torch.device:
        """The device that the settings give this model; by default a GPU if there is one. Imports torch.

        Raises `ModelLoadError` for a device that this machine or this build of torch does not have.
        """
        from modalkit.pipelines.devices import choose_device

        return choose_device(self.common_settings.get("device", "auto"))

    # The results are "or Any", so that subclasses may define the methods as `async def`.

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any] | Any:
        """Prepare a batch for the model, on the CPU. The result is passed to `predict`.

        Raises `RejectItem`, with the index of an item, to refuse that item.
        """
        raise NotImplementedError

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any] | Any:
        """Run the model. The result is passed to `postprocess`."""
        raise NotImplementedError

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel] | Any:
        """Turn the model's output into one result for each item, in the order of `input_list`.

        An exception in an item's place is the error of that item; a `RejectItem` says that the item is refused.
        """
        raise NotImplementedError

    def predict_stream(self, input_list: list[BaseModel]) -> Iterable[Sequence[InferenceOutputModel | None]] | Any:
        """Yield, for each step of a model that generates, a list with the new piece of each item, or None.

        Optional: a class that defines it needs no stages, and all its batches run by it. The last piece of an item is
        its result, and callers of ``worker.predict_stream`` get each piece at once. An exception in an item's place
        ends that item. It is a generator, or an asynchronous one, which is closed when no caller waits any more.
        """
        raise NotImplementedError

    def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel] | Any:
        """Run the three stages, each on its own copy of the list. If a subclass overrides it, it runs as one stage.

        It returns an awaitable if one of the stages is an ``async def``. Where there is a `predict_stream`, it runs
        that and returns the last pieces.
        """
        if has_own(self, "predict_stream"):
            steps: Any = self.predict_stream(list(input_list))
            return _last_pieces_later(steps) if hasattr(steps, "__aiter__") else _last_pieces(steps)
        if is_asynchronous(self, *STAGES):
            return self._run_stages(input_list)
        preprocessed_data = self.preprocess(list(input_list))
        return self.postprocess(list(input_list), self.predict(list(input_list), preprocessed_data))

    async def _run_stages(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        preprocessed_data = await awaited(self.preprocess(list(input_list)))
        raw_output = await awaited(self.predict(list(input_list), preprocessed_data))
        outputs: list[InferenceOutputModel] = await awaited(self.postprocess(list(input_list), raw_output))
        return outputs

    def item_size(self, item: BaseModel) -> int:  # noqa: ARG002  # part of the interface
        """Estimate the size of an item in a unit of the pipeline's choice (tokens, pixels), at least 1.

        Batches are formed by size; a fraction is rounded up. It is called once for each request on the event loop, so
        it must take microseconds.
        """
        return 1

    def sample_items(self, n: int, size: int) -> list[BaseModel]:  # noqa: ARG002  # part of the interface
        """Make `n` items of about `size` each. They are used to measure batches before the first request.

        If it returns an empty list, nothing is measured and nothing is warmed up at the start, and costs are learnt
        from real batches.
        """
        return []

    def device_name(self) -> str:
        """Name the device of the model, so that costs that were measured on another device are not used for it."""
        return f"{platform.machine()} with {os.cpu_count()} cores"

    def warm_up(self) -> Awaitable[object] | None:
        """Do work that would delay the first request. By default, run one sample item, if there are sample items.

        The worker awaits what it returns, if that is an awaitable: it may be an ``async def``.
        """
        if items := self.sample_items(1, 1):
            if not isinstance(items[0], BaseModel):
                kind = type(items[0]).__name__
                raise TypeError(f"sample_items must return instances of {self.input_model.__name__}, not of {kind}")
            outputs = self.run_inference(items)
            return outputs if inspect.isawaitable(outputs) else None
        return None

    def before_predict(self, in_flight: int) -> None:
        """Prepare the thread of a batch, before its `predict`.

        At most `in_flight` batches run now or will at once, this one included.
        Called only where `max_in_flight` is more than 1, and not for an ``async def``. Does nothing by default.
        """

    def move_to(self, device: str) -> None:
        """Move the model to another device, such as ``cuda`` after a snapshot was restored. No batch runs meanwhile.

        Does nothing by default.
        """

    def measure_engines(self, max_s: float) -> EngineChoice | None:  # noqa: ARG002  # part of the interface
        """Measure all engines for up to `max_s` seconds, use the best and keep the choice; None without engines.

        It is called by ``modalkit tune --engines``.
        """
        return None

    def close(self) -> Awaitable[object] | None:
        """Free what the model holds: connections, files, memory of a device. Does nothing by default.

        Called once, when its worker closes, after the last batch and in the thread of the batches; no batch runs any
        more, except one that hangs. It may be an ``async def``. Errors are logged, and it is not waited for longer than
        10 seconds.
        """
        return None

    def on_volume_reload(self) -> None:
        """React to new contents of the mounted volumes. Does nothing by default."""


async def awaited(result: Any) -> Any:
    """What a method returned; if that is an awaitable, because the method is an ``async def``, its result."""
    return await result if inspect.isawaitable(result) else result


def has_own(pipeline: InferencePipeline | type[InferencePipeline], method: str) -> bool:
    """Whether a pipeline, or a class of pipelines, defines this method itself."""
    found = getattr(pipeline, method)
    return getattr(found, "__func__", found) is not getattr(InferencePipeline, method)


def is_asynchronous(pipeline: InferencePipeline, *methods: str) -> bool:
    """Whether one of these methods of the pipeline is an ``async def``."""
    functions = [getattr(pipeline, name) for name in methods]
    return any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in functions)


def _last_pieces(steps: Iterable[Sequence[Any]]) -> list[Any]:
    last: list[Any] = []
    for step in steps:
        last = _merged(last, step)
    return last


async def _last_pieces_later(steps: AsyncIterable[Sequence[Any]]) -> list[Any]:
    last: list[Any] = []
    async for step in steps:
        last = _merged(last, step)
    return last


def _merged(last: list[Any], step: Sequence[Any]) -> list[Any]:
    return [before if piece is None else piece for before, piece in zip(last or step, step, strict=True)]
