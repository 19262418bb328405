"""The data that the bundled model is trained and judged on."""

from pathlib import Path

import pytest

from modalkit.pipelines.training.data import LABELS, SOURCES, Sentence, load_sentences


def test_a_rating_stands_for_one_of_three_labels() -> None:
    ratings = [-4, -0.5, -0.49, 0, 0.49, 0.5, 4]
    labels = [LABELS[Sentence("tweets", rating, "a").label] for rating in ratings]
    assert labels == ["negative", "negative", "neutral", "neutral", "neutral", "positive", "positive"]


def test_soft_labels_add_up_to_one_and_waver_at_the_bounds() -> None:
    for rating in (-3, -0.5, 0, 0.5, 3):
        assert sum(Sentence("tweets", rating, "a").soft_label) == pytest.approx(1)
    assert Sentence("tweets", 0.5, "a").soft_label[2] == pytest.approx(0.5, abs=1e-3)
    assert Sentence("tweets", 3, "a").soft_label[2] > 0.999


def test_the_split_is_fixed_by_the_text_alone_and_holds_out_about_a_tenth() -> None:
    sentences = [Sentence("tweets", n % 3, f"sentence {n}") for n in range(10_000)]
    held_out = [sentence for sentence in sentences if sentence.held_out]
    assert 900 < len(held_out) < 1100
    assert all(Sentence("other", -1, sentence.text).held_out for sentence in held_out)


def test_files_are_read_with_their_stray_bytes(tmp_path: Path) -> None:
    for source in SOURCES:
        (tmp_path / f"{source}_GroundTruth.txt").write_bytes(b"1\t2.5\tna\xefve\x85 text\r\n\r\n2\t-1\ttabs\tinside\n")
    sentences = load_sentences(tmp_path)
    assert [sentence.source for sentence in sentences] == [source for source in SOURCES for _ in range(2)]
    assert [(s.rating, s.text) for s in sentences[:2]] == [(2.5, "na�ve� text"), (-1.0, "tabs\tinside")]
