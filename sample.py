"""From a prompt, pictures or a clip to a video: `generate`, and the command line.

    prompt ─Tokenizer, T5─────────────────────────────────► text 1|2 L d        encode_text
    picture(s), clip + mask ─inpaint_condition────────────► condition 1 17 …    encode_known
    clip, if strength < 1 ─encode, add_noise──────┐
    noise ────────────────────────────────────────┴► latents ─sampler × steps─► denoise
    latents ─decode_stream────────────────────────► uint8 f h w 3 ─► mp4, gif, png   decode

What can be asked for is in request.py, how networks come and go in models.py, videos longer than the model in
long_video.py.

b batch · c channels · f frames · h w height, width (f' h' w' of latents) · L text tokens · d model width
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import runtime
from checkpoint import LORA, find_model, open_safetensors, save_tensors, unknown_keys
from diffusion import SAMPLERS, SNR_SHIFTED, Schedule, guidance_at, guide
from inpaint import add_reference_noise, inpaint_condition
from kinds import native_fps, native_size
from media import WRITERS, check_fps, to_pixels, to_uint8, write_video
from models import Models, load_models
from request import Known, Request, complete, latent_shape, read_inputs
from runtime import DTYPES, NUM_RANKS, RANK, agree, atomic_write, choose_device, listed, say
from sizes import latent_frames, num_tokens
from transformer import VideoTransformer
from vae import decoded_frames

TINY = Path(__file__).parent / "checkpoints" / "tiny"
SMALL_TOKENS = 1024  # up to here both prompts go through the network together


# ---------------------------------------------------------------- the stages


def seeded(seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    """Draws on the CPU, so that a seed means the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def progress_bar(models: Models, stage: str, items: Iterable | None = None, **settings) -> tqdm:
    hidden = None if models.progress and models.writes else True  # None: at a terminal it is shown
    return tqdm(items, stage, disable=hidden, leave=False, **settings)


@torch.inference_mode()
def encode_text(models: Models, texts: tuple[str, ...]) -> Tensor:
    """What T5 makes of (the negative and) the prompt: 1 or 2 L d."""
    with models.use("text_encoder", "text") as t5:
        return t5(models.tokenizer(list(texts), models.config.max_text_seq_length))


@torch.inference_mode()
def encode_known(
    models: Models, request: Request, known: Known, randn: Callable
) -> tuple[Tensor | None, Tensor | None]:
    """(condition 1 c f' h' w', which joins the noisy latents on the channel axis; latents 1 16 f' h' w' of
    the clip that sampling starts from), None for what the model or the request does not have."""
    _, c, f, h, w = latent_shape(models.config, known)
    condition = start = None
    if models.kind == "inpaint":
        condition = torch.zeros(1, 1 + c, f, h, w)  # nothing is known
    if known.frames is None:
        return condition, start
    pixels = to_pixels(known.frames)[None].to(models.device)  # 1 3 f h w
    with models.use("vae", "encode") as vae:
        if models.kind == "inpaint" and known.mask is not None:
            shown = pixels
            if models.config.add_noise_in_inpaint_model and request.noise_aug_strength > 0:
                noise = randn(tuple(pixels.shape)).to(pixels)
                shown = add_reference_noise(pixels, request.noise_aug_strength, noise)
            mask = known.mask[None, None].to(pixels)
            condition = inpaint_condition(vae, shown, mask, tiled=request.tiled)
        elif models.kind == "control":
            condition = vae.encode(pixels, tiled=request.tiled)
        elif models.kind == "image":  # the start, zeros, and the end where there is one
            condition = torch.zeros(1, c, f, h, w)
            for place, picture in zip((0, f - 1), pixels.split(1, dim=2)):
                latents = vae.encode_first_picture(picture, randn((1, c, 1, h, w)), request.tiled)
                condition[:, :, place : place + 1] = latents.float()
        if request.strength < 1 and request.latents is None:
            mean, logvar = vae.moments(pixels, tiled=request.tiled)
            start = vae.posterior(mean, logvar, randn(tuple(mean.shape)))
    return condition, start


