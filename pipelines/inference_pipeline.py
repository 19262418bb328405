"""The interface of a model that a worker runs in batches."""

import os
import platform
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel

from modalkit.pipelines.iomodel import AnyInput, InferenceOutputModel


class InferencePipeline(ABC):
    """One model: turns a list of items into a list of outputs, of the same length and order.

    A batch goes through `preprocess`, `predict` and `postprocess`, one after the other. While one batch is in
    `predict`, another may be in `preprocess` or `postprocess`, on another thread. So pass the data of a batch in the
    dictionaries between the stages, not on `self`. If a stage raises an exception, the worker searches for the failing
    items and fails only those.

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
    """The model that `postprocess` returns, for the documentation of the HTTP interface."""

    cost_feature: ClassVar[Literal["padded", "total"]] = "padded"
    """What the time of a batch grows with: the sizes after padding to the longest, or their sum without padding."""

    max_in_flight: int = 1
    """How many batches may run at once, each on a thread of its own; ``batch_config.max_in_flight`` may change it.

    More than one pays where one batch leaves a part of the device idle. Read when a worker is made. With more than one,
    two batches may be in the same stage.
    """

    def __new__(cls, *_args: Any, **_options: Any) -> Self:
        """Make an instance that has the attributes of the constructor before it is called, or where it is not."""
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

    @abstractmethod
    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        """Prepare a batch for the model, on the CPU. The result is passed to `predict`."""

    @abstractmethod
    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        """Run the model. The result is passed to `postprocess`."""

    @abstractmethod
    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        """Turn the model's output into one result for each item, in the order of `input_list`."""

    def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        """Run the three stages, each on its own copy of the list. If a subclass overrides it, it runs as one stage."""
        preprocessed_data = self.preprocess(list(input_list))
        return self.postprocess(list(input_list), self.predict(list(input_list), preprocessed_data))

    def item_size(self, item: BaseModel) -> int:  # noqa: ARG002  # part of the interface
        """Estimate the size of an item in a unit of the pipeline's choice (tokens, pixels), at least 1.

        Batches are formed by size. It is called once for each request on the event loop, so it must take microseconds.
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

    def warm_up(self) -> None:
        """Do work that would delay the first request. By default, run one sample item, if there are sample items."""
        if items := self.sample_items(1, 1):
            self.run_inference(items)

    def before_predict(self, in_flight: int) -> None:  # noqa: B027  # a hook: most pipelines need nothing here
        """Prepare the thread of a batch, before its `predict`: `in_flight` batches run now, this one included.

        Called only where `max_in_flight` is more than 1. Does nothing by default.
        """

    def move_to(self, device: str) -> None:  # noqa: B027  # a hook: most pipelines need nothing here
        """Move the model to another device, such as ``cuda`` after a snapshot was restored. No batch runs meanwhile.

        Does nothing by default.
        """

    def on_volume_reload(self) -> None:  # noqa: B027  # a hook: most pipelines need nothing here
        """React to new contents of the mounted volumes. Does nothing by default."""
