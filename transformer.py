"""The diffusion transformer of CogVideoX and CogVideoX-Fun: noisy latents, a timestep and text -> velocity.

    noisy b 16 f h w + condition b c f h w ─patchify, linear─► video b n d ┐
    text b L text_embed_dim ─linear──────────────────────────► text  b L d ┴─cat─► tokens b L+n d, + sincos
    timesteps b ─sinusoids, MLP─► temb b time_embed_dim ─linear─► shift, scale, gate of each norm
    tokens ─► num_layers × [ norm·scale + shift ─► attention, RoPE on q and k (5B) ─► × gate, + tokens
                             norm·scale + shift ─► d -> 4d -> d MLP ──────────────► × gate, + tokens ]
    video tokens ─► norm ─► norm·scale + shift ─► linear ─unpatchify─► velocity b 16 f h w

Text and video attend to each other as one sequence but are modulated separately (expert adaptive LayerNorm).
CogVideoX: Yang et al. 2024 (arXiv 2408.06072), sec. 2.2. Reference: diffusers cogvideox_transformer_3d.py and
CogVideoX-Fun cogvideox/models/transformer3d.py. Attributes carry the checkpoint's key names.

b batch · f h w frames, height, width of latents · c channels · n video tokens · L text tokens · d model width
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from checkpoint import component_dir, load_component, only, save_component
from embeddings import Grid, Rope, patchify, rope_table, rotate, sincos_table, timestep_embedding, unpatchify
from sizes import latent_frames


@dataclass
class TransformerConfig:
    """transformer/config.json; the defaults are CogVideoX-2B's."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64  # model width d = heads * head_dim
    in_channels: int = 16  # noisy latents plus condition: 16, 32 (control, image) or 33 (inpaint)
    out_channels: int = 16  # latent channels
    num_layers: int = 30
    time_embed_dim: int = 512  # width of the timestep's vector
    text_embed_dim: int = 4096  # width of T5
    max_text_seq_length: int = 226  # T5 tokens, padding included
    patch_size: int = 2  # latent pixels per token side
    patch_size_t: int | None = None  # latent frames per token; None before V1.5
    patch_bias: bool = True  # of the patch convolution before V1.5; the V1.5 linear layer always has one
    sample_width: int = 90  # native latent size: what sincos tables cover and RoPE is laid over
    sample_height: int = 60
    sample_frames: int = 49  # native length, in video frames
    temporal_compression_ratio: int = 4  # video frames per latent frame, after the first
    spatial_interpolation_scale: float = 1.875  # sincos positions are divided by this
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False  # RoPE (5B) instead of sincos (2B)
    use_learned_positional_embeddings: bool = False  # a stored table besides RoPE (5B I2V)
    attention_bias: bool = True  # of to_q, to_k, to_v
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    flip_sin_to_cos: bool = True  # cos first
    freq_shift: int = 0
    dropout: float = 0.0
    ofs_embed_dim: int | None = None  # a second vector beside the timestep's (CogVideoX1.5 I2V)
    add_noise_in_inpaint_model: bool = False  # reference pixels get noise, by whoever builds the condition
    extra: dict = field(default_factory=dict)  # keys we do not know, written back on saving

    def __post_init__(self) -> None:
        """ValueError for what no CogVideoX has, and what would be computed as something else."""
        only(
            self,
            temporal_compression_ratio=(4,),
            patch_size=(2,),
            patch_size_t=(None, 2),
            activation_fn=("gelu-approximate",),
            timestep_activation_fn=("silu",),
            flip_sin_to_cos=(True,),
            freq_shift=(0,),
            dropout=(0.0,),
        )
        if self.patch_size_t and not self.use_rotary_positional_embeddings:
            raise ValueError("patch_size_t needs use_rotary_positional_embeddings")

    @property
    def dim(self) -> int:
        """Model width d."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def native_grid(self) -> Grid:
        """(latent frames, rows, columns) of the native size; rows and columns in patches."""
        rows, cols = self.sample_height // self.patch_size, self.sample_width // self.patch_size
        return latent_frames(self.sample_frames), rows, cols

    @property
    def patch(self) -> tuple[int, int]:
        """Latent frames and latent pixels per side of one token."""
        return self.patch_size_t or 1, self.patch_size


POSITIONS = ("interpolate", "regenerate", "slice")


def position_rule(config: TransformerConfig) -> str | None:
    """What a model with added positions does off its native grid; None if it has RoPE alone.

    "interpolate": stretch the native table in space, cut it in time (CogVideoX-Fun: models with a condition)
    "regenerate": compute the table for the grid at hand (diffusers: plain CogVideoX, and in place of learned
        positions at another number of frames)
    "slice": the first n rows of the flattened native table, for comparison with the original CogVideoX. On a
        narrower grid they break lines in the wrong places.
    A model trained with another rule says so: "position" in config.json.
    """
    if "position" in config.extra:
        only(config, position=POSITIONS)
        return config.extra["position"]
    if config.use_learned_positional_embeddings:
        return "regenerate"
    if config.use_rotary_positional_embeddings:
        return None
    return "interpolate" if config.in_channels != config.out_channels else "regenerate"


# ---------------------------------------------------------------- into tokens


class PatchEmbed(nn.Module):
    """Latents and text -> tokens, each by its own linear layer."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.patch = config.patch
        p_t, p = config.patch
        if config.patch_size_t is None:
            self.proj = nn.Conv2d(config.in_channels, config.dim, p, stride=p, bias=config.patch_bias)
        else:
            self.proj = nn.Linear(config.in_channels * p_t * p * p, config.dim)
        self.text_proj = nn.Linear(config.text_embed_dim, config.dim)
        if config.use_learned_positional_embeddings:  # not trained further, but part of the checkpoint
            frames, rows, cols = config.native_grid
            num_tokens = config.max_text_seq_length + frames * rows * cols
            self.register_buffer("pos_embedding", torch.zeros(1, num_tokens, config.dim))

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:  # b c f h w, b L text_embed_dim -> b L+n d
        # A convolution whose stride is its kernel is a linear layer on patches: one path for both layouts.
        video = F.linear(patchify(latents, *self.patch), self.proj.weight.flatten(1), self.proj.bias)
        return torch.cat([self.text_proj(text), video], dim=1)


