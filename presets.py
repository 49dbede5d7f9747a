"""What a run is: its settings, and the presets that --preset and --train choose from.

A new preset goes into `PRESETS`. Each field can be changed by a flag of train.py or by --set FIELD=VALUE.
Report: CogVideoX-Fun v1 (token lengths, phases); reference: CogVideoX-Fun README_TRAIN.md, scripts/train.sh.
"""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field, replace

from diffusion import ScheduleConfig
from inpaint import MASK_KINDS
from text_encoder import T5Config
from transformer import TransformerConfig
from vae import VAEConfig


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one token budget."""

    resolutions: tuple[int, ...]  # base sizes, mixed
    max_tokens: int  # of one clip
    global_batch: int  # clips of max_tokens in a step; cheaper shapes come in larger numbers
    num_steps: int
    lr: float
    final_lr: float  # reached by half a cosine; the same as lr: constant
    train_text: bool = False  # the text encoder as well
    pictures: bool = False  # one frame of each sample alone


@dataclass(frozen=True)
class Config:
    """All settings the numbers of a run depend on."""

    phases: tuple[Phase, ...]
    train: str = "dit"  # or "vae"
    max_frames: int = 49
    fps: float | None = None  # that files are read at; None: the model's own
    batch_size: int = 1  # clips of max_tokens in a micro-batch; global_batch / batch_size of them are a step
    noises_per_clip: int = 1  # with a timestep each: encoding a clip may cost more than a small transformer
    timestep_shift: float = 1.0  # above 1: more of the noisy timesteps, see `stratified_timesteps`
    masks: dict[str, float] = field(default_factory=MASK_KINDS.copy)  # kinds and their shares
    text_only: float = 0.0  # share of samples with everything masked and a zero condition, beyond `masks`
    motion_sub_loss: float = 0.0  # share of the loss that is of motion alone, see `denoising_losses`
    optimizer: str = "adamw"  # or "muon": that for matrices, AdamW for vectors and tables, see optim.py
    warmup_steps: int = 100  # in each phase
    weight_decay: float = 0.03
    adam_eps: float = 1e-10
    max_grad_norm: float = 0.05
    wide_clip_steps: int | None = None  # the reference's clipping over time, see `clip_norm`; None: constant
    ema_decay: float = 0.9999  # less at first, see `Optim.update_ema`; 0: no EMA
    position: str | None = None  # sincos off the native grid, see transformer.position_rule; None: as it is
    in_channels: int | None = None  # of the transformer, grown with zeros; None: as it is
    lora_rank: int | None = None  # learn thin matrices beside the transformer's, not its weights; see lora.py
    lora_alpha: float | None = None  # None: the rank
    # Of each sample, taken in turn by the epochs, in the folder of --cache-latents, else on the device; see
    # cache.py. 0: nothing is kept.
    cached_draws: int = 0
    only_full: bool = False  # samples that fill no micro-batch of their shape wait for the next epoch
    kl_weight: float = 1e-5  # of --train vae, as the next two
    equivariance: float = 0.0  # weight of EQ-VAE's penalty, see train_vae.py
    keep_encoder: bool = False  # only the decoder learns: transformers trained on its latents stay valid
    compile_on_gpu: bool = False  # as if --compile were given, where there is one
    save_dtype: str | None = None  # of the weights in OUT when the run has ended; None: float32
    seed: int = 0
    num_shapes: int = 20_000  # samples in an epoch of --data shapes
    picture_share: float = 1 / 6  # of these; the others are clips
    dit: TransformerConfig = field(default_factory=TransformerConfig)  # if there is none yet
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)  # likewise
    vae: VAEConfig | None = None  # likewise; None: there has to be one
    t5: T5Config | None = None


def set_field(config, assignment: str):
    """A dataclass with FIELD=VALUE changed; FIELD may lead into another, as in dit.num_layers."""
    name, is_given, text = assignment.partition("=")
    first, _, rest = name.partition(".")
    is_field = is_given and hasattr(config, first) and first != "phases"
    if not is_field or (rest and not dataclasses.is_dataclass(getattr(config, first))):
        names = ", ".join(f.name for f in dataclasses.fields(config) if f.name not in ("phases", "extra"))
        raise ValueError(f"--set {assignment}: should be FIELD=VALUE, with one of {names}")
    if rest:
        return replace(config, **{first: set_field(getattr(config, first), f"{rest}={text}")})
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    hint = typing.get_type_hints(type(config))[first]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(kind) or kind for kind in kinds]  # list of list[int]
    if type(value) is int and float in kinds:
        value = float(value)
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"--set {assignment}: {first} should be of type {names}")
    return replace(config, **{first: value})


def sizes_from(low: int) -> tuple[int, ...]:
    return tuple(range(low, 1281, 128))


# The reference's commands (README_TRAIN.md, scripts/train.sh): lr 2e-5, constant after 100 steps of warm-up,
# and the weight decay, eps and norm that are defaults above; its train.py clips wider at first.
FUN_2B = Config(
    phases=(  # resolutions, tokens, clips a step, steps, lr
        Phase(sizes_from(512), 13312, 128, 7000, 2e-5, 2e-5),
        Phase(sizes_from(768), 29952, 256, 6500, 2e-5, 2e-5),
        Phase(sizes_from(1024), 53248, 128, 5000, 2e-5, 2e-5),
    ),
    wide_clip_steps=1000,
    dit=TransformerConfig(in_channels=33),
)
FUN_5B = replace(
    FUN_2B,
    dit=replace(FUN_2B.dit, num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True),
)
FUN_VAE = replace(
    FUN_2B,
    train="vae",
    phases=(Phase((256,), 768, 8, 7000, 2e-5, 2e-6),),  # 9 frames: 49 at 512² would keep 670 GiB
    max_grad_norm=1.0,
    wide_clip_steps=None,
)
# The report at an eighth of its scale, sized for ten minutes of an H200 and not yet run to its end; rates,
# steps and shift are chosen, not tuned. Pictures carry the first part: cheap, and all there is of shape.
TINY = Config(
    phases=(
        Phase((64, 96), 40, 1024, 1800, 1.5e-3, 1.5e-3, train_text=True, pictures=True),
        Phase((64, 96), 80, 1024, 4000, 1.5e-3, 8e-4, train_text=True),
        Phase((64, 96, 128), 180, 1024, 1800, 8e-4, 4e-4),
        Phase((64, 96, 128), 320, 1024, 1100, 4e-4, 1e-5),
    ),
    max_frames=17,
    batch_size=1024,  # one micro-batch a step: with four, Python took four fifths of an H200's time
    timestep_shift=1.5,
    text_only=0.2,
    adam_eps=1e-8,
    weight_decay=0.01,
    max_grad_norm=1.0,
    ema_decay=0.999,
    cached_draws=1,
    only_full=True,
    save_dtype="bfloat16",
    compile_on_gpu=True,
    dit=TransformerConfig(
        in_channels=33,
        num_attention_heads=4,
        num_layers=8,
        time_embed_dim=128,
        text_embed_dim=128,
        max_text_seq_length=24,
        sample_width=8,
        sample_height=8,
        sample_frames=17,
        spatial_interpolation_scale=0.9375,  # at 1.875 a table of 4x4 hides the aspect
    ),
    vae=VAEConfig(
        block_out_channels=[24, 32, 48, 64],
        layers_per_block=1,
        norm_num_groups=8,
        sample_height=256,
        sample_width=256,
        scaling_factor=1.0,
    ),
    t5=T5Config(vocab_size=27, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),  # 27: shapes.WORDS
    schedule=ScheduleConfig(extra={"guidance_scale": 2.0}),  # 3 makes worse end pictures, 6 worse shapes
)
# Three minutes more. Short clips first: their steps are cheap. The KL term keeps channels near zero and
# leaves noise in what pixels do not need. 64 stands twice, as edges are hardest there.
TINY_VAE = replace(
    TINY,
    train="vae",
    batch_size=64,
    optimizer="muon",  # on small clips 1 dB ahead of AdamW after 100 steps
    cached_draws=0,
    only_full=False,
    weight_decay=0.0,
    timestep_shift=1.0,
    text_only=0.0,
    kl_weight=5e-4,
    equivariance=0.25,
    phases=(
        Phase((64,), 48, 64, 500, 5e-3, 2.5e-3),
        Phase((64, 64, 96, 128), 96, 64, 300, 2.5e-3, 1e-5),
    ),
)


def scaled_down(config: Config, clips: int, num_shapes: int) -> Config:
    """The same preset for a CPU: `clips` times fewer clips in a step and in a micro-batch."""
    phases = [replace(phase, global_batch=phase.global_batch // clips) for phase in config.phases]
    batch_size = max(1, config.batch_size // clips)
    return replace(config, phases=tuple(phases), batch_size=batch_size, num_shapes=num_shapes)


PRESETS = {  # --preset, --train
    "tiny": {"dit": TINY, "vae": TINY_VAE},
    "tiny-cpu": {"dit": scaled_down(TINY, 16, 10_000), "vae": scaled_down(TINY_VAE, 8, 10_000)},
    "fun-2b": {"dit": FUN_2B, "vae": FUN_VAE},
    "fun-5b": {"dit": FUN_5B, "vae": FUN_VAE},
}
