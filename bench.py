"""Speed and memory: ours beside diffusers and transformers, the same weights and inputs in one process.

    python bench.py                        small layers, a minute or two
    python bench.py --sizes real           the real models' layer widths, random weights
    python bench.py --card --sizes real    on a GPU: the whole 2B and 5B, what a step costs and what fits

A Case is one piece of work, done by both. They take turns, so that what else the machine does hurts both; a
ratio is the median over rounds of ours / theirs. Before that their results are compared: it is the same work.
Peak memory is what a fresh process grows by while it does the work once. This file may be deleted; it needs
requirements-dev.txt.

Dimension key: b batch, c channels, f frames, h w height and width, n video tokens, L text tokens, d width
"""

import argparse
import contextlib
import ctypes
import datetime
import gc
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

import sample
from checkpoint import write_config
from media import to_pixels
from text_encoder import T5Config, T5Encoder
from transformer import CHECKPOINTING, TransformerConfig, VideoTransformer
from vae import VAEConfig, VideoVAE

ROOT = Path(__file__).parent
SMALL_MODEL = ROOT / "tests" / "goldens" / "cogvideox-2b-t2v"  # its tokenizer and scheduler serve all sizes
PROMPT = "a panda plays a guitar"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}  # max |Δ| / max |theirs|: rounding

# ---------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Sizes:
    vae: VAEConfig
    dit: TransformerConfig
    t5: T5Config
    side: int  # of the VAE's clips, in pixels
    num_frames: tuple[int, ...]  # of the VAE's clips
    dit_sides: tuple[int, ...]  # 13 latent frames of so many pixels square: side 128 is 832 tokens


