"""The sentiment pipeline, with the bundled model and with others."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from tokenizers import Tokenizer
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from modalkit.pipelines.errors import ModelLoadError
from modalkit.pipelines.loading import BUNDLED_FOLDER
from modalkit.pipelines.sentiment import SentimentPipeline, SentimentRequest, SentimentResponse
from modalkit.pipelines.texts import MAX_TEXT_CHARACTERS
from modalkit.pipelines.training.data import Sentence

TORCH = {"engine": "torch"}
EXACT = {**TORCH, "dtype": "float32"}
"""The entry's keys for the exact numbers, without measuring."""


def requests(*texts: str) -> list[BaseModel]:
    return [SentimentRequest(text=text) for text in texts]


def run(pipeline: SentimentPipeline, *texts: str) -> list[SentimentResponse]:
    results = pipeline.run_inference(requests(*texts))
    assert all(isinstance(result, SentimentResponse) for result in results)
    return results  # type: ignore[return-value]  # just checked


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A copy of the bundled model, as a user's own."""
    return Path(shutil.copytree(BUNDLED_FOLDER, tmp_path / "mine"))


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_it_tells_good_from_bad_and_from_neither(bundled: SentimentPipeline) -> None:
    answers = run(bundled, "What a lovely day!", "It broke after a week, what a waste.", "The meeting is at nine.")
    assert [answer.sentiment for answer in answers] == ["positive", "negative", "neutral"]
    assert all(1 / 3 < answer.confidence <= 1 for answer in answers)


def test_an_answer_is_what_the_documentation_shows(bundled: SentimentPipeline) -> None:
    (answer,) = run(bundled, "What a lovely day!")
    assert json.loads(answer.model_dump_json()) == {
        "status": "success",
        "error": None,
        "meta": {},
        "sentiment": "positive",
        "confidence": answer.confidence,
    }


def test_a_result_does_not_depend_on_its_companions(bundled: SentimentPipeline, held_out: list[Sentence]) -> None:
    texts = [sentence.text for sentence in held_out[:40]]
    together = run(bundled, *texts)
    for text, answer in zip(texts, together, strict=True):
        (alone,) = run(bundled, text)
        assert alone.sentiment == answer.sentiment
        assert alone.confidence == pytest.approx(answer.confidence, abs=1e-4)


def test_batches_may_overlap_on_several_threads(bundled: SentimentPipeline) -> None:
    texts = [f"It was {'very ' * n}good" for n in range(1, 60)]
    expected = [answer.confidence for answer in run(bundled, *texts)]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda text: run(bundled, text)[0].confidence, texts))
    assert answers == pytest.approx(expected, abs=1e-4)


def test_the_outer_stages_start_no_openmp_threads(bundled: SentimentPipeline) -> None:
    """They run beside `predict` in another thread, whose OpenMP threads would be more than there are cores."""
    items = requests(*["a text of some words"] * 64)
    raw = {"probabilities": torch.rand(64, 3), "truncated": [False] * 64}

    def started_threads() -> set[Path]:
        before = set(Path("/proc/self/task").iterdir())
        bundled.preprocess(items)
        bundled.postprocess(items, raw)
        return set(Path("/proc/self/task").iterdir()) - before

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(started_threads).result() == set()


def test_a_text_beyond_the_models_limit_is_cut_and_says_so(bundled: SentimentPipeline) -> None:
    fits, cut = "good " * (bundled.max_length - 2), "good " * (bundled.max_length - 1)
    whole, truncated, short = run(bundled, fits, cut, "good")
    assert (whole.truncated, truncated.truncated, short.truncated) == (False, True, False)
    assert truncated.model_dump()["truncated"] is True
    assert truncated.confidence == pytest.approx(whole.confidence, abs=1e-4)


def test_max_length_cuts_earlier() -> None:
    pipeline = SentimentPipeline("sentiment", "models", {}, max_length=8, **EXACT)
    assert pipeline.preprocess(requests("word " * 20))["tensors"]["input_ids"].shape == (1, 8)
    assert [answer.truncated for answer in run(pipeline, "a b c d e f", "a b c d e f g")] == [False, True]


