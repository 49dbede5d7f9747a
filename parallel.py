"""One video on several devices: each rank has a part of the tokens, in attention of the heads.

    tokens b L+n d ─► this rank's b s d ─► norms, linear layers, MLPs: token by token
    q, k, v b heads s head_dim ─► b heads/ranks L+n head_dim ─► attention ─► b heads s head_dim
    tokens of the last block b s d ─► b L+n d

Only attention and the end exchange anything, by torch.distributed.tensor, which also knows parts of unequal
size. DeepSpeed Ulysses, Jacobs et al. 2023 (arXiv 2309.14509), sec. 3. This file may be deleted.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from transformer import VideoTransformer

BLOCK, HEADS, TOKENS = 1, 1, 2  # dimensions: tokens in a block; heads and tokens in attention


def divide_tokens(dit: VideoTransformer) -> None:
    """From now on all ranks compute each forward of `dit` together, and each gets the whole velocity.

    All must call it, with the same arguments.
    """
    mesh = init_device_mesh(dit.proj_out.weight.device.type, (dist.get_world_size(),))
    sizes = {HEADS: dit.config.num_attention_heads}  # and of TOKENS those of the current forward
    here = {}  # of the current forward: rows of the RoPE table and number of text tokens in this rank

    def part(x: Tensor, dim: int) -> Tensor:
        return distribute_tensor(x, mesh, [Shard(dim)], src_data_rank=None).to_local()

    def joined(x: Tensor, dim: int, size: int) -> DTensor:
        """The tensor of which each rank holds a part along `dim`."""
        shape = torch.Size((*x.shape[:dim], size, *x.shape[dim + 1 :]))
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x.contiguous(), mesh, [Shard(dim)], shape=shape, stride=strides)

    def exchange(x: Tensor, before: int, after: int) -> Tensor:
        return joined(x, before, sizes[before]).redistribute(placements=[Shard(after)]).to_local()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(*(exchange(x, TOKENS, HEADS) for x in (q, k, v)))
        return exchange(x, HEADS, TOKENS)

    def enter(block: torch.nn.Module, args: tuple) -> tuple:
        tokens, temb, rope, num_text = args
        if block is dit.transformer_blocks[0]:
            sizes[TOKENS] = tokens.shape[BLOCK]
            is_text = torch.arange(tokens.shape[BLOCK], device=tokens.device) < num_text
            here["num_text"] = int(part(is_text, 0).sum())
            here["rope"] = rope and tuple(part(table, 0) for table in rope)
            tokens = part(tokens, BLOCK)
        return tokens, temb, here["rope"], here["num_text"]

    for block in dit.transformer_blocks:
        block.attn1.attend = attend
        block.register_forward_pre_hook(enter)
    block.register_forward_hook(lambda _, __, tokens: joined(tokens, BLOCK, sizes[TOKENS]).full_tensor())
