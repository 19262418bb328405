"""Prunes a WordPiece vocabulary, so that a small model does not consist mostly of embeddings of unused words."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

CONTINUATION = "##"


def kept_token_ids(tokenizer: Tokenizer, texts: Iterable[str], size: int) -> list[int]:
    """The ids of the `size` tokens to keep, ascending.

    The special tokens and all single characters are kept, so that every word can be spelt. The others are those that
    occur most often in `texts`. Among tokens that occur equally often (or never) those with the lowest ids are kept,
    because BERT's vocabulary is roughly ordered by frequency.

    Raises `ValueError` if `size` is too small for the tokens that have to be kept.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    occurrences: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(list(texts)):
        occurrences.update(encoding.ids)
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    characters = {i for token, i in vocabulary.items() if len(token.removeprefix(CONTINUATION)) == 1}
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
    added = [{**token, "id": new_id[token["id"]]} for token in specification["added_tokens"]]
    processor = specification["post_processor"]
    special_tokens = {
        name: {**token, "ids": [new_id[i] for i in token["ids"]]} for name, token in processor["special_tokens"].items()
    }
    return {
        **specification,
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": {**processor, "special_tokens": special_tokens},
        "model": {**model, "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1]))},
    }
