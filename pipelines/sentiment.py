"""The sentiment pipeline, for any sequence-classification model of the transformers library."""

import logging
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from modalkit.pipelines.classifier_settings import engine_settings, parse_settings
from modalkit.pipelines.cpu_threads import cpu_threads
from modalkit.pipelines.engines import Engine, EngineChoice, EngineSettings, load_engine, same_labels
from modalkit.pipelines.errors import ModelLoadError
from modalkit.pipelines.inference_pipeline import InferencePipeline
from modalkit.pipelines.iomodel import InferenceOutputModel
from modalkit.pipelines.loading import Checkpoint, choose_device, dtype_on, load_checkpoint
from modalkit.pipelines.text_samples import varied_texts
from modalkit.pipelines.token_counter import TokenCounter
from modalkit.pipelines.tokenization import TextEncoder

logger = logging.getLogger(__name__)

MAX_TEXT_CHARACTERS = 100_000

SAMPLE_WORDS = ["the", "film", "was", "good", "but", "a", "little", "long", "and", "we", "had", "to", "wait"]

COMMON_LABELS = frozenset({"positive", "neutral", "negative"})


def _check_text(text: str) -> str:
    if len(text) > MAX_TEXT_CHARACTERS:
        raise PydanticCustomError(
            "text_too_long",
            "The text has {length} characters, at most {limit} are accepted: send its decisive part, or split it into "
            "several requests",
            {"length": len(text), "limit": MAX_TEXT_CHARACTERS},
        )
    if not text or text.isspace():
        raise PydanticCustomError("text_blank", "The text is blank: send at least one visible character")
    return text


