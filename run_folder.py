"""The folder of a training run: begun, gone on with, saved to. A kill at any moment leaves one to go on with.

    OUT/  transformer/ vae/ text_encoder/ …    a checkpoint of EMA weights: sample.py --model OUT
          lora.safetensors                     in place of new weights, with --lora-rank
          checkpoints/step-000200/             the same, and training/ for --resume
          log.jsonl  loss.png  previews/

What did not learn, and what OUT shows of its newest checkpoint, are hard links: other names of one file.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint import LORA, read_config, read_json, save_weights, write_json
from data import Micro
from diffusion import Schedule
from optim import Optim
from presets import Config, Phase
from runtime import RANK, gather, say, sync, wait_for_ranks
from text_encoder import T5Config, T5Encoder
from transformer import VideoTransformer
from vae import VideoVAE

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")

# ---------------------------------------------------------------- checkpoints: whole, or not there


def link(source: Path, target: Path) -> None:
    """`target` becomes another name of the file `source`, or a copy where the disk knows no hard links; of a
    folder, each file does, and what only `target` has goes: an old index of shards would be read first."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in source.iterdir() if not path.name.startswith(".")]
        for name in names:
            link(source / name, target / name)
        for path in target.iterdir():
            if path.name not in names:
                path.unlink()
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing


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
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():  # a folder cannot be replaced in one step
            os.replace(path, old)
        os.replace(temporary, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


NONE_YET = "none-yet"  # in OUT/checkpoints before the first: what OUT then holds may be made anew


def checkpoints_of(out: Path) -> list[Path]:
    """Those in OUT/checkpoints, the newest last; not copies, which somebody named otherwise."""
    paths = (out / "checkpoints").glob("step-*")
    numbered = [path for path in paths if path.name.removeprefix("step-").isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(out: Path) -> Path | None:
    """The last complete one of OUT/checkpoints; what a kill left half-written has a dot in front and goes."""
    for torn in (out / "checkpoints").glob(".*"):
        shutil.rmtree(torn, ignore_errors=True)
    complete = [path for path in checkpoints_of(out) if (path / "training" / "state.json").is_file()]
    return complete[-1] if complete else None


def publish(out: Path, newest: Path, keep: int) -> None:
    """OUT shows the weights of its newest checkpoint, and the last `keep` checkpoints stay."""
    (out / "checkpoints" / NONE_YET).unlink(missing_ok=True)
    for path in newest.iterdir():
        if path.name != "training":
            link(path, out / path.name)
    for path in checkpoints_of(out)[:-keep]:
        path = path.rename(path.with_name(f".{path.name}.old"))  # so that half of one is never taken for one
        shutil.rmtree(path, ignore_errors=True)  # somebody may be reading; the next start tries again


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


# ---------------------------------------------------------------- a run begins

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
    index = MODEL_INDEX.copy()
    if model_dir and (model_dir / "model_index.json").is_file():
        index |= read_json(model_dir / "model_index.json")
    index["_class_name"] = PIPELINES.get(in_channels, index["_class_name"])
    write_json(index, out / "model_index.json")


def make_component(name: str, config: Config, out: Path) -> None:
    """OUT/name with fresh weights."""
    if name == "transformer":
        VideoTransformer(config.dit).save_pretrained(out)
    elif name == "scheduler":
        Schedule(config.schedule).save_pretrained(out)
    elif name == "vae":
        vae = VideoVAE(config.vae)
        # A sharp posterior to start with: at a standard deviation of one the decoder would see only noise.
        vae.encoder.conv_out.conv.bias.data[config.vae.latent_channels :] = -6
        vae.save_pretrained(out)
    elif name == "text_encoder":
        T5Encoder(config.t5).save_pretrained(out)
    elif name == "tokenizer":
        from shapes import make_tokenizer  # here, so that shapes.py can be deleted

        (out / name).mkdir()
        make_tokenizer().save(str(out / name / "tokenizer.json"))
        notes = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 24}
        notes |= {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        (out / name / "tokenizer_config.json").write_text(json.dumps(notes) + "\n")


def begin_folder(out: Path, model_dir: Path | None, config: Config, from_scratch: bool) -> None:
    """OUT as a complete checkpoint before the first step: the folders of --model, what it lacks made anew.

    from_scratch: new weights for the component that learns, even where --model has it
    """
    torch.manual_seed(config.seed)
    learns = {"dit": "transformer", "vae": "vae"}[config.train]
    wanted = COMPONENTS if config.train == "dit" else (learns,)
    there = {}
    if model_dir:
        there = {name: model_dir / name for name in COMPONENTS if (model_dir / name).is_dir()}
    if "text_encoder" in there:  # a new transformer is as wide as its text
        width = read_config(T5Config, there["text_encoder"] / "config.json").d_model
        config = replace(config, dit=replace(config.dit, text_embed_dim=width))
    if from_scratch:
        there.pop(learns, None)
    if config.lora_rank and learns not in there:
        raise ValueError("--lora-rank fine-tunes a transformer; give a --model that has one")
    makes = {"transformer": config.dit, "scheduler": config.schedule, "vae": config.vae}
    makes |= {"text_encoder": config.t5, "tokenizer": config.t5}
    for name in wanted:  # all are looked at before the first is made
        if name not in there and makes[name] is None:
            raise ValueError(f"there is no {name}/ to start from; give a --model that has one")
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    (out / "checkpoints" / NONE_YET).touch()  # first, as it tells a run from a model
    for name in COMPONENTS:
        if (out / name).exists():  # of a run that was killed before its first checkpoint
            shutil.rmtree(out / name)
        if name in there:
            link(there[name], out / name)
        elif name in wanted:
            make_component(name, config, out)
    is_new = config.train == "dit" and "transformer" not in there
    write_model_index(out, model_dir, config.dit.in_channels if is_new else config.in_channels)


# ---------------------------------------------------------------- where a run is


@dataclass
class Counters:
    """Where a run is; beside weights, moments and EMA all there is to save."""

    phase: int = 0
    step: int = 0  # of the phase
    total_steps: int = 0
    epoch: int = 0
    batch: int = 0  # of the epoch: the micro-batch that is next
    log_bytes: int = 0  # length of log.jsonl

    def advance(self, micros: list[Micro], phases: tuple[Phase, ...]) -> None:
        """Count a step. Where it ends the phase, go to the next one, which begins a new epoch."""
        self.step += 1
        self.total_steps += 1
        self.epoch = micros[-1].epoch
        self.batch = micros[-1].number + 1
        if self.step == phases[self.phase].num_steps and self.phase + 1 < len(phases):
            self.phase += 1
            self.step = 0
            self.epoch += 1
            self.batch = 0


STATE_VERSION = 2  # 1 drew the noise of each sample by itself


@dataclass
class Run:
    """OUT, and where its run is."""

    out: Path
    settings: dict  # that have to be the same when it is resumed
    at: Counters
    newest: Path | None  # the checkpoint to go on from


def by_field(settings: dict) -> dict:
    """The same with each field of each phase under a name of its own."""
    named = {name: value for name, value in settings.items() if name != "phases"}
    named["number of phases"] = len(settings["phases"])
    for i, phase in enumerate(settings["phases"], 1):
        named |= {f"{name} of phase {i}": value for name, value in phase.items()}
    return named


def begin_or_resume(config: Config, settings: dict, options: argparse.Namespace) -> Run:
    """The start of a run, with OUT made ready, or where its newest checkpoint is."""
    out, model_dir = options.out, options.model
    newest = newest_checkpoint(out)
    if not newest:
        is_model = any((out / name).exists() for name in COMPONENTS)
        is_start = model_dir and out.resolve() == model_dir.resolve()
        if is_start or (is_model and not (out / "checkpoints" / NONE_YET).exists()):
            raise ValueError(f"--out {out} holds a model, which a new run would replace; choose another")
        if model_dir and (model_dir / LORA).is_file():
            raise ValueError(f"{model_dir} is a base model with a LoRA, which would be left out; go on "
                             "with --resume and the --out of its run, or give the base model")  # fmt: skip
        if options.resume:
            say(f"note: there is no checkpoint in {out}; a new run begins")
        if RANK == 0:
            begin_folder(out, model_dir, config, options.from_scratch)
        return Run(out, settings, Counters(phase=options.phase - 1), None)
    if not options.resume:
        raise ValueError(f"{out} holds a run ({newest.name}); add --resume, or choose another --out")
    state = read_json(newest / "training" / "state.json")
    if state.get("version") != STATE_VERSION:
        raise ValueError(f"{newest} is of an earlier version; start a new run from it with --model")
    before, now = by_field(state["settings"]), by_field(settings)
    last, length = config.phases[-1], f"num_steps of phase {len(config.phases)}"
    if last.lr == last.final_lr and now[length] > before.get(length, 0):
        before[length] = now[length]  # at a constant rate a run may become longer
    remedy = "repeat the settings to resume"
    if not config.lora_rank:  # from which no new run begins
        remedy += ", or start a new run from it with --model"
    for name, value in now.items():
        was = before.get(name, value)  # a checkpoint may be older than a setting
        if value != was:
            raise ValueError(f"{newest} was trained with {name} = {was}, now it is {value}; {remedy}")
    say(f"resuming from {newest}")
    if RANK == 0:
        publish(out, newest, options.keep)  # the kill may have come between saving and this
    return Run(out, settings, Counters(**state["counters"]), newest)


def save(run: Run, keep: int, task, optim: Optim, is_lora: bool) -> None:
    """A checkpoint: folders like those of --model with EMA weights, and training/ with all else."""
    out, at = run.out, run.at
    if RANK == 0:
        sync(out / "log.jsonl")  # or a power cut could leave less of it than the checkpoint says
        at.log_bytes = (out / "log.jsonl").stat().st_size
    state = {"version": STATE_VERSION, "counters": dataclasses.asdict(at), "settings": run.settings}
    target = contextlib.nullcontext()
    if RANK == 0:
        target = new_checkpoint(out, at.total_steps, keep)
    with target as folder:
        training = gather(optim.state(with_ema=is_lora))  # written first: of one rank it is no copy
        if RANK == 0:
            save_weights(training, folder / "training", "state")
            (folder / "training" / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        with optim.averaged():
            weights = gather(task.weights())
            if RANK == 0:
                task.save(folder, weights)
    wait_for_ranks()  # as torchrun ends all when one has ended, also one that is still writing
    say(f"saved step {at.total_steps} in {out / 'checkpoints'}")


def round_weights(out: Path, dtype: torch.dtype) -> None:
    """Those in OUT, which is what is used from now on; checkpoints keep all digits."""
    for network, name in ((VideoTransformer, "transformer"), (VideoVAE, "vae"), (T5Encoder, "text_encoder")):
        if (out / name).is_dir():
            network.from_pretrained(out, dtype).save_pretrained(out)
