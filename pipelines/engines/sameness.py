"""Whether the outputs of an engine are those of torch in float32, within limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from modalkit.pipelines.engines.settings import Sameness

if TYPE_CHECKING:
    from torch import Tensor

Outputs = Mapping[str, "Tensor"]
"""The tensors that an engine returns for a batch, by their names."""

Same = Callable[[Sequence[Outputs], Sequence[Outputs]], "str | None"]
"""Compares the outputs of all sample batches with those of torch float32, which come first.

It returns None where they are the same for the pipeline's purpose, else what differs, in a few words.
"""


def same_labels(
    limits: Sameness | None = None,
    *,
    output: str = "logits",
    probabilities: Callable[[Tensor], Tensor] | None = None,
) -> Same:
    """For classifiers: labels must agree, and confidences change little. By default logits become softmax."""
    bounds = limits or Sameness()

    def compare(reference: Sequence[Outputs], found: Sequence[Outputs]) -> str | None:
        import torch

        to_probabilities = probabilities or (lambda logits: logits.softmax(dim=-1))
        expected, other = (
            to_probabilities(torch.cat([batch[output].float().cpu().flatten(end_dim=-2) for batch in batches]))
            for batches in (reference, found)
        )
        if not bool(other.isfinite().all()):
            return "outputs that are no numbers"
        best = expected.topk(2, dim=-1)
        is_clear = best.values[:, 0] - best.values[:, 1] > bounds.tie
        agree = (other.argmax(dim=-1) == best.indices[:, 0])[is_clear]
        if len(agree) and float(agree.float().mean()) < bounds.label_agreement:
            return f"labels agree on {float(agree.float().mean()):.1%} of the samples"
        change = (other.gather(1, best.indices[:, :1]) - best.values[:, :1]).abs().flatten()
        if (largest := float(change.quantile(0.99, interpolation="lower"))) > bounds.confidence_change:
            return f"confidences change by up to {largest:.3f}"
        return None

    return compare


def same_vectors(limits: Sameness | None = None) -> Same:
    """For embeddings and other outputs: each vector, along the last dimension, must keep its direction."""
    bounds = limits or Sameness()

    def compare(reference: Sequence[Outputs], found: Sequence[Outputs]) -> str | None:
        import torch

        for name in reference[0]:
            cosines = torch.cat(
                [
                    torch.nn.functional.cosine_similarity(
                        expected[name].float().cpu(), other[name].float().cpu(), dim=-1
                    ).flatten()
                    for expected, other in zip(reference, found, strict=True)
                ]
            )
            if not bool(cosines.isfinite().all()):
                return "outputs that are no numbers"
            if (least := float(cosines.quantile(0.01, interpolation="higher"))) < bounds.cosine:
                return f"the cosine similarity of {name} falls to {least:.4f}"
        return None

    return compare


def default_same(limits: Sameness) -> Same:
    """For outputs of any names: labels where there are ``logits`` of two classes or more, else vectors."""

    def compare(reference: Sequence[Outputs], found: Sequence[Outputs]) -> str | None:
        logits = reference[0].get("logits")
        is_classifier = logits is not None and logits.dim() >= 2 and logits.shape[-1] >= 2
        return (same_labels if is_classifier else same_vectors)(limits)(reference, found)

    return compare
