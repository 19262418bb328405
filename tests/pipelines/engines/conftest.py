"""A module small enough to be converted in a moment, and batches for it."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modalkit.pipelines.engines import EngineSettings, load_engine

Batch = Mapping[str, Tensor]


class Tiny(nn.Module):
    """Classifies rows of token ids by the mean of their vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.classifier = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        weights = mask.unsqueeze(-1).to(self.classifier.weight.dtype)
        return {"logits": self.classifier((self.embedding(ids) * weights).sum(dim=1) / weights.sum(dim=1))}


def make_module() -> nn.Module:
    torch.manual_seed(3)
    return Tiny().eval()


@pytest.fixture
def module() -> nn.Module:
    return make_module()


def batch(count: int, length: int) -> Batch:
    mask = torch.ones(count, length, dtype=torch.int64)
    mask[0, length // 2 + 1 :] = 0
    return {"ids": torch.arange(count * length).reshape(count, length) % 50, "mask": mask}


def make_batches() -> list[Batch]:
    return [batch(4, 6), batch(16, 9), batch(40, 5)]


@pytest.fixture
def batches() -> list[Batch]:
    return make_batches()


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    """All engines are measured, however busy the machine is, and nothing is left in the user's cache."""
    return EngineSettings(cache_folder=tmp_path / "engines", measure_seconds=100)


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a first start with `settings` keeps: a choice, and `module` converted for each engine."""
    folder = tmp_path_factory.mktemp("kept")
    load_engine(make_module(), make_batches(), EngineSettings(cache_folder=folder, measure_seconds=100))
    return folder


@pytest.fixture
def converted(kept: Path, settings: EngineSettings) -> EngineSettings:
    """`settings` with a folder that has `module` converted for each engine, so that no test waits for that again."""
    shutil.copytree(kept, settings.cache_folder or Path(), ignore=shutil.ignore_patterns("choice-*"))
    return settings