@torch.inference_mode()
def denoise(
    models: Models,
    request: Request,
    known: Known,
    text: Tensor,
    condition: Tensor | None,
    start: Tensor | None,
    randn: Callable,
) -> Tensor:
    """The sampler's loop: from noise, or the noised clip, to clean latents 1 16 f' h' w', float32."""
    schedule = Schedule(models.schedule.config, snr_shift=request.sampler in SNR_SHIFTED)
    timesteps = schedule.timesteps(request.num_steps)[-request.num_taken :]
    shape = latent_shape(models.config, known)
    x = randn(shape) if request.latents is None else request.latents
    x = x.to(models.device, torch.float32)
    if start is not None:
        x = schedule.add_noise(start.float(), x, timesteps[:1])

    def noise_like_x() -> Tensor:
        return randn(shape).to(x)

    with models.use("transformer", "denoise") as dit, contextlib.ExitStack() as stack:
        cache = None
        if request.step_cache:
            from stepcache import skip_steps

            cache = stack.enter_context(skip_steps(dit, request.step_cache, timesteps))
        velocity = guided(models, dit, request, text, condition, len(timesteps), cache)
        steps = SAMPLERS[request.sampler](velocity, x, schedule, timesteps, noise_like_x, request.num_steps)
        for i, x in enumerate(progress_bar(models, "denoise", steps, total=len(timesteps))):
            if not torch.isfinite(x).all():
                where = f"step {i + 1} (timestep {timesteps[i]}) in {models.dtype_name}"
                raise ValueError(f"the latents stopped being finite at {where}; try dtype bfloat16 or "
                                 "float32, or other weights")  # fmt: skip
    if cache is not None:
        models.forwards[0] += cache.num_computed
        models.forwards[1] += cache.num_forwards
    return x[:, :, -latent_frames(known.num_frames) :]  # without the padding of CogVideoX1.5, in front


def guided(
    models: Models,
    dit: VideoTransformer,
    request: Request,
    text: Tensor,
    condition: Tensor | None,
    num_steps: int,
    cache=None,
) -> Callable[[Tensor, int], Tensor]:
    """velocity(x, t) of the prompt, pulled away from that of the negative one where the step is guided.

    cache: a stepcache.StepCache that has to know when a step begins
    """
    text = text.to(models.device, models.dtype)
    if condition is not None:
        condition = condition.to(models.device, models.dtype)

    def velocity(x: Tensor, t: int) -> Tensor:
        dynamic, interval = request.dynamic_guidance, request.guidance_interval
        scale = guidance_at(t, request.guidance_scale, num_steps, dynamic, interval)
        prompts = text if scale != 1 else text[-1:]
        if cache is not None:
            cache.begin(t, len(prompts))
        tokens = x.shape[2:].numel() // (4 * dit.config.patch[0])
        halves_apart = models.on_all_ranks and NUM_RANKS % 2 == 0  # by parallel.py, each on half of the ranks
        at_once = 2 if tokens <= SMALL_TOKENS or halves_apart else 1  # else one by one, for memory
        outputs = []
        for prompt in prompts.split(at_once):
            shape = (len(prompt), -1, -1, -1, -1)
            told = None if condition is None else condition.expand(shape)
            noisy = x.to(models.dtype).expand(shape)
            outputs += dit(noisy, t, prompt, told).split(1)
        if len(outputs) == 1:
            return outputs[0].float()
        return guide(*outputs, scale)

    return velocity


def decode(models: Models, latents: Tensor, tiled: bool = False) -> Iterator[np.ndarray]:
    """Latents 1 16 f' h' w' to chunks of uint8 f h w 3, as they become ready."""
    num_frames = decoded_frames(latents.shape[2], models.first_alone)
    bar = progress_bar(models, "decode", unit="frame", total=num_frames)
    with models.use("vae", "decode") as vae, bar:
        for pixels in vae.decode_stream(latents, tiled=tiled, first_alone=models.first_alone):
            if not torch.isfinite(pixels).all():
                raise ValueError(f"the decoded frames are not finite in {models.dtype_name}; decode the "
                                 "saved latents with dtype float32, or use other weights")  # fmt: skip
            bar.update(pixels.shape[2])
            yield to_uint8(pixels[0])


def generate(models: Models, prompt: str, output: str = "frames", **settings):
    """Make a video, or a picture if num_frames is 1.

    settings: the fields of `Request`, where each is explained
    returns: uint8 f h w 3, or with output="latents" the scaled latents 1 16 f' h' w' (float32)
    randn(shape) replaces every draw, in this order: noise on the reference, posterior of the picture or clip,
    initial noise, sampler.
    raises ValueError or OSError for whatever the caller can get wrong
    """
    request = complete(Request(prompt, **settings), models)
    known = read_inputs(request, models.config)
    randn = request.randn or seeded(request.seed)
    text = encode_text(models, request.texts)
    condition, start = encode_known(models, request, known, randn)
    latents = denoise(models, request, known, text, condition, start, randn)
    if output == "latents":
        return latents
    return np.concatenate(list(decode(models, latents, request.tiled)))


