"""What the pipelines of models from the transformers library share: all but their outputs."""

import logging
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar, Generic, cast

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from modalkit.pipelines.classifier_settings import EntryT, TextModelEntry, engine_settings, parse_settings
from modalkit.pipelines.cpu_threads import cpu_threads
from modalkit.pipelines.devices import choose_device
from modalkit.pipelines.engines import Engine, EngineChoice, EngineSettings, Same, load_engine
from modalkit.pipelines.errors import ModelLoadError
from modalkit.pipelines.inference_pipeline import InferencePipeline
from modalkit.pipelines.loading import Task, dtype_on, load_checkpoint
from modalkit.pipelines.text_samples import varied_texts
from modalkit.pipelines.texts import TextRequest
from modalkit.pipelines.token_counter import TokenCounter
from modalkit.pipelines.tokenization import TextEncoder, TextOrPair

logger = logging.getLogger(__name__)

SAMPLE_WORDS = ["the", "film", "was", "good", "but", "a", "little", "long", "and", "we", "had", "to", "wait"]


class TransformerPipeline(InferencePipeline, Generic[EntryT]):
    """Runs a transformers model on texts, or on pairs of texts. A subclass says for which task.

    Keys of its entry: ``model_path`` (a folder, absolute or in `all_model_data_folder` or in the working directory; or
    a model's name on the Hugging Face hub), ``max_length`` (the number of tokens that a text is truncated to, by
    default the model's limit), ``revision`` (of a model on the hub), ``engine`` and ``dtype`` (``auto``, the default,
    measures what is fastest: see `modalkit.pipelines.engines`). Keys of `common_settings`: ``device``, ``dtype`` for
    entries without one, ``engines``, and ``threads``, for the whole process.

    The constructor loads the model and prints nothing. It raises `ModelLoadError` if the model cannot be loaded.
    Batches may be in different stages on different threads.
    """

    input_model: ClassVar[type[BaseModel]] = TextRequest
    task: ClassVar[Task]
    entry_model: ClassVar[type[TextModelEntry]] = TextModelEntry
    reads_pairs: ClassVar[bool] = False
    needs_offsets: ClassVar[bool] = False

    def __init__(
        self, model_name: str, all_model_data_folder: str, common_settings: dict[str, Any], **model_entry: Any
    ) -> None:
        super().__init__(model_name, all_model_data_folder, common_settings, **model_entry)
        entry_model = cast("type[EntryT]", self.entry_model)
        common, self.entry = parse_settings(model_name, common_settings, model_entry, entry_model)
        threads = cpu_threads()  # before the checkpoint is loaded by torch
        if common.threads is not None:
            threads.set_total(common.threads)
        self._engine_settings = engine_settings(common, self.entry)
        self.device = choose_device(common.device)
        self.checkpoint = load_checkpoint(self.entry, Path(all_model_data_folder), self.device, self.task)
        self._inputs = self.checkpoint.inputs
        self._pad_left = self.checkpoint.tokenizer.padding_side == "left"
        self._encoder = self._make_encoder()
        self._counter = TokenCounter(self._encoder)
        self._module = self.prepare()
        self._engine = self._load_engine(self._engine_settings)

    def to_text(self, item: BaseModel) -> TextOrPair:
        """What the model reads of an item: by default its `text`."""
        return cast("str", item.text)  # type: ignore[attr-defined]  # a subclass with another input model overrides this

    def sample_item(self, text: str) -> BaseModel:
        """An item whose texts are together `text`."""
        return self.input_model.model_validate({"text": text})

    def prepare(self) -> nn.Module:
        """Read what the task needs of the loaded checkpoint, and return the module to run: by default the model.

        Raises `ModelLoadError` for a model that cannot be used.
        """
        return self.checkpoint.model

    def same(self) -> Same | None:
        """What "the same outputs" of two engines means; None for the default of `load_engine`."""
        return None

    def length_limit(self) -> int:
        """How many tokens the model can read."""
        return self.checkpoint.max_length

    @property
    def max_length(self) -> int:
        """How many tokens of a text the model reads, special tokens included."""
        return self._encoder.max_length

    @property
    def dtype(self) -> torch.dtype:
        """The number format that the model computes in."""
        dtype: torch.dtype = getattr(torch, self._engine.choice.dtype)
        return dtype

    @property
    def max_in_flight(self) -> int:  # type: ignore[override]  # read only: it follows from the device
        """On a CPU several batches, which share the threads; elsewhere one."""
        return cpu_threads().max_in_flight if self.device.type == "cpu" else 1

    def before_predict(self, in_flight: int) -> None:
        """On a CPU, use this batch's part of the threads."""
        if self.device.type == "cpu":
            cpu_threads().share(in_flight)

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        """Tokenize and pad to the longest: ``tensors`` (batch, length) on the CPU, and ``truncated`` for each item."""
        return self.encode([self.to_text(item) for item in input_list])

    def predict(
        self,
        input_list: list[BaseModel],  # noqa: ARG002  # part of the interface
        preprocessed_data: dict[str, Any],
    ) -> dict[str, Any]:
        """Run the model: its outputs by their names, float32 on the CPU, and all of `preprocessed_data`."""
        return {**preprocessed_data, **self.compute(preprocessed_data["tensors"])}

    def item_size(self, item: BaseModel) -> int:
        """Count the tokens of an item, special tokens included, from its words: about 15 microseconds for 35 words.

        With the bundled model, the error on the 4,000 texts of the benchmark corpus is at most one token. A word
        outside the vocabulary takes 10 microseconds more the first time.
        """
        text = self.to_text(item)
        return self._counter.count(text if isinstance(text, str) else " ".join(text))

    def sample_items(self, n: int, size: int) -> list[BaseModel]:
        """Items of about `size` tokens, special tokens included."""
        words = max(1, min(size, self.max_length) - self._encoder.special_tokens)
        text = " ".join(islice(cycle(SAMPLE_WORDS), words))
        return [self.sample_item(text) for _ in range(n)]

    def device_name(self) -> str:
        """The GPU, or the CPU with the threads that torch uses, and the engine with its number format."""
        engine = self._engine.choice.candidate
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {engine}"
        return f"{super().device_name()}, {self.device.type}, {cpu_threads().total} threads, {engine}"

    def move_to(self, device: str) -> None:
        """Move the model to `device`, and choose the engine for it.

        Raises `ModelLoadError` if there is no such device.
        """
        target = choose_device(device)
        self._module.to(device=target, dtype=dtype_on(target, self.checkpoint.dtype))
        self.device = target
        self._engine = self._load_engine(self._engine_settings)

    def measure_engines(self, max_s: float) -> EngineChoice:
        """Measure all engines again, for up to `max_s` seconds, use the best and keep the choice."""
        longer = {"measure_seconds": max_s, "use_kept_choice": False}
        self._engine = self._load_engine(self._engine_settings.model_copy(update=longer))
        return self._engine.choice

    def close(self) -> None:
        """Free the engine. No batch can run any more."""
        self._engine.close()

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of the model for a padded batch, by their names: float32 on the CPU."""
        return {name: output.cpu() for name, output in self._engine(**tensors).items()}

    def encode(self, texts: Sequence[TextOrPair]) -> dict[str, Any]:
        """``tensors``, padded to the longest text; ``truncated``; and ``encoded``, the tokens without padding."""
        encoded = self._encoder.encode(texts)
        length = max(map(len, encoded.ids))
        if self.device.type == "cuda":
            # Tensor cores need multiples of 8; the limit of a model may be no multiple of 8.
            length = max(length, min(-(-length // 8) * 8, self.max_length))
        tokenizer = self.checkpoint.tokenizer
        rows: dict[str, tuple[Sequence[list[int] | int], int]] = {"input_ids": (encoded.ids, tokenizer.pad_token_id)}
        if "attention_mask" in self._inputs:
            rows["attention_mask"] = ([1] * len(texts), 0)
        if "token_type_ids" in self._inputs:
            rows["token_type_ids"] = (encoded.type_ids or [0] * len(texts), tokenizer.pad_token_type_id)
        places = [slice(length - len(row), None) if self._pad_left else slice(len(row)) for row in encoded.ids]
        tensors = {name: _padded(values, fill, places, length) for name, (values, fill) in rows.items()}
        return {"tensors": tensors, "truncated": encoded.truncated, "encoded": encoded, "places": places}

    def _make_encoder(self) -> TextEncoder:
        path = f"model_settings.model_entries.{self.model_name}.max_length"
        limit, asked = self.length_limit(), self.entry.max_length
        if asked is not None and asked > limit:
            raise ModelLoadError(
                f"{path}: {asked} is more than the {limit} tokens that the model takes: lower it, or leave it out"
            )
        try:
            return TextEncoder(
                self.checkpoint.tokenizer,
                limit if asked is None else asked,
                of_pairs=self.reads_pairs,
                with_offsets=self.needs_offsets,
            )
        except ValueError as error:
            raise ModelLoadError(f"{path}: {error}. Raise it, or leave it out") from error

    def _load_engine(self, settings: EngineSettings) -> Engine:
        self._encoder.in_parallel = self.device.type != "cpu"
        batches = []
        for texts in varied_texts(self._encoder, self.max_length):
            halves = [(text[: len(text) // 3] or "a", text[len(text) // 3 :]) for text in texts]
            batches.append(self.encode(halves if self.reads_pairs else texts)["tensors"])
        engine = load_engine(self._module, batches, settings, same=self.same())
        self.engine_choice = engine.choice
        is_unpadded = engine.choice.engine == "torch-unpadded"
        self.cost_feature = "total" if is_unpadded else type(self).cost_feature
        logger.info("%s: engine %s", self.model_name, engine.choice)
        return engine


class ModelWithEnd(nn.Module):
    """A model together with what is computed from its outputs on the device: subclasses implement `end`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = getattr(model, "config", None)  # a part of what a kept engine is found by

    def end(self, outputs: Any, mask: Tensor) -> dict[str, Tensor]:
        """The outputs by name; `mask` (batch, length) is 0 where there is padding."""
        raise NotImplementedError

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run the model and `end`."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.end(self.model(input_ids=input_ids, attention_mask=attention_mask, **types), attention_mask)


def _padded(values: Sequence[list[int] | int], fill: int, places: list[slice], length: int) -> Tensor:
    """One row for each text: its values, or one value for all its tokens, at its place."""
    padded = np.full((len(places), length), fill, np.int64)
    for row, value, place in zip(padded, values, places, strict=True):
        row[place] = value
    return torch.from_numpy(padded)
