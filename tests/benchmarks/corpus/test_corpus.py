"""The committed texts, and the function that they are built by."""

import pytest

from modalkit.benchmarks.corpus import mixed_length_texts
from modalkit.benchmarks.corpus.build import TooFewSentencesError, build_texts, pack
from modalkit.pipelines.training.data import Sentence


def made_up_sentences(source: str, count: int) -> list[Sentence]:
    """Sentences of 1 to 30 words, each of which says where it stands."""
    return [Sentence(source, 0.0, " ".join([f"{source}{number}"] * (1 + number % 30))) for number in range(count)]


def test_the_committed_texts_have_the_lengths_that_the_readme_gives() -> None:
    words = sorted(len(text.split()) for text in mixed_length_texts())
    assert len(words) == 4_000
    assert words[2_000] == 23
    assert words[3_800] == 103
    assert words[-1] == 226


def test_the_first_texts_have_about_the_same_mix_of_lengths() -> None:
    words = sorted(len(text.split()) for text in mixed_length_texts(500))
    assert len(words) == 500
    assert 20 <= words[250] <= 26
    assert 85 <= words[475] <= 120


def test_a_text_is_consecutive_whole_sentences_of_one_source() -> None:
    sentences = made_up_sentences("a", 900) + made_up_sentences("b", 900)
    whole = {source: [s.text for s in sentences if s.source == source] for source in ("a", "b")}
    for text in build_texts(sentences, count=40):
        of_source = whole[text[0]]
        first = of_source.index(next(s for s in of_source if text == s or text.startswith(f"{s} ")))
        joined = [" ".join(of_source[first : first + length]) for length in range(1, 50)]
        assert text in joined


def test_no_sentence_is_used_twice() -> None:
    texts = build_texts(made_up_sentences("a", 2_000), count=40)
    numbers = [number for text in texts for number in dict.fromkeys(text.split())]
    assert len(numbers) == len(set(numbers))


def test_sources_are_used_up_evenly() -> None:
    texts = build_texts(made_up_sentences("a", 3_000) + made_up_sentences("b", 9_000), count=400)
    words = {source: sum(len(text.split()) for text in texts if text.startswith(source)) for source in ("a", "b")}
    assert words["b"] / words["a"] == pytest.approx(3, rel=0.2)


def test_another_seed_makes_other_texts() -> None:
    sentences = made_up_sentences("a", 2_000)
    assert build_texts(sentences, 40, seed=1) == build_texts(sentences, 40, seed=1)
    assert build_texts(sentences, 40, seed=1) != build_texts(sentences, 40, seed=2)


def test_a_source_that_runs_out_is_named() -> None:
    with pytest.raises(TooFewSentencesError, match=r"^few ran out of sentences after \d+ of 100 texts"):
        build_texts(made_up_sentences("few", 50), count=100)


def test_the_same_texts_make_the_same_file() -> None:
    assert pack(["one", "two"]) == pack(["one", "two"])
