"""Train the diffusion transformer, or the video VAE, from nothing or from a checkpoint: one loop for both.

    records ─data.Epochs─► a step: a list of micro-batches, each of one shape, dealt to the ranks
    micro-batch ─Feed: encoded, or from the cache─► tensors ─task.losses─► a loss for each noise
    losses ─sum ÷ noises of a step─► gradient ─clip─► AdamW ─► weights ─lerp─► EMA ─► validate, preview, save

Randomness has three levels. All about a sample is a function of (seed, draw, sample), see data.Epochs; the
noise of a micro-batch of (seed, epoch, its number), drawn at once on the device; the timesteps of a step of
(seed, step). So the state of a run is a few counters beside weights, moments and EMA: a run that is
killed and resumed ends with the same bytes (but for rounding on a GPU, and where a cache on the device is
filled anew), and the number of ranks changes only the rounding of sums.

Where to look: the loop is `train`; what learns, and its loss, train_dit.py and train_vae.py; settings and
presets presets.py; masks inpaint.py; what lies in --out run_folder.py. Reference: CogVideoX-Fun
scripts/train.py.
"""

import argparse
import dataclasses
import json
import math
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import checkpoint
import data
import memory
import runtime
import sample
from data import Micro, Plan, Record
from diffusion import NUM_TIMESTEPS
from feed import Feed
from inpaint import MASK_KINDS
from kinds import native_fps, native_size
from log import Log
from media import check_fps, write_video
from optim import OPTIMIZERS, Optim, clip_norm, learning_rate
from presets import PRESETS, Config, Phase, set_field
from run_folder import Run, begin_or_resume, round_weights, save
from runtime import DTYPES, NUM_RANKS, RANK, agree, generator, say, sum_over_ranks, wait_for_ranks
from sharding import place
from sizes import check_frames, check_side
from train_dit import Denoising
from transformer import CHECKPOINTING, POSITIONS, TransformerConfig

# ---------------------------------------------------------------- the loop


def stratified_timesteps(seed: int, step: int, count: int, shift: float = 1.0) -> Tensor:
    """One timestep for each noise of a step: 0 … 999 is cut into so many parts, each has one.

    Each alone is uniform; together they cover all noise levels, so the loss of a step jumps less. Which part
    a noise gets is shuffled, as neighbours share a shape. A shift s moves t/1000 = u to su / (1 + (s − 1)u),
    so with s > 1 there are more noisy ones, where text decides. (Esser et al. 2024, arXiv 2403.03206, eq. 23)
    """
    draws = generator(seed, step, "timesteps")
    parts = torch.randperm(count, generator=draws)
    places = torch.rand(count, generator=draws, dtype=torch.float64)
    uniform = (parts + places) / count
    shifted = shift * uniform / (1 + (shift - 1) * uniform)
    return (shifted * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)


def begin_phase(task, phase: Phase, config: Config, before: Optim | None, newest: Path | None) -> Optim:
    """What learns in a phase, with the state of the phase before, or of the checkpoint to go on from."""
    modules = task.begin(phase)
    optim = Optim(modules, config.optimizer, config.weight_decay, config.adam_eps, config.ema_decay)
    if before:
        optim.inherit(before)
    elif newest:
        optim.load(newest / "training")
    return optim


def describe(
    task, phase: Phase, config: Config, optim: Optim, feed: Feed, num_steps: int, epoch: int, out: Path
) -> None:
    """What will happen, before it does."""
    plan, micros = feed.plan, feed.epochs.micros(epoch)
    size = sum(param.numel() for param in optim.params.values()) / 1e6
    names = ", ".join(dict.fromkeys(name.partition("/")[0] for name in optim.params))
    resolutions = ", ".join(map(str, phase.resolutions))
    say(
        f"training {names}: {size:.2f} M parameters on {task.device} in {str(task.dtype)[6:]} -> {out}\n"
        f"a step is {phase.global_batch // config.batch_size} micro-batches of up to {plan.batch_tokens} "
        f"video tokens, with {config.noises_per_clip} noise(s) a sample, on {NUM_RANKS} rank(s)\n"
        f"{num_steps} steps at resolutions {resolutions}, up to {phase.max_tokens} tokens and "
        f"{plan.max_frames} frames; the shapes of the epoch:\n{data.bucket_table(micros, plan)}"
    )
    if 2 * config.warmup_steps > phase.num_steps:
        say(f"note: the rate warms up over {config.warmup_steps} steps, see --set warmup_steps=N")
    if plan.size:
        length = native_size(task.dit.config)[2]
        others = sum(len(micro.keys) for micro in micros if micro.bucket.num_frames != length)
        if others:
            say(f"note: learned positions fit {length} frames alone; {others} samples get computed ones")


