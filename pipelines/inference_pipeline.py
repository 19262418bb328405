"""The contract between a model and the worker that feeds it batches."""

import os
import platform
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from modalkit.pipelines.iomodel import AnyInput, InferenceOutputModel


class InferencePipeline(ABC):
    """One model: turns a list of items into a list of outputs, the same length and order.

    A batch goes through `preprocess`, `predict` and `postprocess`. The stages of one batch never overlap, but while one
    batch is in `predict` another may be in `preprocess`, on another thread: what a batch needs later belongs in the
    dictionaries that the stages pass on, not on `self`. A stage may raise; the worker then finds out which items are
    to blame and fails those alone.

    `model_name` is the entry's name in ``model_settings.model_entries``, `all_model_data_folder` the folder that local
    models lie in, `common_settings` the settings that all models share (``model_settings.common``), and `model_entry`
    the entry's own keys, without the one that names the pipeline. A pipeline is ready for work once constructed.
    """

    input_model: ClassVar[type[BaseModel]] = AnyInput
    """What an item is validated as before it reaches the pipeline."""

    output_model: ClassVar[type[InferenceOutputModel]] = InferenceOutputModel
    """What `postprocess` returns; documents the answer."""

    deterministic: ClassVar[bool] = False
    """Whether equal items always get equal results, so that they may share one inference."""

    cost_feature: ClassVar[Literal["padded", "total"]] = "padded"
    """What a batch's time follows: its sizes after padding to the longest, or their sum, where nothing is padded."""

    def __init__(
        self, model_name: str, all_model_data_folder: str, common_settings: dict[str, Any], **model_entry: Any
    ) -> None:
        self.model_name = model_name
        self.all_model_data_folder = all_model_data_folder
        self.common_settings = common_settings
        self.model_entry = model_entry

    @abstractmethod
    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        """Prepare a batch for the model, on the CPU: the result is passed to `predict`."""

    @abstractmethod
    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        """Run the model: the result is passed to `postprocess`."""

    @abstractmethod
    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        """Turn the model's output into one result an item, in the order of `input_list`."""

    def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        """Run the three stages in a row, each on a list of its own. One that is overridden is run as one stage."""
        preprocessed_data = self.preprocess(list(input_list))
        return self.postprocess(list(input_list), self.predict(list(input_list), preprocessed_data))

    def item_size(self, item: BaseModel) -> int:  # noqa: ARG002  # part of the contract
        """Estimate what an item costs in units of the pipeline's choice (tokens, pixels), at least 1.

        Batches are formed by it. It is called once for every request on the event loop: it must take microseconds.
        """
        return 1

    def sample_items(self, n: int, size: int) -> list[BaseModel]:  # noqa: ARG002  # part of the contract
        """Make up `n` items of about `size` each, to measure what batches cost before the first request comes.

        An empty list says that the pipeline cannot: nothing is measured at start-up, nothing is warmed up, and costs
        are learnt from real batches.
        """
        return []

    def device_name(self) -> str:
        """Describe what the model runs on, so that costs measured on another device are not mistaken for this one's."""
        return f"{platform.machine()} with {os.cpu_count()} cores"

    def warm_up(self) -> None:
        """Do before the first request what would slow it down. Runs one sample item, where there are samples."""
        if items := self.sample_items(1, 1):
            self.run_inference(items)

    def move_to(self, device: str) -> None:  # noqa: B027  # a hook: doing nothing is right for most
        """Move the model to another device, such as ``cuda`` after a snapshot taken without one; no batch is running.

        Does nothing by default.
        """

    def on_volume_reload(self) -> None:  # noqa: B027  # a hook: doing nothing is right for most
        """Act on new contents of the mounted volumes. Does nothing by default."""
