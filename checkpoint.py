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

Every error a user can cause is a ValueError or an OSError of one sentence that names the file and the remedy.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime import atomic_write, sync

MAX_SHARD_BYTES = 10 * 2**30  # like diffusers: anything smaller stays one file


# ---------------------------------------------------------------- JSON and configs


HARMLESS = set(  # keys of official files that change no number here, or that we write ourselves
    """architectures classifier_dropout decoder_start_token_id dropout_rate dtype torch_dtype
    eos_token_id initializer_factor is_decoder is_encoder_decoder is_gated_act model_type n_positions
    num_decoder_layers output_past pad_token_id scale_decoder_outputs task_specific_params tie_word_embeddings
    transformers_version use_cache
    down_block_types up_block_types force_upcast latents_mean latents_std shift_factor sample_size
    mid_block_add_attention
    clip_sample_range sample_max_value steps_offset dynamic_thresholding_ratio variance_type
    guidance_scale position""".split()
)


def read_json(path: Path) -> dict:
    """A JSON object from a file, or a ValueError that says what is wrong with the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing; is {path.parent} a complete checkpoint folder?"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a JSON object; download it again")
    return content


def read_config(config_class: type, path: Path):
    """A config dataclass from a JSON file; keys it does not declare are kept in `config.extra`.

    Every config class declares `extra: dict` last, so unknown keys survive a load and a save.
    """
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
            known = " or ".join(map(repr, values))
            raise ValueError(f"{name} = {value!r:.60} is not supported, only {known}")


def write_config(config, path: Path, **overrides) -> None:
    """The inverse of `read_config`; `overrides` (such as _class_name) are used where `extra` lacks them."""
    content = {**overrides, **config.extra, **dataclasses.asdict(config)}
    del content["extra"]
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(dict(sorted(content.items())), indent=2) + "\n", encoding="utf-8")


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
        raise OSError(f"--model {name}: no such folder here, and the hub did not deliver it ({reason:.200}); "
                      "give a folder, or try again with a network")  from None  # fmt: skip


# ---------------------------------------------------------------- weights in


def component_dir(model_dir: str | Path, name: str, marker: str = "config.json") -> Path:
    """The folder of one component: `model_dir/name`, or `model_dir` itself if it holds `marker`."""
    model_dir = Path(model_dir)
    if (model_dir / name).is_dir():
        return model_dir / name
    if (model_dir / marker).is_file():
        return model_dir
    if not model_dir.is_dir():
        raise FileNotFoundError(f"{model_dir} is not a folder; give a checkpoint folder that holds {name}/")
    raise FileNotFoundError(f"{model_dir} is not a checkpoint folder: it has neither {name}/ nor {marker}; "
                            "give the folder that holds transformer/, vae/ and the others")  # fmt: skip


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor: {key: path}, from the shards' index or from the single file itself.

    A variant, as in model.fp16.safetensors or model.safetensors.index.fp16.json, is taken if all else lacks.
    """
    visible = [path for path in sorted(folder.glob("*.safetensors*")) if not path.name.startswith(".")]
    files = [path for path in visible if path.suffix == ".safetensors"]
    indices = [path for path in visible if path.suffix == ".json"]
    plain_files = [path for path in files if "." not in path.stem]
    plain_indices = [path for path in indices if path.name.endswith(".safetensors.index.json")]
    files = plain_files or files
    indices = plain_indices or ([] if plain_files else indices)
    if indices:
        weight_map = read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ValueError(f"{indices[0]} has no usable weight_map; download it again")
        if outside := [name for name in weight_map.values() if Path(name).name != name]:
            raise ValueError(
                f"{indices[0]} points outside its folder ({outside[0]}); do not use this checkpoint"
            )
        missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
        if missing:
            raise FileNotFoundError(f"{folder} lacks {missing[0]}, which its index names; download it again")
        return {key: folder / name for key, name in weight_map.items()}
    if len(files) != 1:
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if not files and pickles:
            raise ValueError(
                f"{folder} has only pickled weights ({pickles[0]}); they can run code, so get .safetensors"
            )
        raise FileNotFoundError(
            f"{folder} has {len(files)} .safetensors files and no index; expected one file"
        )
    with open_safetensors(files[0]) as weights:
        return dict.fromkeys(weights.keys(), files[0])


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator:
    """`safe_open` with errors a user can read; tensors taken from it are memory-mapped, not copied."""
    if not Path(path).is_file():  # a pipe would block
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); download it again"
        ) from None


