"""Embeddings, reranking, entities and zero-shot labels: the numbers are those of the library that defines each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Qwen2Config,
    Qwen2Model,
    pipeline,
)

from modalkit.pipelines.embedding import EmbeddingPipeline, EmbeddingResponse
from modalkit.pipelines.engines import Sameness
from modalkit.pipelines.engines.sameness import default_same
from modalkit.pipelines.errors import ModelLoadError, RejectItem
from modalkit.pipelines.inference_pipeline import InferencePipeline
from modalkit.pipelines.rerank import RerankPipeline, RerankRequest, RerankResponse
from modalkit.pipelines.texts import TextRequest
from modalkit.pipelines.token_classification import TokenClassificationPipeline, TokenClassificationResponse
from modalkit.pipelines.transformer_pipeline import TransformerPipeline
from modalkit.pipelines.zero_shot import ZeroShotPipeline, ZeroShotRequest, ZeroShotResponse
from tests.support.tiny_models import EXACT, POSITIONS, TEXTS, save_model

CPU = {"device": "cpu"}
ENTITIES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC", 5: "date"}
INFERENCE = {0: "contradiction", 1: "neutral", 2: "entailment"}
LABELS = ["travel", "cooking", "a day in the neighbourhood"]
QUERIES = ["Where is Paris?", "cats", "Who met whom in Strasbourg, and why?"]

TASKS = [
    (EmbeddingPipeline, "encoder"),
    (RerankPipeline, "cross_encoder"),
    (TokenClassificationPipeline, "tagger"),
    (ZeroShotPipeline, "inference"),
]


def named(labels: dict[int, str]) -> dict[str, Any]:
    return {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(BertModel, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(BertForSequenceClassification, tmp_path_factory.mktemp("cross_encoder"), num_labels=1)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(BertForTokenClassification, tmp_path_factory.mktemp("tagger"), **named(ENTITIES))


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(BertForSequenceClassification, tmp_path_factory.mktemp("inference"), **named(INFERENCE))


def texts(*given: str) -> list[BaseModel]:
    return [TextRequest(text=text) for text in given]


def load(kind: type[InferencePipeline], folder: Path, **entry: Any) -> Any:
    return kind("mine", str(folder.parent), CPU, model_path=folder.name, **{**EXACT, **entry})


def sentence_vectors(folder: Path, pooling: str, *, normalize: bool, max_length: int = POSITIONS) -> torch.Tensor:
    """The vectors of `TEXTS` as sentence-transformers defines them, one text at a time, so without padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = []
    for text in TEXTS:
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state[0]
        vectors.append({"mean": hidden.mean(dim=0), "cls": hidden[0], "last": hidden[-1]}[pooling])
    stacked = torch.stack(vectors)
    return torch.nn.functional.normalize(stacked, dim=1) if normalize else stacked


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", True), ("last", False)])
def test_embeddings_are_those_of_sentence_transformers(
    tmp_path: Path, pooling: str, side: str, *, normalize: bool
) -> None:
    """Padding on the left is for models whose positions are relative."""
    if side == "right":
        folder = save_model(BertModel, tmp_path / "mine")
    else:
        folder = save_model(Qwen2Model, tmp_path / "mine", Qwen2Config, num_key_value_heads=2, padding_side="left")
    model = load(EmbeddingPipeline, folder, pooling=pooling, normalize=normalize)
    answers: list[EmbeddingResponse] = model.run_inference(texts(*TEXTS))
    expected = sentence_vectors(folder, pooling, normalize=normalize)
    assert np.array([a.embedding for a in answers]) == pytest.approx(expected.numpy(), abs=1e-4)
    assert [a.truncated for a in answers] == [False] * 6 + [True]