class TimestepEmbedding(nn.Module):
    """Sinusoids b d -> temb b time_embed_dim."""

    def __init__(self, dim: int, time_embed_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sinusoids: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


# ---------------------------------------------------------------- one block


def text_and_video(tokens: Tensor, num_text: int) -> tuple[Tensor, Tensor]:
    """b L+n d -> b L d and b n d; the backward of `split` fills one tensor, of two slices two."""
    return tokens.split([num_text, tokens.shape[1] - num_text], dim=1)


class AdaptiveNorm(nn.Module):
    """LayerNorm(x)·(1 + scale) + shift, with numbers from the timestep, of text and video each their own.

    Also returns the gates of the branch that follows. (DiT, Peebles & Xie 2023, sec. 3.2, adaLN-Zero.)
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 6 * config.dim)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps, config.norm_elementwise_affine)

    def forward(self, tokens: Tensor, temb: Tensor, num_text: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        numbers = self.linear(F.silu(temb))[:, None]  # b 1 6d, video before text
        shift, scale, gate, text_shift, text_scale, text_gate = numbers.chunk(6, dim=-1)
        text, video = text_and_video(self.norm(tokens), num_text)
        text = torch.addcmul(text_shift, text, 1 + text_scale)
        video = torch.addcmul(shift, video, 1 + scale)
        return torch.cat([text, video], dim=1), (text_gate, gate)


class Attention(nn.Module):
    """Every token attends to every token, padding included; q and k are normalised per head, then rotated."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(config.dim, config.dim, bias=config.attention_bias)
        self.to_k = nn.Linear(config.dim, config.dim, bias=config.attention_bias)
        self.to_v = nn.Linear(config.dim, config.dim, bias=config.attention_bias)
        self.norm_q = nn.LayerNorm(config.attention_head_dim, eps=1e-6)  # not norm_eps
        self.norm_k = nn.LayerNorm(config.attention_head_dim, eps=1e-6)
        self.to_out = nn.Sequential(nn.Linear(config.dim, config.dim))
        self.attend = F.scaled_dot_product_attention  # parallel.py puts its own here

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        q = self.norm_q(self.split_heads(self.to_q(x)))  # b heads L+n head_dim
        k = self.norm_k(self.split_heads(self.to_k(x)))
        v = self.split_heads(self.to_v(x))
        if rope is not None:
            q = rotate(q, rope)
            k = rotate(k, rope)
        x = self.attend(q, k, v)
        return self.to_out(x.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """d -> 4d -> d; its keys are net.0.proj and net.2."""

    def __init__(self, dim: int):
        super().__init__()
        first = nn.ModuleDict({"proj": nn.Linear(dim, 4 * dim)})
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.net[0]["proj"](x), approximate="tanh")
        return self.net[2](x)


def add_gated(tokens: Tensor, branch: Tensor, gates: tuple[Tensor, Tensor], num_text: int) -> Tensor:
    """tokens + gate·branch, with one gate (b 1 d) for text and one for video."""
    text, video = text_and_video(tokens, num_text)
    text_branch, video_branch = text_and_video(branch, num_text)
    text_gate, gate = gates
    text = torch.addcmul(text, text_gate, text_branch)
    video = torch.addcmul(video, gate, video_branch)
    return torch.cat([text, video], dim=1)


class Block(nn.Module):
    """Attention, then MLP, each between its adaptive norm and its gate."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm1 = AdaptiveNorm(config)
        self.attn1 = Attention(config)
        self.norm2 = AdaptiveNorm(config)
        self.ff = FeedForward(config.dim)

    def forward(self, tokens: Tensor, temb: Tensor, rope: Rope | None, num_text: int) -> Tensor:
        x, gates = self.norm1(tokens, temb, num_text)
        tokens = add_gated(tokens, self.attn1(x, rope), gates, num_text)
        x, gates = self.norm2(tokens, temb, num_text)
        return add_gated(tokens, self.ff(x), gates, num_text)


class OutputNorm(nn.Module):
    """LayerNorm(x)·(1 + scale) + shift for the video tokens that leave."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 2 * config.dim)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps, config.norm_elementwise_affine)

    def forward(self, video: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(temb))[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(video), 1 + scale)


# ---------------------------------------------------------------- the model

# What is behind F.scaled_dot_product_attention, by device and shapes.
ATTENTION_KERNELS = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
CHECKPOINTING = {  # "full" keeps a block's input, "attention" also its attention output; the rest is redone
    "full": {},
    "attention": {"context_fn": partial(create_selective_checkpoint_contexts, ATTENTION_KERNELS)},
}


def run_blocks(
    blocks: nn.ModuleList,
    tokens: Tensor,
    temb: Tensor,
    rope: Rope | None,
    num_text: int,
    checkpointing: str | None = None,
) -> Tensor:
    """Tokens b L+n d through the blocks; checkpointing: a key of CHECKPOINTING."""
    for block in blocks:
        if checkpointing:
            settings = CHECKPOINTING[checkpointing]
            tokens = checkpoint(block, tokens, temb, rope, num_text, use_reentrant=False, **settings)
        else:
            tokens = block(tokens, temb, rope, num_text)
    return tokens


OFS = 2.0  # the only value CogVideoX1.5 was ever given


class VideoTransformer(nn.Module):
    """velocity = dit(noisy, timesteps, text, condition); see the picture at the top of this file."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.time_embedding = TimestepEmbedding(config.dim, config.time_embed_dim)
        self.ofs_embedding = None
        if config.ofs_embed_dim:
            self.ofs_embedding = TimestepEmbedding(config.ofs_embed_dim, config.ofs_embed_dim)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(config.dim, config.norm_eps, config.norm_elementwise_affine)
        self.norm_out = OutputNorm(config)
        p_t, p = config.patch
        self.proj_out = nn.Linear(config.dim, config.out_channels * p_t * p * p)

        self.run_blocks = run_blocks  # stepcache.py and parallel.py put their own here
        self.activation_checkpointing: str | None = None  # a key of CHECKPOINTING
        self.position = position_rule(config)
        self._init_weights()

    def _init_weights(self) -> None:
        """For training from scratch, as DiT does: each block starts as the identity, the output at zero.

        Differs from the reference, which leaves torch's defaults."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.detach().flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm2.linear.weight)
        nn.init.zeros_(self.norm_out.linear.weight)
        nn.init.zeros_(self.proj_out.weight)
        if self.config.use_learned_positional_embeddings and not self.proj_out.weight.is_meta:
            table = self._sincos(self.config.native_grid, self.config.max_text_seq_length)
            self.patch_embed.pos_embedding.copy_(table)

    def forward(
        self, noisy: Tensor, timesteps: Tensor | int, text: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """The velocity at a noisy sample, b out_channels f h w.

        noisy: b out_channels f h w    timesteps: b, or one for all, in [0, 1000)    text: b L text_embed_dim
        condition: b (in_channels - out_channels) f h w, joins noisy on the channel axis
        """
        self._check(noisy, text, condition)
        f, h, w = noisy.shape[2:]
        p_t, p = self.config.patch
        latents = noisy if condition is None else torch.cat([noisy, condition], dim=1)
        latents = F.pad(latents, (0, 0, 0, 0, 0, -f % p_t))  # V1.5: a lone frame gets a zero frame beside it
        grid = (latents.shape[2] // p_t, h // p, w // p)

        num_text = text.shape[1]
        tokens = self.patch_embed(latents, text)
        added, rope = self._positions(grid, num_text, noisy.device)
        if added is not None:
            tokens = tokens + added.to(tokens.dtype)

        timesteps = torch.as_tensor(timesteps, device=noisy.device).expand(len(noisy))
        temb = self.time_vector(timesteps, noisy.dtype)
        checkpointing = self.activation_checkpointing if torch.is_grad_enabled() else None
        tokens = self.run_blocks(self.transformer_blocks, tokens, temb, rope, num_text, checkpointing)

        video = self.norm_out(self.norm_final(tokens[:, num_text:]), temb)
        return unpatchify(self.proj_out(video), grid, p_t, p)[:, :, :f]

    def time_vector(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """temb b time_embed_dim, of timesteps b."""
        sinusoids = timestep_embedding(timesteps, self.config.dim)
        temb = self.time_embedding(sinusoids.to(dtype))
        if self.ofs_embedding is not None:
            sinusoids = timestep_embedding(torch.full_like(timesteps, OFS), self.config.ofs_embed_dim)
            temb = temb + self.ofs_embedding(sinusoids.to(dtype))
        return temb

    def _positions(
        self, grid: Grid, num_text: int, device: torch.device
    ) -> tuple[Tensor | None, Rope | None]:
        """What is added to the tokens (L+n d) and what rotates q and k (cos, sin), either or both."""
        config = self.config
        rope = added = None
        if config.use_rotary_positional_embeddings:
            native = None if config.patch_size_t else config.native_grid[1:]
            rope = rope_table(config.attention_head_dim, grid, native, num_text, device)
        if config.use_learned_positional_embeddings and grid == config.native_grid:
            added = self.patch_embed.pos_embedding
        elif self.position is not None:
            added = self._sincos(grid, num_text, device)
        return added, rope

    def _sincos(self, grid: Grid, num_text: int, device: torch.device | str = "cpu") -> Tensor:
        config = self.config
        num_tokens = num_text + math.prod(grid)
        if self.position == "slice":
            grid = config.native_grid
        native = config.native_grid[1:] if self.position == "interpolate" else grid[1:]
        scales = config.spatial_interpolation_scale, config.temporal_interpolation_scale
        table = sincos_table(config.dim, grid, native, num_text, *scales, torch.device(device))
        return table[:num_tokens]

    def _check(self, noisy: Tensor, text: Tensor, condition: Tensor | None) -> None:
        """The network's door: shapes that would give other numbers than meant, or a riddle of an error."""
        config = self.config
        b, c, f, h, w = noisy.shape
        channels = config.out_channels
        num_extra = config.in_channels - channels
        wanted = (b, num_extra, f, h, w) if num_extra else None
        given = None if condition is None else tuple(condition.shape)
        if c != channels or given != wanted:
            raise ValueError(f"noisy is {tuple(noisy.shape)} and condition {given}; a model of "
                             f"{config.in_channels} channels needs {channels} and {num_extra}")  # fmt: skip
        if self.position and text.shape[1] != config.max_text_seq_length:  # RoPE takes any
            raise ValueError(f"text has {text.shape[1]} tokens, not {config.max_text_seq_length}")
        if h % config.patch_size or w % config.patch_size or (f > 1 and f % config.patch[0]):
            raise ValueError(f"latents of {f}x{h}x{w} do not divide into patches of {config.patch}")
        frames, rows, cols = config.native_grid
        if self.position == "interpolate" and f > frames:
            raise ValueError(f"{f} latent frames; this model's positions end at {frames}")
        if config.use_learned_positional_embeddings and (h, w) != (2 * rows, 2 * cols):
            raise ValueError(f"latents are {h}x{w}; learned positions only fit {2 * rows}x{2 * cols}")

    @classmethod
    def from_pretrained(
        cls, model_dir: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Self:
        """Load `model_dir/transformer`, or `model_dir` itself; ValueError or OSError if it does not fit."""
        return load_component(cls, TransformerConfig, component_dir(model_dir, "transformer"), dtype, device)

    def save_pretrained(self, model_dir: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write `model_dir/transformer` as diffusers and CogVideoX-Fun read it.

        state: what `state_dict()` is; of a sharded model, with the tensors gathered
        """
        folder = Path(model_dir) / "transformer"
        save_component(self, folder, state=state, _class_name="CogVideoXTransformer3DModel")


# ---------------------------------------------------------------- from one kind to another


def grow_input_channels(dit: VideoTransformer, in_channels: int) -> None:
    """Give a model more condition channels, in place: 16 -> 33 starts inpainting from text-to-video.

    The new weights are zero, so at first the new channels change nothing. A 2B model now stretches its
    positions, though (`position_rule`), so off its native grid its velocity changes.
    """
    old = dit.config
    state = dit.patch_embed.state_dict()
    weight = state["proj.weight"].reshape(old.dim, old.in_channels, -1)  # d c (p_t p p), whatever the layer
    weight = F.pad(weight, (0, 0, 0, in_channels - old.in_channels))
    dit.config = replace(old, in_channels=in_channels)
    dit.position = position_rule(dit.config)
    with torch.device("meta"):
        dit.patch_embed = PatchEmbed(dit.config)
    state["proj.weight"] = weight.reshape(dit.patch_embed.proj.weight.shape)
    dit.patch_embed.load_state_dict(state, assign=True)
