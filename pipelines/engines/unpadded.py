"""Encoders of transformers that compute the tokens of a batch without its padding.

The layers of the encoder get all texts one after the other, as one row; only attention knows where each begins. On a
GPU that is torch's flash attention. On a CPU, short texts are padded for attention alone. Where the module's outputs
depend on the first token of each text alone, as most classifiers' do, the last layer computes no other.
"""

import importlib.util
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from modalkit.pipelines.engines.encoder import (
    FirstTokensLayer,
    KeysAndValues,
    compute_first_tokens_only,
    needs_first_tokens_only,
    place_of_encoder,
)
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
    """Runs an encoder on the tokens of a batch that are no padding; what it does not compute is 0 in its outputs.

    Where its last layer is a `FirstTokensLayer`, that is all but the first token of each text.
    """

    def __init__(self, encoder: Any, heads: int) -> None:
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
        first_only = isinstance(self.encoder.layer[-1], FirstTokensLayer)
        computed = attention_mask & (attention_mask.cumsum(dim=1) == 1) if first_only else attention_mask
        count = texts if first_only else len(tokens)
        lengths = attention_mask.sum(dim=1, dtype=torch.int32)
        begins = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        where: dict[str, Any] = {"cu_seq_lens_q": begins, "max_length_q": length}
        if not uses_flash(hidden_states):
            where["places"] = places = Places(attention_mask, self._heads)
            tokens = nn.functional.pad(tokens, (0, 0, 0, places.spare))
        outputs = self.encoder(tokens.unsqueeze(0), **where, **options)
        padded = torch.zeros_like(hidden_states)
        padded[computed] = outputs.last_hidden_state.squeeze(0)[:count]
        outputs.last_hidden_state = padded
        return outputs


def uses_flash(tensor: Tensor) -> bool:
    """Whether attention is torch's flash attention, because the tensor is on a GPU."""
    return tensor.is_cuda


def unpaddable_dtypes(module: nn.Module, device: torch.device) -> list[DTypeName]:
    """The number formats in which the encoder inside `module` can compute without padding; none where it cannot."""
    place = place_of_encoder(module)
    if place is None or not place.model.is_backend_compatible():  # type: ignore[no-untyped-call]  # transformers has no type for it
        return []
    if device.type == "cpu":
        return packable_dtypes()
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return []
    return DTYPES if importlib.util.find_spec("torch.nn.attention.varlen") else []  # since torch 2.10


def remove_padding(module: nn.Module, example: Mapping[str, Tensor]) -> None:
    """Let the encoder inside a module compute neither padding nor what its outputs do not depend on.

    `example`, a batch, shows what that is. Raises `EngineError` for a module that has no such encoder.
    """
    place = place_of_encoder(module)
    if place is None:
        raise EngineError("torch-unpadded needs an encoder of transformers: set engine to auto or torch")
    encoder = place.encoder
    first_only = needs_first_tokens_only(module, encoder, example)
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, flash_attention_mask)
    if not place.attend_by(IMPLEMENTATION):
        raise EngineError(f"{type(place.model).__name__} has its own attention, so torch-unpadded cannot compute it")
    heads = getattr(getattr(place.parent, "config", place.model.config), "num_attention_heads", 0)
    setattr(place.parent, place.name, UnpaddedEncoder(encoder, heads))
    if first_only:
        compute_first_tokens_only(module, encoder, example)


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
    of_first = "keys_and_values" in options  # in a `FirstTokensLayer`
    if of_first:
        if options["keys_and_values"] is None:
            raise KeysAndValues(key, value)
        key, value = options["keys_and_values"]
    if not uses_flash(query):
        return _attend_on_cpu(query, key, value, scaling, options["places"]), None
    from torch.nn.attention.varlen import varlen_attn

    begins, longest = options["cu_seq_lens_q"], options["max_length_q"]
    query_begins = torch.arange(len(begins), dtype=begins.dtype, device=begins.device) if of_first else begins
    query_longest = 1 if of_first else longest
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    found = varlen_attn(query, key, value, query_begins, begins, query_longest, longest, scale=scaling)
    return found.unsqueeze(0), None  # type: ignore[union-attr]  # a tuple only where more is asked for


def _attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, places: Places) -> Tensor:
    """The same; torch's own attention for a CPU takes about twice as long for short texts in bfloat16."""
    if key.shape[1] != query.shape[1] or query.shape[1] != places.heads:
        raise EngineError("torch-unpadded computes attention with one key for each head only")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] < key.shape[2]:  # those of the first tokens
        firsts = query.transpose(1, 2).reshape(len(places.lengths) * places.heads, 1, -1)
        return _attend_padded(firsts, key, value, scale, places).view(1, len(places.lengths), places.heads, -1)
    if len(places.lengths) == 1 or max(places.lengths) > MAX_PADDED_LENGTH:
        lengths = [*places.lengths, *([places.spare] if places.spare else [])]
        texts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
        found = [nn.functional.scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in texts]
        return torch.cat(found, dim=2).transpose(1, 2)
    return places.unpad(_attend_padded(places.pad(query), key, value, scale, places))


def _attend_padded(query: Tensor, key: Tensor, value: Tensor, scale: float, places: Places) -> Tensor:
    """The same for padded queries; what it returns is padded as these are."""
    scores = torch.baddbmm(places.mask.to(query.dtype), query, places.pad(key).transpose(1, 2), alpha=scale)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)  # in bfloat16 it takes twice as long
    return weights @ places.pad(value)
