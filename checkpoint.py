"""Checkpoint folders in the official layout, read and written with nothing but JSON and safetensors.

    model_dir/
      model_index.json                               which class reads which folder (we never depend on it)
      scheduler/scheduler_config.json                -> diffusion.Schedule
      tokenizer/spiece.model | tokenizer.json        -> text_encoder.Tokenizer
      text_encoder/config.json  model*.safetensors   -> text_encoder.T5Encoder
      vae/config.json           diffusion_pytorch_model*.safetensors -> vae.VideoVAE
      transformer/config.json   diffusion_pytorch_model*.safetensors -> transformer.VideoTransformer

Modules name their parameters by the checkpoint's keys, so loading is: build on the meta device, compare names
and shapes, assign the memory-mapped tensors. Weights come as one file, or as shards with an index file.
Pickled weights (.bin, .pt, .ckpt) are never opened: unpickling runs whatever code the file holds.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime import atomic_write

# ---------------------------------------------------------------- JSON and configs

HARMLESS = set(  # keys that change no number here, that a config class checks, or that we write ourselves
    """down_block_types up_block_types force_upcast latents_mean latents_std shift_factor sample_size
    mid_block_add_attention
    clip_sample_range sample_max_value steps_offset dynamic_thresholding_ratio variance_type
    thresholding use_karras_sigmas algorithm_type solver_order
    guidance_scale position""".split()
)


def read_json(path: Path) -> dict:
    """A JSON object from a file, or one sentence that says what is wrong with the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; is {path.parent} a complete checkpoint folder?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); download it again") from None


