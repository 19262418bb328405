"""Where a model is computed, in what format, and how long its texts may be."""

import logging
from typing import Any

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification
from transformers.utils import logging as transformers_logging

from modalkit.pipelines.devices import choose_device
from modalkit.pipelines.errors import ModelLoadError
from modalkit.pipelines.loading import BUNDLED_FOLDER, Checkpoint, dtype_on, quiet_transformers


def test_weights_are_loaded_in_float32_on_a_cpu_and_as_stored_elsewhere() -> None:
    assert dtype_on(torch.device("cpu"), torch.float16) is torch.float32
    assert dtype_on(torch.device("cuda"), torch.float16) is torch.float16


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:", "cpu:0", ""])
def test_a_device_of_another_name_is_refused(name: str) -> None:
    with pytest.raises(ModelLoadError, match="is not auto, cpu, mps, cuda or cuda:N"):
        choose_device(name)


def test_roberta_loses_the_positions_up_to_its_padding_token() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, vocab_size=99, max_position_embeddings=34, pad_token_id=1)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_FOLDER)
    checkpoint = Checkpoint(RobertaForSequenceClassification(config), tokenizer, torch.float32, "here")
    assert checkpoint.max_length == 32


def test_the_libraries_own_verbosity_is_back_after_loading() -> None:
    def settings() -> tuple[int, int, bool]:
        return (
            transformers_logging.get_verbosity(),
            hub_logging.get_verbosity(),
            transformers_logging.is_progress_bar_enabled(),
        )

    before = settings()
    with quiet_transformers():
        assert settings() == (logging.ERROR, logging.ERROR, False)
    assert settings() == before
