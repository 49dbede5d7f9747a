"""From a prompt, pictures or a clip to a video: the models in turn, `generate`, and the command line.

    prompt ─Tokenizer, T5─────────────────────────────────► text b L d          use("text_encoder")
    picture(s), clip + mask ─inpaint_condition────────────► condition b 17 …    use("vae")
    clip, if strength < 1 ─encode, add_noise──────┐
    noise ────────────────────────────────────────┴► latents ─sampler × steps─► use("transformer")
    latents ─decode_stream────────────────────────► uint8 f h w 3 ─► mp4, gif, png   use("vae")

Each network is loaded at its first use and freed after it, so that the largest, not the sum, has to fit.
What a model can do follows from its channels (`model_kind`):

    in_channels   kind     takes a prompt and …                         its pipeline in the reference
    16            text     a clip and strength                          diffusers CogVideoX, …VideoToVideo
    33 = 16+1+16  inpaint  start, end pictures; clip, mask, strength    CogVideoX_Fun_Pipeline_Inpaint
    32 = 16+16    control  a control clip                               CogVideoX_Fun_Pipeline_Control
    32, learned   image    a start picture                              diffusers CogVideoXImageToVideo

b batch · c channels · f frames · h w height, width (f' h' w' of latents) · L text tokens · d model width
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import (
    build,
    check_weights,
    component_dir,
    find_model,
    open_safetensors,
    read_config,
    save_tensors,
)
from diffusion import SAMPLERS, SNR_SHIFTED, Schedule, guidance_at, guide
from inpaint import add_reference_noise, inpaint_condition
from media import read_image, read_mask, read_video, resize, to_pixels, to_uint8, write_video
from runtime import DTYPES, NUM_RANKS, RANK, agree, atomic_write, choose_device, fail, in_one_line
from text_encoder import ALIASES, T5Config, T5Encoder, Tokenizer
from transformer import (
    TransformerConfig,
    VideoTransformer,
    check_num_frames,
    check_side,
    choose_size,
    legal_num_frames,
    model_kind,
    native_size,
)
from vae import VAEConfig, VideoVAE, decoded_frames

TINY = Path(__file__).parent / "checkpoints" / "tiny"
SMALL_TOKENS = 1024  # up to here both prompts go through the network together
FPS = 8.0  # what CogVideoX-Fun is trained at
Picture = str | Path | Image.Image | np.ndarray  # an array is uint8 h w 3
Clip = str | Path | np.ndarray  # an array is uint8 f h w 3, at the model's frame rate already


# ---------------------------------------------------------------- models, loaded in turn


class Models:
    """The networks of a checkpoint folder, each in memory only while it is in use (unless keep)."""

    def __init__(
        self,
        model_dir: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        keep: bool = False,
        loras: list[tuple[str | Path, float]] = [],
    ):
        self.model_dir, self.dtype, self.keep = Path(model_dir), dtype, keep
        self.device, self.loras = torch.device(device), list(loras)
        self.spread = False  # True: all ranks compute each velocity together, see parallel.py
        self.compile = False  # True: the transformer's blocks by torch.compile
        config_file = component_dir(model_dir, "transformer") / "config.json"
        self.transformer_config = read_config(TransformerConfig, config_file)
        self.vae_config = read_config(VAEConfig, component_dir(model_dir, "vae") / "config.json")
        self.kind = model_kind(self.transformer_config)
        self.first_alone = self.kind in ("inpaint", "control")  # Fun's chunks in decoding, else diffusers'
        self.schedule = Schedule.from_pretrained(model_dir)
        self.tokenizer = Tokenizer.from_pretrained(model_dir)
        self.loaded: dict[str, nn.Module] = {}  # put a module here to use it in place of the folder's
        self.seconds: dict[str, float] = {}  # spent in each stage so far

    @functools.cached_property
    def num_parameters(self) -> dict[str, int]:
        """Of each network; on the way every file's header is held against its config, and those against each
        other, so that nothing is found missing half-way.

        raises ValueError or OSError in one sentence
        """
        counts, configs = {}, {}
        for name, network, config_class in (
            ("text_encoder", T5Encoder, T5Config),
            ("vae", VideoVAE, VAEConfig),
            ("transformer", VideoTransformer, TransformerConfig),
        ):
            folder = component_dir(self.model_dir, name)
            module = build(network, config_class, folder)
            check_weights(module, folder, ALIASES if name == "text_encoder" else {})
            for file, _ in self.loras if name == "transformer" else []:
                from lora import read_lora  # here and below, so that lora.py can be deleted

                read_lora(module, file)
            counts[name] = sum(p.numel() for p in module.parameters())
            configs[name] = module.config
        t5, vae, dit = configs.values()
        for name, ours, other, theirs in (
            ("text_embed_dim", dit.text_embed_dim, "the text encoder's d_model", t5.d_model),
            ("out_channels", dit.out_channels, "the VAE's latent_channels", vae.latent_channels),
            ("patch_size", dit.patch_size, "the only patch_size known", 2),
            ("the VAE's in_channels", vae.in_channels, "the number of colours", 3),
            ("the VAE's out_channels", vae.out_channels, "the number of colours", 3),
        ):
            if ours != theirs:
                raise ValueError(f"{self.model_dir}: {name} = {ours} does not fit {other} = {theirs}; "
                                 "take all components from one checkpoint")  # fmt: skip
        return counts

    @contextlib.contextmanager
    def use(self, name: str, stage: str) -> Iterator[nn.Module]:
        """One network (text_encoder, vae or transformer), loaded for the block and timed as `stage`.

        One that is there already, from a block around this one for instance, is used and left as it is.
        """
        if name in self.loaded:
            yield self.loaded[name]
            return
        start = time.perf_counter()
        torch.cuda.empty_cache()  # what the stage before has left; a no-op without a GPU
        self.loaded[name] = self._load(name)
        try:
            yield self.loaded[name]
        finally:
            if not self.keep:
                del self.loaded[name]
            self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - start

    def _load(self, name: str) -> nn.Module:
        if name == "text_encoder":  # if it goes again at once, its layers need not be in memory together
            return T5Encoder.from_pretrained(self.model_dir, self.dtype, self.device, stream=not self.keep)
        network = {"vae": VideoVAE, "transformer": VideoTransformer}[name]
        module = network.from_pretrained(self.model_dir, self.dtype, self.device)
        for file, weight in self.loras if name == "transformer" else []:
            from lora import load_lora

            load_lora(module, file, weight)
        if self.spread and name == "transformer":
            from parallel import spread

            spread(module)
        for block in module.transformer_blocks if self.compile and name == "transformer" else ():
            block.compile()
        return module


def load_models(
    model_dir: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    keep: bool = False,
    loras: list[tuple[str | Path, float]] = [],
) -> Models:
    """Look at a checkpoint folder; its networks are loaded when `generate` first uses them.

    keep: leave them in memory afterwards, for a next call
    loras: (file, weight), merged into the transformer, see `lora.load_lora`
    raises ValueError or OSError if the folder is not a complete checkpoint
    """
    return Models(model_dir, dtype, device, keep, loras)


# ---------------------------------------------------------------- what is asked for


@dataclass
class Request:
    """Everything `generate` can be asked for. None means: not given, or the model's own value."""

    prompt: str
    negative_prompt: str = ""
    image: Picture | list[Picture] | None = None  # start picture, or the first few frames
    end_image: Picture | None = None
    video: Clip | None = None  # to change (strength < 1) or to fill in (mask)
    mask: Picture | Clip | None = None  # white, from 240 up: generate here
    control_video: Clip | None = None
    strength: float = 1.0  # share of the steps taken from the clip; 1 starts at pure noise
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_steps: int = 50
    guidance_scale: float | None = None  # 1 or less: no guidance
    dynamic_guidance: bool = False
    guidance_interval: tuple[int, int] = (0, 999)  # timesteps outside go unguided (arXiv 2404.07724)
    sampler: str | None = None  # a key of diffusion.SAMPLERS
    seed: int | None = None  # None draws one
    noise_aug_strength: float = 0.0563  # noise on known pixels, if the model was trained with it
    latents: Tensor | None = None  # b 16 f' h' w' to start from; nothing is added to them
    randn: Callable[[tuple[int, ...]], Tensor] | None = None  # replaces every normal draw

    def check(self, config: TransformerConfig) -> None:
        """Stop, in one sentence, at what cannot be done or contradicts itself; reads no file."""
        kind, pictures = model_kind(config), ("image", "end_image", "video", "mask", "control_video")
        name = f"a {config.in_channels}-channel {kind} model"
        given = {flag for flag in pictures if getattr(self, flag) is not None}
        takes = {
            "text": {"video"},
            "inpaint": {"image", "end_image", "video", "mask"},
            "control": {"control_video"},
            "image": {"image"},
        }[kind]
        for flag in (flag for flag in pictures if flag in given - takes):
            other = "32-channel control" if flag == "control_video" else "33-channel inpaint (…-InP)"
            raise ValueError(f"{name} takes no {flag}; a {other} model does")
        if kind in ("control", "image") and not given:
            raise ValueError(f"{name} needs {'an image' if kind == 'image' else 'a control_video'}")
        if "video" in given and given & {"image", "end_image"}:
            picture = "image" if "image" in given else "end_image"
            raise ValueError(f"{picture} and video contradict each other; a video brings its own frames")
        if "mask" in given and not ("video" in given or given == {"image", "mask"}):
            raise ValueError("mask needs a video, or an image without end_image, to say where to change it")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength} is outside (0, 1]; 0.8 changes much, 0.5 less, 1 all")
        if self.strength < 1 and self.video is None:
            raise ValueError(f"strength={self.strength} needs a video to start from")
        for flag, least, most, advice in (
            ("guidance_scale", 0, 1000, "the models like 6"),
            ("noise_aug_strength", 0, 10, "try 0.0563"),
            ("num_steps", 1, 1000, "the models like 50"),
            ("seed", 0, 2**63 - 1, "any in between will do"),
        ):
            value = getattr(self, flag)
            if value is not None and not least <= value <= most:  # true of NaN, too
                raise ValueError(f"{flag}={value} is outside {least} … {most}; {advice}")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 999:
            raise ValueError(f"guidance_interval={low} {high} is not two timesteps in 0 … 999, lower first")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r} is unknown; choose from {', '.join(SAMPLERS)}")
        if int(self.num_steps * self.strength) < 1:
            raise ValueError(f"strength={self.strength} of num_steps={self.num_steps} leaves no step; "
                             f"the smallest is {1 / self.num_steps:.3g}")  # fmt: skip
        for flag in ("height", "width"):
            if getattr(self, flag) is not None:
                check_side(config, flag, getattr(self, flag))
        if self.num_frames is not None:
            check_num_frames(config, self.num_frames)


