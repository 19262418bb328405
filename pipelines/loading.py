"""Loads a model of the transformers library onto a device, and prints nothing."""

import inspect
import logging
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from modalkit.pipelines.classifier_settings import BUNDLED, ClassifierEntry, TextModelEntry
from modalkit.pipelines.errors import ModelLoadError
from modalkit.pipelines.inference_pipeline import TRANSFORMERS_LOADING

BUNDLED_FOLDER = Path(__file__).parent / "sentiment_model"
DEFAULT_MAX_LENGTH = 512
HUB_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Task:
    """What kind of model is loaded: the class of transformers that loads it, and the words of error messages."""

    loader: type[Any]
    noun: str
    trained_for: str
    min_labels: int = 2
    unused_weights: tuple[str, ...] = ()
    """The first parts of the names of weights that may be missing."""

    def __str__(self) -> str:
        return f"{'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"


TEXT_CLASSIFICATION = Task(AutoModelForSequenceClassification, "text classifier", "sequence classification")


@dataclass(frozen=True)
class Checkpoint:
    """A model in evaluation mode with its tokenizer; `dtype` is the number format of the stored weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    source: str

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in the order of the model's outputs."""
        names = cast("dict[int, str]", self.model.config.id2label)
        return [names[i] for i in range(len(names))]

    @property
    def inputs(self) -> frozenset[str]:
        """The names of the tensors that the tokenizer makes and that the model takes."""
        accepted = inspect.signature(self.model.forward).parameters
        return frozenset(accepted) & frozenset(self.tokenizer.model_input_names)

    @property
    def max_length(self) -> int:
        """How many tokens the model takes: the least limit of tokenizer and model, else `DEFAULT_MAX_LENGTH`."""
        limits = [self.tokenizer.model_max_length, _positions(self.model)]
        # A tokenizer without a limit has 10**30.
        return min((limit for limit in limits if limit and limit < 10**9), default=DEFAULT_MAX_LENGTH)


def _positions(model: PreTrainedModel) -> int | None:
    for name, module in model.named_modules():
        # RoBERTa and similar models count positions from the one after the padding token, so some rows are not used.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return limit


def load_checkpoint(
    entry: TextModelEntry, models_folder: Path, device: torch.device, task: Task = TEXT_CLASSIFICATION
) -> Checkpoint:
    """Load the model of `entry` onto `device`. Prints nothing.

    Raises `ModelLoadError`, with the location and a remedy, if the model cannot be found, read or used.
    """
    source, is_folder = _locate(entry, models_folder)
    place = f"the folder {source}" if is_folder else f"the hub's {source!r}"
    where: dict[str, Any] = {"local_files_only": is_folder or not _hub_answers(source)}
    if not is_folder:
        where["revision"] = entry.revision or "main"
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source, **where)
            stored_dtype = config.dtype or torch.float32
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
            model, report = task.loader.from_pretrained(
                source, config=config, dtype=dtype_on(device, stored_dtype), output_loading_info=True, **where
            )
            model = model.to(device)
    except Exception as error:  # the libraries raise exceptions of any class, even bare Exception
        raise ModelLoadError(_explain_failure(error, task, entry, place, models_folder, is_folder=is_folder)) from error
    checkpoint = Checkpoint(model.eval(), tokenizer, stored_dtype, source)
    _check_usable(checkpoint, task, place, [k for k in report["missing_keys"] if not k.startswith(task.unused_weights)])
    return checkpoint


def _locate(entry: TextModelEntry, models_folder: Path) -> tuple[str, bool]:
    """The location of the model, and whether that is a folder rather than a name on the hub."""
    has_default = isinstance(entry, ClassifierEntry)
    is_bundled = has_default and entry.model_path == BUNDLED
    if is_bundled:
        candidates = [BUNDLED_FOLDER]
    else:
        path = Path(entry.model_path).expanduser()
        candidates = [path] if path.is_absolute() else [models_folder / path, Path.cwd() / path]
    for folder in candidates:
        if folder.is_dir():
            if entry.revision is not None:
                raise ModelLoadError(
                    f"revision {entry.revision!r} is for a model on the hub, but model_path {entry.model_path!r} is "
                    f"the folder {folder}: remove revision"
                )
            return str(folder.resolve()), True
    if is_bundled or not _may_be_on_a_hub(entry, candidates):
        looked_for = " nor ".join(str(folder) for folder in candidates)
        others = f", or {BUNDLED!r}" if has_default else ""
        raise ModelLoadError(
            f"model_path {entry.model_path!r}: there is no folder {looked_for}; give the folder that holds the model's "
            f"config.json, or owner/name of a model on the hub (with revision, if there is a folder owner){others}"
        )
    return entry.model_path, False


