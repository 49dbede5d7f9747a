"""Where the weights of a transformer lie while it learns: on one device, cut over ranks, or with the host."""

import warnings

import torch

from runtime import NUM_RANKS, join_ranks
from transformer import VideoTransformer


def place(
    dit: VideoTransformer, device: torch.device, dtype: torch.dtype, replicate: bool, offload: bool
) -> None:
    """Move a transformer to where it computes: what learns in float32, frozen matrices in the run's dtype.

    Autocast would round the frozen matrices at each use; stored so, the same bytes come out. Of several ranks
    each has a part of every parameter and gathers a block while it computes (FSDP2). offload: the parts, and
    with them gradients and moments, stay in the host's memory.
    """
    for param in dit.parameters():
        is_frozen_matrix = not param.requires_grad and param.ndim > 1
        param.data = param.data.to("cpu" if offload else device, dtype if is_frozen_matrix else torch.float32)
    for buffer in dit.buffers():
        buffer.data = buffer.data.to(device)
    if offload or (NUM_RANKS > 1 and not replicate):
        shard(dit, device, offload)


def shard(dit: VideoTransformer, device: torch.device, offload: bool) -> None:
    """FSDP2 over all ranks, also over one where it is wanted for its offloading."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    join_ranks(alone=True)
    mesh = init_device_mesh(device.type, (NUM_RANKS,))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for module in (*dit.transformer_blocks, dit):
        fully_shard(module, mesh=mesh, offload_policy=policy)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # it is not written to