def generate_each(models: Models, requests: list[Request], known: Known) -> Iterator[Tensor]:
    """Latents, as of `generate`, for requests with the same files; T5 and transformer are loaded once."""
    randns = [seeded(request.seed) for request in requests]
    with models.use("text_encoder", "text"):
        prompts = sorted({request.texts for request in requests})
        texts = {prompt: encode_text(models, prompt) for prompt in prompts}
    encoded = [encode_known(models, request, known, randn) for request, randn in zip(requests, randns)]
    with models.use("transformer", "denoise"):
        for request, randn, (condition, start) in zip(requests, randns, encoded):
            yield denoise(models, request, known, texts[request.texts], condition, start, randn)


# ---------------------------------------------------------------- what is said before the start


def estimate_bytes(models: Models, latents: tuple[int, ...], tiled: bool = False) -> dict[str, int]:
    """Peak memory of each stage, weights and activations, for latents b c f' h' w'.

    Activations are maps of the VAE's widest layers and tokens of the transformer's width, so many times as
    was measured, of decoding on an H200 in bf16, else on CPUs.
    """
    size = models.dtype.itemsize
    config = models.config
    _, _, f, h, w = latents
    tokens = num_tokens(4 * f - 3, 8 * h, 8 * w, config.patch_size_t or 1)
    at_once = 2 if tokens <= SMALL_TOKENS else 1
    area = h * w
    if tiled:
        _, tile = models.vae_config.tiles
        area = min(h, tile[0]) * min(w, tile[1])
    pixel_map = models.vae_config.block_out_channels[1] * 64 * area * size
    token_map = at_once * (config.max_text_seq_length + tokens) * config.dim * size
    weights = {name: count * size for name, count in models.num_parameters.items()}
    if models.low_memory:
        weights["transformer"] = models.num_parameters["transformer"]
    if models.keep:
        weights = dict.fromkeys(weights, sum(weights.values()))
    else:
        weights["text_encoder"] //= 14  # streamed: one layer of 24, and buffers
    return {
        "text": weights["text_encoder"],
        "encode": weights["vae"] + 33 * pixel_map,
        "denoise": weights["transformer"] + 14 * token_map,
        "decode": weights["vae"] + 42 * pixel_map,
    }


def describe(models: Models, requests: list[Request], known: Known) -> str:
    """The lines printed at the start: model, sizes, tokens, memory of each stage, and what was decided."""
    request = requests[0]
    config = models.config
    latents = latent_shape(config, known)
    tokens = num_tokens(known.num_frames, known.height, known.width, config.patch_size_t or 1)
    count = models.num_parameters["transformer"]
    size = f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
    needs = estimate_bytes(models, latents, request.tiled)
    dtype = models.dtype_name + (", matrices as float8" if models.low_memory else "")
    notes = [*known.notes, *prompt_notes(models, requests)]
    num_decoded = decoded_frames(latent_frames(known.num_frames), models.first_alone)
    if num_decoded != known.num_frames:
        notes.append(f"an even number of latent frames: this model decodes {num_decoded} frames")
    read = {"transformer": config, "vae": models.vae_config, "scheduler": models.schedule.config}
    for name, component in read.items():
        if unknown := unknown_keys(component):
            notes.append(f"the config of {name}/ has keys we do not know: {', '.join(unknown)}")
    if (models.model_dir / LORA).is_file() and not models.loras:
        notes.append(f"{LORA} of this folder is not used; add --lora {models.model_dir}")
    lines = [
        f"model    {models.model_dir}: {models.kind}, {config.in_channels} channels, {size} parameters",
        f"video    {len(requests)} of {known.width}x{known.height}, {known.num_frames} frames -> "
        f"{latents[2]} latent frames -> {tokens} tokens",
        f"sampler  {request.sampler}, {request.num_steps} steps, strength {request.strength:g}, "
        f"guidance {request.guidance_scale:g}",
        f"device   {models.device}, {dtype}",
        f"memory   about {listed(needs)}",
    ]
    if request.step_cache:
        from stepcache import announce  # here and in `denoise`, so that stepcache.py can be deleted

        lines.append(f"cache    {announce(models, request)}")
    return "\n".join([*lines, *(f"note     {note}" for note in notes)])


