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
import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import atomic_write, component_dir, open_safetensors, read_config, weight_files
from data import read_image, read_mask, read_video, resize, to_pixels, to_uint8, write_video
from diffusion import SAMPLERS, SNR_SHIFTED, Schedule, guidance_at, guide
from text_encoder import T5Encoder, Tokenizer
from transformer import TransformerConfig, VideoTransformer
from vae import VAEConfig, VideoVAE, inpaint_condition

TINY = Path(__file__).parent / "checkpoints" / "tiny"
SMALL_TOKENS = 1024  # up to here both prompts go through the network together
FPS = 8.0  # what CogVideoX-Fun is trained at
Picture = str | Path | Image.Image | np.ndarray  # an array is uint8 h w 3
Clip = str | Path | np.ndarray  # an array is uint8 f h w 3, at the model's frame rate already


# ---------------------------------------------------------------- models, loaded in turn


def model_kind(config: TransformerConfig) -> str:
    """text, inpaint, control or image: what a transformer was trained to be told beside the noisy latents."""
    extra = config.in_channels - config.out_channels
    if extra == 0:
        return "text"
    if extra == config.out_channels + 1:
        return "inpaint"
    if extra == config.out_channels:
        return "image" if config.use_learned_positional_embeddings else "control"
    raise ValueError(f"in_channels = {config.in_channels} is no kind of model we know; 16, 32 and 33 are")


class Models:
    """The networks of a checkpoint folder, each in memory only while it is in use (unless keep)."""

    def __init__(self, model_dir: str | Path, dtype: torch.dtype, device: str | torch.device, keep: bool):
        self.model_dir, self.dtype, self.device, self.keep = (
            Path(model_dir),
            dtype,
            torch.device(device),
            keep,
        )
        config_file = component_dir(model_dir, "transformer") / "config.json"
        self.transformer_config = read_config(TransformerConfig, config_file)
        self.vae_config = read_config(VAEConfig, component_dir(model_dir, "vae") / "config.json")
        self.kind = model_kind(self.transformer_config)
        self.schedule = Schedule.from_pretrained(model_dir)
        self.tokenizer = Tokenizer.from_pretrained(model_dir)
        self.loaded: dict[str, nn.Module] = {}  # put a module here to use it in place of the folder's
        self.seconds: dict[str, float] = {}  # spent in each stage so far

    @contextlib.contextmanager
    def use(self, name: str, stage: str) -> Iterator[nn.Module]:
        """One network (text_encoder, vae or transformer), loaded for the block; timed as `stage`."""
        start = time.perf_counter()
        if name not in self.loaded:
            self.loaded[name] = self._load(name)
        try:
            yield self.loaded[name]
        finally:
            if not self.keep:
                del self.loaded[name]
                torch.cuda.empty_cache()
            self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - start

    def _load(self, name: str) -> nn.Module:
        if name == "text_encoder":  # if it goes again at once, its layers need not be in memory together
            return T5Encoder.from_pretrained(self.model_dir, self.dtype, self.device, stream=not self.keep)
        network = {"vae": VideoVAE, "transformer": VideoTransformer}[name]
        return network.from_pretrained(self.model_dir, self.dtype, self.device)


