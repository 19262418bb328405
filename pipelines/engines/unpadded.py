"""Encoders of transformers that compute the tokens of a batch without its padding, by torch's flash attention.

The layers of the encoder get all texts one after the other, as one row; only attention knows where each begins.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from modalkit.pipelines.engines.settings import DTypeName
from modalkit.pipelines.errors import EngineError

IMPLEMENTATION = "modalkit_unpadded"
MIN_CAPABILITY = (8, 0)  # of the GPU, for flash attention
DTYPES: list[DTypeName] = ["bfloat16", "float16"]  # those of flash attention
UNKNOWN_HERE = ("position_bias", "sliding_window", "softcap", "s_aux")  # what attention may be told and is not done


class UnpaddedEncoder(nn.Module):
    """Runs an encoder on the tokens of a batch that are no padding; its outputs are 0 where there is padding."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """What the encoder returns; `attention_mask` (texts, length) is true where there is a token."""
        texts, length, _ = hidden_states.shape
        if attention_mask is None:
            attention_mask = torch.ones(texts, length, dtype=torch.bool, device=hidden_states.device)
        lengths = attention_mask.sum(dim=1, dtype=torch.int32)
        outputs = self.encoder(
            hidden_states[attention_mask].unsqueeze(0),
            cu_seq_lens_q=nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            max_length_q=length,
            **options,
        )
        padded = torch.zeros_like(hidden_states)
        padded[attention_mask] = outputs.last_hidden_state.squeeze(0)
        outputs.last_hidden_state = padded
        return outputs


def unpaddable_dtypes(module: nn.Module, device: torch.device) -> list[DTypeName]:
    """The number formats in which the encoder inside `module` can compute without padding; none where it cannot."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return []
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:  # before torch 2.10
        return []
    return DTYPES if _place_of_encoder(module) is not None else []


def remove_padding(module: nn.Module) -> None:
    """Let the encoder inside a module compute without padding. Raises `EngineError` for a model that has none such."""
    place, model = _place_of_encoder(module), _model_in(module)
    if place is None or model is None:
        raise EngineError("torch-unpadded needs an encoder of transformers: set engine to auto or torch")
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, flash_attention_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:  # noqa: SLF001  # there is no public name for it
        raise EngineError(f"{type(model).__name__} has its own attention, so torch-unpadded cannot compute it")
    parent, name = place
    setattr(parent, name, UnpaddedEncoder(getattr(parent, name)))


def _model_in(module: nn.Module) -> PreTrainedModel | None:
    return next((each for each in module.modules() if isinstance(each, PreTrainedModel)), None)


def _place_of_encoder(module: nn.Module) -> tuple[nn.Module, str] | None:
    """The parent and the name of the only stack of layers of an encoder as BERT's."""
    model = _model_in(module)
    if model is None or model.config.is_encoder_decoder or getattr(model.config, "is_decoder", False):
        return None
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in ("encoder", "transformer") and isinstance(getattr(child, "layer", None), nn.ModuleList)
    ]
    return places[0] if len(places) == 1 else None


def _attend(
    module: nn.Module,  # noqa: ARG001  # part of the interface of transformers, as the next ones
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention among the tokens of each text; tensors have the shape (1, heads, tokens, size of a head)."""
    if unknown := [name for name in UNKNOWN_HERE if options.get(name) is not None]:
        raise EngineError(f"torch-unpadded cannot compute attention with {', '.join(unknown)}")
    from torch.nn.attention.varlen import varlen_attn

    begins, longest = options["cu_seq_lens_q"], options["max_length_q"]
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    found = varlen_attn(query, key, value, begins, begins, longest, longest, scale=scaling)
    return found.unsqueeze(0), None  # type: ignore[union-attr]  # a tuple only where more is asked for
