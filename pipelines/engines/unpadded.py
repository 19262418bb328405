"""Encoders of transformers that compute the tokens of a batch without its padding.

The layers of the encoder get all texts one after the other, as one row; only attention knows where each begins. On a
GPU that is torch's flash attention. On a CPU, short texts are padded for attention alone.
"""

import importlib.util
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from modalkit.pipelines.engines.packed import packable_dtypes
from modalkit.pipelines.engines.settings import DTypeName
from modalkit.pipelines.errors import EngineError

IMPLEMENTATION = "modalkit_unpadded"
MIN_CAPABILITY = (8, 0)  # of the GPU, for flash attention
DTYPES: list[DTypeName] = ["bfloat16", "float16"]  # those of flash attention
UNKNOWN_HERE = ("position_bias", "sliding_window", "softcap", "s_aux")  # what attention may be told and is not done
MAX_PADDED_LENGTH = 128  # of the longest text, for attention of all texts together; it needs memory for its square
LENGTH_STEP = 8  # what that length is rounded up to


class Places:
    """Where the tokens of a batch are in a tensor that is padded; for a CPU, where padded texts can share an operation.

    Tensors of attention without padding have the shape (1, heads, tokens, size of a head), padded ones (texts * heads,
    length, size of a head).

    oneDNN takes about a millisecond to prepare for a shape that it has not met lately, as long as it then computes. So
    there are few shapes: `spare` tokens, which mean nothing, are to follow those of the texts.
    """

    def __init__(self, is_token: Tensor, heads: int) -> None:
        counts = is_token.sum(dim=1)
        self.lengths: list[int] = counts.tolist()
        tokens, longest = sum(self.lengths), max(self.lengths)
        self.spare = -tokens % 2 ** max(0, tokens.bit_length() - 5)  # at most 1/16 more
        self._is_token = torch.arange(longest + -longest % LENGTH_STEP) < counts.unsqueeze(1)
        self.heads = heads

    @cached_property
    def mask(self) -> Tensor:
        """What is added to the scores: 0 for tokens, minus infinity for padding; (texts * heads, 1, length)."""
        mask = torch.zeros(self._is_token.shape).masked_fill_(~self._is_token, -torch.inf)
        return mask.repeat_interleave(self.heads, dim=0).unsqueeze(1)

    def pad(self, tensor: Tensor) -> Tensor:
        """Put each text into a row of its own. Padding has the values of some token."""
        texts, length = self._is_token.shape
        rows = tensor.transpose(1, 2).reshape(-1, tensor.shape[-1])
        return rows.index_select(0, self._padded).view(texts * self.heads, length, -1)

    def unpad(self, tensor: Tensor) -> Tensor:
        """Put all texts into one row, with the heads after the tokens: (1, tokens, heads, size of a head)."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        return rows.index_select(0, self._unpadded).view(1, -1, self.heads, tensor.shape[-1])

    @cached_property
    def _padded(self) -> Tensor:
        token = self._is_token.flatten().cumsum(0).sub_(1).clamp_(min=0).view(len(self.lengths), 1, -1)
        return (token * self.heads + torch.arange(self.heads).view(-1, 1)).flatten()

    @cached_property
    def _unpadded(self) -> Tensor:
        text, place = self._is_token.nonzero(as_tuple=True)
        row = text.view(-1, 1) * self.heads + torch.arange(self.heads)
        rows = row * self._is_token.shape[1] + place.view(-1, 1)
        return nn.functional.pad(rows, (0, 0, 0, self.spare)).flatten()


class UnpaddedEncoder(nn.Module):
    """Runs an encoder on the tokens of a batch that are no padding; its outputs are 0 where there is padding."""

    def __init__(self, encoder: nn.Module, heads: int) -> None:
        super().__init__()
        self.encoder = encoder
        self._heads = heads

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """What the encoder returns; `attention_mask` (texts, length) is true where there is a token.

        A text without any has one, its first place, so that there is something to attend to.
        """
        texts, length, _ = hidden_states.shape
        if attention_mask is None:
            attention_mask = torch.ones(texts, length, dtype=torch.bool, device=hidden_states.device)
        attention_mask = attention_mask.clone()
        attention_mask[:, 0] |= ~attention_mask.any(dim=1)
        tokens = hidden_states[attention_mask]
        count = len(tokens)
        if uses_flash(hidden_states):
            lengths = attention_mask.sum(dim=1, dtype=torch.int32)
            begins = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            where: dict[str, Any] = {"cu_seq_lens_q": begins, "max_length_q": length}
        else:
            places = Places(attention_mask, self._heads)
            where = {"places": places}
            tokens = nn.functional.pad(tokens, (0, 0, 0, places.spare))
        outputs = self.encoder(tokens.unsqueeze(0), **where, **options)
        padded = torch.zeros_like(hidden_states)
        padded[attention_mask] = outputs.last_hidden_state.squeeze(0)[:count]
        outputs.last_hidden_state = padded
        return outputs


def uses_flash(tensor: Tensor) -> bool:
    """Whether attention is torch's flash attention, because the tensor is on a GPU."""
    return tensor.is_cuda


def unpaddable_dtypes(module: nn.Module, device: torch.device) -> list[DTypeName]:
    """The number formats in which the encoder inside `module` can compute without padding; none where it cannot."""
    model = _model_in(module)
    if _place_of_encoder(module) is None or model is None:
        return []
    if not model.is_backend_compatible():  # type: ignore[no-untyped-call]  # transformers has no type for it
        return []
    if device.type == "cpu":
        return packable_dtypes()
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return []
    return DTYPES if importlib.util.find_spec("torch.nn.attention.varlen") else []  # since torch 2.10


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
    heads = getattr(getattr(parent, "config", model.config), "num_attention_heads", 0)
    setattr(parent, name, UnpaddedEncoder(getattr(parent, name), heads))


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
    if not uses_flash(query):
        return _attend_on_cpu(query, key, value, scaling, options["places"]), None
    from torch.nn.attention.varlen import varlen_attn

    begins, longest = options["cu_seq_lens_q"], options["max_length_q"]
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    found = varlen_attn(query, key, value, begins, begins, longest, longest, scale=scaling)
    return found.unsqueeze(0), None  # type: ignore[union-attr]  # a tuple only where more is asked for


def _attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, places: Places) -> Tensor:
    """The same; torch's own attention for a CPU takes about twice as long for short texts in bfloat16."""
    if key.shape != query.shape or query.shape[1] != places.heads:
        raise EngineError("torch-unpadded computes attention with one key for each head only")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if len(places.lengths) == 1 or max(places.lengths) > MAX_PADDED_LENGTH:
        lengths = [*places.lengths, *([places.spare] if places.spare else [])]
        texts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
        found = [nn.functional.scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in texts]
        return torch.cat(found, dim=2).transpose(1, 2)
    query, key, value = map(places.pad, (query, key, value))
    scores = torch.baddbmm(places.mask.to(query.dtype), query, key.transpose(1, 2), alpha=scale)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)  # in bfloat16 it takes twice as long
    return places.unpad(weights @ value)
