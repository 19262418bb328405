"""Text to tokens: cut to the limit, known to be cut, and on any thread."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modalkit.pipelines.loading import BUNDLED_FOLDER
from modalkit.pipelines.tokenization import TextEncoder


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(BUNDLED_FOLDER)
    return loaded


def test_it_yields_what_the_tokenizer_itself_would(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["What a lovely day!", "", "Zażółć gęślą jaźń 😀"]
    expected = tokenizer(texts)["input_ids"]
    encoded = TextEncoder(tokenizer, 64).encode(texts)
    assert encoded.ids == expected
    assert encoded.type_ids is None
    assert encoded.truncated == [False, False, False]


def test_only_a_text_that_lost_something_counts_as_truncated(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = TextEncoder(tokenizer, 6).encode(["good " * 3, "good " * 4, "good " * 5, "good " * 500])
    assert [len(row) for row in encoded.ids] == [5, 6, 6, 6]
    assert encoded.truncated == [False, False, True, True]
    assert all(row[-1] == tokenizer.sep_token_id for row in encoded.ids)


def test_a_limit_that_leaves_no_room_for_text_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="max_length 2 leaves no room for text"):
        TextEncoder(tokenizer, 2)


def test_a_tokenizer_written_in_python_is_cut_alike(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["good " * 3, "good " * 4, "good " * 5]
    fast = TextEncoder(tokenizer, 6).encode(texts)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert TextEncoder(tokenizer, 6).encode(texts) == fast


def test_threads_may_share_an_encoder(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = TextEncoder(tokenizer, 16)
    batches = [[f"{'very ' * n}good", "bad"] for n in range(40)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(encoder.encode, batches)) == [encoder.encode(batch) for batch in batches]