def load_models(
    model_dir: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    keep: bool = False,
) -> Models:
    """Look at a checkpoint folder; its networks are loaded when `generate` first uses them.

    keep: leave them in memory afterwards, for a next call
    raises ValueError or OSError if the folder is not a complete checkpoint
    """
    return Models(model_dir, dtype, device, keep)


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
    guidance_scale: float = 6.0  # 1 or less: no guidance
    dynamic_guidance: bool = False
    guidance_interval: tuple[int, int] = (0, 999)  # timesteps outside go unguided (arXiv 2404.07724)
    sampler: str | None = None  # a key of diffusion.SAMPLERS
    seed: int | None = None  # None draws one
    noise_aug_strength: float = 0.0563  # noise on known pixels, if the model was trained with it
    latents: Tensor | None = None  # b 16 f' h' w' to start from; nothing is added to them
    randn: Callable[[tuple[int, ...]], Tensor] | None = None  # replaces every normal draw

    def check(self, config: TransformerConfig) -> None:
        """Stop, in one sentence, at what cannot be done or contradicts itself; reads no file."""
        kind = model_kind(config)
        name = f"a {config.in_channels}-channel {kind} model"
        takes = {
            "text": {"video"},
            "inpaint": {"image", "end_image", "video", "mask"},
            "control": {"control_video"},
            "image": {"image"},
        }[kind]
        for flag in ("image", "end_image", "video", "mask", "control_video"):
            if getattr(self, flag) is not None and flag not in takes:
                raise ValueError(f"{name} takes no {flag}; {_advice(flag)}")
        if kind in ("control", "image") and getattr(self, needed := next(iter(takes))) is None:
            raise ValueError(f"{name} needs {'an' if needed == 'image' else 'a'} {needed}")
        if self.video is not None and (self.image is not None or self.end_image is not None):
            raise ValueError("image and video contradict each other; a video brings its own frames")
        if (
            self.mask is not None
            and self.video is None
            and (self.image is None or self.end_image is not None)
        ):
            raise ValueError(
                "mask says where to change a video or a single image; give one of them, no end_image"
            )
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength} is outside (0, 1]; 0.8 changes much, 0.5 less, 1 all")
        if self.strength < 1 and self.video is None:
            raise ValueError(f"strength={self.strength} needs a video to start from")
        if not math.isfinite(self.guidance_scale) or not 0 <= self.guidance_scale <= 1000:
            raise ValueError(f"guidance_scale={self.guidance_scale} is outside 0 … 1000; the models like 6")
        if not 0 <= self.noise_aug_strength <= 10:
            raise ValueError(f"noise_aug_strength={self.noise_aug_strength} is outside 0 … 10; try 0.0563")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 999:
            raise ValueError(
                f"guidance_interval={low} {high} should be two timesteps in 0 … 999, lower first"
            )
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r} is unknown; choose from {', '.join(SAMPLERS)}")
        if not 1 <= self.num_steps <= 1000:
            raise ValueError(f"num_steps={self.num_steps} is outside 1 … 1000; the models like 50")
        if int(self.num_steps * self.strength) < 1:
            raise ValueError(f"strength={self.strength} of num_steps={self.num_steps} leaves no step; "
                             f"the smallest is {1 / self.num_steps:.3g}")  # fmt: skip
        for flag in ("height", "width"):
            value = getattr(self, flag)
            if value is not None and (value < 16 or value % 16 or value > 16384):
                nearest = min(max(round(value / 16), 1), 1024) * 16
                raise ValueError(f"{flag}={value}; sizes are multiples of 16, try {nearest}")
        if self.num_frames is not None:
            check_num_frames(config, self.num_frames)


def _advice(flag: str) -> str:
    return {
        "control_video": "a control model of 32 channels does",
        "video": "an inpaint model of 33 channels does",
    }.get(flag, "an inpaint model of 33 channels (…-InP) does")


def check_num_frames(config: TransformerConfig, num_frames: int) -> None:
    """ValueError unless num_frames is 4k+1 and within the model's positions."""
    if num_frames < 1 or num_frames % 4 != 1:
        up = max(num_frames - 1, 0) // 4 * 4 + 5
        raise ValueError(f"num_frames={num_frames}; the VAE needs 4k+1, try {up} (or {max(up - 4, 1)})")
    if num_frames > max_num_frames(config):
        raise ValueError(f"num_frames={num_frames} is more than this model's positions hold; "
                         f"the most is {max_num_frames(config)}")  # fmt: skip


def max_num_frames(config: TransformerConfig) -> int:
    """Interpolated positions end with their table. RoPE goes on; we stop counting at 16385 frames."""
    if config.use_rotary_positional_embeddings or model_kind(config) == "text":
        return 16385
    return (config.sample_frames - 1) // 4 * 4 + 1


def legal_num_frames(config: TransformerConfig, num_frames: int) -> int:
    """The largest number of frames the model can make that is not above num_frames.

    V1.5 patches latent frames in pairs: an odd number above one loses four frames, as in the reference.
    """
    latent_frames = (min(num_frames, max_num_frames(config)) - 1) // 4 + 1
    if config.patch_size_t and latent_frames > 1:
        latent_frames -= latent_frames % config.patch_size_t
    return 4 * (latent_frames - 1) + 1


