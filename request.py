"""What a video can be asked for: a request, checked once, and its files, read at the size of the video.

    Request ─complete─► checked, with the model's own values for what was left open
            ─read_inputs─► Known: num_frames, height, width; frames uint8 f h w 3, mask bool f h w

Which model takes what is in TAKES; the kinds of models are explained in kinds.py.

f frames · h w height, width (f' h' w' of latents)
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kinds
from diffusion import SAMPLERS
from media import Clip, Picture, check_fps, read_image, read_mask, read_video, resize
from sizes import latent_grid
from transformer import TransformerConfig

TAKES = {  # by kind
    "text": {"video"},
    "inpaint": {"image", "end_image", "video", "mask"},
    "control": {"control_video"},
    "image": {"image", "end_image"},
}
NEEDS = {"control": "control_video", "image": "image"}
BOUNDS = {  # of numbers that would else give noise, or nothing, after a long wait
    "strength": (0, 1, "0.8 changes much, 0.5 less, 1 all"),
    "guidance_scale": (0, 1000, "the models like 6"),
    "noise_aug_strength": (0, 10, "try 0.0563"),
    "num_steps": (1, 1000, "the models like 50"),
    "seed": (0, 2**63 - 1, "any in between will do"),
    "step_cache": (0, 10, "0 computes every step, 0.1 fewer, 0.2 fewer still"),
}


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
    strength: float = 1.0  # how many of the steps are taken from the clip; 1 starts at pure noise
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
    fps: float | None = None  # clips are read at it
    tiled: bool = False  # the VAE works through tiles: less memory, slightly other numbers
    step_cache: float = 0.0  # above 0: blocks are skipped where they change less, see stepcache.py
    latents: Tensor | None = None  # 1 16 f' h' w' to start from; nothing is added to them
    randn: Callable[[tuple[int, ...]], Tensor] | None = None  # replaces every normal draw

    def check(self, config: TransformerConfig) -> None:
        """ValueError for what cannot be done or contradicts itself; reads no file."""
        kind = kinds.model_kind(config)
        name = f"a {config.in_channels}-channel {kind} model"
        files = ("image", "end_image", "video", "mask", "control_video")
        given = [file for file in files if getattr(self, file) is not None]
        for file in given:
            if file not in TAKES[kind]:
                other = "32-channel control" if file == "control_video" else "33-channel inpaint (…-InP)"
                raise ValueError(f"{name} takes no {file}; a {other} model does")
        if kind in NEEDS and NEEDS[kind] not in given:
            raise ValueError(f"{name} needs {NEEDS[kind]}")
        if "video" in given and ("image" in given or "end_image" in given):
            raise ValueError(f"{given[0]} and video contradict each other; a video brings its own frames")
        if "mask" in given and not ("video" in given or given == ["image", "mask"]):
            raise ValueError("mask needs a video, or an image without end_image, to say where to change it")
        if kind == "image" and len(self.images) > 1:
            raise ValueError(f"{name} takes one image, not {len(self.images)}; one of 33 channels takes more")
        if self.strength < 1 and self.video is None:
            raise ValueError(f"strength={self.strength} needs a video to start from")
        for number, (least, most, advice) in BOUNDS.items():
            value = getattr(self, number)
            if value is not None and not least <= value <= most:  # true of NaN, too
                raise ValueError(f"{number}={value} is outside {least} … {most}; {advice}")
        if self.fps is not None:
            check_fps(self.fps)
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 999:
            raise ValueError(f"guidance_interval={low} {high} is not two timesteps in 0 … 999, lower first")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r} is unknown; choose from {', '.join(SAMPLERS)}")
        if self.num_taken < 1:
            raise ValueError(f"strength={self.strength} of num_steps={self.num_steps} leaves no step; "
                             "raise one of them")  # fmt: skip
        kinds.check_size(config, self.height, self.width, self.num_frames)

    @property
    def images(self) -> list[Picture]:
        if self.image is None:
            return []
        return self.image if isinstance(self.image, list) else [self.image]

    @property
    def num_taken(self) -> int:
        """How many of num_steps are taken, the last ones."""
        return int(self.num_steps * self.strength)

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt, after the negative one if there is guidance."""
        return (self.negative_prompt, self.prompt) if self.guidance_scale > 1 else (self.prompt,)


