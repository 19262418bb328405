"""Encoders without padding. Flash attention needs a GPU, so attention of each text alone stands in for it here."""

import copy
from collections.abc import Sequence

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForTokenClassification,
)

from modalkit.pipelines import EngineError, EngineSettings, load_engine, transformer_pipeline
from modalkit.pipelines.engines import Engine, EngineChoice, unpadded
from modalkit.pipelines.engines.packed import packable_dtypes
from modalkit.pipelines.engines.settings import DTypeName
from modalkit.pipelines.engines.unpadded import remove_padding, unpaddable_dtypes
from modalkit.pipelines.sentiment import SentimentPipeline, SentimentRequest
from tests.support.tiny_models import SIZES

BERT = BertForSequenceClassification(BertConfig(**SIZES))
ROBERTA = RobertaForTokenClassification(RobertaConfig(**SIZES, pad_token_id=1))
DISTILBERT = DistilBertForSequenceClassification(
    DistilBertConfig(dim=32, n_heads=4, n_layers=2, hidden_dim=48, vocab_size=100)
)
EXAMPLE = {"input_ids": torch.randint(5, 100, (2, 5))}


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of the texts of each call of attention, which is the one for GPUs."""
    seen: list[list[int]] = []

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        begins_of_queries: Tensor,
        begins: Tensor,
        longest_of_queries: int,
        longest: int,
        scale: float,
    ) -> Tensor:
        seen.append(begins.diff().tolist())
        texts = zip(
            parts(query, begins_of_queries, longest_of_queries),
            parts(key, begins, longest),
            parts(value, begins, longest),
            strict=True,
        )
        return torch.cat([attention_of(each, scale) for each in texts])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend)
    monkeypatch.setattr(unpadded, "uses_flash", lambda _: True)
    return seen


def parts(tensor: Tensor, begins: Tensor, longest: int) -> tuple[Tensor, ...]:
    """The part of each text, as flash attention finds it."""
    assert begins.dtype == torch.int32
    counts = begins.diff().tolist()
    assert max(counts) <= longest
    assert sum(counts) == len(tensor)
    return torch.split(tensor, counts)


def attention_of(parts: Sequence[Tensor], scale: float) -> Tensor:
    query, key, value = (part.transpose(0, 1) for part in parts)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale).transpose(0, 1)


def mask_of(kind: str) -> Tensor:
    mask = torch.ones(3, 7, dtype=torch.int64)
    if kind != "none":
        mask[0, 3:], mask[2, 1:] = 0, 0
    return mask.flip(1) if kind == "left" else mask


@pytest.fixture(params=["gpu", "cpu", "cpu, long texts"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[list[int]] | None:
    """Each way to compute attention; the lengths that flash attention gets, None on a CPU."""
    if request.param == "gpu":
        found: list[list[int]] = request.getfixturevalue("lengths")
        return found
    if request.param == "cpu, long texts":
        monkeypatch.setattr(unpadded, "MAX_PADDED_LENGTH", 2)
    return None


@pytest.mark.parametrize(
    ("model", "kind"),
    [(BERT, "right"), (BERT, "none"), (ROBERTA, "right"), (ROBERTA, "left"), (DISTILBERT, "right")],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_outputs_are_those_of_the_padded_batch(
    model: PreTrainedModel, kind: str, attention: list[list[int]] | None
) -> None:
    ids, mask = torch.randint(5, 100, (3, 7)), mask_of(kind)
    other = copy.deepcopy(model).train(mode=False)
    remove_padding(other, EXAMPLE)
    if attention is not None:
        attention.clear()
    model.train(mode=False)
    with torch.inference_mode():
        expected, found = (each(input_ids=ids, attention_mask=mask).logits for each in (model, other))
    if found.dim() == 3:  # of each token: those of padding mean nothing
        expected, found = expected[mask.bool()], found[mask.bool()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert attention is None or attention == [mask.sum(dim=1).tolist()] * 2
    assert model.config._attn_implementation == "sdpa"  # noqa: SLF001  # the module itself is as it was


@pytest.mark.parametrize("model", [BERT, DISTILBERT], ids=lambda each: type(each).__name__)
def test_a_text_without_a_token_has_the_output_of_one_place_of_padding(
    model: PreTrainedModel, attention: list[list[int]] | None
) -> None:
    other = copy.deepcopy(model).train(mode=False)
    remove_padding(other, EXAMPLE)
    if attention is not None:
        attention.clear()
    model.train(mode=False)
    ids, mask = torch.randint(5, 100, (2, 7)), torch.zeros(2, 7, dtype=torch.int64)
    ids[0] = 0
    mixed = mask.clone()
    mixed[1, :3] = 1
    with torch.inference_mode():
        empty = model(input_ids=ids[:1, :1]).logits
        with_tokens = model(input_ids=ids[1:, :3], attention_mask=mixed[1:, :3]).logits
        found = [
            other(input_ids=ids[:rows], attention_mask=each[:rows]).logits for rows, each in ((1, mask), (2, mixed))
        ]
        all_empty = other(input_ids=torch.zeros_like(ids), attention_mask=mask).logits
    torch.testing.assert_close(found[0], empty, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], torch.cat([empty, with_tokens]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(all_empty, empty.expand_as(all_empty), atol=1e-5, rtol=1e-4)
    assert attention is None or attention == [[1]] * 2 + [[1, 3]] * 2 + [[1, 1]] * 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=1, n_head=2)), "needs an encoder of transformers"),
        (DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES)), "has its own attention"),
        (torch.nn.Linear(2, 2), "needs an encoder of transformers"),
    ],
)
def test_other_models_are_refused(model: torch.nn.Module, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        remove_padding(model, EXAMPLE)


def test_what_this_attention_does_not_know_is_refused(lengths: list[list[int]]) -> None:
    model = copy.deepcopy(BERT)
    remove_padding(model, EXAMPLE)
    lengths.clear()
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(EngineError, match="cannot compute attention with sliding_window"):
        model.bert(input_ids=ids, sliding_window=2)
    assert lengths == []


def test_heads_that_share_keys_are_refused_on_a_cpu() -> None:
    query, key = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
    places = unpadded.Places(torch.ones(1, 3, dtype=torch.bool), 4)
    with pytest.raises(EngineError, match="one key for each head"):
        unpadded._attend(BERT, query, key, key, None, places=places)  # noqa: SLF001  # transformers calls it


def test_a_cpu_computes_encoders_in_the_formats_of_packed_weights() -> None:
    assert unpaddable_dtypes(BERT, torch.device("cpu")) == packable_dtypes()
    assert unpaddable_dtypes(DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES)), torch.device("cpu")) == []
    model = torch.nn.Linear(2, 2)
    assert unpaddable_dtypes(model, torch.device("cpu")) == []
    with pytest.raises(EngineError, match=r"engine torch-unpadded cannot compute on this device \(cpu\)"):
        load_engine(model, [{"input": torch.ones(1, 2)}], EngineSettings(engine="torch-unpadded"))


@pytest.mark.parametrize("dtype", packable_dtypes())
def test_it_computes_the_bundled_model(dtype: DTypeName) -> None:
    texts: list[BaseModel] = [
        SentimentRequest(text=text) for text in ("Fine.", "It was awful from beginning to end.", "Great! " * 60)
    ]
    outputs = []
    for engine, number in (("torch", "float32"), ("torch-unpadded", dtype)):
        pipeline = SentimentPipeline("mine", ".", {"device": "cpu"}, engine=engine, dtype=number)
        outputs.append(pipeline.predict(texts, pipeline.preprocess(texts))["probabilities"])
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5 if dtype == "float32" else 0.02, rtol=0)


def test_a_batch_costs_the_sum_of_its_sizes_then(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(engine: str) -> SentimentPipeline:
        choice = EngineChoice.model_validate({"engine": engine, "dtype": "float16", "reason": "a test"})
        monkeypatch.setattr(transformer_pipeline, "load_engine", lambda *_, **__: Engine(dict, choice))
        return SentimentPipeline("mine", ".", {})

    assert load("torch-unpadded").cost_feature == "total"
    assert load("torch").cost_feature == "padded"
