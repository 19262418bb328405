"""The labelled sentences that the bundled model is trained and evaluated on, and their fixed split.

Source: C.J. Hutto and E.E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", ICWSM 2014. MIT licence, (c) 2016 C.J. Hutto. The files are part of the source distribution of the PyPI package
``vaderSentiment`` 3.3.2.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

DATA_PACKAGE = "vaderSentiment==3.3.2"
SOURCES = ("amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets")
LABELS = ("negative", "neutral", "positive")

NEUTRAL_BOUND = 0.5
"""Sentences rated within this distance of 0 are neutral."""

RATING_ERROR = 0.25
"""About the standard error of a mean of 20 ratings."""

HELD_OUT_FOLD, FOLDS = 0, 10


@dataclass(frozen=True)
class Sentence:
    """One rated sentence; ``rating`` is the mean of 20 raters, from -4 (most negative) to 4 (most positive)."""

    source: str
    rating: float
    text: str

    @property
    def label(self) -> int:
        """The index in `LABELS` of the label that the rating means."""
        if self.rating <= -NEUTRAL_BOUND:
            return 0
        return 2 if self.rating >= NEUTRAL_BOUND else 1

    @property
    def held_out(self) -> bool:
        """Whether it is excluded from training. Only the text decides, so copies of a text are on the same side."""
        digest = hashlib.sha256(self.text.encode()).digest()
        return int.from_bytes(digest[:8], "big") % FOLDS == HELD_OUT_FOLD

    @property
    def soft_label(self) -> tuple[float, float, float]:
        """The probability of each label, given that the rating is uncertain by `RATING_ERROR`.

        A sentence rated 0.49 is hardly more neutral than one rated 0.51, but their hard labels would differ.
        """
        below = NormalDist(self.rating, RATING_ERROR).cdf(-NEUTRAL_BOUND)
        above = NormalDist(-self.rating, RATING_ERROR).cdf(-NEUTRAL_BOUND)
        return below, 1 - below - above, above


def load_sentences(folder: Path) -> list[Sentence]:
    """All sentences of the ``*_GroundTruth.txt`` files in `folder`, in the order of `SOURCES` and of the files."""
    sentences = []
    for source in SOURCES:
        content = (folder / f"{source}_GroundTruth.txt").read_bytes()
        # A few bytes are not UTF-8, and some texts contain characters that str.splitlines() treats as line ends.
        for line in content.decode("utf-8", errors="replace").split("\n"):
            if line.strip():
                _, rating, text = line.split("\t", 2)
                sentences.append(Sentence(source, float(rating), text.strip()))
    return sentences


def fetch_sentences(cache_folder: Path) -> Path:
    """Download the sentences from the package registry of pip's configuration; returns the folder of the files."""
    folder = cache_folder / "hutto_ICWSM_2014"
    if not folder.is_dir():
        archive = pip_download(DATA_PACKAGE, cache_folder, "--no-binary", ":all:")
        with tempfile.TemporaryDirectory() as unpacked:
            shutil.unpack_archive(archive, unpacked, filter="data")
            (inner,) = Path(unpacked).rglob("hutto_ICWSM_2014.tar.gz")
            shutil.unpack_archive(inner, cache_folder, filter="data")
    return folder


def pip_download(requirement: str, folder: Path, *options: str) -> Path:
    """Download one distribution without its dependencies; returns the file's path.

    Raises `subprocess.CalledProcessError` when pip fails.
    """
    target = folder / requirement.replace("==", "-")
    if not target.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(target)]
        subprocess.run([*command, *options, requirement], check=True)
    (path,) = target.iterdir()
    return path


def read_sentences(path: Path) -> list[Sentence]:
    """The sentences of a file that ``export-held-out`` wrote."""
    rows = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [Sentence(source, float(rating), text) for source, rating, text in (row.split("\t", 2) for row in rows)]
