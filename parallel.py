"""One video on several devices: the halves of guidance apart, the tokens of each shared by its ranks.

    two prompts b = 2 ─► the first half of an even number of ranks takes the one, the others the other
    tokens b L+n d ─► this rank's b s d ─► norms, linear layers, MLPs: token by token
    q, k, v b heads s head_dim ─► b heads/ranks L+n head_dim ─► attention ─► b heads s head_dim
    tokens of the last block b s d ─► b L+n d

Halves exchange nothing but their velocities, once a forward, so two ranks are best used that way. Ranks that
share tokens exchange them in attention and at the end, by torch.distributed.tensor, which also knows parts of
unequal size: DeepSpeed Ulysses, Jacobs et al. 2023 (arXiv 2309.14509), sec. 3. This file may be deleted.

b batch · L+n text and video tokens, s of them in a rank · d model width
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from transformer import Rope, VideoTransformer, run_blocks

BATCH, TOKENS, HEADS, TOKENS_BY_HEAD = 0, 1, 1, 2  # dimensions of b n d, and of b heads n head_dim


def part(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """This rank's part of a tensor that all ranks of the mesh hold."""
    return distribute_tensor(x, mesh, [Shard(dim)], src_data_rank=None).to_local()


def joined(x: Tensor, dim: int, size: int, mesh: DeviceMesh) -> DTensor:
    """The tensor of which each rank holds a part along `dim`."""
    shape = torch.Size((*x.shape[:dim], size, *x.shape[dim + 1 :]))
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x.contiguous(), mesh, [Shard(dim)], shape=shape, stride=strides)


class Division:
    """Who computes what of the current forward."""

    def __init__(self, device: str, num_heads: int):
        num_ranks = dist.get_world_size()
        self.all = init_device_mesh(device, (num_ranks,))
        self.halves = None
        if num_ranks % 2 == 0:
            grid = init_device_mesh(device, (2, num_ranks // 2), mesh_dim_names=("halves", "tokens"))
            self.halves, self.half = grid["halves"], grid["tokens"]
        self.num_heads = num_heads

    def enter(self, dit: nn.Module, inputs: tuple) -> tuple:
        """Before a forward: of two prompts this rank's one."""
        self.is_apart = self.halves is not None and len(inputs[0]) == 2
        self.mesh = self.half if self.is_apart else self.all  # of the ranks that share tokens
        if not self.is_apart:
            return inputs
        return tuple(part(x, BATCH, self.halves) if isinstance(x, Tensor) else x for x in inputs)

    def leave(self, dit: nn.Module, inputs: tuple, velocity: Tensor) -> Tensor:
        """After it: the velocities of both."""
        if not self.is_apart:
            return velocity
        return joined(velocity, BATCH, 2, self.halves).full_tensor()

    def run_blocks(
        self, blocks: nn.ModuleList, tokens: Tensor, temb: Tensor, rope: Rope | None, num_text: int, *others
    ) -> Tensor:
        """In place of `transformer.run_blocks`: whole tokens in and out."""
        if self.mesh.size() == 1:
            return run_blocks(blocks, tokens, temb, rope, num_text, *others)
        self.num_tokens = tokens.shape[TOKENS]
        is_text = torch.arange(self.num_tokens, device=tokens.device) < num_text
        num_text = int(part(is_text, 0, self.mesh).sum())
        if rope is not None:
            rope = tuple(part(table, 0, self.mesh) for table in rope)
        tokens = part(tokens, TOKENS, self.mesh)
        tokens = run_blocks(blocks, tokens, temb, rope, num_text, *others)
        return joined(tokens, TOKENS, self.num_tokens, self.mesh).full_tensor()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In place of scaled_dot_product_attention: some tokens in and out, some heads in between."""
        if self.mesh.size() == 1:
            return F.scaled_dot_product_attention(q, k, v)
        some_heads = []
        for x in (q, k, v):
            x = joined(x, TOKENS_BY_HEAD, self.num_tokens, self.mesh)
            some_heads.append(x.redistribute(placements=[Shard(HEADS)]).to_local())
        x = F.scaled_dot_product_attention(*some_heads)
        x = joined(x, HEADS, self.num_heads, self.mesh)
        return x.redistribute(placements=[Shard(TOKENS_BY_HEAD)]).to_local()


def divide(dit: VideoTransformer) -> None:
    """From now on all ranks, which all call it, compute each forward of `dit` together."""
    division = Division(dit.proj_out.weight.device.type, dit.config.num_attention_heads)
    dit.register_forward_pre_hook(division.enter)
    dit.register_forward_hook(division.leave)
    dit.run_blocks = division.run_blocks
    for block in dit.transformer_blocks:
        block.attn1.attend = division.attend