def prompt_notes(models: Models, requests: list[Request]) -> list[str]:
    """What of the prompts does not reach the network: what is too long, and words a small model lacks."""
    notes = []
    if requests[0].negative_prompt and requests[0].guidance_scale <= 1:
        notes.append("without guidance the negative prompt is not used; give --guidance-scale above 1")
    tokenizer = models.tokenizer
    for prompt in dict.fromkeys(text for request in requests for text in request.texts):
        if len(tokenizer.encode(prompt)) >= models.config.max_text_seq_length:  # one place is for </s>
            notes.append(f"{prompt:.40}… is cut to {models.config.max_text_seq_length} tokens")
        if unknown := tokenizer.unknown_words(prompt):
            vocabulary = tokenizer.unigram.get_vocab()
            known = [word for word in sorted(vocabulary, key=vocabulary.get) if not word.startswith("<")]
            notes.append(f"this model does not know: {', '.join(unknown)}. It knows: {', '.join(known)}")
    return notes


# ---------------------------------------------------------------- results on disk


def as_json(record: dict) -> str:
    return json.dumps(record, indent=2, default=str)


def save_latents(path: Path, latents: Tensor, record: dict) -> None:
    save_tensors({"latents": latents.cpu().contiguous()}, path, {"record": as_json(record)})


def load_latents(path: Path) -> tuple[Tensor, dict]:
    """What `save_latents` left: latents 1 c f' h' w' and the record of their making."""
    with open_safetensors(path) as file:
        if list(file.keys()) != ["latents"]:
            raise ValueError(f"{path} holds no latents of ours; give the .safetensors beside a video")
        latents = file.get_tensor("latents").float()
        record = json.loads((file.metadata() or {}).get("record", "{}"))
    return latents, record