class SentimentRequest(BaseModel):
    """One text to judge."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[
        str,
        AfterValidator(_check_text),
        Field(
            description="Not blank. Tokens beyond the model's limit are not read (`truncated`).",
            json_schema_extra={"minLength": 1, "maxLength": MAX_TEXT_CHARACTERS, "examples": ["What a lovely day!"]},
        ),
    ]


class SentimentResponse(InferenceOutputModel):
    """The sentiment of one text."""

    sentiment: str = Field(description="The model's most probable label: positive, neutral or negative.")
    confidence: float = Field(ge=0, le=1, description="That label's probability.")
    truncated: bool = Field(
        default=False,
        exclude_if=lambda truncated: not truncated,
        description="True if the text was longer than the model's limit, so that only its beginning was read.",
    )


class SentimentPipeline(InferencePipeline):
    """Classifies texts with a transformers model.

    Keys of its entry: ``model_path`` (``bundled``, the default; a folder, absolute or in `all_model_data_folder` or in
    the working directory; or a model's name on the Hugging Face hub), ``max_length`` (the number of tokens that a text
    is truncated to, by default the model's limit), ``revision`` (of a model on the hub), ``engine`` and ``dtype``
    (``auto``, the default, measures what is fastest: see `modalkit.pipelines.engines`). Keys of `common_settings`:
    ``device``, ``dtype`` for entries without one, ``engines``, and ``threads``, for the whole process.

    The constructor loads the model and prints nothing. It raises `ModelLoadError` if the model cannot be loaded.
    Batches may be in different stages on different threads.
    """

    input_model: ClassVar[type[BaseModel]] = SentimentRequest
    output_model: ClassVar[type[InferenceOutputModel]] = SentimentResponse

    def __init__(
        self, model_name: str, all_model_data_folder: str, common_settings: dict[str, Any], **model_entry: Any
    ) -> None:
        super().__init__(model_name, all_model_data_folder, common_settings, **model_entry)
        common, entry = parse_settings(model_name, common_settings, model_entry)
        if common.threads is not None:
            cpu_threads().set_total(common.threads)
        self._engine_settings = engine_settings(common, entry)
        self.device = choose_device(common.device)
        self._checkpoint = checkpoint = load_checkpoint(entry, Path(all_model_data_folder), self.device)
        self._model = checkpoint.model
        self._inputs = checkpoint.inputs
        self._encoder = _make_encoder(model_name, checkpoint, entry.max_length)
        self._counter = TokenCounter(self._encoder)
        self._pad_left = checkpoint.tokenizer.padding_side == "left"
        self.labels = [label.lower() if label.lower() in COMMON_LABELS else label for label in checkpoint.labels]
        self._multi_label = self._model.config.problem_type == "multi_label_classification"
        self._engine = self._load_engine(self._engine_settings)

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
        return self._encode([cast("SentimentRequest", item).text for item in input_list])

    def predict(
        self,
        input_list: list[BaseModel],  # noqa: ARG002  # part of the interface
        preprocessed_data: dict[str, Any],
    ) -> dict[str, Any]:
        """Run the model: ``probabilities`` of shape (batch, labels), float32 on the CPU."""
        with torch.inference_mode():
            probabilities = self._probabilities(self._engine(**preprocessed_data["tensors"])["logits"])
        return {"probabilities": probabilities.cpu(), "truncated": preprocessed_data["truncated"]}

    def postprocess(
        self,
        input_list: list[BaseModel],  # noqa: ARG002  # part of the interface
        raw_output: dict[str, Any],
    ) -> list[InferenceOutputModel]:
        """The most probable label of each text.

        It uses numpy, because a reduction by torch in a second thread would start more OpenMP threads. With more of
        them than cores, libgomp sleeps between parallel regions instead of spinning, and `predict` takes 15 % longer.
        """
        probabilities = raw_output["probabilities"].numpy()
        labels, confidences = probabilities.argmax(axis=-1), probabilities.max(axis=-1)
        return [
            SentimentResponse(sentiment=self.labels[label], confidence=confidence, truncated=truncated)
            for label, confidence, truncated in zip(
                labels.tolist(), confidences.tolist(), raw_output["truncated"], strict=True
            )
        ]

    def item_size(self, item: BaseModel) -> int:
        """Count the tokens of a text, special tokens included, from its words: about 15 microseconds for 35 words.

        With the bundled model, the error on the 4,000 texts of the benchmark corpus is at most one token. A word
        outside the vocabulary takes 10 microseconds more the first time.
        """
        return self._counter.count(cast("SentimentRequest", item).text)

    def sample_items(self, n: int, size: int) -> list[BaseModel]:
        """Texts of about `size` tokens, special tokens included."""
        words = max(1, min(size, self.max_length) - self._encoder.special_tokens)
        text = " ".join(islice(cycle(SAMPLE_WORDS), words))
        return [SentimentRequest(text=text) for _ in range(n)]

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
        torch.nn.Module.to(self._model, device=target, dtype=dtype_on(target, self._checkpoint.dtype))
        self.device = target
        self._engine = self._load_engine(self._engine_settings)

    def measure_engines(self, max_s: float) -> EngineChoice:
        """Measure all engines again, for up to `max_s` seconds, use the best and keep the choice."""
        longer = {"measure_seconds": max_s, "use_kept_choice": False}
        self._engine = self._load_engine(self._engine_settings.model_copy(update=longer))
        return self._engine.choice

    def _load_engine(self, settings: EngineSettings) -> Engine:
        texts = varied_texts(self._encoder, self.max_length)
        batches = [self._encode(batch)["tensors"] for batch in texts]  # `preprocess` may be that of a subclass
        same = same_labels(settings.sameness, probabilities=self._probabilities)
        engine = load_engine(self._model, batches, settings, same=same)
        self.engine_choice = engine.choice
        logger.info("%s: engine %s", self.model_name, engine.choice)
        return engine

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid() if self._multi_label else logits.softmax(dim=-1)

    def _encode(self, texts: list[str]) -> dict[str, Any]:
        encoded = self._encoder.encode(texts)
        length = max(map(len, encoded.ids))
        if self.device.type == "cuda":
            # Tensor cores need multiples of 8; the limit of a model may be no multiple of 8.
            length = max(length, min(-(-length // 8) * 8, self.max_length))
        tokenizer = self._checkpoint.tokenizer
        rows: dict[str, tuple[Sequence[list[int] | int], int]] = {"input_ids": (encoded.ids, tokenizer.pad_token_id)}
        if "attention_mask" in self._inputs:
            rows["attention_mask"] = ([1] * len(texts), 0)
        if "token_type_ids" in self._inputs:
            rows["token_type_ids"] = (encoded.type_ids or [0] * len(texts), tokenizer.pad_token_type_id)
        bounds = [length - len(row) if self._pad_left else len(row) for row in encoded.ids]
        return {
            "tensors": {name: self._padded(values, fill, bounds, length) for name, (values, fill) in rows.items()},
            "truncated": encoded.truncated,
        }

    def _padded(self, values: Sequence[list[int] | int], fill: int, bounds: list[int], length: int) -> torch.Tensor:
        """One row for each text: its values, or one value for all its tokens, before or after its bound."""
        padded = np.full((len(bounds), length), fill, np.int64)
        for row, value, bound in zip(padded, values, bounds, strict=True):
            row[slice(bound, None) if self._pad_left else slice(bound)] = value
        return torch.from_numpy(padded)


def _make_encoder(model_name: str, checkpoint: Checkpoint, max_length: int | None) -> TextEncoder:
    path = f"model_settings.model_entries.{model_name}.max_length"
    if max_length is not None and max_length > checkpoint.max_length:
        raise ModelLoadError(
            f"{path}: {max_length} is more than the {checkpoint.max_length} tokens that the model takes: lower it, or "
            "leave it out"
        )
    try:
        return TextEncoder(checkpoint.tokenizer, checkpoint.max_length if max_length is None else max_length)
    except ValueError as error:
        raise ModelLoadError(f"{path}: {error}. Raise it, or leave it out") from error