def _may_be_on_a_hub(entry: TextModelEntry, folders: Sequence[Path]) -> bool:
    """Whether no folder can be meant: asking a hub that cannot be reached for a misspelt folder takes minutes."""
    if not _HUB_NAME.fullmatch(entry.model_path) or entry.model_path.startswith("."):
        return False
    has_owner = "/" in entry.model_path and not any(folder.parent.is_dir() for folder in folders)
    return has_owner or entry.revision is not None


def _hub_answers(source: str) -> bool:
    """Whether the hub can be reached: else the libraries ask for minutes, even for a model that is in their cache."""
    try:
        HfApi().model_info(source, timeout=HUB_TIMEOUT_S)
    except (HfHubHTTPError, OfflineModeIsEnabled):
        return True  # the libraries explain a refusal, and do not ask in the offline mode
    except Exception as error:  # noqa: BLE001  # of the HTTP client that this version of the library has
        logger.warning("The hub cannot be reached, so %s is looked for in its cache only: %s", source, error)
        return False
    return True


def _explain_failure(
    error: Exception, task: Task, entry: TextModelEntry, place: str, models_folder: Path, *, is_folder: bool
) -> str:
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...").rstrip(".")
    if is_folder:
        return (
            f"cannot load {task} from {place}: {reason}. It needs config.json, tokenizer.json and "
            f"model.safetensors of a {task.trained_for.replace(' ', '-')} model, as save_pretrained() writes them: if "
            "they are there, copy them again"
        )
    return (
        f"cannot load {task} from {place}: {reason}. If a folder was meant by model_path "
        f"{entry.model_path!r}: it is neither in {models_folder} nor in {Path.cwd()}"
    )


def _check_usable(checkpoint: Checkpoint, task: Task, place: str, missing_weights: list[str]) -> None:
    if missing_weights:
        missing = ", ".join(sorted(missing_weights)[:4])
        raise ModelLoadError(
            f"the model in {place} is no trained {task.noun}: it has no weights for {missing}. Use one that was "
            f"fine-tuned for {task.trained_for}"
        )
    if len(checkpoint.labels) < task.min_labels:
        raise ModelLoadError(
            f"the model in {place} is no classifier: its config.json has {len(checkpoint.labels)} label. Use a "
            "classifier with two labels or more"
        )
    # If its file is missing, transformers makes a tokenizer without any words.
    if len(checkpoint.tokenizer) <= len(set(checkpoint.tokenizer.all_special_ids)):
        raise ModelLoadError(f"the tokenizer in {place} has no vocabulary. Add the tokenizer.json of this model")
    if checkpoint.tokenizer.pad_token_id is None:
        raise ModelLoadError(
            f"the tokenizer in {place} has no padding token, so texts of different lengths make no batch. Set "
            '"pad_token" in its tokenizer_config.json to a token of its vocabulary that the model was padded with'
        )
    # Decoder models use it to find the last token of a text.
    if checkpoint.model.config.pad_token_id is None:
        checkpoint.model.config.pad_token_id = checkpoint.tokenizer.pad_token_id


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Make transformers and the hub's client print nothing, and restore their settings at the end.

    The settings are global to the process, so only one thread at a time runs the block.
    """
    with TRANSFORMERS_LOADING:
        verbosity, hub_verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
        bars, hub_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
        transformers_logging.set_verbosity(logging.ERROR)
        hub_logging.set_verbosity(logging.ERROR)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the library has no type for it
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            hub_logging.set_verbosity(hub_verbosity)
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # as above
                if not hub_bars:
                    disable_progress_bars()


def dtype_on(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The number format to load weights in: float32 on a CPU, which every engine can start from, else `stored`."""
    return torch.float32 if device.type == "cpu" else stored