def make_record(models: Models, request: Request, num_frames: int, height: int, width: int) -> dict:
    """Everything needed to make a video again: the request, its sizes, the models."""
    names = [field.name for field in fields(request) if field.name not in ("latents", "randn")]
    return {name: getattr(request, name) for name in names} | {
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "model": str(models.model_dir),
        "lora": [f"{file}:{weight}" for file, weight in models.loras],
        "kind": models.kind,
        "dtype": models.dtype_name,
        "low_memory": models.low_memory,
        "device": str(models.device),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


def check_out(target: Path, count: int, inputs: list[str | None]) -> None:
    """What would else be found at the end: a place that cannot be written to, or that is an input."""
    is_file = target.suffix and not target.is_dir()
    if is_file and target.suffix.lower() not in WRITERS:
        raise ValueError(f"--out {target}: files end in {', '.join(WRITERS)}; a folder has no ending")
    if len(os.fsencode(target.stem)) > 180:  # 255 is the most, and -segment-1.safetensors may come behind
        raise ValueError(f"--out {target}: a name of more than 180 bytes; take a shorter one")
    for path in output_paths(target, count, "") if is_file else []:
        for made in (path, path.with_suffix(".safetensors"), path.with_suffix(".json")):
            if made.exists() and any(made.samefile(given) for given in inputs if given):
                raise ValueError(f"--out {target}: {made} is an input and would be lost; take another name")
    folder = target.parent if is_file else target
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def output_paths(target: Path, count: int, suffix: str) -> list[Path]:
    """Where results go: the file asked for, numbered if there are more, or the next numbers in the folder."""
    if target.suffix and not target.is_dir():
        if count == 1:
            return [target]
        return [target.with_stem(f"{target.stem}-{i + 1}") for i in range(count)]
    stems = [path.stem.removesuffix("-segment-1") for path in target.glob("*.*")]  # see long_video.py
    first = max((int(stem) for stem in stems if stem.isdecimal()), default=0) + 1
    return [target / f"{first + i:04d}{suffix}" for i in range(count)]


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split()):.1000}; see --help\n")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, with the names of `Request`, whose defaults stand for what is None here."""
    description = "Make videos from prompts, pictures and clips with CogVideoX and CogVideoX-Fun."
    parser = Parser(prog="sample.py", description=description, allow_abbrev=False)

    def add(flag: str, text: str, **settings) -> None:
        default = settings.get("default") or getattr(Request, flag.strip("-").replace("-", "_"), None)
        if default:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            text += f" (default {shown})"
        parser.add_argument(flag, help=text, **settings)

    switch = {"action": "store_true", "default": None}
    hub_id = "alibaba-pai/CogVideoX-Fun-V1.1-2b-InP"
    add("prompt", "what to show; several prompts make several videos", nargs="*")
    add("--model", f"checkpoint folder, or a hub id such as {hub_id}; default: checkpoints/tiny")
    add("--negative-prompt", "what to steer away from", metavar="TEXT")
    add("--image", "start picture; several are the first frames", nargs="+", metavar="PICTURE")
    add("--end-image", "last frame", metavar="PICTURE")
    add("--video", "clip to change (with --strength) or to fill in (with --mask)", metavar="CLIP")
    add("--mask", "white, from 240 up, is made anew; the rest is kept", metavar="PICTURE|CLIP")
    add("--control-video", "poses, edges or depth for a control model", metavar="CLIP")
    add("--strength", "how much of --video is made anew, in (0, 1]", type=float)
    add("--height", "multiple of 16; default: the model's own, or near it at the input's aspect", type=int)
    add("--width", "multiple of 16; default: as for --height", type=int)
    add("--num-frames", "4k+1; 1 makes a picture; default: the model's own, or the clip's", type=int)
    add("--num-steps", "steps of the sampler; with --sampler dpm++ 20 come near to 50", type=int)
    add("--guidance-scale", "pull towards the prompt; 1: none; default: the model's own, else 6", type=float)
    add("--dynamic-guidance", "vary it over the steps, as the reference can", **switch)
    add("--guidance-interval", "timesteps to guide, 999 the noisiest", type=int, nargs=2)
    add("--noise-aug-strength", "noise on given pictures", type=float)
    add("--sampler", "default: the model's", choices=list(SAMPLERS))
    add("--lora", "add what was fine-tuned, WEIGHT times (default 1)", nargs="+", metavar="FILE[:WEIGHT]")
    add("--seed", "a video of each; the same seed makes the same again; default: drawn", type=int, nargs="+")
    add("--fps", "clips are read and videos written at it; default: the model's, 8 or 16", type=float)
    add("--tiled", "the VAE works in tiles: less memory, slightly other pixels", **switch)
    add("--step-cache", "skip blocks where they change less than this: faster, try 0.1; 0: never", type=float)
    add("--dtype", "default: bfloat16 on a GPU, else float32", choices=DTYPES)
    add("--device", "such as cuda, cuda:1, mps, cpu; default: the best there is")
    add("--low-memory", "transformer weights as float8: half the memory, other numbers", action="store_true")
    add("--compile", "torch.compile the transformer: slow to start, faster steps", action="store_true")
    add("--out", ".mp4, .gif, .png (a strip of frames), or a folder for NNNN.mp4", default="outputs")
    add("--from-latents", "only decode latents saved by an earlier run", metavar="FILE")
    add("--quiet", "print nothing but errors", action="store_true")
    args = parser.parse_args(argv)

    if bool(args.prompt) == bool(args.from_latents):
        parser.error("give a prompt (before --image and --seed), or --from-latents FILE without one")
    if args.from_latents:
        for name in asked(args).keys() - {"fps", "tiled"}:
            parser.error(f"--from-latents only decodes; {name} cannot change what was sampled")
    return args


def asked(args: argparse.Namespace) -> dict:
    """What is given of the fields of `Request`, but for the prompt."""
    names = [field.name for field in fields(Request) if field.name != "prompt"]
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def parse_lora(text: str) -> tuple[Path, float]:
    """(file, weight) of FILE or FILE:WEIGHT; of the folder of a run its file is meant."""
    path, weight = Path(text), 1.0
    match = re.fullmatch(r"(.+):([-+.e\d]+)", text)
    if match and not path.exists():  # a name may hold a colon
        path, weight = Path(match[1]), float(match[2])
    if path.is_dir():
        path = path / LORA
    return path, weight


def open_models(args: argparse.Namespace) -> Models:
    """The models of --model on --device in --dtype."""
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    loras = [parse_lora(text) for text in args.lora or []]
    models = load_models(find_model(args.model or TINY), dtype, device, loras=loras)
    models.compile = args.compile
    models.low_memory = args.low_memory
    models.progress = not args.quiet
    return models


Video = tuple[Path, Iterator[np.ndarray], dict]  # where it goes, uint8 f h w 3 in chunks, its record


