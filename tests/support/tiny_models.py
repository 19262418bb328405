"""Models of transformers with random weights, small enough to be made in a moment, and a tokenizer for them."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

EXACT: dict[str, Any] = {"engine": "torch", "dtype": "float32"}
"""The entry's keys for the exact numbers, without measuring."""

TEXTS = [
    "Paris is lovely.",
    "What a day!",
    "Angela Merkel met Emmanuel Macron in Strasbourg, before both of them travelled to Brussels by an early train.",
    "No.",
    "The unbelievably long-winded announcement wasn't understood",
    "Zürich and Genève are in Switzerland",
    "A cat sat on the mat, and the other cats of the neighbourhood sat around it for the whole afternoon. " * 9,
]
"""Of mixed lengths; the last one is longer than `POSITIONS`."""

POSITIONS = 128
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 150,
}


def save_tokenizer(folder: Path, padding_side: str) -> None:
    """A tokenizer like BERT's, of few words, so that many have several tokens."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = [word for text in TEXTS for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
    letters = sorted({*"".join(words)})
    pairs = Counter(word[i : i + 2] for word in words for i in range(1, len(word) - 1))
    common = sorted(pairs, key=lambda pair: (-pairs[pair], pair))
    parts = [f"##{part}" for part in (*letters, *common)]
    tokens = dict.fromkeys([*SPECIAL, *letters, *sorted(words)[::20], *parts][: SIZES["vocab_size"]])
    tokenizer = Tokenizer(models.WordPiece({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # the library has no type for it
        tokenizer_object=tokenizer,
        model_max_length=POSITIONS,
        padding_side=padding_side,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    ).save_pretrained(folder)


def save_model(
    model_class: type[PreTrainedModel],
    folder: Path,
    config_class: type[PreTrainedConfig] = BertConfig,
    *,
    padding_side: str = "right",
    **config: Any,
) -> Path:
    """A model with random weights that are large enough for outputs that differ, and the tokenizer."""
    torch.manual_seed(7)
    sizes = {**SIZES, "max_position_embeddings": POSITIONS, "initializer_range": 0.5}
    model: Any = model_class(config_class(**sizes, **config))
    model.save_pretrained(folder)
    save_tokenizer(folder, padding_side)
    return folder
