"""Speed and memory: ours beside diffusers and transformers, plain beside fast, and what fine-tuning costs.

    python tools/bench.py                                               small layers: does it work? a minute
    python tools/bench.py --sizes real --rows dit t5                    the official widths, two layers
    python tools/bench.py --sizes whole --dtype bfloat16 --compile      the whole 2B and 5B, on a GPU

A Case is one piece of work and the ways to do it: by the peer's network, ours, ours made fast; each also
compiled. All have the same weights and inputs, and their results must agree. They take turns in one process,
so that whatever else the machine does hurts all of them; a ratio is the median over rounds of a way's seconds
over the first one's. Peers need requirements-dev.txt; without it, `--ways ours fast`.

f frames · h w height, width · d width of the transformer · where: {"dtype": …, "device": …}
"""

import argparse
import copy
import datetime
import functools
import gc
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from runtime import autocast  # noqa: E402
from text_encoder import T5Config, T5Encoder  # noqa: E402
from transformer import CHECKPOINTING, TransformerConfig, VideoTransformer  # noqa: E402
from vae import VAEConfig, VideoVAE  # noqa: E402

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}  # max |Δ| / max |first|: rounding

# ---------------------------------------------------------------- sizes

Clip = tuple[int, int, int]  # height, width, frames


def as_text(clip: Clip) -> str:
    return "x".join(map(str, clip))


def as_clip(text: str) -> Clip:
    return tuple(map(int, text.split("x")))


@dataclass(frozen=True)
class Sizes:
    vae: VAEConfig
    dits: dict[str, TransformerConfig]
    t5: T5Config
    vae_clips: list[Clip]
    dit_clips: list[Clip]


