"""The encoder of transformers inside a module, and a last layer of it that computes what is of use.

The outputs of most classifiers depend on the last state of each text's first token alone. Then the last layer has no
need of the other tokens but for their keys and values.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modalkit.pipelines.engines.torch_engine import named_outputs

IMPLEMENTATION = "modalkit_first_tokens"
SAME_WITHIN = 0.02  # in bfloat16, too


class Place(NamedTuple):
    """Where an encoder is: the attribute `name` of `parent`, inside `model`."""

    model: PreTrainedModel
    parent: nn.Module
    name: str

    @property
    def encoder(self) -> Any:
        """What is there; its ``layer`` are its layers."""
        return getattr(self.parent, self.name)

    def attend_by(self, implementation: str) -> bool:
        """Let the model compute attention by an implementation that transformers knows; whether it does then."""
        self.model.set_attn_implementation(implementation)
        return bool(self.model.config._attn_implementation == implementation)  # noqa: SLF001  # there is no public name


def place_of_encoder(module: nn.Module) -> Place | None:
    """The only stack of layers of an encoder as BERT's; None where there is none, or another number."""
    model = next((each for each in module.modules() if isinstance(each, PreTrainedModel)), None)
    if model is None or model.config.is_encoder_decoder or getattr(model.config, "is_decoder", False):
        return None
    places = [
        Place(model, parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in ("encoder", "transformer") and isinstance(getattr(child, "layer", None), nn.ModuleList)
    ]
    return places[0] if len(places) == 1 else None


class KeysAndValues(Exception):  # noqa: N818  # no error: it ends a layer where these are known
    """What attention looks at, of all tokens."""


class FirstTokensLayer(nn.Module):
    """The last layer of an encoder, for the first token of each text alone.

    That one looks at all tokens, so the layer runs twice: with all of them until `keys_and_values` are known to
    attention, which is to raise them, and with the first ones, for which attention is to use them.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        """What the layer returns, with one token for each text."""
        begins = options.get("cu_seq_lens_q")
        first = hidden_states[:, :1] if begins is None else hidden_states[:, begins[:-1]]
        try:
            return self.layer(hidden_states, *arguments, **options, keys_and_values=None)
        except KeysAndValues as found:
            return self.layer(first, *arguments, **options, keys_and_values=found.args)


def needs_first_tokens_only(module: nn.Module, encoder: nn.Module, example: Mapping[str, Tensor]) -> bool:
    """Whether the module's outputs have a gradient by the last states of first tokens, and by those of no other.

    A module can hide that it uses others (by rounding, or by detaching them): see `compute_first_tokens_only`.
    """
    calls: list[Tensor] = []

    def watch(_: nn.Module, __: Any, outputs: Any) -> Any:
        outputs.last_hidden_state = outputs.last_hidden_state.detach().requires_grad_()
        calls.append(outputs.last_hidden_state)
        return outputs

    hook = encoder.register_forward_hook(watch)
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            outputs = list(named_outputs(module(**example)).values())
            [states] = calls
            weights = [torch.rand_like(output) for output in outputs]  # a sum of probabilities has a gradient of 0
            gradient = torch.autograd.grad(outputs, states, weights)[0]
    except Exception:  # noqa: BLE001  # outputs that are whole numbers, a module that cannot be differentiated
        return False
    finally:
        hook.remove()
    return gradient.shape[1] > 1 and bool(gradient[:, 0].any() and not gradient[:, 1:].any())


def compute_first_tokens_only(module: nn.Module, encoder: Any, example: Mapping[str, Tensor]) -> bool:
    """Let the last layer of the encoder inside a module do so, if the outputs for `example` stay; whether they do."""
    layer = encoder.layer[-1]
    with torch.inference_mode():
        expected = named_outputs(module(**example)).values()
        encoder.layer[-1] = FirstTokensLayer(layer)
        try:
            is_same = all(
                torch.allclose(found, output, rtol=SAME_WITHIN, atol=SAME_WITHIN)
                for found, output in zip(named_outputs(module(**example)).values(), expected, strict=True)
            )
        except Exception:  # noqa: BLE001  # a layer that needs all tokens raises anything
            is_same = False
    if not is_same:
        encoder.layer[-1] = layer
    return is_same


def skip_other_tokens(module: nn.Module, example: Mapping[str, Tensor]) -> None:
    """Let the encoder inside a module, with its padding, compute no token in vain; nothing changes where it cannot.

    `example`, a batch, shows where that is.
    """
    place = place_of_encoder(module)
    if place is None or not needs_first_tokens_only(module, place.encoder, example):
        return
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    earlier = place.model.config._attn_implementation  # noqa: SLF001  # as above
    if not (place.attend_by(IMPLEMENTATION) and compute_first_tokens_only(module, place.encoder, example)):
        place.attend_by(earlier)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers by torch; in the last layer, the first token of each text looks at all of it."""
    if "keys_and_values" in options:
        known = options.pop("keys_and_values")
        if known is None:
            raise KeysAndValues(key, value)
        key, value = known
        attention_mask = None if attention_mask is None else attention_mask[:, :, :1]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