def prepare(
    models: Models,
    args: argparse.Namespace,
    settings: dict,
    tell: Callable,
    paths_for: Callable = output_paths,
) -> tuple[Known, list[tuple[Request, Path]]]:
    """What the files hold; and a request, and where its video goes, for each prompt and seed.

    Of all requests those of this process; or all, if there are fewer than processes, which then share each.
    """
    seeds = args.seed or [agree(int.from_bytes(os.urandom(4)))]
    pairs = itertools.product(args.prompt, seeds)
    requests = [complete(Request(prompt, seed=seed, **settings), models) for prompt, seed in pairs]
    known = read_inputs(requests[0], models.config)
    tell(describe(models, requests, known))
    suffix = ".png" if known.num_frames == 1 else ".mp4"
    paths = agree(paths_for(Path(args.out), len(requests), suffix))
    work = list(zip(requests, paths))
    models.on_all_ranks = len(work) < NUM_RANKS
    if not models.on_all_ranks:
        work = work[RANK::NUM_RANKS]
    return known, work


def make_videos(models: Models, args: argparse.Namespace, settings: dict, tell: Callable) -> Iterator[Video]:
    """All are sampled and their latents saved before the first is decoded: a kill then loses nothing."""
    known, work = prepare(models, args, settings, tell)
    made = []
    for latents, (request, path) in zip(generate_each(models, [request for request, _ in work], known), work):
        if models.writes:
            if Path(args.out).is_dir() and any(path.parent.glob(f"{path.stem}[.-]*")):
                # A run that was started meanwhile has taken the number.
                [path] = output_paths(Path(args.out), 1, path.suffix)
            record = make_record(models, request, known.num_frames, known.height, known.width)
            save_latents(path.with_suffix(".safetensors"), latents, record)
            made.append((path, latents, record))
    with models.use("vae", "decode"):  # once for all
        for path, latents, record in made:
            yield path, decode(models, latents, record["tiled"]), record


def decode_again(args: argparse.Namespace) -> tuple[Models, list[Video]]:
    """From latents that were saved, with the model, dtype and fps of then unless others are given."""
    if args.fps is not None:
        check_fps(args.fps)
    latents, record = load_latents(Path(args.from_latents))
    args.model = args.model or record.get("model")
    args.dtype = args.dtype or record.get("dtype")
    models = open_models(args)
    channels = models.vae_config.latent_channels
    if latents.dim() != 5 or latents.shape[:2] != (1, channels):
        raise ValueError(f"{args.from_latents} holds latents of shape {tuple(latents.shape)}, which the VAE "
                         f"of {models.model_dir} cannot decode; give the --model they are of")  # fmt: skip
    tiled = args.tiled or record.get("tiled", False)
    fps = args.fps or record.get("fps") or native_fps(models.config)
    record |= {"fps": fps, "tiled": tiled, "dtype": models.dtype_name, "model": str(models.model_dir)}
    suffix = ".png" if latents.shape[2] == 1 else ".mp4"
    [path] = output_paths(Path(args.out), 1, suffix)
    return models, [(path, decode(models, latents, tiled), record)]


def run(args: argparse.Namespace) -> None:
    """Make each video, and write it with the record of its making beside it."""

    def tell(text: object) -> None:
        if not args.quiet:
            say(text)

    inputs = [*(args.image or []), args.end_image, args.video, args.mask, args.control_video]
    inputs += [path for path, _ in map(parse_lora, args.lora or [])]
    count = max(1, len(args.prompt)) * len(args.seed or [0])  # of videos; --from-latents has no prompt
    check_out(Path(args.out), count, inputs)
    settings = asked(args)
    settings.pop("seed", None)  # there may be several
    if args.from_latents:
        models, videos = decode_again(args)
    else:
        models = open_models(args)
        if models.kind == "inpaint" and (args.num_frames or 0) > native_size(models.config)[2]:
            from long_video import make_long_videos  # here, so that long_video.py can be deleted

            videos = make_long_videos(models, args, settings, tell)
        else:
            videos = make_videos(models, args, settings, tell)
    for path, chunks, record in videos:
        write_video(chunks, path, record["fps"])
        with atomic_write(path.with_suffix(".json")) as temporary:
            temporary.write_text(as_json(record) + "\n")
        tell(path)
    tell(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in models.seconds.items()))
    computed, forwards = models.forwards
    if forwards:
        tell(f"step cache: {computed} of {forwards} forwards of the transformer computed in full")


MEMORY_REMEDY = "try a smaller --height, --width or --num-frames, --tiled, --low-memory, or --dtype bfloat16"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 with one line on stderr if not."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings(action="ignore"):  # of libraries: no help to someone at a terminal
            run(args)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message = runtime.in_one_line(error, MEMORY_REMEDY)
        if message is None:
            raise  # a mistake of ours, and its traceback is wanted
    return runtime.fail("sample.py", message)


if __name__ == "__main__":
    sys.exit(main())
