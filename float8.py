"""A transformer in half the memory: the matrices of its blocks are kept as float8, a byte a number.

    weight  out in ─► scale  out 1, largest |weight| of a row / 448;   weight / scale ─► float8 e4m3, out in
    x ─► x·(float8·scale)ᵀ + bias, the matrix made anew for each use and forgotten

float8 e4m3 has three bits behind the leading one and ends at 448, so a weight is off by up to 6 %, by 2.6 %
on average; the scale lets each row use all of its range. Norms, biases, embeddings and the output layer stay
as they are. For inference only: such a model neither learns nor can be saved. This file may be deleted.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer import VideoTransformer

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


class Linear(nn.Linear):
    """A linear layer with a float8 weight and a scale for each of its rows."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype).mul_(self.scale)
        return F.linear(x, weight, self.bias)


def shrink(dit: VideoTransformer, device: str | torch.device) -> None:
    """Bring a loaded model to `device` matrix by matrix, in place, so that it is never there in full size.

    raises ValueError if the device does not know float8
    """
    if torch.device(device).type == "mps":
        raise ValueError("low_memory needs float8, which mps does not have; leave it out, or try cpu")
    for module in dit.transformer_blocks.modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach().to(device).float()
        scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST
        scale = scale.clamp(min=1e-30)  # a row may be zero
        weight = (weight / scale).to(torch.float8_e4m3fn)
        module.__class__ = Linear
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.register_buffer("scale", scale)  # in the state dict, so that a saved model is refused
    for tensor in [*dit.parameters(), *dit.buffers()]:
        if tensor.dtype != torch.float8_e4m3fn:
            tensor.data = tensor.data.to(device, copy=True)  # a view would keep the whole file in memory
