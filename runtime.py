"""The ground that every program stands on: processes, devices, random draws, files and errors.

processes   torchrun starts NUM_RANKS of them, all in the same program; one alone has no process group, and
            everything here then answers for it
draws       keyed(seed, …): a generator that is a function of what it is for, never of what was drawn before
files       atomic_write: a kill at any moment leaves the old file or the new one
errors      in_one_line: what a user can cause becomes one sentence, all else keeps its traceback
"""

import contextlib
import functools
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

RANK = int(os.environ.get("RANK", 0))
NUM_RANKS = int(os.environ.get("WORLD_SIZE", 1))
DTYPES = ["float32", "bfloat16", "float16"]

# ---------------------------------------------------------------- processes


@functools.cache
def join_ranks(alone: bool = False) -> dist.Store | None:
    """Meet the other processes: NCCL for what is on GPUs, Gloo for what is not.

    alone: make a group of one process too, which FSDP needs for its offloading
    returns: a store that all of them read and write, or None if there are no others
    """
    if dist.is_initialized() or (NUM_RANKS == 1 and not alone):
        return None
    if NUM_RANKS == 1:
        store = dist.HashStore()
    else:
        store, _, _ = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = timedelta(days=1)  # NCCL would wait ten minutes, in which rank 0 may not have saved 5B
    dist.init_process_group(backend, timeout=patience, store=store, rank=RANK, world_size=NUM_RANKS)
    return store


def sum_over_ranks(values: Tensor) -> Tensor:
    """In place."""
    if NUM_RANKS > 1:
        dist.all_reduce(values)
    return values


def wait_for_ranks() -> None:
    sum_over_ranks(torch.zeros(1))


def average_over_ranks(tensors: list[Tensor]) -> None:
    """In place, in one message in place of a hundred."""
    if NUM_RANKS > 1 and tensors:
        joined = sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors])) / NUM_RANKS
        parts = joined.split([tensor.numel() for tensor in tensors])
        for tensor, average in zip(tensors, parts):
            tensor.copy_(average.view_as(tensor))


def is_cut(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose module is slow to import and seldom needed by one process."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut over ranks; every rank has to call it."""
    return tensor.full_tensor() if is_cut(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if is_cut(tensor) else tensor


def gather(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on the CPU of rank 0; every rank has to call it. Elsewhere nothing is kept."""
    gathered = {}
    for name, tensor in state.items():
        tensor = whole(tensor)
        if RANK == 0:
            gathered[name] = tensor.cpu()
    return gathered


def cut_like(param: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part of a whole tensor, on the device of `param` and cut as it is; a copy."""
    tensor = tensor.to(param.device, copy=True)
    if not is_cut(param) or tensor.ndim == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    cut = distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)
    return cut.to(param.device)  # of what is offloaded it lies on the GPU by then


def agree(value: object) -> object:
    """What rank 0 says; no rank goes on before all are here."""
    if NUM_RANKS == 1:
        return value
    join_ranks()
    values = [value]
    dist.broadcast_object_list(values)
    wait_for_ranks()
    return values[0]


def say(text: object, on_all_ranks: bool = False) -> None:
    """Print, as a rule on rank 0 alone. A file's name may be no Unicode."""
    if RANK == 0 or on_all_ranks:
        print(str(text).encode(errors="backslashreplace").decode(), flush=True)


def as_size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.3g} MiB"


def listed(parts: dict[str, int]) -> str:
    """Names and their sizes, as text."""
    return ", ".join(f"{name} {as_size(size)}" for name, size in parts.items() if size)


# ---------------------------------------------------------------- devices


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for, or the best there is; under torchrun each process gets a GPU of its own.

    raises ValueError if it is not there
    """
    if NUM_RANKS > 1 and torch.cuda.is_available() and name in (None, "cuda"):
        rank = int(os.environ["LOCAL_RANK"])
        count = torch.cuda.device_count()
        if rank >= count:
            raise ValueError(f"there are more processes than GPUs; try --nproc_per_node={count}")
        name = f"cuda:{rank}"
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # fails on "meta", which computes nothing
    except Exception:  # each kind of device fails in its own way
        raise ValueError(f"--device {name} is not available here; try cpu") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where FSDP computes
    return device


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself, and so faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()  # with AVX-512 alone it can be slower


def autocast(device: torch.device, dtype: torch.dtype, keeps: bool = False) -> torch.autocast:
    """Matrix products in dtype, of weights in float32.

    keeps: hold each rounded weight until the end of the block, for a network that uses it often. Those of a
        transformer would all lie in memory at once, even where a rank holds only a part of it.
    """
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=keeps)


# ---------------------------------------------------------------- draws


def keyed(*key: int | str) -> int:
    """A seed that is a function of the key: (seed, epoch, sample, purpose), for instance.

    With it a run's state is a few counters: neither order, ranks, threads nor a resume change a number.
    """
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def generator(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(keyed(*key))


def chance(draws: torch.Generator, probability: float) -> bool:
    return torch.rand((), generator=draws).item() < probability


def integer(draws: torch.Generator, low: int, high: int) -> int:
    """Uniform in low … high, both included."""
    return int(torch.randint(low, max(low, high) + 1, (), generator=draws))


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that is synced to disk and renamed to `path` if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name, as processes of two machines may have one number. Writers look at the suffix.
    temporary = path.with_name(f".{path.stem}.{os.urandom(8).hex()}.tmp{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors would make files private
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or folder to the disk. Windows opens no folder, and wants files open for writing."""
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- errors


# What the allocators of CPUs and of mps say.
NO_MEMORY = "can't allocate memory|MPS backend out of memory|Invalid buffer size"


def in_one_line(error: BaseException, memory_remedy: str) -> str | None:
    """One sentence for an error that a user can cause and mend; None for a mistake of ours.

    memory_remedy: what the program advises where memory runs out
    """
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):  # no C++ compiler, say
        message = f"torch.compile: {str(error).splitlines()[0]}; leave out --compile"
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(NO_MEMORY, str(error)):
        message = f"out of memory; {memory_remedy}"
    elif isinstance(error, OSError) and error.errno is not None:
        message = f"{error.filename or 'a file'}: {error.strerror}; is the path right, and is there room?"
    elif isinstance(error, ModuleNotFoundError) and "." not in (error.name or "."):
        # of a package, or of a file that may be deleted
        message = f"{error.name} is not here, which is needed for this"
    elif isinstance(error, (ValueError, OSError)):
        message = str(error)
    elif isinstance(error, KeyboardInterrupt):
        message = "interrupted"
    else:
        return None
    return " ".join(message.split())


def fail(prog: str, message: str) -> int:
    """The exit status 2, after the one line on stderr."""
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 2
