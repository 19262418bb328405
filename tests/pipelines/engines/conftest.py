"""A module small enough to be converted in a moment, and batches for it."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modalkit.pipelines.engines import EngineSettings

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


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(3)
    return Tiny().eval()


def batch(count: int, length: int) -> Batch:
    mask = torch.ones(count, length, dtype=torch.int64)
    mask[0, length // 2 + 1 :] = 0
    return {"ids": torch.arange(count * length).reshape(count, length) % 50, "mask": mask}


@pytest.fixture
def batches() -> list[Batch]:
    return [batch(4, 6), batch(16, 9), batch(40, 5)]


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    """All engines are measured, however busy the machine is, and nothing is left in the user's cache."""
    return EngineSettings(cache_folder=tmp_path / "engines", measure_seconds=100)