def native_size(config: TransformerConfig) -> tuple[int, int, int]:
    """(height, width, frames) a model is made for; V1.5 says 300×300 latents but lives at 480×720 pixels."""
    height, width = 8 * config.sample_height, 8 * config.sample_width
    if config.patch_size_t:
        return min(480, height), min(720, width), 85
    return height // 16 * 16, width // 16 * 16, (config.sample_frames - 1) // 4 * 4 + 1


def choose_size(
    config: TransformerConfig, height: int | None, width: int | None, source: tuple[int, int] | None
) -> tuple[int, int]:
    """Height and width: as asked; else the native area at the source's aspect, in multiples of 16."""
    native_height, native_width, _ = native_size(config)
    if source is None or config.use_learned_positional_embeddings:  # learned positions fit one size only
        return height or native_height, width or native_width
    aspect = source[0] / source[1]
    exact = height or (width * aspect if width else math.sqrt(native_height * native_width * aspect))
    limits = (8 * config.sample_height, 8 * config.sample_width) if config.patch_size_t else (16384, 16384)

    def legal(size: float, limit: int) -> int:
        return min(max(round(size / 16), 1) * 16, limit // 16 * 16)

    return height or legal(exact, limits[0]), width or legal(exact / aspect, limits[1])


# ---------------------------------------------------------------- one job: everything read and decided


@dataclass
class Job:
    """A request with its files read and its sizes fixed; then what each stage adds for the next."""

    request: Request
    height: int
    width: int
    num_frames: int
    sampler: str
    seed: int
    frames: np.ndarray | None = None  # uint8 f h w 3: the known video, the clip to start from, or the control
    mask: Tensor | None = None  # bool f h w, True = generate; None: all of it
    notes: list[str] = field(default_factory=list)  # what was decided for the user
    text: Tensor | None = None  # 1 or 2 L d: (negative prompt and) prompt
    condition: Tensor | None = None  # 1 c f' h' w'
    start: Tensor | None = None  # 1 16 f' h' w': the latents the sampler begins with

    def latent_shape(self, channels: int) -> tuple[int, ...]:
        return (1, channels, (self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8)


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
    clip = None
    source = request.video if request.video is not None else request.control_video
    if source is not None:
        clip = read_video(source, request.num_frames or native_size(config)[2], fps)

    num_frames = request.num_frames or (len(clip) if clip is not None else native_size(config)[2])
    if clip is not None and len(clip) < num_frames:
        raise ValueError(f"{_name(source)} has {len(clip)} frames at {fps:g} fps, fewer than num_frames="
                         f"{num_frames}; try {legal_num_frames(config, len(clip))}")  # fmt: skip
    num_frames = legal_num_frames(config, num_frames)
    first = clip if clip is not None else images or ([end_image] if end_image is not None else None)
    height, width = choose_size(
        config, request.height, request.width, None if first is None else first[0].shape[:2]
    )
    job = Job(
        request,
        height,
        width,
        num_frames,
        request.sampler or _default_sampler(models),
        int.from_bytes(os.urandom(4)) if request.seed is None else request.seed,
    )
    if first is not None and not (request.height and request.width):
        job.notes.append(f"the input of {first[0].shape[1]}x{first[0].shape[0]} is made at {width}x{height}")

    if clip is not None:
        job.frames = resize(clip[:num_frames], height, width)
    elif images or end_image is not None:
        job.frames, job.mask = _known_frames(images, end_image, job)
    if request.mask is not None:
        job.mask = read_mask(request.mask, num_frames, height, width, fps)
    if job.mask is not None and not job.mask.any():
        raise ValueError("everything is given and nothing left to generate; "
                         "the mask needs some white, or a picture more frames")  # fmt: skip
    shape = job.latent_shape(config.out_channels)
    if request.latents is not None and tuple(request.latents.shape) != shape:
        raise ValueError(f"latents of shape {tuple(request.latents.shape)} do not fit; expected {shape}")
    return job


def _name(source: Picture | Clip) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the clip"


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
def encode_text(models: Models, t5: T5Encoder, request: Request) -> Tensor:
    """The prompt, after the negative prompt if there is guidance: 1 or 2 L d."""
    prompts = [request.prompt] if request.guidance_scale <= 1 else [request.negative_prompt, request.prompt]
    return t5(models.tokenizer(prompts, models.transformer_config.max_text_seq_length))


@torch.inference_mode()
def encode_inputs(
    models: Models, vae: VideoVAE | None, job: Job, randn: Callable
) -> tuple[Tensor | None, Tensor | None]:
    """(condition 1 c f' h' w', scaled latents of the clip to start from), either None where there is none."""
    kind, request, scale_shape = (
        models.kind,
        job.request,
        job.latent_shape(models.transformer_config.out_channels),
    )
    pixels = None if job.frames is None else to_pixels(job.frames)[None].to(models.device)  # 1 3 f h w
    condition = init = None
    if kind == "inpaint":
        if pixels is None or job.mask is None:  # nothing is known
            condition = torch.zeros(1, scale_shape[1] + 1, *scale_shape[2:])
        else:
            known = pixels
            if models.transformer_config.add_noise_in_inpaint_model and request.noise_aug_strength > 0:
                noise = request.noise_aug_strength * randn(tuple(pixels.shape)).to(pixels)
                known = torch.where(pixels == -1, pixels, pixels + noise)  # not on black, as in the reference
            condition = inpaint_condition(vae, known, job.mask[None, None].to(pixels))
    elif kind == "control":
        condition = vae.encode(pixels)
    elif kind == "image":  # a sample of the posterior, as diffusers does; later frames are zero
        mean, logvar = vae.moments(pixels[:, :, :1])
        first = vae.posterior(mean, logvar, randn(tuple(mean.shape)))
        condition = torch.cat(
            [first, first.new_zeros(*scale_shape[:2], scale_shape[2] - 1, *scale_shape[3:])], dim=2
        )
    if request.strength < 1 and request.latents is None:
        mean, logvar = vae.moments(pixels)
        init = vae.posterior(mean, logvar, randn(tuple(mean.shape)))
    return condition, init


@torch.inference_mode()
def denoise(models: Models, dit: VideoTransformer, job: Job, randn: Callable, progress: bool) -> Tensor:
    """The sampler's loop: from job.start to clean latents 1 16 f' h' w', float32.

    raises ValueError at the step where the latents stop being finite
    """
    request = job.request
    schedule = Schedule(models.schedule.config, snr_shift=job.sampler in SNR_SHIFTED)
    timesteps = schedule.timesteps(request.num_steps)
    timesteps = timesteps[len(timesteps) - int(request.num_steps * request.strength) :]
    x = job.start  # still the clip's latents where strength < 1
    if request.latents is not None:
        x = request.latents
    else:
        noise = randn(job.latent_shape(models.transformer_config.out_channels)).to(
            models.device, torch.float32
        )
        x = noise if x is None else schedule.add_noise(x.float(), noise, timesteps[:1])
    x = x.to(models.device, torch.float32)
    text = dit.project_text(job.text.to(models.device, models.dtype))
    condition = None if job.condition is None else job.condition.to(models.device, models.dtype)
    num_tokens = math.prod(x.shape[2:]) // 4
    together = (
        num_tokens <= 1024
    )  # small: one forward of batch 2 keeps the processor busy. Large: two save memory

    def velocity(x: Tensor, t: int) -> Tensor:
        scale = guidance_at(
            t, request.guidance_scale, len(timesteps), request.dynamic_guidance, request.guidance_interval
        )
        texts = text if scale != 1 else text[-1:]
        parts = [
            dit(
                x.to(models.dtype).expand(len(part), -1, -1, -1, -1),
                t,
                part,
                None if condition is None else condition.expand(len(part), -1, -1, -1, -1),
                text_projected=True,
            )
            for part in texts.split(2 if together else 1)
        ]
        out = torch.cat(parts)
        return guide(*out.split(1), scale) if len(out) == 2 else out.float()

    steps = SAMPLERS[job.sampler](
        velocity, x, schedule, timesteps, lambda: randn(tuple(x.shape)).to(x), request.num_steps
    )
    for i, x in enumerate(tqdm(steps, "denoise", len(timesteps), disable=not progress, leave=False)):
        if not torch.isfinite(x).all():
            other = "bfloat16 or float32" if models.dtype == torch.float16 else "float32"
            raise ValueError(f"the latents stopped being finite at step {i + 1} (timestep {timesteps[i]}) in "
                             f"{str(models.dtype)[6:]}; try dtype {other}")  # fmt: skip
    return x


def make_latents(models: Models, jobs: list[Job], progress: bool = False) -> Iterator[Tensor]:
    """The clean latents of each job in turn; every network is loaded once for all of them."""
    draws = [job.request.randn or _seeded_randn(job.seed) for job in jobs]
    with models.use("text_encoder", "text") as t5:
        for job in tqdm(jobs, "text", disable=not progress, leave=False):
            job.text = encode_text(models, t5, job.request)
    needs_vae = any(job.frames is not None for job in jobs)
    with models.use("vae", "encode") if needs_vae else contextlib.nullcontext() as vae:
        for job, randn in zip(tqdm(jobs, "encode", disable=not progress, leave=False), draws):
            job.condition, job.start = encode_inputs(models, vae, job, randn)
    with models.use("transformer", "denoise") as dit:
        for job, randn in zip(jobs, draws):
            yield denoise(models, dit, job, randn, progress)


def _seeded_randn(seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    """Draws on the CPU, so that a seed means the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def make_frames(models: Models, latents: Tensor, progress: bool = False) -> Iterator[np.ndarray]:
    """Decode latents 1 16 f' h' w' into chunks of uint8 f h w 3, as they become ready."""
    first_alone = models.kind in ("inpaint", "control")  # else diffusers' chunks
    bar = tqdm(desc="decode", unit="frame", total=4 * latents.shape[2] - 3, disable=not progress, leave=False)
    with models.use("vae", "decode") as vae, bar:
        for pixels in vae.decode_stream(latents, first_alone=first_alone):
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


# ---------------------------------------------------------------- what it says before it starts


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device; of a CPU what Linux calls available, elsewhere 0 for unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


def estimate_bytes(models: Models, job: Job) -> dict[str, int]:
    """Peak memory of each stage, weights and activations, for one job. Rough: measured within a third."""
    size = models.dtype.itemsize
    dit, vae = models.transformer_config, models.vae_config
    counts = {
        name: count_parameters(models.model_dir, name) for name in ("text_encoder", "vae", "transformer")
    }
    tokens = dit.max_text_seq_length + math.prod(job.latent_shape(1)[2:]) // 4
    # At full resolution the widest block holds 8 frames in, 10 padded, 8 out, and two frames per convolution.
    vae_activations = 35 * vae.block_out_channels[1] * job.height * job.width * size
    return {
        "text": 2
        * size
        * counts["text_encoder"]
        // (1 if models.keep else 12),  # streamed: a layer at a time
        "encode": counts["vae"] * size + vae_activations * 2 // 3,
        "denoise": counts["transformer"] * size + 16 * tokens * dit.dim * size,
        "decode": counts["vae"] * size + vae_activations,
    }


def count_parameters(model_dir: Path, name: str) -> int:
    """Parameters of a component, from the headers of its weight files."""
    files, total = weight_files(component_dir(model_dir, name)), 0
    for path in sorted(set(files.values())):
        with open_safetensors(path) as weights:
            total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())
    return total


def describe(models: Models, jobs: list[Job]) -> str:
    """The block printed at the start: model, sizes, tokens, and memory of each stage against what is free."""
    job, config = jobs[0], models.transformer_config
    latents = job.latent_shape(config.out_channels)
    tokens = math.prod(latents[2:]) // 4 // (config.patch_size_t or 1)
    needs = {stage: need / 2**30 for stage, need in estimate_bytes(models, job).items()}
    free = free_bytes(models.device) / 2**30
    request = job.request
    steps = f"{int(request.num_steps * request.strength)} of " if request.strength < 1 else ""
    billions = count_parameters(models.model_dir, "transformer") / 1e9
    lines = [
        f"model    {models.model_dir}: {models.kind}, {config.in_channels} channels, {billions:.3g} B weights",
        f"video    {job.width}x{job.height}, {job.num_frames} frames -> {latents[2]} latent frames "
        f"-> {tokens} tokens" + (f", {len(jobs)} of them" if len(jobs) > 1 else ""),
        f"sampler  {job.sampler}, {steps}{request.num_steps} steps, guidance {request.guidance_scale:g}",
        f"device   {models.device}, {str(models.dtype)[6:]}",
        "memory   about " + ", ".join(f"{stage} {need:.1f}" for stage, need in needs.items())
        + (f" GiB; {free:.1f} free" if free else " GiB"),
    ]  # fmt: skip
    lines += [f"note     {note}" for note in dict.fromkeys(note for job in jobs for note in job.notes)]
    if free and max(needs.values()) > free:
        stage = max(needs, key=needs.get)
        lines.append(
            f"warning  {stage} may need more memory than is free; try a smaller size or --dtype bfloat16"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- results on disk


def save_latents(path: Path, latents: Tensor, record: dict) -> None:
    """Latents with the record of their making, written before decoding starts: a kill then loses nothing."""
    with atomic_write(path) as temporary:
        save_file({"latents": latents.cpu().contiguous()}, temporary, {"record": json.dumps(record)})


def load_latents(path: Path) -> tuple[Tensor, dict]:
    """What `save_latents` wrote; ValueError or OSError if it is something else."""
    with open_safetensors(path) as file:
        if list(file.keys()) != ["latents"]:
            raise ValueError(f"{path} holds no latents of ours; give the .safetensors beside a video")
        latents, record = file.get_tensor("latents"), (file.metadata() or {}).get("record", "{}")
    try:
        record = json.loads(record)
    except ValueError:
        record = {}
    if latents.dim() != 5 or not latents.is_floating_point() or not isinstance(record, dict):
        raise ValueError(f"{path} holds no latents of ours; give the .safetensors beside a video")
    if not torch.isfinite(latents).all():
        raise ValueError(f"{path} holds latents that are not finite; sample again, with --dtype float32")
    return latents, record


def make_record(models: Models, job: Job) -> dict:
    """Everything needed to make a video again, for JSON: the request, what was decided for it, versions."""
    request = {f.name: getattr(job.request, f.name) for f in dataclasses.fields(Request)}
    decided = {name: getattr(job, name) for name in ("height", "width", "num_frames", "sampler", "seed")}
    skip = ("latents", "randn")
    return {
        **{name: value for name, value in {**request, **decided}.items() if name not in skip},
        "model": str(models.model_dir),
        "kind": models.kind,
        "dtype": str(models.dtype)[6:],
        "device": str(models.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def output_paths(out: str | None, count: int, suffix: str) -> list[Path]:
    """Where `count` results go: the file asked for, or new numbered files in a folder (default: outputs).

    raises ValueError for an ending we cannot write, OSError for a place we cannot write to
    """
    target = Path(out or "outputs")
    if target.suffix and not target.is_dir():
        if target.suffix.lower() not in (".mp4", ".gif", ".png"):
            raise ValueError(f"--out {target}: files end in .mp4, .gif or .png; a folder has no ending")
        paths = [target] if count == 1 else [target.with_stem(f"{target.stem}-{i + 1}") for i in range(count)]
    else:
        taken = (
            [int(p.stem) for p in target.glob("*") if p.stem.isascii() and p.stem.isdigit()]
            if target.is_dir()
            else []
        )
        first = max(taken, default=0) + 1
        paths = [target / f"{first + i:04d}{suffix}" for i in range(count)]
    folder = paths[0].parent
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"--out {target}: cannot write in {existing}; choose another place")
    return paths


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; names and defaults are those of `Request`."""
    defaults = {f.name: f.default for f in dataclasses.fields(Request)}
    parser = Parser(
        prog="sample.py",
        description="Make videos from prompts, pictures and clips with CogVideoX and CogVideoX-Fun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompt", nargs="*", help="what to show; several prompts make several videos")
    add(
        "--model",
        default=str(TINY),
        help="checkpoint folder, or a hub id such as alibaba-pai/CogVideoX-Fun-V1.1-2b-InP",
    )
    add("--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    add("--image", nargs="+", metavar="PICTURE", help="start picture; several are the first frames")
    add("--end-image", metavar="PICTURE", help="last frame")
    add("--video", metavar="CLIP", help="clip to change (with --strength) or to fill in (with --mask)")
    add("--mask", metavar="PICTURE|CLIP", help="white, from 240 up, is made anew; the rest is kept")
    add("--control-video", metavar="CLIP", help="poses, edges or depth for a control model")
    add("--strength", type=float, default=1.0, help="how much of --video is made anew, in (0, 1]")
    add(
        "--height", type=int, help="multiple of 16; default the model's own, or near it at the input's aspect"
    )
    add("--width", type=int, help="multiple of 16")
    add("--num-frames", type=int, help="4k+1; 1 makes a picture; default the model's own, or the clip's")
    add("--num-steps", type=int, default=defaults["num_steps"], help="network evaluations")
    add(
        "--guidance-scale",
        type=float,
        default=defaults["guidance_scale"],
        help="pull towards the prompt; 1: none",
    )
    add(
        "--dynamic-guidance",
        action="store_true",
        default=False,
        help="vary it over the steps, as the reference can",
    )
    interval = {"type": int, "nargs": 2, "metavar": ("LOW", "HIGH"), "default": defaults["guidance_interval"]}
    add("--guidance-interval", **interval, help="timesteps to guide, 999 the noisiest")
    add(
        "--noise-aug-strength",
        type=float,
        default=defaults["noise_aug_strength"],
        help="noise on given pictures",
    )
    add("--sampler", choices=list(SAMPLERS), help="default: the model's")
    add(
        "--seed",
        type=int,
        nargs="+",
        help="one or several; the same seed gives the same video; default: drawn",
    )
    add("--num-videos", type=int, default=1, help="videos per prompt, with seeds counted up from --seed")
    add("--fps", type=float, default=FPS, help="rate clips are read at and videos are written at")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    add("--device", help="such as cuda, cuda:1, mps, cpu; default: the best there is")
    add(
        "--out",
        metavar="FILE|FOLDER",
        help=".mp4, .gif, .png (a strip of frames), or a folder; default outputs/NNNN",
    )
    add("--from-latents", metavar="FILE", help="only decode latents saved by an earlier run")
    add("--quiet", action="store_true", default=False, help="print nothing but errors")
    args = parser.parse_args(argv)
    if bool(args.prompt) == hasattr(args, "from_latents"):
        parser.error("give a prompt, or --from-latents FILE without one")
    if not 1 <= args.num_videos <= 10_000:
        parser.error(f"--num-videos {args.num_videos} is outside 1 … 10000")
    if args.num_videos > 1 and len(getattr(args, "seed", [0])) > 1:
        parser.error("--num-videos counts up from one --seed; give one seed, or the seeds alone")
    if any(not 0 <= seed < 2**63 for seed in getattr(args, "seed", [])):
        parser.error(f"--seed {args.seed} should be between 0 and 2^63 - 1")
    if not 0.1 <= args.fps <= 1000:
        parser.error(f"--fps {args.fps} is outside 0.1 … 1000; the models are trained at {FPS}")
    return args


DTYPES = ["float32", "bfloat16", "float16"]
HUB_FILES = ["model_index.json", "scheduler/*", "tokenizer/*", "*/config.json"]
HUB_WEIGHTS = [f"{name}/*.safetensors*" for name in ("text_encoder", "vae", "transformer")]


def find_model(name: str) -> Path:
    """A local folder as it is; else a hub id, fetched with only the files we read."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name == str(TINY) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(
            f"--model {name}: there is no such folder, and a hub id looks like owner/name"
        )
    from huggingface_hub import snapshot_download  # slow to import, and a local folder never needs it

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES + HUB_WEIGHTS))
    except Exception as error:  # requests, HTTP, cache and validation errors share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(
            f"--model {name}: no such folder here, and the hub did not deliver it ({reason:.200})"
        ) from None