def deal_timesteps(micros: list[Micro], config: Config, step: int) -> tuple[Tensor, ...]:
    """For each micro-batch of a step the timesteps of its noises."""
    sizes = [len(micro.keys) * config.noises_per_clip for micro in micros]
    timesteps = stratified_timesteps(config.seed, step, sum(sizes), config.timestep_shift)
    return timesteps.split(sizes)


def check_finite(numbers: list[float], step: int, micros: list[Micro], records: list[Record]) -> None:
    if not all(map(math.isfinite, numbers)):
        names = [records[index].name for micro in micros for index in micro.indices]
        shown = ", ".join(names[:32])
        if len(names) > 32:
            shown += f" and {len(names) - 32} more"
        raise ValueError(
            f"step {step}: loss or gradient is not finite; the weights are untouched. "
            f"Lower --lr, or look at the files of this batch: {shown}"
        )


def train(task, config: Config, options: argparse.Namespace, run: Run, feed: Feed, signals: list) -> bool:
    """All phases, from where the run is to its end or to a signal; returns whether it was one.

    task: train_dit.Denoising, or train_vae.Reconstruction
    """
    out, at = run.out, run.at
    steps_left = sum(phase.num_steps for phase in config.phases[at.phase :]) - at.step
    num_steps = min(options.num_steps or math.inf, at.total_steps + steps_left)
    log = Log(out / "log.jsonl", at.log_bytes, num_steps)
    optim = None
    stop = False

    while at.total_steps < num_steps and not stop:
        phase = config.phases[at.phase]
        optim = begin_phase(task, phase, config, optim, run.newest)
        steps_ahead = min(phase.num_steps - at.step, num_steps - at.total_steps)
        feed.begin(phase, at.epoch, at.batch, steps_ahead)
        describe(task, phase, config, optim, feed, steps_ahead, at.epoch, out)
        if at.total_steps == 0:
            validate(task, optim, feed, log, 0)  # where it starts

        for micros in feed.steps:  # the same list on every rank
            start = time.perf_counter()
            waited = 0.0
            timesteps = deal_timesteps(micros, config, at.total_steps)
            num_noises = sum(map(len, timesteps))
            loss = torch.zeros((), device=task.device)
            for micro, its_timesteps in list(zip(micros, timesteps))[RANK::NUM_RANKS]:
                asked_at = time.perf_counter()
                batch = next(feed.batches)
                waited += time.perf_counter() - asked_at
                share = task.losses(batch, micro, its_timesteps).sum() / num_noises
                # The gradient is the mean over all noises, however they are cut; over ranks FSDP averages.
                (share * NUM_RANKS).backward()
                loss += share.detach()
            norm = optim.average_gradients()
            loss, norm = torch.stack([loss, norm.to(loss)]).tolist()  # the one wait for the device in a step
            check_finite([loss, norm], at.total_steps + 1, micros, feed.files.records)
            optim.clip(norm, clip_norm(at.total_steps, norm, config.max_grad_norm, config.wide_clip_steps))
            lr = learning_rate(at.step, phase.num_steps, phase.lr, phase.final_lr, config.warmup_steps)
            optim.step(lr)
            optim.update_ema(at.total_steps)

            loss, stop = sum_over_ranks(torch.tensor([loss, len(signals)], dtype=torch.float64)).tolist()
            seconds = time.perf_counter() - start
            num_tokens = sum(data.tokens_of(m.bucket, feed.plan) * len(t) for m, t in zip(micros, timesteps))
            log.step(at.total_steps + 1, at.phase + 1, seconds, loss=loss, grad_norm=norm, lr=lr,
                     tokens_per_s=num_tokens / seconds, wait=waited / seconds,
                     gib=memory.gib_used(task.device))  # fmt: skip
            at.advance(micros, config.phases)

            is_last = at.total_steps == num_steps or at.step == 0  # of the run, or of the phase
            if is_last or at.total_steps % options.val_every == 0:
                validate(task, optim, feed, log, at.total_steps)
            if is_last or stop or at.total_steps % options.save_every == 0:
                save(run, options.keep, task, optim, config.lora_rank is not None)
            if is_last or at.total_steps % options.preview_every == 0:
                preview(task, optim, feed, out / "previews" / f"step-{at.total_steps:06d}", options)
            if is_last or stop:
                break
        feed.batches.close()
    if config.save_dtype and not stop and RANK == 0:
        round_weights(out, getattr(torch, config.save_dtype))
    return bool(stop)