def read_tensors(files: dict[str, Path], keys: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(key, memory-mapped tensor) for each key; `check_weights` has seen that they are there.

    Each call opens the files anew, so that the pages of an earlier call can be forgotten: a mapping kept open
    counts everything ever read through it as resident."""
    for path in sorted({files[key] for key in keys}):
        with open_safetensors(path) as weights:
            for key in keys:
                if files[key] == path:
                    yield key, weights.get_tensor(key)


def check_keys(folder: Path, expected: dict[str, torch.Size], found: dict[str, torch.Size]) -> None:
    """Stop at missing, unexpected or mis-shaped weights, naming the first few of each."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    common = sorted(expected.keys() & found.keys())
    misshaped = [
        f"{key} is {list(found[key])}, the config asks for {list(expected[key])}"
        for key in common
        if list(found[key]) != list(expected[key])
    ]
    problems = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{title}: {', '.join(names[:3])}{more}")
    if problems:
        raise ValueError(f"weights in {folder} do not match its config.json: {'; '.join(problems)}")


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
                    raise ValueError(f"{path}: {key} is {stored.get_dtype()}; only floating-point weights "
                                     "are read, not quantised ones")  # fmt: skip
                found[aliases.get(key, key)] = stored.get_shape()
    check_keys(folder, {key: tensor.shape for key, tensor in module.state_dict().items()}, found)
    return files


def load_weights(
    module: nn.Module,
    folder: Path,
    dtype: torch.dtype | None,
    device: str | torch.device,
    aliases: dict[str, str] = {},
) -> None:
    """Fill a module built on the meta device from a component folder, strictly; see `check_weights`.

    dtype: of the loaded tensors; None keeps each as it is stored
    """
    files = check_weights(module, folder, aliases)
    keys = [key for key in files if aliases.get(key) not in files]  # of two names for a tensor, ours
    state = {
        aliases.get(key, key): tensor.to(device=device, dtype=dtype)
        for key, tensor in read_tensors(files, keys)
    }
    module.load_state_dict(state, strict=True, assign=True)


# ---------------------------------------------------------------- weights out


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Like `atomic_write` for a whole folder: it appears complete, synced and named, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for part in sorted(temporary.rglob("*")):
            sync(part)
        sync(temporary)
        if path.exists():  # a folder cannot be replaced in one step: move the old one aside first
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """`target` becomes another name of the file `source`, or a copy where the disk knows no hard links; of a
    folder, each file in it does."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if not path.name.startswith("."):
                link(path, target / path.name)
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """One safetensors file, written atomically."""
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {path} ({error}); is the disk full?") from None


def save_weights(
    state: dict[str, Tensor], folder: Path, stem: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `folder/stem.safetensors`, or shards and an index when it would pass `max_shard_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for key, tensor in state.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor.detach().to("cpu").contiguous()
        size += num_bytes
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        save_tensors(shard, folder / name, {"format": "pt"})  # transformers refuses files without the note
    index = folder / f"{stem}.safetensors.index.json"
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in state.values())
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        with atomic_write(index) as temporary:
            temporary.write_text(
                json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            )
    else:
        index.unlink(missing_ok=True)
    for stale in set(folder.glob(f"{stem}*.safetensors")) - {folder / name for name in names}:
        stale.unlink()  # a model saved before with another number of shards


# ---------------------------------------------------------------- the folder of a training run

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
PIPELINES = {
    16: "CogVideoXPipeline",
    32: "CogVideoX_Fun_Pipeline_Control",
    33: "CogVideoX_Fun_Pipeline_Inpaint",
}
MODEL_INDEX = {
    "_class_name": PIPELINES[33],
    "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}


def write_model_index(out: Path, model_dir: Path | None, in_channels: int | None) -> None:
    """OUT/model_index.json: as in model_dir where there is one; in_channels: where the transformer grew."""
    given = model_dir / "model_index.json" if model_dir else None
    index = {**MODEL_INDEX, **(read_json(given) if given and given.is_file() else {})}
    index["_class_name"] = PIPELINES.get(in_channels, index["_class_name"])
    with atomic_write(out / "model_index.json") as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n")


def newest_checkpoint(out: Path) -> Path | None:
    """The last complete one of OUT/checkpoints; what a kill left half-written has a dot in front and goes."""
    for torn in (out / "checkpoints").glob(".*"):
        shutil.rmtree(torn, ignore_errors=True)
    complete = (path.parent.parent for path in (out / "checkpoints").glob("step-*/training/state.json"))
    return max(complete, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


@contextlib.contextmanager
def new_checkpoint(out: Path, step: int, keep: int) -> Iterator[Path]:
    """OUT/checkpoints/step-…, to be filled with what changed: it appears complete or not at all, with what it
    lacks linked from OUT. Then OUT shows its weights, and older ones go.

    raises OSError if there is no room; what was there before is untouched then
    """
    target = out / "checkpoints" / f"step-{step:06d}"
    try:
        with atomic_dir(target) as folder:
            yield folder
            for name in (*COMPONENTS, "model_index.json"):
                if (out / name).exists() and not (folder / name).exists():
                    link(out / name, folder / name)
    except OSError as error:
        last = newest_checkpoint(out)
        kept = f"{last} is intact: make room and --resume" if last else "there is no earlier checkpoint"
        raise OSError(f"cannot save {target} ({error.strerror or error}); {kept}") from None
    publish(out, target, keep)


def publish(out: Path, newest: Path, keep: int) -> None:
    """OUT shows the weights of its newest checkpoint, and the last `keep` checkpoints stay."""
    for path in newest.iterdir():
        if path.name != "training":
            link(path, out / path.name)
    for path in sorted((out / "checkpoints").glob("step-*"), key=_step_of)[:-keep]:
        path = path.rename(path.with_name(f".{path.name}.old"))  # so that half of one is never taken for one
        shutil.rmtree(path)


# ---------------------------------------------------------------- one component, in and out


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
):
    """`module_class(config)` with the weights of `folder`."""
    module = build(module_class, config_class, folder)
    load_weights(module, folder, dtype, device, aliases)
    return module.eval()


def save_component(
    module: nn.Module,
    folder: Path,
    stem: str = "diffusion_pytorch_model",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    state: dict[str, Tensor] | None = None,
    **stamps,
) -> None:
    """config.json and weights of a module with a `.config`, in the layout `load_component`, diffusers and
    transformers read. stamps: config keys that say whose class it is, such as _class_name. state: in place of
    the module's state_dict()."""
    save_weights(state or module.state_dict(), folder, stem, max_shard_bytes)
    write_config(module.config, folder / "config.json", **stamps)