def choose_device(name: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """The device asked for or the best there is, and the dtype asked for or its usual one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {name} is not available here; try cpu") from None
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} should be one of {', '.join(DTYPES)}")
    if device.type == "meta":
        raise ValueError("--device meta computes nothing; try cpu")
    return device, getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def make_jobs(models: Models, args: argparse.Namespace) -> list[Job]:
    """A job for every prompt and seed."""
    names = {f.name for f in dataclasses.fields(Request)} - {"prompt", "seed"}
    settings = {name: value for name, value in vars(args).items() if name in names}
    settings["guidance_interval"] = tuple(args.guidance_interval)
    if "num_frames" in settings:
        frames = settings["num_frames"]
        check_num_frames(models.transformer_config, frames)
        if (legal := legal_num_frames(models.transformer_config, frames)) != frames:
            raise ValueError(f"num_frames={frames} is an odd number of latent frames, which this model takes "
                             f"in pairs; try {legal} (or {legal + 8})")  # fmt: skip
    seeds = getattr(args, "seed", [None])
    if args.num_videos > 1:
        first = int.from_bytes(os.urandom(4)) if seeds[0] is None else seeds[0]
        seeds = [first + i for i in range(args.num_videos)]
    requests = [Request(prompt, seed=seed, **settings) for prompt in args.prompt for seed in seeds]
    return [prepare(models, request, args.fps) for request in requests]


def sample(args: argparse.Namespace, say: Callable) -> tuple[Models, list[tuple[Path, Tensor, dict]]]:
    """Prepare and sample every job: (path of the video, latents, record) of each, the latents saved."""
    device, dtype = choose_device(vars(args).get("device"), vars(args).get("dtype"))
    models = load_models(find_model(args.model), dtype, device)
    jobs = make_jobs(models, args)
    suffix = ".png" if all(job.num_frames == 1 for job in jobs) else ".mp4"
    paths = output_paths(vars(args).get("out"), len(jobs), suffix)
    say(describe(models, jobs))
    results = []
    for path, job, latents in zip(paths, jobs, make_latents(models, jobs, progress=not args.quiet)):
        record = make_record(models, job) | {"fps": args.fps}
        save_latents(path.with_suffix(".safetensors"), latents, record)
        results.append((path, latents, record))
    return models, results


def reopen(args: argparse.Namespace) -> tuple[Models, list[tuple[Path, Tensor, dict]]]:
    """What `sample` returns, from saved latents; with the model, dtype and fps of then, unless given."""
    latents, record = load_latents(Path(args.from_latents))
    for name, default in (("model", str(TINY)), ("fps", FPS), ("dtype", None)):
        if vars(args).get(name, default) == default and isinstance(record.get(name), type(default or "")):
            setattr(args, name, record[name])
    device, dtype = choose_device(vars(args).get("device"), vars(args).get("dtype"))
    models = load_models(find_model(args.model), dtype, device)
    return models, [(output_paths(vars(args).get("out"), 1, ".mp4")[0], latents, record)]


def run(args: argparse.Namespace) -> None:
    """Sample or reopen latents, then decode and write each video, and the record of its making beside it."""
    say = (lambda *_: None) if args.quiet else print
    models, results = reopen(args) if "from_latents" in args else sample(args, say)
    for path, latents, record in results:
        write_video(make_frames(models, latents, progress=not args.quiet), path, args.fps)
        with atomic_write(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(record | {"seconds": models.seconds}, indent=2) + "\n")
        say(path)
    say(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in models.seconds.items()))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 with one line on stderr if not."""
    args = parse(argv)
    try:
        run(args)
        return 0
    except (ValueError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "alloc" not in str(error):
            raise  # a mistake of ours, and its traceback is wanted
        message = "out of memory; try a smaller --height, --width or --num-frames, or --dtype bfloat16"
    except KeyboardInterrupt:
        message = "interrupted"
    print(f"sample.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