def validate(task, optim: Optim, feed: Feed, log: Log, step: int) -> None:
    """With the averaged weights; in shapes of their own, which are not worth compiling."""
    with optim.averaged(), torch.compiler.set_stance("force_eager"):
        log.validation(step, task.validate(feed.held_out))


def preview(task, optim: Optim, feed: Feed, path: Path, options: argparse.Namespace) -> None:
    """Some held-out samples, as the averaged weights make them: PATH-0.gif and .png, …

    If one fails, for lack of memory say, the run goes on without it. Not so with --offload, which may leave
    weights gathered, nor with several ranks, which might wait for each other.
    """
    with optim.averaged(), torch.compiler.set_stance("force_eager"):
        try:
            for micro in feed.held_out_micros[: options.num_previews]:
                shown = feed.held_out_loader.load(*micro.places()[0], feed.read)
                frames = task.preview(shown, options.preview_steps)
                name = f"{path}-{micro.number}"
                if RANK == 0:
                    for ending in (".gif", ".png"):
                        write_video(frames, Path(name + ending), feed.config.fps)
                say(f"{name}.gif and .png: {shown.caption}")
        except Exception as error:
            message = runtime.in_one_line(error, "--num-previews 0 needs less")
            if message is None or NUM_RANKS > 1 or options.offload:
                raise
            say(f"note: no preview: {message}")


