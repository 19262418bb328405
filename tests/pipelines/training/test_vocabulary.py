"""What is left of a vocabulary."""

import json

import pytest
from tokenizers import Tokenizer

from modalkit.pipelines.loading import BUNDLED_FOLDER
from modalkit.pipelines.training.train import kept_token_ids, prune_tokenizer

REQUIRED = 5 + 2 * 36
"""The special tokens, and the letters and digits at the start of a word and within."""


def test_frequent_tokens_are_kept_first_then_those_of_low_ids(tiny_tokenizer: Tokenizer) -> None:
    texts = ["never seen", "never", "the"]
    kept = kept_token_ids(tiny_tokenizer, texts, REQUIRED + 4)
    assert kept == sorted(kept)
    beyond = {tiny_tokenizer.id_to_token(i) for i in kept[REQUIRED:]}
    assert beyond == {"never", "seen", "the", "film"}


def test_a_size_below_what_has_to_stay_is_refused(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=f"vocabulary size 9 is too small: {REQUIRED} tokens have to stay"):
        kept_token_ids(tiny_tokenizer, [], 9)


def test_a_pruned_tokenizer_spells_what_it_has_lost(tiny_tokenizer: Tokenizer) -> None:
    kept = kept_token_ids(tiny_tokenizer, ["never", "the film was"], REQUIRED + 4)
    pruned = Tokenizer.from_str(json.dumps(prune_tokenizer(json.loads(tiny_tokenizer.to_str()), kept)))
    assert pruned.get_vocab_size() == len(kept)
    encoding = pruned.encode("The film was never seen")
    assert encoding.tokens == ["[CLS]", "the", "film", "was", "never", "s", "##e", "##e", "##n", "[SEP]"]
    assert [kept[i] for i in encoding.ids] == [tiny_tokenizer.token_to_id(token) for token in encoding.tokens]


def test_the_bundled_vocabulary_can_spell_every_word() -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLED_FOLDER / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 16_384
    tokens = tokenizer.encode("antidisestablishmentarianism qwertzuiop Zażółć").tokens
    assert "[UNK]" not in tokens
