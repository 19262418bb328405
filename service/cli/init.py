"""``modalkit init``: the files of a new service."""

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from modalkit.service.cli.common import notices, one_of
from modalkit.service.cli.config import defaults_yaml
from modalkit.service.errors import UsageError
from modalkit.service.settings import ModelEntry

MAX_PREFIX_CHARACTERS = 48
"""Limit of `app_settings.app_prefix`, which a new service has from its folder."""

_PREFIX_LINE = re.compile(r"(?<=  app_prefix: )\S+")
_ENTRIES = "  model_entries:\n"
_ENTRY = re.compile(r"    \S.*\n((?:      .*\n)+)")
_ENTRY_LINE = re.compile(r"      (\w+):[^#]*?(\s+#.*)?$")
_ITEM_LINE = re.compile(r"^ITEM = .*$", re.MULTILINE)


class InitError(UsageError):
    """Raised when a file is in the way of a new one."""


class Task(StrEnum):
    """What a new service is for."""

    EMPTY = "empty"
    SENTIMENT = "sentiment"
    EMBEDDING = "embedding"
    RERANK = "rerank"
    TOKEN_CLASSIFICATION = "token-classification"  # noqa: S105  # a task
    ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class Template:
    """What one task needs: the class that runs the model, the keys of its entry, and an item to try."""

    pipeline: str
    item: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ("test_service.py",)
    model_name: str = ""


TEMPLATES = {
    Task.EMPTY: Template(
        "pipeline:WordCount", {"text": "one two three"}, files=("pipeline.py", "test_pipeline.py"), model_name="words"
    ),
    Task.SENTIMENT: Template(
        "modalkit.pipelines.sentiment:SentimentPipeline", {"text": "What a lovely day!"}, {"model_path": "bundled"}
    ),
    Task.EMBEDDING: Template(
        "modalkit.pipelines.embedding:EmbeddingPipeline",
        {"text": "What a lovely day!"},
        {"model_path": "sentence-transformers/all-MiniLM-L6-v2"},
    ),
    Task.RERANK: Template(
        "modalkit.pipelines.rerank:RerankPipeline",
        {"query": "How is the weather?", "text": "What a lovely day!"},
        {"model_path": "cross-encoder/ms-marco-MiniLM-L6-v2"},
    ),
    Task.TOKEN_CLASSIFICATION: Template(
        "modalkit.pipelines.token_classification:TokenClassificationPipeline",
        {"text": "Marie Curie was born in Warsaw."},
        {"model_path": "dslim/bert-base-NER"},
    ),
    Task.ZERO_SHOT: Template(
        "modalkit.pipelines.zero_shot:ZeroShotPipeline",
        {"text": "What a lovely day!", "labels": ["weather", "politics"]},
        {"model_path": "typeform/distilbert-base-uncased-mnli"},
    ),
}


def init(
    folder: Annotated[Path, typer.Argument(help="Where the files go; it is made if it does not exist.")] = Path(),
    task: Annotated[
        Task, typer.Option(help="What the service is for; empty: a pipeline of your own.", **one_of(Task))
    ] = Task.EMPTY,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model of a task: its name on a hub, or a folder.")
    ] = None,
) -> None:
    """Write the files of a new service: a pipeline, or the configuration for a task, its test, and a Dockerfile.

    Nothing is overwritten.

    [bold]Examples[/bold]

    modalkit init my-model && cd my-model && pytest && modalkit serve

    modalkit init search --task embedding --model sentence-transformers/all-mpnet-base-v2
    """
    if model is not None and task is Task.EMPTY:
        raise typer.BadParameter(
            "--model needs a --task: with a pipeline of your own, modalkit.yaml says what it loads"
        )
    if model is not None and not model.strip():
        raise typer.BadParameter("--model is empty: give the name of a model on a hub, or a folder")
    template = TEMPLATES[task]
    app_prefix = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name)[:MAX_PREFIX_CHARACTERS].strip("-")
    files = _files_of(task, template, model, app_prefix or task)
    for name in files:
        if os.path.lexists(folder / name):  # a link that leads nowhere too
            raise InitError(f"{folder / name} exists already, and nothing is overwritten: choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with (folder / name).open("x", encoding="utf-8") as file:
            file.write(text)
    notices.print(f"Wrote {', '.join(files)} into {folder.resolve()}. There, try:")
    item = shlex.quote(json.dumps(template.item))
    notices.print(
        "  pytest                      (pip install pytest)",
        "  modalkit serve",
        f"  curl http://127.0.0.1:8000/sync/predict -d {item}",
        sep="\n",
    )


def _files_of(task: Task, template: Template, model: str | None, app_prefix: str) -> dict[str, str]:
    """The files of a new service by their names."""
    arguments = dict(template.arguments) if model is None else {**template.arguments, "model_path": model}
    templates = resources.files("modalkit.service.cli").joinpath("templates")
    texts = {name: templates.joinpath(name).read_text(encoding="utf-8") for name in (*template.files, "Dockerfile")}
    return {
        "modalkit.yaml": _configuration(
            app_prefix, template.model_name or task, {"pipeline": template.pipeline, **arguments}
        ),
        **{name: _ITEM_LINE.sub(lambda _: f"ITEM = {template.item!r}", text) for name, text in texts.items()},
        ".dockerignore": templates.joinpath("dockerignore").read_text(encoding="utf-8"),
    }


def _configuration(app_prefix: str, model_name: str, values: dict[str, Any]) -> str:
    """The commented file of all defaults, with a model with these values in place of the bundled one.

    Keys that every entry has are kept, with their comments; those of the bundled pipeline are kept for tasks only.
    """
    head, _, rest = defaults_yaml().partition(_ENTRIES)
    entry = _ENTRY.match(rest)
    if entry is None:
        raise AssertionError("modalkit.yaml has no model entry: this is a bug in modalkit")
    has_arguments = len(values) > 1
    lines = [f"    {model_name}:"]
    is_kept = True
    for line in entry[1].splitlines():
        if found := _ENTRY_LINE.match(line):
            key, comment = found[1], found[2] or ""
            if values.get(key) != "bundled":
                comment = comment.replace(" bundled,", "")
            is_kept = has_arguments or key in ModelEntry.model_fields
            if key in values:
                lines.append(f"      {key}: {json.dumps(values.pop(key))}{comment}")
                continue
        if is_kept and (has_arguments or not line.startswith("      #")):
            lines.append(line)
    lines += [f"      {key}: {json.dumps(value)}" for key, value in values.items()]
    head = _PREFIX_LINE.sub(lambda _: json.dumps(app_prefix), head, count=1)
    return f"{head}{_ENTRIES}{chr(10).join(lines)}\n{rest[entry.end() :]}"
