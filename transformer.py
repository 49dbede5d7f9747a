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

b batch · f frames · h w height, width · c channels · n video tokens · L text tokens · d model width
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from checkpoint import MAX_SHARD_BYTES, component_dir, load_component, save_component
from embeddings import Grid, Rope, patchify, rope_table, rotate, sincos_table, timestep_embedding, unpatchify


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
    ofs_embed_dim: int | None = None  # CogVideoX1.5 I2V only
    add_noise_in_inpaint_model: bool = False  # reference pixels get noise, by whoever builds the condition
    extra: dict = field(default_factory=dict)  # keys we do not know, written back on saving

    def __post_init__(self) -> None:
        supported = {
            "temporal_compression_ratio": (4,),
            "patch_size_t": (None, 2),
            "activation_fn": ("gelu-approximate",),
            "timestep_activation_fn": ("silu",),
            "flip_sin_to_cos": (True,),
            "freq_shift": (0,),
            "dropout": (0.0,),
            "ofs_embed_dim": (None,),
        }
        for name, values in supported.items():
            if getattr(self, name) not in values:
                allowed = " or ".join(map(repr, values))
                raise ValueError(f"{name} = {getattr(self, name)!r} is not supported, only {allowed}")
        sizes = ["num_attention_heads", "attention_head_dim", "out_channels", "time_embed_dim", "patch_size"]
        for name in [*sizes, "spatial_interpolation_scale", "temporal_interpolation_scale", "norm_eps"]:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        rope, learned = self.use_rotary_positional_embeddings, self.use_learned_positional_embeddings
        if self.in_channels < self.out_channels:
            raise ValueError(f"in_channels = {self.in_channels} is below out_channels = {self.out_channels}")
        if min(self.native_grid) < 1:
            raise ValueError(f"sample_frames, sample_height, sample_width give a grid of {self.native_grid}")
        if (rope and self.attention_head_dim % 16) or self.dim % 16:
            part = "attention_head_dim" if rope else "num_attention_heads * attention_head_dim"
            raise ValueError(f"{part} must be a multiple of 16, for three axes of positions")
        if learned and (self.patch_size_t or not rope):
            raise ValueError("use_learned_positional_embeddings needs RoPE and no patch_size_t")
        if self.patch_size_t and not rope:
            raise ValueError("patch_size_t needs use_rotary_positional_embeddings")

    @property
    def dim(self) -> int:
        """Model width d."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def native_grid(self) -> Grid:
        """(latent frames, rows, columns) of the native size; rows and columns in patches."""
        frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        return frames, self.sample_height // self.patch_size, self.sample_width // self.patch_size

    @property
    def patch(self) -> tuple[int, int]:
        """Latent frames and latent pixels per side of one token."""
        return self.patch_size_t or 1, self.patch_size


# ---------------------------------------------------------------- into tokens


class PatchEmbed(nn.Module):
    """Latents and text -> tokens, each by its own linear layer."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        p_t, p = self.patch = config.patch
        if config.patch_size_t is None:
            self.proj = nn.Conv2d(config.in_channels, config.dim, p, stride=p, bias=config.patch_bias)
        else:
            self.proj = nn.Linear(config.in_channels * p_t * p * p, config.dim)
        self.text_proj = nn.Linear(config.text_embed_dim, config.dim)
        if config.use_learned_positional_embeddings:  # not trained further, but part of the checkpoint
            frames, rows, cols = config.native_grid
            num_tokens = config.max_text_seq_length + frames * rows * cols
            self.register_buffer("pos_embedding", torch.zeros(1, num_tokens, config.dim))

    def forward(self, latents: Tensor) -> Tensor:  # b c f h w -> b n d
        # A convolution whose stride is its kernel is a linear layer on patches: one path for both layouts.
        return F.linear(patchify(latents, *self.patch), self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedding(nn.Module):
    """Sinusoids b d -> temb b time_embed_dim."""

    def __init__(self, dim: int, time_embed_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sinusoids: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


# ---------------------------------------------------------------- one block


def parted(tokens: Tensor, num_text: int) -> tuple[Tensor, Tensor]:
    """b L+n d -> text b L d and video b n d; the backward of `split` fills one tensor, of two slices two."""
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
        text, video = parted(self.norm(tokens), num_text)
        text = torch.addcmul(text_shift, text, 1 + text_scale)
        video = torch.addcmul(shift, video, 1 + scale)
        return torch.cat([text, video], dim=1), (text_gate, gate)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√head_dim) v    all: b heads n head_dim

    Training in bf16 on a CPU, plain products take 0.3 … 0.5 of the time of torch's kernel at 104 to 344
    tokens, 0.95 at 1058, where keeping all scores begins to cost memory.
    """
    if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[-2] <= 1024:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # b heads n n
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


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
        self.attend = attend  # parallel.py puts its own here

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # b heads L+n head_dim
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        x = self.attend(q, k, v)
        return self.to_out(x.transpose(1, 2).flatten(2))


class GELU(nn.Module):
    """Linear layer and tanh-approximated GELU; a module only for its key, ff.net.0.proj."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """d -> 4d -> d."""

    def __init__(self, dim: int):
        super().__init__()
        no_dropout = nn.Identity()  # holds index 1, where the reference has one
        self.net = nn.Sequential(GELU(dim, 4 * dim), no_dropout, nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def add_gated(tokens: Tensor, branch: Tensor, gates: tuple[Tensor, Tensor], num_text: int) -> Tensor:
    """tokens + gate·branch, with one gate (b 1 d) for text and one for video."""
    pairs = zip(parted(tokens, num_text), gates, parted(branch, num_text))
    return torch.cat([torch.addcmul(*pair) for pair in pairs], dim=1)


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

# What F.scaled_dot_product_attention becomes, by device and shapes: not to be done again with "attention".
ATTENTION_KERNELS = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
CHECKPOINTING = {  # what the backward pass finds of a block: its input; and the output of its attention
    "full": {},
    "attention": {"context_fn": partial(create_selective_checkpoint_contexts, ATTENTION_KERNELS)},
}


class VideoTransformer(nn.Module):
    """velocity = dit(noisy, timesteps, text, condition); see the picture at the top of this file."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.time_embedding = TimestepEmbedding(config.dim, config.time_embed_dim)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(config.dim, config.norm_eps, config.norm_elementwise_affine)
        self.norm_out = OutputNorm(config)
        p_t, p = config.patch
        self.proj_out = nn.Linear(config.dim, config.out_channels * p_t * p * p)

        self.activation_checkpointing: str | None = None  # a key of CHECKPOINTING: recompute in backward
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
        norms = [norm for block in self.transformer_blocks for norm in (block.norm1, block.norm2)]
        for layer in [*(norm.linear for norm in norms), self.norm_out.linear, self.proj_out]:
            nn.init.zeros_(layer.weight)
        if self.config.use_learned_positional_embeddings and not self.proj_out.weight.is_meta:
            table = self._sincos(self.config.native_grid, self.config.max_text_seq_length)
            self.patch_embed.pos_embedding.copy_(table)

    def project_text(self, text: Tensor) -> Tensor:
        """T5's output b L text_embed_dim -> text tokens b L d, which need computing only once per prompt."""
        return self.patch_embed.text_proj(text)

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor | int,
        text: Tensor,
        condition: Tensor | None = None,
        text_projected: bool = False,
    ) -> Tensor:
        """The velocity at a noisy sample.

        noisy: b out_channels f h w    timesteps: b, or one for all, in [0, 1000)
        text: b L text_embed_dim; or what `project_text` made of it, if text_projected
        condition: b (in_channels - out_channels) f h w, joins noisy on the channel axis
        returns: b out_channels f h w
        raises ValueError for shapes this model cannot take
        """
        self._check(noisy, text, condition, text_projected)
        batch, _, f, h, w = noisy.shape
        p_t, p = self.config.patch
        latents = noisy if condition is None else torch.cat([noisy, condition], dim=1)
        latents = F.pad(latents, (0, 0, 0, 0, 0, -f % p_t))  # V1.5: a lone frame gets a zero frame beside it
        grid = (latents.shape[2] // p_t, h // p, w // p)

        text = text if text_projected else self.project_text(text)
        num_text = text.shape[1]
        tokens = torch.cat([text, self.patch_embed(latents)], dim=1)  # b L+n d
        added, rope = self._positions(grid, num_text, noisy.device)
        if added is not None:
            tokens = tokens + added.to(tokens.dtype)

        timesteps = torch.as_tensor(timesteps, device=noisy.device).expand(batch)
        temb = self.time_embedding(timestep_embedding(timesteps, self.config.dim).to(noisy.dtype))
        for block in self.transformer_blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                how = CHECKPOINTING[self.activation_checkpointing]
                tokens = checkpoint(block, tokens, temb, rope, num_text, use_reentrant=False, **how)
            else:
                tokens = block(tokens, temb, rope, num_text)

        video = self.norm_out(self.norm_final(tokens[:, num_text:]), temb)
        return unpatchify(self.proj_out(video), grid, p_t, p)[:, :, :f]

    def _positions(
        self, grid: Grid, num_text: int, device: torch.device
    ) -> tuple[Tensor | None, Rope | None]:
        """What is added to the tokens (L+n d) and what rotates q and k (cos, sin), either or both."""
        config, rope, added = self.config, None, None
        if config.use_rotary_positional_embeddings:
            native = None if config.patch_size_t else config.native_grid[1:]
            rope = rope_table(config.attention_head_dim, grid, native, num_text, device)
        if config.use_learned_positional_embeddings and grid == config.native_grid:
            added = self.patch_embed.pos_embedding
        elif self.position is not None:
            added = self._sincos(grid, num_text, device)
        return added, rope

    def _sincos(self, grid: Grid, num_text: int, device: torch.device | str = "cpu") -> Tensor:
        drawn = self.config.native_grid if self.position == "slice" else grid
        native = self.config.native_grid[1:] if self.position == "interpolate" else drawn[1:]
        scales = self.config.spatial_interpolation_scale, self.config.temporal_interpolation_scale
        table = sincos_table(self.config.dim, drawn, native, num_text, *scales, torch.device(device))
        return table[: num_text + math.prod(grid)]

    def _check(self, noisy: Tensor, text: Tensor, condition: Tensor | None, text_projected: bool) -> None:
        """Stop, in one sentence, at whatever a caller can get wrong."""
        config = self.config
        if noisy.dim() != 5 or noisy.shape[1] != config.out_channels:
            raise ValueError(f"noisy is {tuple(noisy.shape)}; expected b {config.out_channels} f h w")
        batch, _, f, h, w = noisy.shape
        num_extra = config.in_channels - config.out_channels
        wanted = (batch, num_extra, f, h, w) if num_extra else None
        given = None if condition is None else tuple(condition.shape)
        if given != wanted:
            raise ValueError(f"condition is {given}; a model of {config.in_channels} channels needs {wanted}")
        width = config.dim if text_projected else config.text_embed_dim
        length = config.max_text_seq_length if self.position else text.shape[1]  # RoPE takes any
        if text.shape != (batch, length, width):
            raise ValueError(f"text is {tuple(text.shape)}; expected {(batch, length, width)}")
        p, native_h, native_w = config.patch_size, config.sample_height, config.sample_width
        if h % p or w % p:
            raise ValueError(f"latents are {h}x{w}; both need to be multiples of {p}, pixels of {8 * p}")
        num_frames = config.native_grid[0]
        if self.position == "interpolate" and f > num_frames:
            raise ValueError(f"{f} latent frames; this model's positions end at {num_frames}")
        most = math.prod(config.native_grid)
        if self.position == "slice" and f * h * w > most * p * p:
            raise ValueError(f"{f * h * w // (p * p)} tokens; a sliced table ends at {most}")
        if config.patch_size_t and f > 1 and f % config.patch_size_t:
            raise ValueError(f"{f} latent frames; this model takes 1 or a multiple of {config.patch_size_t}")
        if config.use_learned_positional_embeddings and (h, w) != (native_h, native_w):
            raise ValueError(f"latents are {h}x{w}; learned positions only fit {native_h}x{native_w}")
        if config.patch_size_t and (h > native_h or w > native_w):
            raise ValueError(f"latents are {h}x{w}; this model's positions end at {native_h}x{native_w}")

    @classmethod
    def from_pretrained(
        cls, model_dir: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "VideoTransformer":
        """Load `model_dir/transformer`, or `model_dir` itself; ValueError or OSError if it does not fit."""
        return load_component(cls, TransformerConfig, component_dir(model_dir, "transformer"), dtype, device)

    def save_pretrained(
        self,
        model_dir: str | Path,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        """Write `model_dir/transformer` as diffusers and CogVideoX-Fun read it.

        state: what `state_dict()` is; of a sharded model, with the tensors gathered
        """
        stamps = {"_class_name": "CogVideoXTransformer3DModel", "max_shard_bytes": max_shard_bytes}
        save_component(self, Path(model_dir) / "transformer", state=state, **stamps)


POSITIONS = ("interpolate", "regenerate", "slice")


def position_rule(config: TransformerConfig) -> str | None:
    """What a model with added positions does off its native grid; None if it has RoPE alone.

    "interpolate": stretch the native table in space, cut it in time. CogVideoX-Fun does so; its models are
        those with condition channels.
    "regenerate": compute the table for the grid at hand. diffusers does so for plain CogVideoX, and in place
        of learned positions at another number of frames.
    "slice", for comparison only: the first n rows of the flattened native table, as the original CogVideoX
        takes them. On a narrower grid they break lines in the wrong places.
    `train.py --position` picks another rule, and the folders it writes say so: "position" in config.json.
    """
    if "position" in config.extra:
        position = config.extra["position"]
        if position not in POSITIONS:
            allowed = ", ".join(POSITIONS)
            raise ValueError(f"transformer/config.json: position = {position!r} should be one of {allowed}")
        return position
    if config.use_learned_positional_embeddings:
        return "regenerate"
    if config.use_rotary_positional_embeddings:
        return None
    return "interpolate" if config.in_channels != config.out_channels else "regenerate"


# ---------------------------------------------------------------- what a model can be asked for


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


def largest_side(config: TransformerConfig, name: str) -> int:
    """V1.5's positions end with its table; others stretch, and we stop at 16384."""
    return 8 * getattr(config, f"sample_{name}") // 16 * 16 if config.patch_size_t else 16384


def check_side(config: TransformerConfig, name: str, size: int) -> None:
    """ValueError unless a height or width (the name) is a multiple of 16 that the model's positions hold."""
    native = 8 * getattr(config, f"sample_{name}")
    most = largest_side(config, name)
    if not 16 <= size <= most or size % 16:
        nearest = min(max(round(size / 16) * 16, 16), most)
        raise ValueError(f"{name}={size}; sizes are multiples of 16 up to {most}, try {nearest}")
    if config.use_learned_positional_embeddings and size != native:
        raise ValueError(f"{name}={size}; this model's learned positions only fit {name}={native}")


def check_num_frames(config: TransformerConfig, num_frames: int) -> None:
    """ValueError unless num_frames is 4k+1 and within the model's positions."""
    if num_frames < 1 or num_frames % 4 != 1:
        up = max(num_frames - 1, 0) // 4 * 4 + 5
        tries = sorted({legal_num_frames(config, up), legal_num_frames(config, max(up - 4, 1))}, reverse=True)
        raise ValueError(f"num_frames={num_frames}; the VAE needs 4k+1, try {' (or '.join(map(str, tries))}"
                         + ")" * (len(tries) - 1))  # fmt: skip
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
    num_frames = (config.sample_frames - 1) // 4 * 4 + 1
    if config.patch_size_t:
        height, width, num_frames = min(480, height), min(720, width), 85
    return height // 16 * 16, width // 16 * 16, num_frames


def choose_size(
    config: TransformerConfig, height: int | None, width: int | None, source: tuple[int, int] | None
) -> tuple[int, int]:
    """Height and width: as asked; else the native area at the source's aspect, in multiples of 16."""
    native_height, native_width, _ = native_size(config)
    if source is None or config.use_learned_positional_embeddings:  # learned positions fit one size only
        return height or native_height, width or native_width
    aspect = source[0] / source[1]
    exact = height or (width * aspect if width else math.sqrt(native_height * native_width * aspect))

    def legal(size: float, name: str) -> int:
        return min(max(round(size / 16), 1) * 16, largest_side(config, name))

    return height or legal(exact, "height"), width or legal(exact / aspect, "width")


# ---------------------------------------------------------------- from one kind to another


def grow_input_channels(dit: VideoTransformer, in_channels: int) -> None:
    """Give a model more condition channels, in place: 16 -> 33 starts inpainting from text-to-video.

    The new weights are zero, so the velocity stays what it was whatever the new channels hold.
    raises ValueError if in_channels is less than the model has
    """
    old = dit.config
    if in_channels < old.in_channels:
        raise ValueError(f"in_channels = {in_channels} is less than the model's {old.in_channels}")
    state = dit.patch_embed.state_dict()
    weight = state["proj.weight"].reshape(old.dim, old.in_channels, -1)  # d c (p_t p p), whatever the layer
    weight = F.pad(weight, (0, 0, 0, in_channels - old.in_channels))
    dit.config = replace(old, in_channels=in_channels)
    dit.position = position_rule(dit.config)
    with torch.device("meta"):
        dit.patch_embed = PatchEmbed(dit.config)
    state["proj.weight"] = weight.reshape(dit.patch_embed.proj.weight.shape)
    dit.patch_embed.load_state_dict(state, assign=True)