def test_a_batch_is_padded_to_its_longest_text(bundled: SentimentPipeline) -> None:
    tensors = bundled.preprocess(requests("good", "good good good"))["tensors"]
    assert tensors["input_ids"].shape == (2, 5)
    assert tensors["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_on_cuda_lengths_are_multiples_of_8_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = SentimentPipeline("sentiment", "models", {"device": "cpu"}, max_length=13, **EXACT)
    monkeypatch.setattr(pipeline, "device", torch.device("cuda"))
    lengths = [
        pipeline.preprocess(requests("good " * words))["tensors"]["input_ids"].shape[1] for words in (1, 6, 7, 99)
    ]
    assert lengths == [8, 8, 13, 13]


def test_a_model_gets_only_the_tensors_that_it_takes(model_folder: Path, bundled: SentimentPipeline) -> None:
    """DistilBERT has no token types; this one also has two labels, and its weights are left to chance."""
    sizes: dict[str, Any] = {"dim": 8, "hidden_dim": 8, "n_heads": 2, "n_layers": 1, "vocab_size": 16_384}
    config = DistilBertConfig(**sizes, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})
    DistilBertForSequenceClassification(config).save_pretrained(model_folder)
    pipeline = SentimentPipeline("mine", ".", {"device": "cpu"}, model_path=str(model_folder), **EXACT)
    assert set(pipeline.preprocess(requests("good"))["tensors"]) == {"input_ids", "attention_mask"}
    assert "token_type_ids" in bundled.preprocess(requests("good"))["tensors"]
    (answer,) = run(pipeline, "good")
    assert answer.sentiment in {"negative", "positive"}


def test_moving_to_a_device_that_is_not_there_changes_nothing(bundled: SentimentPipeline) -> None:
    before = bundled.device
    for name, message in (("cuda:99", "cuda:99"), ("gpu", "'gpu' is not auto")):
        with pytest.raises(ModelLoadError, match=message):
            bundled.move_to(name)
    assert bundled.device == before
    assert run(bundled, "good")


def test_the_number_format_is_the_one_asked_for_whatever_is_stored(bundled: SentimentPipeline) -> None:
    assert json.loads((BUNDLED_FOLDER / "config.json").read_text())["dtype"] == "float16"
    assert bundled.dtype is torch.float32
    cpu = SentimentPipeline("sentiment", "models", {"device": "cpu", "dtype": "float32"}, **TORCH, dtype="bfloat16")
    assert cpu.dtype is torch.bfloat16  # that of the entry
    cpu.move_to("cpu")
    assert cpu.dtype is torch.bfloat16
    assert "torch bfloat16" in cpu.device_name()


def test_threads_are_set_as_configured() -> None:
    before = torch.get_num_threads()
    try:
        SentimentPipeline("sentiment", "models", {"threads": before + 1}, **EXACT)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_folder_is_found_in_the_models_folder_and_its_labels_are_used(model_folder: Path) -> None:
    change_json(
        model_folder / "config.json",
        id2label={"0": "NEGATIVE", "1": "Meh", "2": "POSITIVE"},
        label2id={"NEGATIVE": 0, "Meh": 1, "POSITIVE": 2},
    )
    pipeline = SentimentPipeline("mine", str(model_folder.parent), {}, model_path="mine", **EXACT)
    assert pipeline.labels == ["negative", "Meh", "positive"]
    assert [answer.sentiment for answer in run(pipeline, "I love it", "The meeting is at nine.")] == ["positive", "Meh"]


def test_a_classifier_of_several_labels_at_once_gives_each_its_own_probability(model_folder: Path) -> None:
    change_json(model_folder / "config.json", problem_type="multi_label_classification")
    pipeline = SentimentPipeline("mine", str(model_folder.parent), {}, model_path="mine", **EXACT)
    items = requests("I love it")
    probabilities = pipeline.predict(items, pipeline.preprocess(items))["probabilities"]
    assert probabilities.sum() != pytest.approx(1, abs=1e-3)


