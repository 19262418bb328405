"""Linear layers whose weights oneDNN has put in order for this CPU once; torch itself does it anew in each call."""

import torch
from torch import Tensor, nn

from modalkit.pipelines.engines.settings import DTypeName


class PackedLinear(nn.Module):
    """Computes what a linear layer does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())  # noqa: SLF001  # torch.compile's
        bias: Tensor | None = getattr(linear, "bias", None)
        self.bias = None if bias is None else bias.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer to the last dimension."""
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")  # noqa: SLF001  # as above
        return outputs


def packable_dtypes() -> list[DTypeName]:
    """The number formats in which this CPU and this build of torch compute with such weights."""
    operators = torch.ops.mkldnn
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch has no type for it
    if not (has_onednn and hasattr(operators, "_reorder_linear_weight")):
        return []
    short: bool = operators._is_mkldnn_bf16_supported()  # noqa: SLF001  # there is no public question
    return ["float32", "bfloat16"] if short else ["float32"]


def pack_linears(module: nn.Module) -> None:
    """Replace all plain linear layers inside a module. Their `weight` is of use to nothing else then."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)
