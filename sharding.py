"""Where the weights of a transformer lie while it learns: on one device, cut over ranks, or with the host."""

import warnings

import torch

from runtime import NUM_RANKS, is_cut, join_ranks
from transformer import VideoTransformer


def place(dit: VideoTransformer, device: torch.device, dtype: torch.dtype, offload: bool) -> None:
    """Move a transformer to where it computes: what learns in float32, frozen matrices in the run's dtype.

    Autocast would round the frozen matrices at each use; stored so, the same bytes come out. With
    several ranks each holds a part of every parameter, and gathers a block while it computes (FSDP2). With
    offload, even on one rank, the parts, their gradients and moments stay in the host's memory.
    """
    is_sharded = offload or NUM_RANKS > 1
    if is_sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        join_ranks(alone=True)
        mesh = init_device_mesh(device.type, (NUM_RANKS,))
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for module in (*dit.transformer_blocks, dit):  # in turn, as no rank may have room for all of it
        for param in module.parameters():
            if not is_cut(param):
                is_frozen_matrix = not param.requires_grad and param.ndim > 1
                kept_in = dtype if is_frozen_matrix else torch.float32
                param.data = param.data.to("cpu" if offload else device, kept_in)
        if is_sharded:
            # Also the outermost: left gathered by a validation, it would go on with the averaged weights.
            fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    for buffer in dit.buffers():
        buffer.data = buffer.data.to(device)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # it is not written to