def test_padding_goes_where_the_tokenizer_has_it(model_folder: Path) -> None:
    change_json(model_folder / "tokenizer_config.json", padding_side="left")
    pipeline = SentimentPipeline("mine", str(model_folder.parent), {}, model_path="mine", **EXACT)
    mask = pipeline.preprocess(requests("good", "good good good"))["tensors"]["attention_mask"]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("common", "entry", "message"),
    [
        (
            {"device": "gpu"},
            {},
            r"^devices of the entry, or else model_.*\.device: 'gpu' is not auto, cpu, mps, cuda or",
        ),
        (
            {"device": "cuda:99"},
            {},
            r"^devices of the entry, or else model_.*\.device: 'cuda:99' was asked for.*set it to auto or cpu",
        ),
        ({"dtype": "float8"}, {}, r"common\.dtype: 'float8' is not auto, float32"),
        ({"engines": {"cache": "x"}}, {}, r"common\.engines: .* is not a group of settings of engines \(cache_folder"),
        ({}, {"engine": "tensorrt"}, r"model_entries\.mine\.engine: 'tensorrt' is not auto, torch, torch-packed"),
        ({"threads": 0}, {}, r"common\.threads: 0 is not a positive whole number"),
        ({"treads": 2}, {}, r"common\.treads: there is no such setting; there are device, dtype, engines, threads"),
        (
            {},
            {"max_lenght": 5},
            r"model_entries\.mine\.max_lenght: there is no such setting; there are dtype, engine, max_length",
        ),
        ({}, {"max_length": 513}, r"max_length: 513 is more than the 512 tokens"),
        ({}, {"max_length": 2}, r"model_entries\.mine\.max_length: max_length 2 leaves no room for text.*Raise it"),
        ({}, {"revision": "main"}, r"revision 'main' is for a model on the hub"),
        ({}, {"model_path": "./nowhere"}, r"nowhere"),
        ({}, {"model_path": "my-modle"}, r"model_path 'my-modle': there is no folder models/my-modle nor .*owner/name"),
        ({}, {"model_path": "sentiment_model/x"}, r"there is no folder models/sentiment_model/x nor"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(
    common: dict[str, Any], entry: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sentiment_model").mkdir()
    with pytest.raises(ModelLoadError, match=message):
        SentimentPipeline("mine", "models", common, **entry)


def test_a_name_that_no_hub_knows_is_refused_with_the_folders_that_were_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=rf"nobody/nothing.*neither in {tmp_path}"):
        SentimentPipeline("mine", str(tmp_path), {}, model_path="nobody/nothing")


def test_a_hub_that_cannot_be_reached_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ModelLoadError, match=r"'nobody/nothing'.*[^.]\. If a folder was meant"):
        SentimentPipeline("mine", str(tmp_path), {}, model_path="nobody/nothing")
    assert "The hub cannot be reached, so nobody/nothing is looked for in its cache only" in caplog.text


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_is_refused(model_folder: Path, missing: str) -> None:
    (model_folder / missing).unlink()
    with pytest.raises(ModelLoadError, match=str(model_folder)):
        SentimentPipeline("mine", ".", {}, model_path=str(model_folder))


def test_a_model_without_a_trained_head_is_refused(model_folder: Path) -> None:
    change_json(model_folder / "config.json", model_type="distilbert", architectures=["DistilBertModel"])
    with pytest.raises(ModelLoadError, match="no trained text classifier"):
        SentimentPipeline("mine", ".", {}, model_path=str(model_folder))


def test_a_text_of_a_megabyte_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValidationError, match=r"1000000 characters, at most 100000 are accepted: .*split it"):
        SentimentRequest(text="x" * 1_000_000)


@pytest.mark.parametrize("unit", ["x", "word ", " x", "字", "\x00"])
def test_a_text_of_the_longest_accepted_length_is_answered(bundled: SentimentPipeline, unit: str) -> None:
    text = (unit * MAX_TEXT_CHARACTERS)[:MAX_TEXT_CHARACTERS]
    (answer,) = run(bundled, text)
    assert 0 <= answer.confidence <= 1
    assert 1 <= bundled.item_size(SentimentRequest(text=text)) <= bundled.max_length


@pytest.mark.parametrize("text", ["", "  \n\t", "x" * (MAX_TEXT_CHARACTERS + 1), 5, None])
def test_a_text_that_is_none_is_refused(text: Any) -> None:
    with pytest.raises(ValidationError, match="text"):
        SentimentRequest(text=text)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="lang"):
        SentimentRequest.model_validate({"text": "a", "lang": "en"})


def test_the_size_estimate_is_close_to_the_number_of_tokens(
    bundled: SentimentPipeline, held_out: list[Sentence]
) -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLED_FOLDER / "tokenizer.json"))
    texts = [sentence.text for sentence in held_out]
    true = [len(encoding) for encoding in tokenizer.encode_batch(texts)]
    errors = sorted(abs(bundled.item_size(item) - length) for item, length in zip(requests(*texts), true, strict=True))
    assert sum(errors) / len(errors) < 0.01
    assert errors[int(0.99 * len(errors))] == 0
    assert bundled.item_size(requests("word " * 5000)[0]) == bundled.max_length


def test_sample_items_have_the_size_that_was_asked_for(bundled: SentimentPipeline) -> None:
    for size in (3, 16, 128, bundled.max_length):
        items = bundled.sample_items(4, size)
        assert len(items) == 4
        assert bundled.preprocess(items)["tensors"]["input_ids"].shape == (4, size)