def test_a_sentence_transformers_folder_says_how_it_is_pooled_and_cut(tmp_path: Path) -> None:
    folder = save_model(BertModel, tmp_path / "mine")
    names = ("Transformer", "Pooling", "Normalize")
    modules = [{"path": f"{i}_{name}", "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    model = load(EmbeddingPipeline, folder)
    answers: list[EmbeddingResponse] = model.run_inference(texts(*TEXTS))
    expected = sentence_vectors(folder, "cls", normalize=True, max_length=16)
    assert np.array([a.embedding for a in answers]) == pytest.approx(expected.numpy(), abs=1e-5)
    assert model.max_length == 16

    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ModelLoadError, match=r"pooling_mode_max_tokens.*set model_settings\.model_entries\.mine\.pool"):
        load(EmbeddingPipeline, folder)
    assert load(EmbeddingPipeline, folder, pooling="mean").run_inference(texts("a"))
    modules.append({"path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelLoadError, match="a module that this pipeline does not run: Dense"):
        load(EmbeddingPipeline, folder, pooling="mean")


@pytest.mark.parametrize(
    ("config", "entry", "function"),
    [
        ({}, {}, "sigmoid"),
        ({}, {"activation": "none"}, "none"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, {}, "none"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, {}, "none"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}, {"activation": "sigmoid"}, "sigmoid"),
    ],
)
def test_pairs_are_scored_as_a_cross_encoder_does(
    tmp_path: Path, config: dict[str, Any], entry: dict[str, Any], function: str
) -> None:
    folder = save_model(BertForSequenceClassification, tmp_path / "mine", num_labels=1, **config)
    pairs = [{"text": query, "text_pair": text} for query in QUERIES for text in TEXTS]
    reference = pipeline("text-classification", model=str(folder), function_to_apply=function, device="cpu")
    expected = [one["score"] for one in reference(pairs, truncation=True)]
    items: list[BaseModel] = [RerankRequest(query=pair["text"], text=pair["text_pair"]) for pair in pairs]
    answers: list[RerankResponse] = load(RerankPipeline, folder, **entry).run_inference(items)
    assert [a.score for a in answers] == pytest.approx(expected, abs=1e-4)
    assert [a.truncated for a in answers] == ([False] * 6 + [True]) * 3


def test_a_reranker_with_an_activation_that_is_not_known_is_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = {"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}
    folder = save_model(BertForSequenceClassification, tmp_path / "mine", num_labels=1, **config)
    with pytest.raises(ModelLoadError, match=r"torch\.nn\.Tanh.*mine\.activation to sigmoid or none"):
        load(RerankPipeline, folder)


@pytest.mark.parametrize("aggregation", ["simple", "first", "average", "max"])
def test_entities_are_those_of_the_transformers_pipeline(tagger: Path, aggregation: str) -> None:
    reference = pipeline("token-classification", model=str(tagger), aggregation_strategy=aggregation, device="cpu")
    expected: Any = reference(TEXTS)
    answers: list[TokenClassificationResponse] = load(
        TokenClassificationPipeline, tagger, aggregation=aggregation
    ).run_inference(texts(*TEXTS))
    assert sum(len(a.entities) for a in answers) > 5, "next to nothing is compared"
    for text, answer, entities in zip(TEXTS, answers, expected, strict=True):
        assert [(e.entity_group, e.start, e.end) for e in answer.entities] == [
            (e["entity_group"], e["start"], e["end"]) for e in entities
        ]
        assert [e.score for e in answer.entities] == pytest.approx([e["score"] for e in entities], abs=1e-5)
        assert all(e.word == text[e.start : e.end] for e in answer.entities)
    assert [a.truncated for a in answers] == [False] * 6 + [True]


@pytest.mark.parametrize("multi_label", [False, True])
def test_zero_shot_labels_are_those_of_the_transformers_pipeline(inference: Path, *, multi_label: bool) -> None:
    """Each text has its own number of labels, some those of the entry."""
    template = "It is about {}."
    reference = pipeline("zero-shot-classification", model=str(inference), device="cpu")
    own = [None, ["travel"], LABELS[:2], [*LABELS, "yes", "no"], None, [str(n) for n in range(40)], LABELS]
    expected = [
        reference(text, labels or LABELS, hypothesis_template=template, multi_label=multi_label)
        for text, labels in zip(TEXTS, own, strict=True)
    ]
    model = load(ZeroShotPipeline, inference, labels=LABELS, hypothesis_template=template, multi_label=multi_label)
    items: list[BaseModel] = [
        ZeroShotRequest(text=text, labels=labels) for text, labels in zip(TEXTS, own, strict=True)
    ]
    answers: list[ZeroShotResponse] = model.run_inference(items)
    for answer, one in zip(answers, expected, strict=True):
        assert dict(zip(answer.labels, answer.scores, strict=True)) == pytest.approx(
            dict(zip(one["labels"], one["scores"], strict=True)), abs=1e-5
        )
        assert answer.scores == sorted(answer.scores, reverse=True)
    assert [a.truncated for a in answers] == [False] * 6 + [True]


def test_a_request_without_labels_fails_alone_where_the_entry_has_none(inference: Path) -> None:
    model = load(ZeroShotPipeline, inference)
    with_labels = ZeroShotRequest(text="yes", labels=["a", "b"])
    without = ZeroShotRequest(text="no")
    first, second = model.run_inference([without, with_labels])
    assert isinstance(first, RejectItem)
    assert str(first).startswith("there are no labels: give labels in the")
    assert second.scores == pytest.approx(model.run_inference([with_labels])[0].scores)
    assert isinstance(model.run_inference([without])[0], RejectItem)
    for labels in ([], [""], ["x"] * 101):
        with pytest.raises(ValidationError, match="labels"):
            ZeroShotRequest(text="no", labels=labels)


@pytest.mark.parametrize(
    ("kind", "fixture", "message"),
    [
        (RerankPipeline, "inference", "is no reranker: it has 3 outputs"),
        (ZeroShotPipeline, "cross_encoder", "is no classifier: its config.json has 1 label"),
        (ZeroShotPipeline, "tagger", "is no trained zero-shot classifier: it has no weights for"),
        (TokenClassificationPipeline, "encoder", "is no trained token classifier: .* fine-tuned for token class"),
        (RerankPipeline, "encoder", "is no trained reranker: .* fine-tuned for reranking"),
    ],
)
def test_a_model_for_another_task_is_refused(
    request: pytest.FixtureRequest, kind: type[InferencePipeline], fixture: str, message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load(kind, request.getfixturevalue(fixture))


def test_a_classifier_without_entailment_is_no_zero_shot_model(tmp_path: Path) -> None:
    folder = save_model(BertForSequenceClassification, tmp_path / "mine", **named({0: "good", 1: "bad"}))
    with pytest.raises(ModelLoadError, match=r"none of its labels \(good, bad\) is entailment"):
        load(ZeroShotPipeline, folder)


@pytest.mark.parametrize(
    ("kind", "entry", "message"),
    [
        (EmbeddingPipeline, {}, r"mine\.model_path: it is missing: give a folder, or owner/name of a model on"),
        (EmbeddingPipeline, {"model_path": "./x"}, r"config\.json, or owner/name of a model on the hub \(with"),
        (
            EmbeddingPipeline,
            {"model_path": "x", "pooling": "max"},
            r"mine\.pooling: 'max' is not auto .*mean, cls or l",
        ),
        (RerankPipeline, {"model_path": "x", "activation": "tanh"}, r"mine\.activation: 'tanh' is not auto"),
        (TokenClassificationPipeline, {"model_path": "x", "aggregation": "none"}, r"'none' is not simple, first, av"),
        (ZeroShotPipeline, {"model_path": "x", "hypothesis_template": "It is."}, r"'It is\.' is not a sentence with"),
        (ZeroShotPipeline, {"model_path": "x", "labels": []}, r"mine\.labels: \[\] is not a list of 1 to 100 labels"),
        (ZeroShotPipeline, {"model_path": "x", "lables": ["a"]}, r"mine\.lables: there is no such setting"),
    ],
)
def test_a_wrong_key_is_refused_by_its_name(kind: type[InferencePipeline], entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        kind("mine", "models", CPU, **entry)


@pytest.mark.parametrize(("kind", "fixture"), TASKS)
def test_samples_have_the_size_that_was_asked_for_and_can_be_run(
    request: pytest.FixtureRequest, kind: type[InferencePipeline], fixture: str
) -> None:
    model: TransformerPipeline[Any] = load(kind, request.getfixturevalue(fixture))
    least = model.item_size(model.sample_items(1, 1)[0])
    for size in (1, 30, 50):
        items = model.sample_items(3, size)
        assert len(items) == 3
        assert model.item_size(items[0]) <= max(least, 2.5 * size)
        assert all(output.status == "success" for output in model.run_inference(items))
    model.warm_up()


@pytest.mark.parametrize(("kind", "fixture"), TASKS)
def test_a_converted_model_has_the_same_outputs(
    request: pytest.FixtureRequest, tmp_path: Path, kind: type[InferencePipeline], fixture: str
) -> None:
    """What a task adds to the model, such as pooling, is converted with it."""
    folder: Path = request.getfixturevalue(fixture)
    common = {**CPU, "engines": {"cache_folder": tmp_path}}
    model: Any = kind("mine", str(folder.parent), common, model_path=folder.name, engine="openvino", dtype="float32")
    exact = load(kind, folder)
    tensors = model.encode([model.to_text(item) for item in exact.sample_items(5, 40)])["tensors"]
    found, expected = model.compute(tensors), exact.compute(tensors)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].numpy() == pytest.approx(tensor.numpy(), abs=1e-3)


@pytest.mark.parametrize(("kind", "fixture"), TASKS)
def test_engines_with_other_outputs_are_told_apart(
    request: pytest.FixtureRequest, kind: type[InferencePipeline], fixture: str
) -> None:
    """The outputs of batches of several lengths, and the same ones with noise."""
    model: Any = load(kind, request.getfixturevalue(fixture))
    batches = [model.encode([model.to_text(item) for item in model.sample_items(40, size)]) for size in (8, 50)]
    outputs = [model.compute(batch["tensors"]) for batch in batches]
    noisy = [{name: tensor + torch.randn_like(tensor) for name, tensor in batch.items()} for batch in outputs]
    same = model.same() or default_same(Sameness())
    assert same(outputs, outputs) is None
    assert same(outputs, noisy) is not None