# ---------------------------------------------------------------- the command line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} should be at least 1")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    description = "Train the VAE, or train and fine-tune the transformer, of CogVideoX and CogVideoX-Fun."
    parser = sample.Parser(
        prog="train.py", description=description, allow_abbrev=False, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), help="see presets.py; tiny, if there is no --model")
    add("--train", choices=["dit", "vae"], default="dit", help="what learns")
    add("--data", help="metadata .json, .jsonl or .csv, a folder, or shapes, for the tiny presets")
    add("--val-data", help="held-out samples; else some of --data")
    add("--model", help="folder or hub id to start from; what it lacks is made from the preset")
    add("--from-scratch", action="store_true", help="new weights for what learns, even where --model has it")
    add("--out", type=Path, help="folder to write; default runs/PRESET or runs/PRESET-vae")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--phase", type=positive, default=1, help="the one to start with, of those in presets.py")
    add("--num-steps", type=positive, help="stop after so many steps in all; else behind the last phase")
    add = parser.add_argument_group("in place of the preset's values; they change the numbers").add_argument
    add("--phase-steps", type=positive, nargs="+", help="steps of each phase; fewer numbers: fewer phases")
    add("--resolutions", type=positive, nargs="+", help="base sizes, in every phase")
    add("--max-tokens", type=positive, help="tokens of a clip, in every phase")
    add("--lr", type=float, nargs="+", help="constant learning rate; or first and last of half a cosine")
    add("--grad-accum", type=positive, help="micro-batches in a step")
    add("--batch-size", type=positive, help="clips of max-tokens in a micro-batch; more of smaller ones")
    add("--num-frames", type=positive, dest="max_frames", help="most frames of a clip")
    add("--fps", type=float, help="frames a second to read files at; 8, for CogVideoX1.5 16, if not given")
    add("--lora-rank", type=positive, help="learn LoRA of this rank; sample.py --lora OUT uses it")
    add("--lora-alpha", type=float, help="how much it counts, as alpha/rank; the rank if not given")
    add("--in-channels", type=positive, help="grow a text model: 33 to an inpaint, 32 to a control model")
    add("--masks", nargs="+", choices=list(MASK_KINDS), metavar="KIND",
        help=f"only these of {', '.join(MASK_KINDS)}; their shares stay in proportion")  # fmt: skip
    add("--cache-latents", type=Path, metavar="DIR",
        help="encode each sample first, under 4 draws of mask and crop, and keep that here")  # fmt: skip
    add("--seed", type=int)
    add("--dtype", choices=["bfloat16", "float32"], help="to compute in; bfloat16 where it is fast")
    add("--num-val", type=positive, default=16, help="samples held out")
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="any other field of Config, ema_decay=0 or dit.num_layers=4 for instance")  # fmt: skip
    add = parser.add_argument_group("without influence on the numbers").add_argument
    add("--device", help="default: the best there is")
    add("--activation-checkpointing", nargs="?", const="full", choices=list(CHECKPOINTING),
        help="less memory, a third more time; attention: keep its output, a little more of both")  # fmt: skip
    add("--offload", action="store_true", help="weights, gradients and moments stay in the host's memory")
    add("--compile", action="store_true", help="compile the transformer's blocks")
    add("--num-workers", type=positive, default=4, help="threads that load data")
    add("--save-every", type=positive, default=500, help="steps between checkpoints")
    add("--keep", type=positive, default=3, help="how many checkpoints stay")
    add("--val-every", type=positive, default=250, help="steps between validations")
    add("--preview-every", type=positive, default=1000, help="steps between previews")
    add("--num-previews", type=int, default=3)
    add("--preview-steps", type=positive, default=25, help="sampling steps of a preview")
    args = parser.parse_args(argv)
    if not args.preset and args.model:
        raise ValueError(f"--model needs a --preset, whose settings fit it: {', '.join(PRESETS)}")
    args.preset = args.preset or "tiny"
    if not args.data and not args.preset.startswith("tiny"):
        raise ValueError("give --data, a folder of clips with captions for instance; or shapes, drawn ones")
    args.data = args.data or "shapes"
    if args.val_data and args.data == "shapes":
        raise ValueError("--val-data goes with --data files; drawn shapes hold out combinations of their own")
    args.out = args.out or Path("runs") / (args.preset + ("-vae" if args.train == "vae" else ""))
    if not args.model and args.preset.startswith("tiny") and args.train == "dit":
        args.model = f"runs/{args.preset}-vae"  # what --train vae makes
        if not Path(args.model).is_dir():
            remedy = "run --train vae first, or give --model a folder with vae/"
            raise ValueError(f"there is no {args.model} yet; {remedy}")
    args.model = checkpoint.find_model(args.model) if args.model else None
    return args