COG_2B = TransformerConfig()
COG_5B = TransformerConfig(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
SMALL_DIT = TransformerConfig(num_attention_heads=4, num_layers=4, text_embed_dim=128, max_text_seq_length=32)
SIZES = {
    "tiny": Sizes(
        vae=VAEConfig(block_out_channels=[16, 32, 32, 64], layers_per_block=1, norm_num_groups=8),
        dits={"sincos": SMALL_DIT, "RoPE": replace(SMALL_DIT, use_rotary_positional_embeddings=True)},
        t5=T5Config(vocab_size=1200, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
        vae_clips=[(64, 64, 9), (64, 64, 17)],
        dit_clips=[(64, 64, 49), (128, 128, 49)],
    ),
    "real": Sizes(
        vae=VAEConfig(),
        dits={"two layers of 2B": replace(COG_2B, num_layers=2)},
        t5=T5Config(vocab_size=1200, num_layers=2),
        vae_clips=[(128, 128, 9), (128, 128, 17)],
        dit_clips=[(128, 128, 49), (256, 256, 49)],
    ),
    "whole": Sizes(
        vae=VAEConfig(),
        dits={"2B": COG_2B, "5B": COG_5B},
        t5=T5Config(),
        vae_clips=[(480, 720, 49), (1024, 1024, 49)],
        dit_clips=[(512, 512, 49), (480, 720, 49)],
    ),
}

# ---------------------------------------------------------------- networks with random weights


@torch.no_grad()
def make(network: type[nn.Module], config, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network whose weights let something of everything through; a fresh transformer is the identity."""
    torch.manual_seed(0)
    with torch.device(device):
        module = network(config).to(dtype)
    if network is not VideoVAE:
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return module.eval().requires_grad_(False)


def peer_of(ours: nn.Module) -> nn.Module:
    """The same network of diffusers or transformers, with our weights."""
    import diffusers
    import transformers

    config = {name: value for name, value in vars(ours.config).items() if name != "extra"}
    first = next(ours.parameters())
    with torch.device(first.device):
        if isinstance(ours, T5Encoder):
            peer = transformers.T5EncoderModel(transformers.T5Config(**config, dropout_rate=0.0))
        elif isinstance(ours, VideoTransformer):
            config.pop("add_noise_in_inpaint_model")
            peer = diffusers.CogVideoXTransformer3DModel(**config)
        else:
            config["down_block_types"] = ["CogVideoXDownBlock3D"] * 4
            config["up_block_types"] = ["CogVideoXUpBlock3D"] * 4
            peer = diffusers.AutoencoderKLCogVideoX(**config)
    peer.load_state_dict(ours.state_dict(), strict=False)  # theirs has a name or a table more
    return peer.to(first.dtype).eval().requires_grad_(False)


def variants(ours: nn.Module, ways: list[str]) -> dict[str, nn.Module]:
    """The network in each of the ways asked for that it has."""
    networks = {"peer": peer_of(ours)} if "peer" in ways else {}
    if "ours" in ways:
        networks["ours"] = ours
    if "fast" in ways and isinstance(ours, VideoVAE):
        from vae_fast import speed_up

        networks["fast"] = copy.deepcopy(ours)
        speed_up(networks["fast"])
    return networks


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# ---------------------------------------------------------------- the work


@dataclass
class Case:
    """One piece of work and the ways to do it; each returns a tensor, to be compared with the first's."""

    name: str
    ways: dict[str, Callable[[], Tensor]]
    compiled: list[nn.Module] = field(default_factory=list)  # the parts that --compile compiles
    resident: int = 0  # bytes that belong to it and are in use before it begins: weights, optimizer
    flops: float = 0.0
    is_exact: bool = True  # False: they differ by more than rounding, and by how much is the question


def encode(vae: nn.Module, pixels: Tensor) -> Tensor:
    if isinstance(vae, VideoVAE):
        return vae.moments(pixels)[0]
    return vae.encode(pixels).latent_dist.mean


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    if isinstance(vae, VideoVAE):
        return vae.decode(latents, first_alone=False)
    return vae.decode(latents / vae.config.scaling_factor).sample


def vae_cases(sizes: Sizes, ways: list[str], where: dict) -> Iterator[Case]:
    ours = make(VideoVAE, sizes.vae, **where)
    vaes = variants(ours, ways)
    for clip in sizes.vae_clips:
        height, width, f = clip
        squares = torch.rand(1, 3, f, height // 8, width // 8, **where)  # 8x8 pixels, of all colours
        pixels = 2 * squares.repeat_interleave(8, 3).repeat_interleave(8, 4) - 1
        latents = torch.randn(1, 16, 1 + f // 4, height // 8, width // 8, **where)
        for work, x in ((encode, pixels), (decode, latents)):
            runs = {way: partial(work, vae, x) for way, vae in vaes.items()}
            halves = [vae.encoder if work is encode else vae.decoder for vae in vaes.values()]
            yield Case(f"VAE {work.__name__} {as_text(clip)}", runs, halves, bytes_of(ours.parameters()))


def forward(dit: nn.Module, noisy: Tensor, text: Tensor, t: Tensor) -> Tensor:
    if isinstance(dit, VideoTransformer):
        return dit(noisy, t, text)
    rope = None
    if dit.config.use_rotary_positional_embeddings:
        rope = peer_rope(dit.config.attention_head_dim, noisy.shape[2:], noisy.device)
    t = t.expand(len(noisy))
    return dit(noisy.transpose(1, 2), text, t, image_rotary_emb=rope).sample.transpose(1, 2)


@functools.cache
def peer_rope(head_dim: int, latents: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, rows, columns = latents[0], latents[1] // 2, latents[2] // 2
    corners = (0, 0), (rows, columns)
    return get_3d_rotary_pos_embed(head_dim, corners, (rows, columns), frames, device=device)


def guided_step(dit: nn.Module, noisy: Tensor, text: Tensor, t: Tensor) -> Tensor:
    """Both halves of guidance: above 1024 tokens ours takes them in turn, for memory; diffusers never."""
    in_turn = isinstance(dit, VideoTransformer) and noisy[0, 0].numel() > 4 * 1024
    halves = text.split(1 if in_turn else 2)
    return torch.cat([forward(dit, noisy.expand(len(half), -1, -1, -1, -1), half, t) for half in halves])


def gradient(dit: nn.Module, noisy: Tensor, text: Tensor, t: Tensor) -> Tensor:
    """Of the last matrix of the first block, in which all that follows has a part."""
    dit.requires_grad_(True)
    with torch.enable_grad():
        forward(dit, noisy, text[:1], t).float().square().mean().backward()
    result = dit.transformer_blocks[0].ff.net[2].weight.grad
    dit.requires_grad_(False).zero_grad()
    return result


def dit_flops(config: TransformerConfig, num_tokens: int) -> float:
    """Of one forward of one sample (text counts among the tokens): matrix products and attention."""
    n, d = num_tokens, config.dim
    return config.num_layers * (2 * 12 * d * d * n + 4 * n * n * d)


def dit_inputs(config: TransformerConfig, clip: Clip, where: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents of one clip, the texts of both halves of guidance, and a timestep."""
    height, width, f = clip
    noisy = torch.randn(1, 16, 1 + f // 4, height // 8, width // 8, **where)
    text = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, **where)
    return noisy, text, torch.tensor([500], device=where["device"])


def at_native_size(sizes: Sizes) -> Iterator[tuple[str, TransformerConfig, Clip]]:
    """Each transformer with each clip, which is made its native size: there all agree about positions."""
    for (label, config), (height, width, f) in itertools.product(sizes.dits.items(), sizes.dit_clips):
        config = replace(config, sample_height=height // 8, sample_width=width // 8)
        yield label, config, (height, width, f)


def dit_cases(sizes: Sizes, ways: list[str], where: dict) -> Iterator[Case]:
    for label, config, clip in at_native_size(sizes):
        ours = make(VideoTransformer, config, **where)
        dits = variants(ours, ways)
        noisy, text, t = dit_inputs(config, clip, where)
        blocks = [block for dit in dits.values() for block in dit.transformer_blocks]
        flops = dit_flops(config, noisy[0, 0].numel() // 4 + text.shape[1])
        for what, work, times in (("guided step", guided_step, 2), ("forward + backward", gradient, 3)):
            runs = {way: partial(work, dit, noisy, text, t) for way, dit in dits.items()}
            name = f"{label} {what} {as_text(clip)}"
            yield Case(name, runs, blocks, bytes_of(ours.parameters()), times * flops)


def embed(t5: nn.Module, ids: Tensor) -> Tensor:
    return t5(ids) if isinstance(t5, T5Encoder) else t5(ids).last_hidden_state


def t5_cases(sizes: Sizes, ways: list[str], where: dict) -> Iterator[Case]:
    ours = make(T5Encoder, sizes.t5, **where)
    ids = torch.randint(3, 1000, (2, 226), device=where["device"])
    runs = {way: partial(embed, t5, ids) for way, t5 in variants(ours, ways).items()}
    yield Case("T5, two prompts", runs, resident=bytes_of(ours.parameters()))


SAMPLING = {  # way -> settings of `sample.generate`: here what makes it faster or smaller is compared
    "ours": {},
    "step cache 0.1": {"step_cache": 0.1},
    "dpm++, 20 steps": {"sampler": "dpm++", "num_steps": 20},
}


def sampling_cases(sizes: Sizes, ways: list[str], where: dict) -> Iterator[Case]:
    """50 guided steps from a prompt to latents, with the tokenizer and scheduler of a small model."""
    import sample

    for label, config, clip in at_native_size(sizes):
        models = sample.load_models(ROOT / "tests" / "goldens" / "cogvideox-2b-t2v", **where)
        models.config = config
        dit = make(VideoTransformer, config, **where)
        t5 = make(T5Encoder, T5Config(1200, config.text_embed_dim, d_ff=256, num_layers=1), **where)
        models.loaded = {"transformer": dit, "text_encoder": t5}
        size = dict(zip(("height", "width", "num_frames"), clip))
        run = partial(sample.generate, models, "a panda plays a guitar", seed=0, output="latents", **size)
        runs = {way: partial(run, **settings) for way, settings in SAMPLING.items()}
        name = f"{label} 50 steps {as_text(clip)}"
        yield Case(name, runs, list(dit.transformer_blocks), bytes_of(dit.parameters()), is_exact=False)


def learner(config: TransformerConfig, rank: int, where: dict) -> tuple[VideoTransformer, list[Tensor]]:
    """A transformer and what learns of it, in float32: LoRA of a rank beside frozen weights; 0 is all."""
    from lora import add_lora

    dit = make(VideoTransformer, config, **where)
    learnt = add_lora(dit, rank) if rank else list(dit.requires_grad_(True).parameters())
    for parameter in learnt:
        parameter.data = parameter.data.float()
    return dit, learnt


def learn(
    dit: VideoTransformer, optimizer: torch.optim.Optimizer, inputs: tuple, how: str | None, where: dict
) -> Tensor:
    """One step as train.py takes it, from cached latents and text; how: activations are checkpointed"""
    dit.activation_checkpointing = how
    try:
        with torch.enable_grad(), autocast(**where):
            loss = dit(*inputs).float().square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
    finally:  # also of a step that did not fit
        optimizer.zero_grad()
    return loss.detach()


def finetuning_cases(sizes: Sizes, ways: list[str], where: dict) -> Iterator[Case]:
    """Of an inpaint model; all weights learn where the rank is 0."""
    for (label, config), rank in itertools.product(sizes.dits.items(), (16, 128, 0)):
        dit, learnt = learner(replace(config, in_channels=33), rank, where)
        optimizer = torch.optim.AdamW(learnt, fused=True)
        resident = bytes_of(dit.parameters()) + 2 * bytes_of(learnt)  # AdamW's two moments
        what = f"LoRA of rank {rank}" if rank else "all weights"
        for clip, how in itertools.product(sizes.dit_clips, (None, *CHECKPOINTING)):
            noisy, text, t = dit_inputs(config, clip, where | {"dtype": torch.float32})
            condition = torch.cat([noisy, noisy[:, :1]], dim=1)
            runs = {"ours": partial(learn, dit, optimizer, (noisy, t, text[:1], condition), how, where)}
            name = f"{label} {what} {as_text(clip)}, checkpointing {how or 'none'}"
            yield Case(name, runs, list(dit.transformer_blocks), resident)


ROWS = {
    "vae": vae_cases,
    "dit": dit_cases,
    "t5": t5_cases,
    "sampling": sampling_cases,
    "finetuning": finetuning_cases,
}

# ---------------------------------------------------------------- measuring


def say(text: str) -> None:
    """How it goes; only tables go to stdout."""
    print(text, file=sys.stderr, flush=True)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def difference(result: Tensor, first: Tensor) -> float:
    """max |Δ| / max |first|"""
    assert result.shape == first.shape, (result.shape, first.shape)
    return ((result.float() - first.float()).abs().max() / first.float().abs().max()).item()


def compile_parts(case: Case) -> Case:
    """Each way twice: as it is, and with the case's parts compiled."""
    for part in case.compiled:
        part.compile(dynamic=False)
    eager = torch.compiler.set_stance("force_eager")
    ways = {way: eager(run) for way, run in case.ways.items()}
    return replace(case, ways=ways | {f"{way}, compiled": run for way, run in case.ways.items()})


@torch.no_grad()
def measure(case: Case, rounds: int, device: torch.device) -> dict[str, dict]:
    """way -> peak bytes (of a GPU), difference, seconds and ratio; of one that fails, why."""
    found = {}
    times = {}
    gc.collect()  # networks of earlier work
    for way, run in case.ways.items():
        before = torch.cuda.memory_allocated()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            result = run()
        except RuntimeError as error:  # out of memory; or torch.compile cannot
            say(f"{case.name}, {way}: {str(error)[:2000]}")
            found[way] = {"failure": type(error).__name__}
            continue
        if not times:
            first = result
        times[way] = []
        peak = torch.cuda.max_memory_allocated() - before + case.resident if device.type == "cuda" else 0
        found[way] = {"difference": difference(result, first), "peak": peak}
    for i in range(rounds):
        for way in list(times)[:: 1 if i % 2 else -1]:
            times[way].append(seconds(case.ways[way], device))
    for way in times:
        ratios = [a / b for a, b in zip(times[way], next(iter(times.values())))]
        found[way] |= {"seconds": statistics.median(times[way]), "ratio": statistics.median(ratios)}
    return found


def matrix_rate(dtype: torch.dtype, device: torch.device, n: int = 8192) -> float:
    """FLOP/s of a product of two n x n matrices: what a GPU really gives."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / statistics.median(seconds(lambda: a @ b, device) for _ in range(10))


# ---------------------------------------------------------------- tables and the command line

HEAD = ["work", "way", "seconds", "ratio", "peak GiB", "difference", "TFLOP/s"]


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def print_way(case: Case, way: str, numbers: dict, rate: float) -> None:
    """rate: of a matrix product, FLOP/s"""
    if "failure" in numbers:
        print_row([case.name, way, numbers["failure"], "", "", "", ""])
        return
    flops = case.flops / numbers["seconds"]
    speed = f"{flops / 1e12:.3g}" if flops else ""
    if flops and rate:
        speed += f" ({flops / rate:.0%} of a matrix product)"
    peak = f"{numbers['peak'] / 2**30:.2f}" if numbers["peak"] else ""
    cells = [f"{numbers['seconds']:.3g}", f"{numbers['ratio']:.2f}", peak, f"{numbers['difference']:.0e}"]
    print_row([case.name, way, *cells, speed])


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("bench.py", None, __doc__.splitlines()[0], formatter_class=formatter)
    all_ways = ["peer", "ours"] + ["fast"] * (ROOT / "vae_fast.py").exists()
    add = parser.add_argument
    add("--sizes", choices=list(SIZES), default="tiny", help="real: official widths; whole: whole models")
    add("--rows", nargs="+", choices=list(ROWS), default=["vae", "dit", "t5"], help="which work")
    add("--models", nargs="+", help="of these transformers alone: 5B")
    add("--match", nargs="+", default=[], help="only work with all of these in its name: 'guided step'")
    add("--clips", nargs="+", type=as_clip, help="sizes in place of the usual: 480x720x49, height first")
    add("--ways", nargs="+", choices=all_ways, default=all_ways)
    add("--compile", action="store_true", help="each way also compiled")
    add("--dtype", choices=list(TOLERANCE), default="float32", help="to compute in")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rounds", type=int, default=5, help="turns of each way")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0, or 1 if the results of two ways differ by more than rounding."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    where = {"dtype": getattr(torch, args.dtype), "device": device}
    sizes = SIZES[args.sizes]
    if args.models:
        sizes = replace(sizes, dits={label: sizes.dits[label] for label in args.models})
    if args.clips:
        sizes = replace(sizes, vae_clips=args.clips, dit_clips=args.clips)
    machine, rate = f"{platform.machine()}, {args.threads} threads", 0.0
    if device.type == "cuda":
        machine, rate = torch.cuda.get_device_name(), matrix_rate(**where)
    command = " ".join(sys.argv[1:] if argv is None else argv)
    print(f"{datetime.date.today()}, {machine}, torch {torch.__version__}, python tools/bench.py {command}\n")
    print_row(HEAD)
    print_row(["---"] * len(HEAD))
    all_agree = True
    for row in args.rows:
        for case in ROWS[row](sizes, args.ways, where):
            if not all(words in case.name for words in args.match):
                continue
            if args.compile and case.compiled:
                case = compile_parts(case)
            for way, numbers in measure(case, args.rounds, device).items():
                print_way(case, way, numbers, rate)
                is_close = numbers.get("difference", 0.0) <= TOLERANCE[args.dtype]  # false of NaN
                if case.is_exact and not is_close:
                    say(f"{case.name}, {way}: TOO LARGE a difference")
                    all_agree = False
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