SIZES = {
    "tiny": Sizes(
        VAEConfig(block_out_channels=[16, 32, 32, 64], layers_per_block=1, norm_num_groups=8),
        TransformerConfig(num_attention_heads=4, num_layers=4, text_embed_dim=128, max_text_seq_length=32),
        T5Config(vocab_size=1200, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
        side=64, num_frames=(9, 17), dit_sides=(64, 128),
    ),
    "real": Sizes(
        VAEConfig(),
        TransformerConfig(num_layers=2),
        T5Config(vocab_size=1200, num_layers=2),
        side=128, num_frames=(9, 17), dit_sides=(128, 256),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What --card measures: (height, width, frames) of guided steps and of training steps."""

    dits: dict[str, TransformerConfig]
    models: Sizes  # VAE and T5 beside them
    sizes: tuple[tuple[int, int, int], ...]
    phases: tuple[tuple[int, int, int], ...]
    num_steps: int
    matrix_side: int


FUN_2B = TransformerConfig(in_channels=33)
FUN_5B = replace(FUN_2B, num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
SMALL_SHAPES = ((64, 64, 49), (64, 96, 49))
CARDS = {  # tiny: only to see that the script works
    "tiny": Card({"tiny": replace(SIZES["tiny"].dit, in_channels=33)}, SIZES["tiny"], SMALL_SHAPES,
                 SMALL_SHAPES, num_steps=2, matrix_side=256),
    "real": Card({"2B": FUN_2B, "5B": FUN_5B}, replace(SIZES["real"], t5=T5Config()),
                 sizes=((512, 512, 49), (480, 720, 49), (1024, 1024, 49)),
                 phases=((512, 512, 49), (768, 768, 49), (1024, 1024, 49)),  # 13312, 29952, 53248 tokens
                 num_steps=50, matrix_side=8192),
}  # fmt: skip

# ---------------------------------------------------------------- models with random weights


@torch.no_grad()
def make(network: type[nn.Module], config, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network whose weights let something of everything through; a fresh transformer is the identity."""
    torch.manual_seed(0)
    with torch.device(device):
        module = network(config).to(dtype).eval()
    for parameter in module.parameters() if network is not VideoVAE else ():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    if network is VideoVAE:
        module._to_channels_last()
    return module.requires_grad_(False)


def peer_of(module: nn.Module) -> nn.Module:
    """The same network of diffusers or transformers, with copies of our weights in its own layout."""
    if isinstance(module, T5Encoder):
        from transformers import T5Config as PeerConfig
        from transformers import T5EncoderModel as Peer

        config = vars(module.config) | {"dropout_rate": 0.0}
        config.pop("extra")
        build = lambda: Peer(PeerConfig(**config))  # noqa: E731
    else:
        from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

        config = vars(module.config) | {}
        config.pop("extra")
        config.pop("add_noise_in_inpaint_model", None)
        if isinstance(module, VideoVAE):
            for side in ("down", "up"):
                config[f"{side}_block_types"] = (f"CogVideoX{side.capitalize()}Block3D",) * 4
            config.pop("use_quant_conv"), config.pop("use_post_quant_conv")
            build = lambda: AutoencoderKLCogVideoX(**config)  # noqa: E731
        else:
            build = lambda: CogVideoXTransformer3DModel(**config)  # noqa: E731
    first = next(module.parameters())
    with torch.device(first.device):
        peer = build().to(first.dtype).eval().requires_grad_(False)
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    aliases = {"encoder.embed_tokens.weight", "patch_embed.pos_embedding"}  # theirs alone, or stored twice
    assert not unexpected and set(missing) <= aliases, (missing, unexpected)
    return peer


# ---------------------------------------------------------------- the work


@dataclass
class Case:
    """One piece of work; both return a tensor, to be compared."""

    name: str
    ours: Callable[[], Tensor]
    peer: Callable[[], Tensor] | None = None
    flops: float = 0.0
    warm_up: Callable[[], object] | None = None  # a short form of `ours` that leaves it nothing to compile


def clip(sizes: Sizes, num_frames: int, like: nn.Module) -> Tensor:
    """b 3 f h w in [-1, 1]: squares of 8×8 pixels, each of a random colour in each frame."""
    draw = torch.Generator().manual_seed(1)
    frames = torch.rand(num_frames, sizes.side // 8, sizes.side // 8, 3, generator=draw)
    frames = frames.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return to_pixels((255 * frames).byte().numpy())[None].to(like.device, like.dtype)


def vae_cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    ours = make(VideoVAE, sizes.vae, dtype, device)
    peer = peer_of(ours)
    for f in sizes.num_frames:
        pixels = clip(sizes, f, ours)
        latents = torch.randn(1, 16, 1 + f // 4, sizes.side // 8, sizes.side // 8)
        scaled = latents.to(device, dtype)
        unscaled = scaled / sizes.vae.scaling_factor
        shape = f"{f}×{sizes.side}²"
        yield Case(f"VAE encode {shape}", lambda x=pixels: ours.moments(x)[0],
                   lambda x=pixels: peer.encode(x).latent_dist.mode())  # fmt: skip
        yield Case(f"VAE decode {shape}", lambda x=scaled: ours.decode(x, first_alone=False),
                   lambda x=unscaled: peer.decode(x).sample)  # fmt: skip


def dit_flops(config: TransformerConfig, num_tokens: int) -> float:
    """Of one forward of one sample (text counts among the tokens): matrix products and attention."""
    n, d = num_tokens, config.dim
    return config.num_layers * (2 * 12 * d * d * n + 4 * n * n * d)


def dit_inputs(config: TransformerConfig, height: int, width: int, num_frames: int, like: nn.Module):
    """(noisy b c f h w, timesteps, text b L d, condition or None) of one sample"""
    draw = torch.Generator().manual_seed(2)
    latents = (1 + num_frames // 4, height // 8, width // 8)
    shapes = [(1, 16, *latents), (1, config.max_text_seq_length, config.text_embed_dim)]
    shapes.append((1, config.in_channels - 16, *latents))
    first = next(like.parameters())
    noisy, text, condition = (torch.randn(s, generator=draw).to(first.device, first.dtype) for s in shapes)
    t = torch.tensor([500], device=first.device)
    return noisy, t, text, condition if config.in_channels > 16 else None


def dit_cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    config = sizes.dit
    ours = make(VideoTransformer, config, dtype, device)
    peer = peer_of(ours)

    def learn(module: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
        """The gradient of the last matrix of a block, in which all that follows has a part."""
        module.requires_grad_(True)
        with torch.enable_grad():
            forward().float().square().mean().backward()
        gradient = module.transformer_blocks[0].ff.net[2].weight.grad
        module.requires_grad_(False)
        for parameter in module.parameters():
            parameter.grad = None
        return gradient

    for side in sizes.dit_sides:
        noisy, t, text, _ = dit_inputs(config, side, side, 49, ours)
        frames_first = noisy.transpose(1, 2)
        n = noisy[0, 0].numel() // 4

        def forward(x=noisy, t=t, text=text) -> Tensor:
            return ours(x, t, text)

        def peer_forward(x=frames_first, t=t, text=text) -> Tensor:
            return peer(x, text, t).sample.transpose(1, 2)

        flops = dit_flops(config, n + config.max_text_seq_length)
        yield Case(f"DiT forward, {n} tokens", forward, peer_forward, flops)
        both = [lambda m=m, f=f: learn(m, f) for m, f in ((ours, forward), (peer, peer_forward))]
        yield Case(f"DiT forward + backward, {n} tokens", *both, 3 * flops)


def t5_cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    ours = make(T5Encoder, sizes.t5, dtype, device)
    peer = peer_of(ours)
    ids = torch.randint(3, 1000, (2, 226), generator=torch.Generator().manual_seed(3)).to(device)
    yield Case("T5, two prompts", lambda: ours(ids), lambda: peer(ids)[0])


def sampling_cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """A prompt to a video, guided, by the sampler of the folder, all networks in memory."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    config = replace(sizes.dit, text_embed_dim=sizes.t5.d_model)
    with folder(config, sizes) as model_dir:
        models = sample.load_models(model_dir, dtype, device, keep=True)
        models.loaded = networks(config, sizes, dtype, device)
        parts = {name: peer_of(network) for name, network in models.loaded.items()}
        scheduler = CogVideoXDDIMScheduler.from_pretrained(model_dir, subfolder="scheduler")
        pipeline = CogVideoXPipeline(tokenizer=None, scheduler=scheduler, **parts)
        pipeline.set_progress_bar_config(disable=True)
        start = torch.randn(1, 16, 3, sizes.side // 8, sizes.side // 8)
        size = {"height": sizes.side, "width": sizes.side, "num_frames": 9, "guidance_scale": 6.0}
        size |= {"max_sequence_length": config.max_text_seq_length, "num_inference_steps": 10}
        first = start.transpose(1, 2).to(device, dtype)

        def ours() -> Tensor:
            latents = {"latents": start, "seed": 0, "sampler": "ddim-cog", "num_steps": 10}
            keys = ("height", "width", "num_frames", "guidance_scale")
            frames = sample.generate(models, PROMPT, **latents, **{key: size[key] for key in keys})
            return torch.from_numpy(frames).float()

        def peer() -> Tensor:
            ids = models.tokenizer([PROMPT, ""], config.max_text_seq_length).to(device)
            embeds = dict(
                zip(("prompt_embeds", "negative_prompt_embeds"), parts["text_encoder"](ids)[0][:, None])
            )
            frames = pipeline(**embeds, latents=first, output_type="np", **size).frames[0]
            return torch.from_numpy(frames * 255).round()

        yield Case(f"prompt to frames, 9×{sizes.side}², 10 steps", ours, peer)


GROUPS = {"vae": vae_cases, "dit": dit_cases, "t5": t5_cases, "sampling": sampling_cases}


@contextlib.contextmanager
def folder(config: TransformerConfig, sizes: Sizes) -> Iterator[Path]:
    """A checkpoint folder of configs, tokenizer and scheduler; its networks are in memory alone."""
    with tempfile.TemporaryDirectory() as name:
        model_dir = Path(name)
        for part in ("tokenizer", "scheduler"):
            shutil.copytree(SMALL_MODEL / part, model_dir / part)
        for part, part_config in (("transformer", config), ("vae", sizes.vae), ("text_encoder", sizes.t5)):
            (model_dir / part).mkdir()
            write_config(part_config, model_dir / part / "config.json")
        yield model_dir


def networks(config: TransformerConfig, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict:
    return {
        "text_encoder": make(T5Encoder, sizes.t5, dtype, device),
        "transformer": make(VideoTransformer, config, dtype, device),
        "vae": make(VideoVAE, sizes.vae, dtype, device),
    }


# ---------------------------------------------------------------- measuring


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def difference(case: Case) -> float:
    """max |ours − theirs| / max |theirs|; the first run of both, so also their warm-up."""
    ours, theirs = case.ours().float(), case.peer().float()
    assert ours.shape == theirs.shape, f"{case.name}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compare(case: Case, rounds: int, device: torch.device) -> tuple[float, float, float]:
    """Medians of our seconds, theirs, and of the ratio in each round; who begins alternates."""
    ours, theirs = [], []
    for i in range(rounds):
        turns = [(case.ours, ours), (case.peer, theirs)]
        for work, times in turns[:: 1 if i % 2 else -1]:
            times.append(seconds(work, device))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs))
    return statistics.median(ours), statistics.median(theirs), ratio


def child(*arguments: str) -> str:
    """The last line that a fresh Python process prints."""
    command = [sys.executable, *arguments]
    # With it ours alone would be compiled at every import; installed packages have their bytecode.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"bench.py: error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def growth(work: Callable[[], object], device: torch.device) -> float:
    """MB by which memory grows at its peak while `work` is done once: of the GPU, or of this process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # what building the models has left behind must not hide growth
    before, peak, done = memory_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, memory_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak - before


def memory_mb() -> float:
    """Of this process, less what it maps from files: libraries come and go as the system likes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024 / 1e6


def import_cpu_seconds(statement: str) -> float:
    """CPU time of a process that only imports, less that of one that does nothing; bytecode is cached."""
    code = "import os, sys; exec(sys.argv[1]); print(sum(os.times()[:2]))"
    return float(child("-c", code, statement)) - float(child("-c", code, ""))


# ---------------------------------------------------------------- ours beside theirs


def say(text: str) -> None:
    """How it goes; only tables go to stdout."""
    print(text, file=sys.stderr, flush=True)


def find_case(args: argparse.Namespace, name: str, dtype: str, device: torch.device) -> Case:
    cases = (
        case
        for make_cases in GROUPS.values()
        for case in make_cases(SIZES[args.sizes], getattr(torch, dtype), device)
    )
    return next(case for case in cases if case.name == name)


def side_by_side(args: argparse.Namespace, device: torch.device) -> bool:
    """Print the table; False if any results differ by more than rounding."""
    rows, all_agree = [], True
    peak_tflops = matrix_rate(device, args.dtypes[-1]) if device.type == "cuda" else 0
    for dtype in args.dtypes:
        for group in args.only:
            for case in GROUPS[group](SIZES[args.sizes], getattr(torch, dtype), device):
                error = difference(case)
                ours, theirs, ratio = compare(case, args.rounds, device)
                limit = 1 / 255 + TOLERANCE[dtype] if group == "sampling" else TOLERANCE[dtype]
                all_agree &= error <= limit
                say(f"{case.name}, {dtype}: {ours:.4g} s, theirs {theirs:.4g} s, error {error:.1e}"
                    + " TOO LARGE" * (error > limit))  # fmt: skip
                row = [case.name, dtype, f"{ratio:.2f}", f"{error:.0e}"]
                if device.type == "cuda":
                    tflops = case.flops / ours / 1e12
                    row += [f"{ours * 1e3:.1f} ms", f"{theirs * 1e3:.1f} ms"]
                    row += [f"{tflops:.0f} ({tflops / peak_tflops:.0%})" if case.flops else ""]
                rows.append(row)
    empty = [""] * (3 if device.type == "cuda" else 0)
    for dtype in args.dtypes if "vae" in args.only and "memory" not in args.leave_out else ():
        f, side = SIZES[args.sizes].num_frames[-1], SIZES[args.sizes].side
        for kind in ("encode", "decode"):
            name = f"VAE {kind} {f}×{side}²"
            numbers = [measure_memory(args, name, who, dtype) for who in ("ours", "peer")]
            say(f"peak growth of {name}, {dtype}: {numbers[0]:.0f} MB, theirs {numbers[1]:.0f} MB")
            rows.append([f"peak memory of {name}", dtype, f"{numbers[0] / numbers[1]:.2f}", "", *empty])
    if "import" not in args.leave_out:
        pairs = [[import_cpu_seconds(line) for line in IMPORTS] for _ in range(args.rounds + 1)]
        pairs = pairs[1:]  # before, Python may have had to compile, ours at least
        say(f"import, CPU time: {pairs[0][0]:.2f} s, theirs {pairs[0][1]:.2f} s")
        ratio = statistics.median(a / b for a, b in pairs)
        rows.append(["import of sample.py", "", f"{ratio:.2f}", "", *empty])
    print_table(
        ["work", "dtype", "ours / theirs", "error"] + ["ours", "theirs", "TFLOP/s"][: len(empty)], rows
    )
    return all_agree


IMPORTS = ("import sample", "from diffusers import CogVideoXPipeline")


def measure_memory(args: argparse.Namespace, name: str, who: str, dtype: str) -> float:
    options = ["--sizes", args.sizes, "--device", args.device, "--threads", str(args.threads)]
    return float(child(str(ROOT / "bench.py"), *options, "--memory", name, who, dtype))


def print_table(head: list[str], rows: list[list[str]]) -> None:
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |")


# ---------------------------------------------------------------- a card: whole models


ENOUGH = 10.0  # seconds after which a case is not repeated: 50 guided steps of 5B alone take 72


def matrix_rate(device: torch.device, dtype: str, n: int = 8192) -> float:
    """TFLOP/s of a product of two n × n matrices: what the card really gives."""
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(10)]
    return 2 * n**3 / statistics.median(times) / 1e12


def train_step(dit: VideoTransformer, inputs: tuple, checkpointing: str | None) -> None:
    """Forward and backward of one clip; weights and gradients are of the network's dtype, no optimizer."""
    dit.activation_checkpointing = checkpointing
    dit.requires_grad_(True)
    try:
        with torch.enable_grad():
            dit(*inputs).float().square().mean().backward()
    finally:
        for parameter in dit.parameters():
            parameter.grad = None
        dit.requires_grad_(False)


def error_to_float32(dit: VideoTransformer, inputs: tuple) -> float:
    """max |Δ| / max |velocity| of a network and the same weights in float32."""
    low, dtype = dit(*inputs).float(), dit.proj_out.weight.dtype
    exact = dit.float()(*(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs))
    dit.to(dtype)  # nothing is lost: the weights were of that dtype
    return ((low - exact).abs().max() / exact.abs().max()).item()


def dit_card_cases(
    label: str, config: TransformerConfig, plan: Card, dtype: torch.dtype, device: torch.device
):
    """Guided steps and training steps of a whole transformer, eager and compiled."""
    dit = make(VideoTransformer, config, dtype, device)
    error = error_to_float32(dit, dit_inputs(config, 64, 64, 9, dit))
    print(f"{label}: {str(dtype)[6:]} differs from float32 by {error:.1e} of the largest velocity\n")
    for mode in ("eager", "compiled"):
        for block in dit.transformer_blocks if mode == "compiled" else ():
            block.compile()
        for height, width, f in plan.sizes:
            inputs = dit_inputs(config, height, width, f, dit)
            flops = 2 * dit_flops(config, inputs[0][0, 0].numel() // 4 + config.max_text_seq_length)
            work = partial(lambda inputs: [dit(*inputs) for _ in range(2)], inputs)
            yield Case(f"{label} guided step, {height}×{width}×{f}, {mode}", work, flops=flops)
        for height, width, f in plan.phases:
            inputs = dit_inputs(config, height, width, f, dit)
            n = inputs[0][0, 0].numel() // 4
            flops = 3 * dit_flops(config, n + config.max_text_seq_length)
            for checkpointing in (None, *CHECKPOINTING):
                name = (
                    f"{label} forward + backward, {n} tokens, {mode}, checkpointing {checkpointing or 'none'}"
                )
                yield Case(name, partial(train_step, dit, inputs, checkpointing), flops=flops)


def sampling_card_case(
    label: str, config: TransformerConfig, plan: Card, dtype: torch.dtype, device: torch.device
):
    """A prompt to frames with all networks in memory, as a program that makes many videos has them."""
    height, width, f = plan.sizes[1]
    with folder(config, plan.models) as model_dir:
        models = sample.load_models(model_dir, dtype, device, keep=True)
        models.loaded = networks(config, plan.models, dtype, device)
        for block in models.loaded["transformer"].transformer_blocks:
            block.compile()
        settings = {"height": height, "width": width, "num_frames": f, "seed": 0}
        run = partial(sample.generate, models, PROMPT, **settings)
        name = f"{label} prompt to frames, {height}×{width}×{f}, {plan.num_steps} guided steps, compiled"
        yield Case(name, partial(run, num_steps=plan.num_steps), warm_up=partial(run, num_steps=2))


def other_card_cases(plan: Card, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    t5 = make(T5Encoder, plan.models.t5, dtype, device)
    yield Case("T5, two prompts", partial(t5, torch.zeros(2, 226, dtype=torch.long, device=device)))
    del t5
    vae = make(VideoVAE, plan.models.vae, dtype, device)
    for height, width, f in plan.sizes:
        latents = torch.randn(1, 16, 1 + f // 4, height // 8, width // 8)
        work = partial(lambda latents: [chunk.cpu() for chunk in vae.decode_stream(latents)], latents)
        yield Case(f"VAE decode, streamed, {height}×{width}×{f}", work)


def measure(case: Case, rounds: int, device: torch.device) -> tuple[float, float]:
    """Median of our seconds, and the peak of all memory in use meanwhile, in GB."""
    (case.warm_up or case.ours)()
    gc.collect()  # networks of the cases before
    before = torch.cuda.memory_allocated() / 1e6 if device.type == "cuda" else memory_mb()
    times: list[float] = []
    peak = before + growth(lambda: times.append(seconds(case.ours, device)), device)
    while len(times) < rounds and sum(times) < ENOUGH:
        times.append(seconds(case.ours, device))
    return statistics.median(times), peak / 1e3


def card(args: argparse.Namespace, device: torch.device) -> None:
    """What the whole models cost; what does not fit says so, and the next goes on."""
    plan, name = CARDS[args.sizes], args.dtypes[-1]
    dtype, rate = getattr(torch, name), matrix_rate(device, name, plan.matrix_side)
    print(f"matrix product: {rate:.3g} TFLOP/s in {name}\n")
    models = {
        label: replace(config, text_embed_dim=plan.models.t5.d_model) for label, config in plan.dits.items()
    }
    kinds = (dit_card_cases, sampling_card_case)
    groups = [kind(*model, plan, dtype, device) for model in models.items() for kind in kinds]
    rows = []
    for case in chain(*groups, other_card_cases(plan, dtype, device)):
        if args.match and not any(part in case.name for part in args.match):
            continue
        try:
            took, peak = measure(case, args.rounds, device)
        except torch.OutOfMemoryError:
            rows.append([case.name, "out of memory", "", "", ""])
            torch.cuda.empty_cache()
            continue
        tflops = case.flops / took / 1e12
        speed = [f"{tflops:.3g}", f"{tflops / rate:.0%}"] if case.flops else ["", ""]
        rows.append([case.name, f"{took:.3f}", *speed, f"{peak:.1f}"])
        say(f"{case.name}: {took:.3f} s")
    print_table(["work", "seconds", "TFLOP/s", "of matrix product", "peak GB"], rows)


# ---------------------------------------------------------------- the command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = sample.Parser(prog="bench.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--sizes", choices=list(SIZES), default="tiny", help="real: the official layer widths")
    add(
        "--card", action="store_true", help="whole models on a GPU (with --sizes tiny: a check of the script)"
    )
    add("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="what is compared")
    add("--dtypes", nargs="+", choices=list(TOLERANCE), default=["float32"], help="to compute in")
    add("--rounds", type=int, default=5, help="turns of each")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--leave-out", nargs="*", choices=["import", "memory"], default=[], help="what else is measured")
    add("--match", nargs="+", help="of --card: only the work with one of these in its name")
    add("--memory", nargs=3, metavar=("CASE", "WHO", "DTYPE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0, or 1 if results differ by more than rounding."""
    args = parse(argv)
    device, _ = sample.choose_device(args.device, None)
    torch.set_num_threads(args.threads)
    if args.memory:
        name, who, dtype = args.memory
        case = find_case(args, name, dtype, device)
        with torch.no_grad():
            print(growth(getattr(case, who), device))
        return 0
    processor = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_name()}, {args.threads} threads"
    )
    print(f"{datetime.date.today()}, {processor}, torch {torch.__version__}, python bench.py "
          f"{' '.join(sys.argv[1:] if argv is None else argv)}\n")  # fmt: skip
    with torch.no_grad():
        if args.card:
            card(args, device)
            return 0
        return 0 if side_by_side(args, device) else 1


def cpu_name() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{names[0].split(':')[1].strip() if names else platform.processor()} ({isa})"


if __name__ == "__main__":
    sys.exit(main())