def make_config(args: argparse.Namespace) -> Config:
    """The preset with the command line's changes; ValueError for what cannot be."""
    config = PRESETS[args.preset][args.train]
    for assignment in args.set:
        config = set_field(config, assignment)
    names = {f.name for f in dataclasses.fields(Config)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    if args.masks:
        given["masks"] = {kind: share for kind, share in MASK_KINDS.items() if kind in args.masks}
    config = replace(config, **given)
    if config.fps is None:
        dit = config.dit
        file = args.model and args.model / "transformer" / "config.json"
        if file and file.is_file() and not args.from_scratch:
            dit = checkpoint.read_config(TransformerConfig, file)
        dit = replace(dit, in_channels=config.in_channels or dit.in_channels)
        config = replace(config, fps=native_fps(dit))
    if args.cache_latents:
        config = replace(config, cached_draws=config.cached_draws or 4, only_full=False)  # 4: not tuned

    changes = {}
    if args.lr:
        changes |= {"lr": args.lr[0], "final_lr": args.lr[-1]}
    if args.max_tokens:
        changes["max_tokens"] = args.max_tokens
    if args.resolutions:
        changes["resolutions"] = tuple(args.resolutions)
    if args.grad_accum:
        changes["global_batch"] = config.batch_size * args.grad_accum
    if config.lora_rank:
        changes["train_text"] = False  # its file holds the transformer's part alone
    steps = args.phase_steps or [phase.num_steps for phase in config.phases]
    if len(steps) > len(config.phases):
        raise ValueError(f"--phase-steps has {len(steps)} numbers, {args.preset} {len(config.phases)} phases")
    phases = tuple(replace(phase, num_steps=n, **changes) for phase, n in zip(config.phases, steps))
    config = replace(config, phases=phases)
    check_config(config, args)
    return config


# Fields of Config, and the folders that are made of them.
MADE_OF = {"dit": "transformer", "vae": "vae", "t5": "text_encoder", "schedule": "scheduler"}


def check_config(config: Config, args: argparse.Namespace) -> None:
    """What would stop a run late, or make it other than asked."""
    for assignment in args.set:
        folder = MADE_OF.get(assignment.partition(".")[0])
        if folder and args.model and (args.model / folder).is_dir() and not args.from_scratch:
            raise ValueError(f"--set {assignment}: {folder}/ of --model stays as it is; add --from-scratch")
    check_fps(config.fps)
    check_frames(config.max_frames)
    if args.phase > len(config.phases):
        remedy = "; --phase-steps takes a number for each, from the first on" if args.phase_steps else ""
        raise ValueError(f"--phase {args.phase}: there are {len(config.phases)}{remedy}")
    if args.lr and len(args.lr) > 2:
        raise ValueError(f"--lr takes one number or two, the first and the last, not {len(args.lr)}")
    for phase in config.phases:
        for size in phase.resolutions:
            check_side("--resolutions", size)
        num_micros, rest = divmod(phase.global_batch, config.batch_size)
        if rest or num_micros % NUM_RANKS:
            raise ValueError(
                f"a step of {phase.global_batch} clips cannot be cut into micro-batches of "
                f"{config.batch_size} for {NUM_RANKS} ranks; give --grad-accum a multiple of {NUM_RANKS}"
            )
    is_dit = config.train == "dit"
    for flag in "cache-latents lora-rank in-channels masks offload compile activation-checkpointing".split():
        if not is_dit and getattr(args, flag.replace("-", "_")):
            raise ValueError(f"--{flag} is for --train dit; leave it out")
    for name in ("cached_draws", "noises_per_clip"):
        if getattr(config, name) != getattr(Config, name) and not is_dit:
            raise ValueError(f"{name} is for --train dit; leave it out")
    if config.keep_encoder and (is_dit or not args.model or args.from_scratch):
        raise ValueError("keep_encoder is for the VAE of a --model, with --train vae and no --from-scratch")
    if config.lora_rank and (config.in_channels or config.position):
        raise ValueError("--lora-rank learns beside a transformer as it is; no --in-channels, no position")
    if config.lora_alpha and not config.lora_rank:
        raise ValueError(f"--lora-alpha {config.lora_alpha} needs --lora-rank; give it, or leave both out")
    choices = {"optimizer": OPTIMIZERS, "position": (None, *POSITIONS), "save_dtype": (None, *DTYPES)}
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            listed = ", ".join(map(str, allowed))
            raise ValueError(f"{name}={getattr(config, name)} is unknown; choose from {listed}")
    shares = config.masks.values()
    are_numbers = all(type(share) in (int, float) and 0 <= share < math.inf for share in shares)
    if not set(config.masks) <= set(MASK_KINDS) or not are_numbers or sum(shares) == 0:
        raise ValueError(f"masks are some of {', '.join(MASK_KINDS)}, each with its share, not all 0")


def make_task(
    config: Config, options: argparse.Namespace, device: torch.device, dtype: torch.dtype, files: data.Files
):
    """What learns; check the samples against it, and say which words of theirs it will not see."""
    if config.train == "vae":
        from train_vae import Reconstruction  # here, so that train_vae.py can be deleted

        return Reconstruction(config, options.out, device, dtype)
    task = Denoising(config, options.out, device, dtype)
    plans = [task.plan(phase) for phase in config.phases[options.phase - 1 :]]
    check_records(files.records + files.held_out, task.kind, plans)
    if options.masks and task.kind != "inpaint":
        raise ValueError(f"--masks is for inpaint models, this one is of kind {task.kind}; leave it out")
    captions = sorted({record.caption(record.num_frames) for record in files.records})
    length = task.dit.config.max_text_seq_length
    for line in data.caption_report(captions, task.models.tokenizer, length):
        say(line)
    task.dit.activation_checkpointing = options.activation_checkpointing
    if options.compile or (config.compile_on_gpu and device.type == "cuda"):
        for block in task.dit.transformer_blocks:
            block.compile(dynamic=True)  # one graph: with one for each shape torch gives up after eight
    return task


def check_records(records: list[Record], kind: str, plans: list[Plan]) -> None:
    for record in records:
        if kind == "control" and not record.read_control:
            raise ValueError(f"a control model needs a control_file_path for every sample: {record.name}")
        if kind == "image":
            for plan in plans:
                check_is_clip(record, plan)


def check_is_clip(record: Record, plan: Plan) -> None:
    """Of one frame alone an image model would be shown all there is to make."""
    for size in data.sizes_for(record, plan) or [min(plan.resolutions)]:
        if data.bucket_at(record, plan, size).num_frames == 1:
            raise ValueError(
                f"an image-to-video model learns from clips alone, and of {record.name} one frame is left at "
                f"{size}; remove it, or give smaller --resolutions or more --max-tokens"
            )


SAME_SIGNAL = 2.0  # seconds: timeout and torchrun send theirs twice, which must not interrupt the save


def run_command(argv: list[str] | None, signals: list[int]) -> bool:
    """The command line; returns whether a signal ended it."""
    options = parse(argv)
    config = make_config(options)
    device = runtime.choose_device(options.device)
    has_bf16 = runtime.computes_bfloat16(device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if has_bf16 else "float32"))
    if options.data == "shapes":
        files = data.draw_files(
            config.num_shapes, config.picture_share, options.num_val, config.max_frames, config.seed
        )
    else:
        files = data.open_files(options.data, options.val_data, options.num_val, config.fps)
    if not files.records or not files.held_out:
        reasons = checkpoint.first_few(files.failures.values()) or "none is listed"
        raise ValueError(f"there are no samples to train on, or none to hold out: {reasons}")
    settings = {"dtype": str(dtype)[6:], **dataclasses.asdict(config)}
    settings["digest of the training samples"] = data.digest(files.records)[:16]
    settings["digest of the held-out samples"] = data.digest(files.held_out)[:16]
    settings = json.loads(json.dumps(settings))  # as a checkpoint gives them back
    if agree(settings) != settings:  # a file could not be opened there, say
        raise ValueError(f"rank {RANK} has other settings or samples than rank 0; give all the same files")
    if RANK > 0:
        wait_for_ranks()  # until rank 0 has made the folder ready
    run = begin_or_resume(config, settings, options)
    if RANK == 0:
        wait_for_ranks()
    task = make_task(config, options, device, dtype, files)
    if config.train == "dit":
        models = sample.load_models(options.out, dtype, device)  # each alone, as none is kept
        say(memory.describe(task.dit, models, config, config.phases[run.at.phase :], options.offload))
        place(task.dit, device, dtype, options.offload)
    feed = Feed(task, config, files, options.cache_latents, options.num_workers)
    stopped = train(task, config, options, run, feed, signals)
    following = f"sample.py PROMPT --model {options.out}"
    if config.lora_rank:
        following += f" --lora {options.out / checkpoint.LORA}"
    if config.train == "vae":
        following = f"train.py --preset {options.preset} --model {options.out}"
    say(f"{'stopped' if stopped else 'done'}: {run.at.total_steps} steps; now python {following}")
    return stopped


def main(argv: list[str] | None = None) -> int:
    """0 at the end, 2 with one line on stderr for an error, 128 + n after signal n."""
    signals: list[int] = []
    first_at = 0.0

    def stop(number: int, _) -> None:
        nonlocal first_at
        if not signals:
            first_at = time.monotonic()
            say("saving after this step …")
        elif time.monotonic() - first_at > SAME_SIGNAL:
            raise KeyboardInterrupt  # asked once more: at once
        signals.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    store = runtime.join_ranks()
    try:
        if not run_command(argv, signals):
            return 0
        return 128 + (signals[0] if signals else signal.SIGTERM)  # the latter where it came to another rank
    except (Exception, KeyboardInterrupt) as error:
        if store and store.add("failed", 1) > 1:
            return 2  # an error of one rank is soon one of all, but the first alone knows why
        remedy = "try a smaller --batch-size or --max-tokens, or --activation-checkpointing"
        message = runtime.in_one_line(error, remedy)
        if message is None:
            raise
        return runtime.fail("train.py", message)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    status = main()
    if dist.is_initialized() and status != 2:  # an error may have left others in the middle of something
        dist.destroy_process_group()
    sys.exit(status)
