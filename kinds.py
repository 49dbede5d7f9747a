"""What a model is for, at which sizes: all of it follows from transformer/config.json, never from a name.

    in_channels         kind     takes a prompt and …                       its pipeline in the reference
    16                  text     a clip and strength                        diffusers CogVideoX, …VideoToVideo
    33 = 16+1+16        inpaint  start, end pictures; clip, mask, strength  CogVideoX_Fun_Pipeline_Inpaint
    32 = 16+16          control  a control clip                             CogVideoX_Fun_Pipeline_Control
    32, learned or ofs  image    a start picture, an end if trained so      diffusers CogVideoXImageToVideo

Models of kind text or image with patch_size_t are CogVideoX1.5: an odd number of latent frames above one gets
one more in front, which is dropped before decoding (`num_padding`). Of kind inpaint they are Fun V1.5.
"""

import math

from sizes import MAX_FRAMES, check_frames, check_side, latent_frames, near_side, video_frames
from transformer import TransformerConfig, position_rule


def model_kind(config: TransformerConfig) -> str:
    """text, inpaint, control or image: what a transformer was trained to be told beside the noisy latents."""
    extra = config.in_channels - config.out_channels
    if extra == 0:
        return "text"
    if extra == config.out_channels + 1:
        return "inpaint"
    if extra == config.out_channels:
        is_image = config.use_learned_positional_embeddings or config.ofs_embed_dim
        return "image" if is_image else "control"
    raise ValueError(f"in_channels = {config.in_channels} is no kind of model we know; 16, 32 and 33 are")


def is_cogvideox15(config: TransformerConfig) -> bool:
    """CogVideoX1.5 as diffusers runs it, and not Fun V1.5, which has other rules for sizes."""
    return config.patch_size_t is not None and model_kind(config) in ("text", "image")


def native_size(config: TransformerConfig) -> tuple[int, int, int]:
    """(height, width, frames) a model is made for.

    Files of models with patch_size_t may say 300×300 latents; they live at 480×720×85 pixels (Fun V1.5) and
    768×1360×81 (CogVideoX1.5).
    """
    height, width, num_frames = 8 * config.sample_height, 8 * config.sample_width, config.sample_frames
    if is_cogvideox15(config):
        height, width = min(768, height), min(1360, width)
    elif config.patch_size_t:
        height, width, num_frames = min(480, height), min(720, width), 85
    return height // 16 * 16, width // 16 * 16, video_frames(latent_frames(num_frames))


def native_fps(config: TransformerConfig) -> float:
    """Frames a second of the clips a model learnt from, for reading as for writing."""
    return 16.0 if is_cogvideox15(config) else 8.0


def max_num_frames(config: TransformerConfig) -> int:
    """A native table of positions ends; RoPE, and tables computed anew, go on."""
    if position_rule(config) in (None, "regenerate"):
        return MAX_FRAMES
    return video_frames(latent_frames(config.sample_frames))


def check_size(
    config: TransformerConfig, height: int | None, width: int | None, num_frames: int | None
) -> None:
    """ValueError, with what to try, for a size this model cannot make; None is not looked at."""
    for name, size in (("height", height), ("width", width)):
        if size is None:
            continue
        check_side(name, size)
        native = 8 * getattr(config, f"sample_{name}")
        if config.use_learned_positional_embeddings and size != native:
            raise ValueError(f"{name}={size}; this model's learned positions only fit {name}={native}")
    if num_frames is None:
        return
    check_frames(num_frames)
    if num_frames > max_num_frames(config):
        raise ValueError(f"num_frames={num_frames} is more than this model's positions hold; "
                         f"the most is {max_num_frames(config)}")  # fmt: skip


def choose_size(
    config: TransformerConfig, height: int | None, width: int | None, source: tuple[int, int] | None
) -> tuple[int, int]:
    """Height and width as asked; a missing one follows the aspect of the source (its height, width).

    Where both are missing they take the native area. Without a source, what is missing is native.
    """
    native_height, native_width, _ = native_size(config)
    if source is None or config.use_learned_positional_embeddings:  # learned positions fit one size only
        return height or native_height, width or native_width
    aspect = source[0] / source[1]
    exact_height = math.sqrt(native_height * native_width * aspect)
    if width:
        exact_height = width * aspect
    if height:
        exact_height = height
    return height or near_side(exact_height), width or near_side(exact_height / aspect)


def legal_num_frames(config: TransformerConfig, num_frames: int, from_clip: bool = False) -> int:
    """The largest number of frames the model can make that is not above num_frames.

    Models with patch_size_t take latent frames in pairs. Fun V1.5 gives up the last of an odd number above
    one, and so does CogVideoX1.5 where it starts from a clip; else it puts one more in front, `num_padding`.
    """
    count = latent_frames(min(num_frames, max_num_frames(config)))
    pads = is_cogvideox15(config) and not from_clip
    if config.patch_size_t and count > 1 and not pads:
        count -= count % config.patch_size_t
    return video_frames(count)


def num_padding(config: TransformerConfig, num_latent_frames: int) -> int:
    """How many latent frames CogVideoX1.5 makes in front of a video, to be dropped before decoding."""
    if is_cogvideox15(config) and num_latent_frames > 1:
        return num_latent_frames % config.patch_size_t
    return 0