def write_json(content: dict, path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_config(config_class: type, path: Path):
    """A config dataclass from a JSON file; keys it does not declare are kept in `config.extra`."""
    content = read_json(path)
    known = {field.name for field in dataclasses.fields(config_class)} - {"extra"}
    values = {name: content[name] for name in known & content.keys()}
    try:
        return config_class(**values, extra={key: content[key] for key in content.keys() - known})
    except ValueError as error:  # a config class may check in __post_init__ what its fields mean together
        raise ValueError(f"{path}: {error}") from None


def unknown_keys(config) -> list[str]:
    """Keys of a config file that nothing here reads and that are not known to be harmless: worth a note."""
    return sorted(key for key in config.extra if key not in HARMLESS and not key.startswith("_"))


def only(config, **allowed: tuple) -> None:
    """ValueError if a key of a config, declared or not, has a value other than the allowed ones: it changes
    numbers, and we would compute something else."""
    for name, values in allowed.items():
        value = getattr(config, name, config.extra.get(name, values[0]))
        if value not in values:
            supported = " or ".join(map(repr, values))
            raise ValueError(f"{name} = {value!r:.60} is not supported, only {supported}")


def write_config(config, path: Path, **stamps) -> None:
    """The inverse of `read_config`; `stamps` (such as _class_name) are used where `extra` lacks them."""
    content = {**stamps, **config.extra, **dataclasses.asdict(config)}
    del content["extra"]
    write_json(dict(sorted(content.items())), path)


# ---------------------------------------------------------------- folders

HUB_FILES = ["model_index.json", "scheduler/*", "tokenizer/*", "*/config.json"]
HUB_WEIGHTS = [f"{name}/*.safetensors*" for name in ("text_encoder", "vae", "transformer")]


def find_model(name: str | Path) -> Path:
    """A local folder as it is; else a hub id, fetched with only the files we read."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        raise FileNotFoundError(f"--model {name}: no such folder, and a hub id looks like owner/name")
    from huggingface_hub import snapshot_download  # slow to import, and a local folder never needs it

    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES + HUB_WEIGHTS))
    except Exception as error:  # requests, HTTP, cache and validation errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"--model {name}: no such folder here, and the hub did not deliver it ({reason:.200})"
        raise OSError(f"{problem}; give a folder, or try again with a network") from None


def component_dir(model_dir: str | Path, name: str, marker: str = "config.json") -> Path:
    """The folder of one component: `model_dir/name`, or `model_dir` itself if it holds `marker`."""
    model_dir = Path(model_dir)
    if (model_dir / name).is_dir():
        return model_dir / name
    if (model_dir / marker).is_file():
        return model_dir
    problem = f"{model_dir} is not a checkpoint folder: it has neither {name}/ nor {marker}"
    raise FileNotFoundError(f"{problem}; give the folder that holds transformer/, vae/ and the others")


# ---------------------------------------------------------------- weights in


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator:
    """`safe_open` with errors a user can read; tensors taken from it are memory-mapped, not copied."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        reason = f"{path} is truncated or not a safetensors file ({error})"
        raise ValueError(f"{reason}; download it again") from None


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor: {key: path}, from the shards' index or from the single file itself.

    Variants (model.fp16.safetensors, model.safetensors.index.fp16.json) are taken if there is nothing else.
    """
    indices = sorted(folder.glob("[!.]*.safetensors.index*.json"))  # a dot in front: left by macOS
    files = sorted(folder.glob("[!.]*.safetensors"))
    plain_indices = [path for path in indices if path.name.endswith(".index.json")]
    plain_files = [path for path in files if "." not in path.stem]
    found = plain_indices or plain_files or indices or files
    if not found:
        raise FileNotFoundError(
            f"{folder} has no .safetensors; pickled weights (.bin, .pt) are not read, as they can run code"
        )
    if len(found) > 1:
        raise ValueError(f"{folder} has {len(found)} weight files and no index; download it again")
    if found[0].suffix == ".json":
        return {key: folder / name for key, name in read_json(found[0])["weight_map"].items()}
    with open_safetensors(found[0]) as weights:
        return dict.fromkeys(weights.keys(), found[0])


def read_tensors(files: dict[str, Path], keys: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(key, memory-mapped tensor) for each key.

    Each call opens the files anew, so that the pages of an earlier call can be forgotten: a mapping kept open
    counts everything ever read through it as resident."""
    for path in sorted({files[key] for key in keys}):
        with open_safetensors(path) as weights:
            for key in keys:
                if files[key] == path:
                    yield key, weights.get_tensor(key)


def first_few(names: Collection[str]) -> str:
    """Three of them, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def check_weights(module: nn.Module, folder: Path, aliases: dict[str, str] = {}) -> dict[str, Path]:
    """Hold a module against the headers of a component's weight files; which file holds which tensor.

    aliases: {other name: our name} for keys that name a tensor twice; either name, or both, may be present.
    raises ValueError if a key is missing, unexpected, mis-shaped or not floating-point
    """
    files = weight_files(folder)
    found = {}
    for path in sorted(set(files.values())):
        with open_safetensors(path) as weights:
            for key in weights.keys():
                stored = weights.get_slice(key)
                if not stored.get_dtype().startswith(("F", "BF")):
                    reason = f"{path}: {key} is {stored.get_dtype()}"
                    raise ValueError(f"{reason}; only floating-point weights are read, not quantised ones")
                found[aliases.get(key, key)] = list(stored.get_shape())
    expected = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
    problems = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "mis-shaped": [
            f"{key} is {found[key]}, the config asks for {expected[key]}"
            for key in expected.keys() & found.keys()
            if found[key] != expected[key]
        ],
    }
    sentences = [f"{title}: {first_few(names)}" for title, names in problems.items() if names]
    if sentences:
        raise ValueError(f"weights in {folder} do not match its config.json: {'; '.join(sentences)}")
    return files


def build(module_class: type, config_class: type, folder: Path) -> nn.Module:
    """`module_class(config)` of a component folder, on the meta device, which costs nothing."""
    config = read_config(config_class, folder / "config.json")
    with torch.device("meta"):
        return module_class(config)


def load_component(
    module_class: type,
    config_class: type,
    folder: Path,
    dtype: torch.dtype | None,
    device: str | torch.device,
    aliases: dict[str, str] = {},
) -> nn.Module:
    """`module_class(config)` with the weights of `folder`, strictly; see `check_weights`.

    dtype: of the loaded tensors; None keeps each as it is stored
    """
    module = build(module_class, config_class, folder)
    files = check_weights(module, folder, aliases)
    keys = [key for key in files if aliases.get(key) not in files]  # of two names for a tensor, ours
    state = {}
    for key, tensor in read_tensors(files, keys):
        state[aliases.get(key, key)] = tensor.to(device=device, dtype=dtype)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


# ---------------------------------------------------------------- weights out

MAX_SHARD_BYTES = 10 * 2**30  # like diffusers: anything smaller stays one file


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """One safetensors file, written atomically."""
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {path} ({error}); is the disk full?") from None


def save_weights(state: dict[str, Tensor], folder: Path, stem: str) -> None:
    """Write `folder/stem.safetensors`, or shards and an index when it would pass MAX_SHARD_BYTES."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = tensor.detach().to("cpu").contiguous()
        size += tensor.nbytes
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        save_tensors(shard, folder / name, {"format": "pt"})  # transformers refuses files without the note
    index = folder / f"{stem}.safetensors.index.json"
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, index)
    else:
        index.unlink(missing_ok=True)
    for stale in set(folder.glob(f"{stem}*.safetensors")) - {folder / name for name in names}:
        stale.unlink()  # a model saved before with another number of shards


def save_component(
    module: nn.Module,
    folder: Path,
    stem: str = "diffusion_pytorch_model",
    state: dict[str, Tensor] | None = None,
    **stamps,
) -> None:
    """config.json and weights of a module with a `.config`, in the layout that `load_component`, diffusers
    and transformers read.

    state: weights in place of the module's state_dict()
    stamps: config keys that say whose class it is, such as _class_name
    """
    save_weights(state or module.state_dict(), folder, stem)
    write_config(module.config, folder / "config.json", **stamps)


LORA = "lora.safetensors"  # beside a base model: what a run with --lora-rank has learnt