def complete(request: Request, models) -> Request:
    """The request, checked, with the own values of the `Models` for what was left open, but for sizes."""
    request.check(models.config)
    own = {
        "guidance_scale": models.schedule.default_guidance_scale,
        "sampler": request.sampler or models.default_sampler,  # which may raise
        "fps": kinds.native_fps(models.config),
        "seed": int.from_bytes(os.urandom(4)),
    }
    missing = {name: value for name, value in own.items() if getattr(request, name) is None}
    return replace(request, **missing)


# ---------------------------------------------------------------- files read, sizes decided


class Known(NamedTuple):
    """What the files of a request hold, and the sizes that follow from them."""

    num_frames: int
    height: int
    width: int
    frames: np.ndarray | None = None  # uint8 f h w 3: known video, control, or an image model's pictures
    mask: Tensor | None = None  # bool f h w, True = generate; None: all of it
    notes: tuple[str, ...] = ()  # what was decided for the user


def read_inputs(request: Request, config: TransformerConfig) -> Known:
    """Read a request's files at the size of the video."""
    notes = []
    num_frames = request.num_frames or kinds.native_size(config)[2]
    clip = read_clip(request, num_frames)
    if clip is not None:
        num_frames = len(clip)
    legal = kinds.legal_num_frames(config, num_frames, from_clip=request.video is not None)
    if legal != num_frames:
        notes.append(f"{num_frames} frames do not fit this model: {legal} are made")
        num_frames = legal

    pictures = [read_image(image) for image in request.images]
    if request.end_image is not None:
        pictures.append(read_image(request.end_image))
    if len(pictures) > num_frames:
        raise ValueError(f"{len(pictures)} pictures are more than num_frames={num_frames}")
    sources = pictures if clip is None else clip[:1]
    sizes = [source.shape[:2] for source in sources]
    first = sizes[0] if sizes else None
    height, width = kinds.choose_size(config, request.height, request.width, first)
    for h, w in dict.fromkeys(sizes):
        if (h, w) != (height, width):  # an end picture may have another aspect than the start
            notes.append(f"the input of {w}x{h} is made at {width}x{height}")

    frames = mask = None
    if clip is not None:
        frames = resize(clip[:num_frames], height, width)
        if request.video is not None and request.strength == 1 and request.mask is None:
            notes.append("strength 1 and no mask: only the size and length of the video are kept")
    elif pictures:
        frames = np.stack([resize(picture, height, width) for picture in pictures])
        if kinds.model_kind(config) != "image":
            frames, mask = place_pictures(frames, request.end_image is not None, num_frames)
    if request.mask is not None:
        mask = read_mask(request.mask, num_frames, height, width, request.fps)
    if mask is not None and not mask.any():
        raise ValueError("what is given fills all frames and leaves nothing to generate; "
                         "raise num_frames, or give a mask with some white")  # fmt: skip
    known = Known(num_frames, height, width, frames, mask, tuple(notes))
    shape = latent_shape(config, known)
    if request.latents is not None and tuple(request.latents.shape) != shape:
        raise ValueError(f"latents of shape {tuple(request.latents.shape)} do not fit; expected {shape}")
    return known


def read_clip(request: Request, num_frames: int) -> np.ndarray | None:
    """The clip to change, or to follow, uint8 f h w 3 of at most num_frames."""
    source = request.control_video if request.video is None else request.video
    if source is None:
        return None
    clip = read_video(source, num_frames, request.fps)
    if request.num_frames and len(clip) < num_frames:
        raise ValueError(f"the clip has {len(clip)} frames at {request.fps:g} fps, fewer than "
                         f"num_frames={num_frames}; leave num_frames out")  # fmt: skip
    return clip


def place_pictures(pictures: np.ndarray, has_end: bool, num_frames: int) -> tuple[np.ndarray, Tensor]:
    """Pictures f h w 3 as a clip and its mask: the first on every frame, the others and the end on their own.

    The unknown frames are blacked out later; repeating the start picture there is the reference's way.
    """
    places = list(range(len(pictures)))
    if has_end:
        places[-1] = num_frames - 1
    frames = np.repeat(pictures[:1], num_frames, axis=0)
    frames[places] = pictures
    mask = torch.ones(frames.shape[:3], dtype=torch.bool)
    mask[places] = False
    return frames, mask


def latent_shape(config: TransformerConfig, known: Known) -> tuple[int, int, int, int, int]:
    """1 16 f' h' w' of what the network makes, the padding of CogVideoX1.5 included."""
    f, h, w = latent_grid(known.num_frames, known.height, known.width)
    return 1, config.out_channels, f + kinds.num_padding(config, f), h, w
