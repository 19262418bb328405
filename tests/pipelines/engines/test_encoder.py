"""The last layer computes the first token of each text alone, where the outputs depend on no other."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from modalkit.pipelines.engines.encoder import place_of_encoder, skip_other_tokens
from modalkit.pipelines.engines.exported import Converted, convert
from modalkit.pipelines.engines.settings import Candidate
from modalkit.pipelines.engines.torch_engine import changing_dimensions, named_outputs
from modalkit.pipelines.engines.unpadded import remove_padding
from tests.support.tiny_models import SIZES

BERT = BertForSequenceClassification(BertConfig(**SIZES))
CLASSIFIERS: list[PreTrainedModel] = [
    BERT,
    XLMRobertaForSequenceClassification(XLMRobertaConfig(**SIZES)),
    ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=16)),
    DistilBertForSequenceClassification(DistilBertConfig(dim=32, n_heads=4, n_layers=2, hidden_dim=48, vocab_size=100)),
]
EXAMPLE = {
    "input_ids": torch.randint(5, 100, (3, 7)),
    "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6]),
}
BATCH = {
    "input_ids": torch.randint(5, 100, (2, 9)),
    "attention_mask": torch.tensor([[1] * 9, [1] * 2 + [0] * 7]),
}
Change = Callable[[nn.Module, dict[str, Tensor]], None]


class Wrapped(nn.Module):
    """A module of a user's around BERT, which makes something of its states."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.model = BertModel(BertConfig(**SIZES))
        self.make = make

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.make(states, attention_mask.unsqueeze(-1))


def computed_tokens(module: nn.Module, batch: dict[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """How many tokens the last linear layer of the encoder gets, and the outputs."""
    place = place_of_encoder(module)
    assert place is not None
    linear = [each for each in place.encoder.modules() if isinstance(each, nn.Linear)][-1]
    counts: list[int] = []
    hook = linear.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0][..., 0].numel()))
    with torch.inference_mode():
        outputs = named_outputs(module(**batch))
    hook.remove()
    return counts[-1], outputs


@pytest.mark.parametrize("change", [skip_other_tokens, remove_padding])
@pytest.mark.parametrize("model", CLASSIFIERS, ids=lambda each: type(each).__name__)
def test_a_classifier_computes_the_first_tokens_and_its_outputs_stay(model: nn.Module, change: Change) -> None:
    model.train(mode=False)
    other = copy.deepcopy(model)
    change(other, EXAMPLE)
    _, expected = computed_tokens(model, BATCH)
    count, found = computed_tokens(other, BATCH)
    assert count == len(BATCH["input_ids"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("change", [skip_other_tokens, remove_padding])
@pytest.mark.parametrize(
    "module",
    [
        BertForTokenClassification(BertConfig(**SIZES)),
        BertModel(BertConfig(**SIZES)),
        Wrapped(lambda states, mask: (states * mask).sum(dim=1) / mask.sum(dim=1)),
        Wrapped(lambda states, mask: states.masked_fill(mask == 0, -100).amax(dim=1)),
        Wrapped(lambda states, _: (states[:, 0], states[:, 1:].argmax(dim=-1) * 0 + states[:, :1, 0].long())),
        Wrapped(lambda states, mask: states.detach()[:, 0] * mask[:, 0]),
        Wrapped(lambda states, mask: (states * mask).sum(dim=1).sign()),
        Wrapped(lambda states, mask: states[:, 0] + (states * mask).sum(dim=1).detach()),
    ],
    ids=["of each token", "states", "mean", "maximum", "labels", "no gradient", "signs", "hidden"],
)
def test_all_tokens_are_computed_where_outputs_may_depend_on_them(module: nn.Module, change: Change) -> None:
    module.train(mode=False)
    other = copy.deepcopy(module)
    change(other, EXAMPLE)
    _, expected = computed_tokens(module, BATCH)
    count, found = computed_tokens(other, BATCH)
    is_token = BATCH["attention_mask"].bool()
    assert count >= is_token.sum()
    for name, output in expected.items():
        kept = is_token if output.shape[:2] == is_token.shape else torch.ones(len(output), dtype=torch.bool)
        torch.testing.assert_close(found[name][kept], output[kept], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES)),
        MPNetForSequenceClassification(MPNetConfig(**SIZES)),
        nn.Linear(2, 2),
    ],
    ids=lambda each: type(each).__name__,
)
def test_other_models_stay_as_they_are(model: nn.Module) -> None:
    before = repr(model)
    skip_other_tokens(model, EXAMPLE if isinstance(model, PreTrainedModel) else {"input": torch.ones(1, 2)})
    assert repr(model) == before


def test_a_layer_that_fails_for_single_tokens_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(BERT).train(mode=False)
    before = repr(model), model.config._attn_implementation  # noqa: SLF001  # there is no public name for it
    dense = model.bert.encoder.layer[-1].output.dense
    forward: Callable[[Tensor], Tensor] = dense.forward

    def demand_length(states: Tensor) -> Tensor:
        if states.shape[1] == 1:
            raise ValueError("too short")
        return forward(states)

    monkeypatch.setattr(dense, "forward", demand_length)
    skip_other_tokens(model, EXAMPLE)
    assert (repr(model), model.config._attn_implementation) == before  # noqa: SLF001  # as above
    model(**EXAMPLE)


def test_such_a_model_can_be_converted(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = copy.deepcopy(BERT).train(mode=False)
    with torch.inference_mode():
        expected = named_outputs(model(**BATCH))
    skip_other_tokens(model, EXAMPLE)
    convert("openvino", model, EXAMPLE, changing_dimensions([EXAMPLE, BATCH]), tmp_path)
    found = Converted(Candidate("openvino", "float32"), tmp_path, torch.device("cpu"))(BATCH)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