# ---------------------------------------------------------------- one job: everything read and decided


@dataclass
class Job:
    """A request with its files read and its sizes fixed; then what each stage adds for the next."""

    request: Request
    height: int
    width: int
    num_frames: int
    sampler: str
    guidance_scale: float
    seed: int
    frames: np.ndarray | None = None  # uint8 f h w 3: the known video, the clip to start from, or the control
    mask: Tensor | None = None  # bool f h w, True = generate; None: all of it
    notes: list[str] = field(default_factory=list)  # what was decided for the user
    text: Tensor | None = None  # 1 or 2 L d: (negative prompt and) prompt
    condition: Tensor | None = None  # 1 c f' h' w'
    start: Tensor | None = None  # 1 16 f' h' w': the latents the sampler begins with

    def latent_shape(self, channels: int) -> tuple[int, int, int, int, int]:
        return 1, channels, (self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8


def prepare(models: Models, request: Request, fps: float = FPS) -> Job:
    """Check a request, read its files, and fix sizes; no network is loaded.

    fps: the rate clips are read at
    raises ValueError or OSError, in one sentence, for whatever a user can get wrong
    """
    config = models.transformer_config
    request.check(config)
    images = request.image if isinstance(request.image, list) else [request.image]
    images = [read_image(image) for image in images if image is not None]
    end_image = None if request.end_image is None else read_image(request.end_image)
    clip, source = None, request.video if request.video is not None else request.control_video
    most_frames = request.num_frames or native_size(config)[2]
    if source is not None:
        clip = read_video(source, most_frames, fps)

    num_frames = request.num_frames or (most_frames if clip is None else len(clip))
    if clip is not None and len(clip) < num_frames:
        name = source if isinstance(source, (str, Path)) else "the clip"
        raise ValueError(f"{name} has {len(clip)} frames at {fps:g} fps, fewer than num_frames={num_frames}; "
                         f"try {legal_num_frames(config, len(clip))}")  # fmt: skip
    num_frames = legal_num_frames(config, num_frames)
    first = clip if clip is not None else images or ([end_image] if end_image is not None else None)
    size = None if first is None else first[0].shape[:2]
    height, width = choose_size(config, request.height, request.width, size)
    check_side(config, "height", height)
    check_side(config, "width", width)
    seed = int.from_bytes(os.urandom(4)) if request.seed is None else request.seed
    sampler, guidance_scale = request.sampler or _default_sampler(models), request.guidance_scale
    guidance_scale = models.schedule.default_guidance_scale if guidance_scale is None else guidance_scale
    job = Job(request, height, width, num_frames, sampler, guidance_scale, seed)

    if size not in (None, (height, width)) and not (request.height and request.width):
        job.notes.append(f"the input of {size[1]}x{size[0]} is made at {width}x{height}")
    if clip is not None and num_frames < len(clip) < most_frames:
        job.notes.append(f"of the clip's {len(clip)} frames at {fps:g} fps the first {num_frames} are taken")
    if request.video is not None and request.strength == 1 and request.mask is None:
        job.notes.append("strength 1 and no mask: only the size and length of the video are kept")
    if (out := decoded_frames(job.latent_shape(1)[2], models.first_alone)) != num_frames:
        job.notes.append(f"{num_frames} frames are an even number of latent frames: this model decodes {out}")
    if first is not None:
        check_memory({"the input": 3 * 4 * num_frames * height * width}, torch.device("cpu"))  # fp32 pixels
    if clip is not None:
        job.frames = resize(clip[:num_frames], height, width)
    elif images or end_image is not None:
        job.frames, job.mask = _known_frames(images, end_image, job)
    if request.mask is not None:
        job.mask = read_mask(request.mask, num_frames, height, width, fps)
    if job.mask is not None and not job.mask.any():
        raise ValueError("what is given fills all frames and leaves nothing to generate; "
                         "raise num_frames, or give a mask with some white")  # fmt: skip
    shape = job.latent_shape(config.out_channels)
    if request.latents is not None and tuple(request.latents.shape) != shape:
        raise ValueError(f"latents of shape {tuple(request.latents.shape)} do not fit; expected {shape}")
    return job


def _default_sampler(models: Models) -> str:
    """Fun samples with plain DDIM whatever scheduler_config.json says; diffusers does what it says."""
    return "ddim" if models.kind in ("inpaint", "control") else models.schedule.default_sampler


def _known_frames(
    images: list[np.ndarray], end: np.ndarray | None, job: Job
) -> tuple[np.ndarray, Tensor | None]:
    """Pictures as a clip and its mask: the first on every frame, the others and the end on their own.

    The unknown frames are blacked out later; repeating the start picture there is the reference's way.
    """
    num_given = len(images) + (end is not None)
    if num_given > job.num_frames:
        raise ValueError(f"{num_given} pictures are more than num_frames={job.num_frames}")
    images = [resize(image, job.height, job.width) for image in images]
    end = None if end is None else resize(end, job.height, job.width)
    frames = np.repeat((images[0] if images else end)[None], job.num_frames, axis=0)
    mask = torch.ones(job.num_frames, job.height, job.width, dtype=torch.bool)
    for i, image in enumerate(images):
        frames[i], mask[i] = image, False
    if end is not None:
        frames[-1], mask[-1] = end, False
    return frames, mask


# ---------------------------------------------------------------- the stages


@torch.inference_mode()
def encode_texts(models: Models, jobs: list[Job], progress: bool) -> None:
    """Each job's prompt, after the negative prompt if there is guidance: 1 or 2 L d."""
    length, texts = models.transformer_config.max_text_seq_length, {}
    with models.use("text_encoder", "text") as t5:
        for job in _bar(jobs, "text", progress):
            request = job.request
            prompts = [request.negative_prompt] * (job.guidance_scale > 1) + [request.prompt]
            if (key := tuple(prompts)) not in texts:
                texts[key] = t5(models.tokenizer(prompts, length))
            job.text = texts[key]


@torch.inference_mode()
def encode_inputs(models: Models, jobs: list[Job], draws: list[Callable], progress: bool) -> None:
    """What each job's model is told beside the text, and the clip's latents if sampling starts from them."""
    needs_vae = any(job.frames is not None for job in jobs)
    with models.use("vae", "encode") if needs_vae else contextlib.nullcontext() as vae:
        for job, randn in zip(_bar(jobs, "encode", progress), draws):
            pixels = None  # 1 3 f h w
            if job.frames is not None:
                pixels = to_pixels(job.frames)[None].to(models.device)
            job.condition = encode_condition(models, vae, job, pixels, randn)
            if job.request.strength < 1 and job.request.latents is None:
                mean, logvar = vae.moments(pixels)
                job.start = vae.posterior(mean, logvar, randn(tuple(mean.shape)))


def encode_condition(
    models: Models, vae: VideoVAE | None, job: Job, pixels: Tensor | None, randn: Callable
) -> Tensor | None:
    """What joins the noisy latents on the channel axis, 1 c f' h' w'; None for a text model."""
    config, request = models.transformer_config, job.request
    shape = job.latent_shape(config.out_channels)
    if models.kind == "inpaint":
        if pixels is None or job.mask is None:  # nothing is known
            return torch.zeros(1, shape[1] + 1, *shape[2:])
        if config.add_noise_in_inpaint_model and request.noise_aug_strength > 0:
            noise = randn(tuple(pixels.shape)).to(pixels)
            pixels = add_reference_noise(pixels, request.noise_aug_strength, noise)
        return inpaint_condition(vae, pixels, job.mask[None, None].to(pixels))
    if models.kind == "control":
        return vae.encode(pixels)
    if models.kind == "image":  # a sample of the posterior, as diffusers does; later frames are zero
        mean, logvar = vae.moments(pixels[:, :, :1])
        first = vae.posterior(mean, logvar, randn(tuple(mean.shape)))
        return torch.cat([first, first.new_zeros(*shape[:2], shape[2] - 1, *shape[3:])], dim=2)
    return None


@torch.inference_mode()
def denoise(models: Models, dit: VideoTransformer, job: Job, randn: Callable, progress: bool) -> Tensor:
    """The sampler's loop: from job.start to clean latents 1 16 f' h' w', float32.

    raises ValueError at the step where the latents stop being finite
    """
    request, dtype = job.request, models.dtype
    schedule = Schedule(models.schedule.config, snr_shift=job.sampler in SNR_SHIFTED)
    timesteps = schedule.timesteps(request.num_steps)
    timesteps = timesteps[len(timesteps) - int(request.num_steps * request.strength) :]
    x = request.latents
    if x is None:
        x = randn(job.latent_shape(models.transformer_config.out_channels)).to(models.device, torch.float32)
        if job.start is not None:
            x = schedule.add_noise(job.start.float(), x, timesteps[:1])
    x = x.to(models.device, torch.float32)
    text = dit.project_text(job.text.to(models.device, dtype))
    condition = None if job.condition is None else job.condition.to(models.device, dtype)
    together = num_tokens(models.transformer_config, x.shape) <= SMALL_TOKENS  # else one by one, for memory

    def velocity(x: Tensor, t: int) -> Tensor:
        scale = guidance_at(
            t, job.guidance_scale, len(timesteps), request.dynamic_guidance, request.guidance_interval
        )
        x, outputs = x.to(dtype), []
        for part in (text if scale != 1 else text[-1:]).split(2 if together else 1):
            noisy, extra = (
                None if c is None else c.expand(len(part), -1, -1, -1, -1) for c in (x, condition)
            )
            outputs += dit(noisy, t, part, extra, text_projected=True).split(1)
        return guide(*outputs, scale) if len(outputs) == 2 else outputs[0].float()

    steps = SAMPLERS[job.sampler](
        velocity, x, schedule, timesteps, lambda: randn(tuple(x.shape)).to(x), request.num_steps
    )
    for i, x in enumerate(_bar(steps, "denoise", progress, total=len(timesteps))):
        if not torch.isfinite(x).all():
            other = "bfloat16 or float32" if dtype == torch.float16 else "float32"
            raise ValueError(f"the latents stopped being finite at step {i + 1} (timestep {timesteps[i]}) in "
                             f"{str(dtype)[6:]}; try dtype {other}, or other weights")  # fmt: skip
    return x


def make_latents(models: Models, jobs: list[Job], progress: bool = False) -> Iterator[Tensor]:
    """The clean latents of each job in turn; every network is loaded once for all of them."""
    if not jobs:
        return
    draws = [job.request.randn or _seeded_randn(job.seed) for job in jobs]
    encode_texts(models, jobs, progress)
    encode_inputs(models, jobs, draws, progress)
    with models.use("transformer", "denoise") as dit:
        for job, randn in zip(jobs, draws):
            yield denoise(models, dit, job, randn, progress)


def _seeded_randn(seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    """Draws on the CPU, so that a seed means the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def _bar(items, stage: str, progress: bool, **settings) -> tqdm:
    """Steps and seconds left of a stage, at a terminal only: in a file the bars would pile up."""
    return tqdm(items, stage, disable=None if progress else True, leave=False, **settings)


def make_frames(models: Models, latents: Tensor, progress: bool = False) -> Iterator[np.ndarray]:
    """Decode latents 1 16 f' h' w' into chunks of uint8 f h w 3, as they become ready.

    raises ValueError if the pixels are not finite
    """
    num_frames = decoded_frames(latents.shape[2], models.first_alone)
    bar = _bar(None, "decode", progress, unit="frame", total=num_frames)
    with models.use("vae", "decode") as vae, bar:
        for pixels in vae.decode_stream(latents, first_alone=models.first_alone):
            if not torch.isfinite(pixels).all():
                raise ValueError(f"the decoded frames are not finite in {str(models.dtype)[6:]}; decode the "
                                 "saved latents with dtype float32, or use other weights")  # fmt: skip
            bar.update(pixels.shape[2])
            yield to_uint8(pixels[0])


def generate(models: Models, prompt: str, output: str = "frames", progress: bool = False, **settings):
    """Make a video, or a picture if num_frames is 1.

    settings: the fields of `Request`, where each is explained
    returns: uint8 f h w 3, or with output="latents" the scaled latents 1 16 f' h' w' (float32)
    randn(shape) replaces every draw, in this order: noise on the reference, posterior of the picture or clip,
    initial noise, sampler.
    raises ValueError or OSError, in one sentence, for whatever the caller can get wrong
    """
    if output not in ("frames", "latents"):
        raise ValueError(f"output={output!r} should be 'frames' or 'latents'")
    job = prepare(models, Request(prompt, **settings))
    [latents] = list(make_latents(models, [job], progress))
    return latents if output == "latents" else np.concatenate(list(make_frames(models, latents, progress)))


# ---------------------------------------------------------------- longer than the model

MOST_FRAMES = 16385
OVERLAP = 5  # frames that a segment of a long video is given of the one before: two latent frames


def segments(num_frames: int, length: int, overlap: int = OVERLAP) -> list[int]:
    """How many frames each segment shares with the one before, for num_frames in segments of `length`.

    The first shares none; the last as many as are needed to fill it.
    raises ValueError unless num_frames is 4k+1 and at most 16385, more than half an hour
    """
    if num_frames % 4 != 1:
        raise ValueError(f"num_frames={num_frames}; the VAE needs 4k+1, try {num_frames // 4 * 4 + 1}")
    if num_frames > MOST_FRAMES:
        raise ValueError(f"num_frames={num_frames} is very long; the most is {MOST_FRAMES}")
    shared, done = [0], length
    while done < num_frames:
        new = min(length - overlap, num_frames - done)
        shared.append(length - new)
        done += new
    return shared


def generate_long(
    models: Models, prompt: str, num_frames: int, progress: bool = False, **settings
) -> Iterator[np.ndarray]:
    """A video of any length, in chunks uint8 f h w 3: segments of the model's own length, where each is given
    the last frames of the one before as known frames of an inpaint model, and fades in over them. Memory does
    not grow with it.

    settings: as for `generate`, but what gives other frames than the first and last ones
    raises ValueError for other models and settings
    """
    length = native_size(models.transformer_config)[2]
    given = {name for name in ("video", "mask", "control_video", "latents") if settings.get(name) is not None}
    if given:
        raise ValueError(f"num_frames={num_frames} is made in segments of {length} and takes no "
                         f"{min(given)}; leave it out, or make {length} frames")  # fmt: skip
    images = {name: settings.pop(name, None) for name in ("image", "end_image")}
    seed = settings.pop("seed", None)
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    overlaps, before = segments(num_frames, length), None
    for i, shared in enumerate(overlaps):
        end = images["end_image"] if i == len(overlaps) - 1 else None
        request = settings | {"num_frames": length, "seed": seed + i}
        if before is None:
            request |= {"image": images["image"], "end_image": end}
        else:
            height, width = before.shape[1:3]
            video, mask = np.zeros_like(before), np.full_like(before, 255)
            video[:shared], mask[:shared] = before[-shared:], 0
            if end is not None:
                video[-1], mask[-1] = resize(read_image(end), height, width), 0
            request |= {"video": video, "mask": mask, "height": height, "width": width}
        frames = generate(models, prompt, progress=progress, **request)
        before = frames if before is None else fade(before, frames, shared)
        kept_back = overlaps[i + 1] if i + 1 < len(overlaps) else 0  # the next segment fades in over them
        yield before[: length - kept_back]


def fade(before: np.ndarray, after: np.ndarray, shared: int) -> np.ndarray:
    """`after`, its first frames, which `before` ends with as well, mixed with those: ever less of `before`.

    What the VAE changes of known frames would else be seen as a jump. The reference's fade (predict_i2v.py)
    begins with 0, 1/shared, 2/shared, …; these weights begin a frame earlier and so rise by less.
    """
    weights = np.arange(1, shared + 1, dtype=np.float32)[:, None, None, None] / (shared + 1)
    mixed = before[-shared:] + weights * (after[:shared] - before[-shared:].astype(np.float32))
    return np.concatenate([mixed.round().astype(np.uint8), after[shared:]])


# ---------------------------------------------------------------- memory, and what is said before the start


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device; of a CPU what Linux calls available, elsewhere 0 for unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


def check_memory(needs: dict[str, int], device: torch.device) -> None:
    """Stop before the system stops us: ValueError where a need, in bytes, is far beyond what is free."""
    name, need, free = max(needs, key=needs.get), max(needs.values()) / 2**30, free_bytes(device) / 2**30
    if free and need > 1.5 * free:
        raise ValueError(f"{name} needs about {need:.3g} GiB of memory and {free:.3g} are free; "
                         "try a smaller height, width or num_frames, or dtype bfloat16")  # fmt: skip


def estimate_bytes(models: Models, latents: tuple[int, ...]) -> dict[str, int]:
    """Peak memory of each stage, weights and activations, for latents b c f' h' w'.

    The factors are measured: growth of the peak on a CPU, official VAE (9 frames), 2B width (49 frames),
    128x128 and 192x192, fp32 and bf16. There the VAE is right within a tenth, the transformer at most 1.5
    times too high.
    """
    size, dit = models.dtype.itemsize, models.transformer_config
    tokens = num_tokens(dit, latents)
    passes = 2 if tokens <= SMALL_TOKENS else 1
    # The widest layers hold dozens of maps of full size: chunks of 8 frames, and copies of them.
    map_bytes = models.vae_config.block_out_channels[1] * 64 * latents[3] * latents[4] * size
    weights = {name: count * size for name, count in models.num_parameters.items()}
    return {
        "text": weights["text_encoder"] // (1 if models.keep else 14),  # streamed: a layer of 24 and buffers
        "encode": weights["vae"] + 33 * map_bytes,
        "denoise": weights["transformer"] + 23 * passes * (dit.max_text_seq_length + tokens) * dit.dim * size,
        "decode": weights["vae"] + 52 * map_bytes,
    }


def num_tokens(config: TransformerConfig, latents: tuple[int, ...]) -> int:
    """Video tokens of latents b c f' h' w'; V1.5 pads a single frame to a pair."""
    return math.ceil(latents[2] / (config.patch_size_t or 1)) * (latents[3] // 2) * (latents[4] // 2)


def describe(models: Models, jobs: list[Job], needs: dict[str, int]) -> str:
    """The block printed at the start: model, sizes, tokens, and memory of each stage against what is free."""
    job, config, request = jobs[0], models.transformer_config, jobs[0].request
    latents = job.latent_shape(config.out_channels)
    free, stage = free_bytes(models.device), max(needs, key=needs.get)
    steps = f"{int(request.num_steps * request.strength)} of " if request.strength < 1 else ""
    lines = [
        f"model    {models.model_dir}: {models.kind}, {config.in_channels} channels, "
        f"{models.num_parameters['transformer'] / 1e9:.3g} B parameters",
        f"video    {job.width}x{job.height}, {job.num_frames} frames -> {latents[2]} latent frames "
        f"-> {num_tokens(config, latents)} tokens" + (f", {len(jobs)} of them" if len(jobs) > 1 else ""),
        f"sampler  {job.sampler}, {steps}{request.num_steps} steps, guidance {job.guidance_scale:g}",
        f"device   {models.device}, {str(models.dtype)[6:]}",
        "memory   about " + ", ".join(f"{stage} {need / 2**30:.1f}" for stage, need in needs.items())
        + " GiB" + (f"; {free / 2**30:.1f} free" if free else ""),
        *(f"note     {note}" for note in job.notes),
    ]  # fmt: skip
    if free and needs[stage] > free:
        lines.append(
            f"warning  {stage} may need more memory than is free; a smaller size or dtype needs less"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- results on disk


def load_latents(path: Path) -> tuple[Tensor, dict]:
    """Latents 1 c f' h' w' and the record of their making, as `sample_all` saves them.

    raises ValueError or OSError if the file is anything else
    """
    wrong = ValueError(f"{path} holds no latents of ours; give the .safetensors beside a video")
    if path.is_file() and path.suffix != ".safetensors":
        raise wrong
    with open_safetensors(path) as file:
        if list(file.keys()) != ["latents"]:
            raise wrong
        latents, record = file.get_tensor("latents"), (file.metadata() or {}).get("record", "{}")
    try:
        record = json.loads(record)
    except (ValueError, RecursionError):
        record = None
    if latents.dim() != 5 or len(latents) != 1 or not latents.is_floating_point() or type(record) is not dict:
        raise wrong
    if not torch.isfinite(latents := latents.float()).all():
        raise ValueError(f"{path} holds latents that are not finite; sample again, with --dtype float32")
    return latents, record


def make_record(models: Models, job: Job, fps: float) -> dict:
    """Everything needed to make a video again, for JSON: the request, what was decided for it, versions."""
    asked = {f.name: getattr(job.request, f.name) for f in dataclasses.fields(Request)}
    names = ("height", "width", "num_frames", "sampler", "guidance_scale", "seed")
    decided = {name: getattr(job, name) for name in names}
    return {
        **{name: value for name, value in (asked | decided).items() if name not in ("latents", "randn")},
        "fps": fps,
        "model": str(models.model_dir),
        "lora": [f"{file}:{weight}" for file, weight in models.loras],
        "kind": models.kind,
        "dtype": str(models.dtype)[6:],
        "device": str(models.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def check_out(target: Path, inputs: list[str | None] = []) -> None:
    """ValueError or OSError for an ending or a place that cannot be written, or an input; leaves no trace."""
    is_file = target.suffix and not target.is_dir()
    if is_file and target.suffix.lower() not in (".mp4", ".gif", ".png"):
        raise ValueError(f"--out {target}: files end in .mp4, .gif or .png; a folder has no ending")
    if is_file and target.exists() and any(target.samefile(path) for path in inputs if path):
        raise ValueError(f"--out {target} is an input, which would be lost; choose another name")
    absolute = os.fsencode(target.absolute())
    if len(absolute) > 3000 or max(map(len, absolute.split(b"/"))) > 200:  # leaves room for endings
        raise ValueError(f"--out {target}: the name is too long; choose a shorter one")
    folder = target.parent if is_file else target
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = error.strerror
        raise OSError(
            f"--out {target}: cannot write in {existing} ({reason}); choose another place"
        ) from None


def output_paths(target: Path, count: int, suffix: str) -> list[Path]:
    """Where `count` results go: the file asked for, numbered if there are more, or the next in the folder."""
    if target.suffix and not target.is_dir():
        return [target if count == 1 else target.with_stem(f"{target.stem}-{i + 1}") for i in range(count)]
    taken = [int(path.stem) for path in target.glob("[0-9]*.*") if re.fullmatch("[0-9]+", path.stem)]
    return [target / f"{max(taken, default=0) + 1 + i:04d}{suffix}" for i in range(count)]


# ---------------------------------------------------------------- several processes: torchrun


def share(models: Models, jobs: list) -> list:
    """This rank's part of the jobs; or all, if there are fewer than ranks: then all ranks work on each.

    What they make together rank 0 alone writes: `writes`.
    """
    models.spread = len(jobs) < NUM_RANKS
    return jobs if models.spread else jobs[RANK::NUM_RANKS]


def writes(models: Models) -> bool:
    return RANK == 0 or not models.spread


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_line(message)}; see --help\n")


def one_line(message: str) -> str:
    return " ".join(message.split())[:1000]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; names and defaults are those of `Request`. `given` are the flags that were there."""
    description = "Make videos from prompts, pictures and clips with CogVideoX and CogVideoX-Fun."
    parser = Parser(prog="sample.py", description=description, allow_abbrev=False)

    def add(flag: str, text: str, **settings) -> None:
        default = settings.setdefault("default", getattr(Request, flag.strip("-").replace("-", "_"), None))
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        shown = "the tiny model, checkpoints/tiny" if default is TINY else shown
        parser.add_argument(flag, help=text + (f" (default {shown})" if shown else ""), **settings)

    add("prompt", "what to show; several prompts make several videos", nargs="*")
    hub_id = "alibaba-pai/CogVideoX-Fun-V1.1-2b-InP"
    add("--model", f"checkpoint folder, or a hub id such as {hub_id}", default=TINY)
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
    add("--num-steps", "steps of the sampler", type=int)
    add("--guidance-scale", "pull towards the prompt; 1: none; default: the model's own, else 6", type=float)
    add("--dynamic-guidance", "vary it over the steps, as the reference can", action="store_true")
    add("--guidance-interval", "timesteps to guide, 999 the noisiest", type=int, nargs=2)
    add("--noise-aug-strength", "noise on given pictures", type=float)
    add("--sampler", "default: the model's", choices=list(SAMPLERS))
    add("--lora", "add what was fine-tuned, WEIGHT times (default 1)", nargs="+", metavar="FILE[:WEIGHT]")
    add("--seed", "one or several; a seed makes the same video again; default: drawn", type=int, nargs="+")
    add("--num-videos", "videos per prompt, with seeds counted up from --seed", type=int, default=1)
    add("--fps", "rate clips are read at and videos are written at", type=float, default=FPS)
    add("--dtype", "default: bfloat16 on a GPU, else float32", choices=DTYPES)
    add("--device", "such as cuda, cuda:1, mps, cpu; default: the best there is")
    add("--compile", "torch.compile the transformer: slow to start, faster steps", action="store_true")
    add("--out", ".mp4, .gif, .png (a strip of frames), or a folder for NNNN.mp4", default="outputs")
    add("--from-latents", "only decode latents saved by an earlier run", metavar="FILE")
    add("--quiet", "print nothing but errors", action="store_true")

    if nul := [arg for arg in argv if "\0" in arg]:
        parser.error(f"{nul[0]!r} holds a NUL character; leave it out")
    defaults = vars(parser.parse_args([]))  # parsed apart, so that None marks what was not given
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults)))
    args.given = {name for name, value in vars(args).items() if value not in (None, [])}
    for name in defaults.keys() - args.given:
        setattr(args, name, defaults[name])

    if bool(args.prompt) == bool(args.from_latents):
        parser.error("give a prompt (before --image and --seed), or --from-latents FILE without one")
    extra = args.given - {"from_latents", "model", "dtype", "device", "fps", "out", "quiet"}
    if args.from_latents and extra:
        parser.error(
            f"--from-latents only decodes; {', '.join(sorted(extra))} cannot change what was sampled"
        )
    seeds = args.seed or [None]
    if args.num_videos != 1 and len(seeds) > 1:
        parser.error("--num-videos counts up from one --seed; give one seed, or the seeds alone")
    if not 1 <= args.num_videos * len(args.prompt or "1") * len(seeds) <= 1000:
        parser.error(f"--num-videos {args.num_videos} is outside 1 … 1000 for all prompts and seeds together")
    if not 0.1 <= args.fps <= 1000:
        parser.error(f"--fps {args.fps} is outside 0.1 … 1000; the models are trained at {FPS}")
    return args


def parse_lora(text: str) -> tuple[Path, float]:
    """(file, weight) of FILE or FILE:WEIGHT; ValueError for a weight out of all bounds."""
    file, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = None
    if not file or weight is None or Path(text).is_file():  # a name may hold a colon
        return Path(text), 1.0
    if not abs(weight) <= 100:  # true of NaN, too
        raise ValueError(f"--lora {text}: the weight {weight:g} is outside -100 … 100; 1 is usual")
    return Path(file), weight


def open_models(args: argparse.Namespace, loras: list = []) -> Models:
    """The models of --model on --device in --dtype; ValueError or OSError if one of them cannot be had."""
    if args.model is TINY and not TINY.is_dir():
        raise FileNotFoundError("there is no checkpoints/tiny; give --model a hub id or a checkpoint folder, "
                                "such as tests/goldens/fun-2b-inp, whose weights are random")  # fmt: skip
    device = choose_device(args.device)
    if args.dtype not in (None, *DTYPES):  # of a record, where argparse does not look
        raise ValueError(f"dtype {args.dtype!r} should be one of {', '.join(DTYPES)}")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    models = load_models(find_model(args.model), dtype, device, loras=loras)
    models.compile = args.compile
    return models


def make_jobs(models: Models, args: argparse.Namespace) -> list[Job]:
    """A job for every prompt and seed; files are read once for all of them."""
    config, num_frames = models.transformer_config, args.num_frames
    if num_frames is not None:
        check_num_frames(config, num_frames)
        if (legal := legal_num_frames(config, num_frames)) != num_frames:
            raise ValueError(f"num_frames={num_frames} is an odd number of latent frames, which this model "
                             f"takes in pairs; try {legal} (or {legal + 8})")  # fmt: skip
    seeds = args.seed or [agree(int.from_bytes(os.urandom(4)))]
    seeds = [seed + i for seed in seeds for i in range(args.num_videos)]
    names = [f.name for f in dataclasses.fields(Request) if hasattr(args, f.name)]
    settings = {name: getattr(args, name) for name in names} | {
        "guidance_interval": tuple(args.guidance_interval)
    }
    pairs = itertools.product(args.prompt, seeds)
    requests = [Request(**settings | {"prompt": prompt, "seed": seed}) for prompt, seed in pairs]
    for request in requests:
        request.check(config)
    job = prepare(models, requests[0], args.fps)
    for prompt in args.prompt:
        if len(models.tokenizer.encode(prompt)) >= config.max_text_seq_length:  # one place is for </s>
            job.notes.append(f"{prompt:.40}… is cut to {config.max_text_seq_length} tokens")
        if unknown := models.tokenizer.unknown_words(prompt):
            vocabulary = sorted(
                models.tokenizer.unigram.get_vocab(), key=models.tokenizer.unigram.token_to_id
            )
            known = ", ".join(word for word in vocabulary if not word.startswith("<"))
            job.notes.append(f"this model does not know: {', '.join(unknown)}. It knows: {known:.2000}")
    return [replace(job, request=request, seed=request.seed) for request in requests]


def run_long(models: Models, args: argparse.Namespace, say: Callable) -> None:
    """Every prompt and seed as a long video, written while it is made; there are no latents to keep."""
    models.keep = True  # every segment needs all of them
    target, given = Path(args.out), vars(args)
    check_out(target, [args.end_image, *(args.image or [])])
    seeds = args.seed or [agree(int.from_bytes(os.urandom(4)))]
    seeds = [seed + i for seed in seeds for i in range(args.num_videos)]
    names = [
        f.name for f in dataclasses.fields(Request) if f.name in given and f.name not in ("prompt", "seed")
    ]
    settings = {name: given[name] for name in names if given[name] is not None and name != "num_frames"}
    settings["guidance_interval"] = tuple(args.guidance_interval)
    pairs = list(itertools.product(args.prompt, seeds))
    paths = agree(output_paths(target, len(pairs), ".mp4"))
    overlaps = segments(args.num_frames, native_size(models.transformer_config)[2])
    say(f"{args.num_frames} frames in {len(overlaps)} segments, which share {str(overlaps[1:])[1:-1]} frames "
        f"with those before; seeds {str(seeds)[1:-1]}")  # fmt: skip
    for (prompt, seed), path in share(models, list(zip(pairs, paths))):
        progress = not args.quiet and writes(models)
        chunks = generate_long(models, prompt, args.num_frames, progress, seed=seed, **settings)
        if not writes(models):
            collections.deque(chunks, maxlen=0)  # makes them
            continue
        write_video(chunks, path, args.fps)
        record = {"prompt": prompt, "seed": seed, "num_frames": args.num_frames, "overlaps": overlaps}
        record |= {"settings": {name: str(value) for name, value in settings.items()}, "fps": args.fps}
        with atomic_write(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(record | {"model": str(models.model_dir)}, indent=2) + "\n")
        say(path)


def sample_all(
    models: Models, args: argparse.Namespace, say: Callable
) -> tuple[Models, list[tuple[Path, Tensor, dict]]]:
    """Prepare and sample every job: (path of the video, latents, record) of each, the latents saved.

    They are saved before decoding starts, so that a kill then loses nothing.
    """
    jobs = make_jobs(models, args)
    target = Path(args.out)
    check_out(target, [args.end_image, args.video, args.mask, args.control_video, *(args.image or [])])
    needs = estimate_bytes(models, jobs[0].latent_shape(models.vae_config.latent_channels))
    check_memory(needs, models.device)
    say(describe(models, jobs, needs))
    results, suffix = [], ".png" if jobs[0].num_frames == 1 else ".mp4"
    paths = agree(output_paths(target, len(jobs), suffix))
    dealt = share(models, list(zip(jobs, paths)))
    progress = not args.quiet and writes(models)
    for (job, path), latents in zip(dealt, make_latents(models, [job for job, _ in dealt], progress)):
        if not writes(models):
            continue
        record = make_record(models, job, args.fps)
        tensors = {"latents": latents.cpu().contiguous()}
        save_tensors(tensors, path.with_suffix(".safetensors"), {"record": json.dumps(record)})
        results.append((path, latents, record))
    return models, results


def reopen(args: argparse.Namespace) -> tuple[Models, list[tuple[Path, Tensor, dict]]]:
    """What `sample_all` returns, from saved latents; with the model, dtype and fps of then, unless given."""
    latents, record = load_latents(Path(args.from_latents))
    for name, kind in (("model", str), ("fps", float), ("dtype", str)):
        if name not in args.given and isinstance(record.get(name), kind):
            setattr(args, name, record[name])
    if not 0.1 <= args.fps <= 1000:
        raise ValueError(f"{args.from_latents} was made at {args.fps} fps; give --fps {FPS}")
    models = open_models(args)
    if latents.shape[1] != models.vae_config.latent_channels or 0 in latents.shape:
        raise ValueError(f"{args.from_latents} holds latents of shape {tuple(latents.shape)}, which the VAE "
                         f"of {args.model} cannot decode; give the --model they are of")  # fmt: skip
    check_out(Path(args.out))
    check_memory({"decoding": estimate_bytes(models, latents.shape)["decode"]}, models.device)
    suffix = ".png" if latents.shape[2] == 1 else ".mp4"
    return models, [(output_paths(Path(args.out), 1, suffix)[0], latents, record)]


def run(args: argparse.Namespace) -> None:
    """Sample or reopen latents, then decode and write each video, and the record of its making beside it."""

    def say(text: object) -> None:
        if RANK == 0 and not args.quiet:
            print(str(text).encode(errors="backslashreplace").decode())  # names of files may be no Unicode

    if args.from_latents:
        models, results = reopen(args)
    else:
        models = open_models(args, [parse_lora(text) for text in args.lora or []])
        longest = native_size(models.transformer_config)[2]
        if models.kind == "inpaint" and (args.num_frames or 0) > longest:
            run_long(models, args, say)
            return
        models, results = sample_all(models, args, say)
    with models.use("vae", "decode"):  # once for all
        for path, latents, record in results:
            write_video(make_frames(models, latents, progress=not args.quiet), path, args.fps)
            with atomic_write(path.with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps(record, indent=2) + "\n")
            say(path)
    say(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in models.seconds.items()))


MEMORY_REMEDY = "try a smaller --height, --width or --num-frames, or --dtype bfloat16"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 with one line on stderr if not."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings(action="ignore"):  # of libraries: no help to someone at a terminal
            run(args)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message = in_one_line(error, MEMORY_REMEDY)
        if message is None:
            raise  # a mistake of ours, and its traceback is wanted
    return fail("sample.py", message)


if __name__ == "__main__":
    sys.exit(main())
