"""The networks of a checkpoint folder, loaded in turn.

    model_dir/ ─Models─► configs, schedule, tokenizer: read at once
                 └─use─► text_encoder | vae | transformer: each loaded at its first use and freed after it, so
                         that the largest, not the sum, has to fit

What may be done to a transformer is in files of its own: lora.py merges what was fine-tuned, float8.py halves
its memory, parallel.py shares it among devices.
"""

import contextlib
import functools
import gc
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from checkpoint import build, check_weights, component_dir, read_config
from diffusion import Schedule
from kinds import model_kind
from runtime import RANK
from text_encoder import ALIASES, T5Config, T5Encoder, Tokenizer
from transformer import TransformerConfig, VideoTransformer
from vae import VAEConfig, VideoVAE


class Models:
    """The networks of a checkpoint folder, each in memory only while it is in use.

    keep: leave them in memory afterwards, for a next call
    loras: (file, weight), merged into the transformer, see `lora.load_lora`
    raises ValueError or OSError for a wrong config, schedule or tokenizer; num_parameters checks weights
    """

    def __init__(
        self,
        model_dir: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        keep: bool = False,
        loras: list[tuple[str | Path, float]] = [],
    ):
        self.model_dir = Path(model_dir)
        self.dtype = dtype
        self.device = torch.device(device)
        self.keep = keep
        self.loras = list(loras)
        self.on_all_ranks = False  # True: all ranks compute each velocity together, see parallel.py
        self.compile = False  # True: the transformer's blocks by torch.compile
        self.low_memory = False  # True: the transformer's matrices as float8, see float8.py
        self.progress = False  # True: steps and seconds left of each stage are shown, at a terminal
        self.config = read_config(TransformerConfig, component_dir(model_dir, "transformer") / "config.json")
        self.vae_config = read_config(VAEConfig, component_dir(model_dir, "vae") / "config.json")
        self.schedule = Schedule.from_pretrained(model_dir)
        self.tokenizer = Tokenizer.from_pretrained(model_dir)
        self.loaded: dict[str, nn.Module] = {}  # put a module here to use it in place of the folder's
        self.seconds: dict[str, float] = {}  # in each stage so far
        self.forwards = [0, 0]  # with a step cache: of the transformer so far, computed in full and all

    @property
    def kind(self) -> str:
        return model_kind(self.config)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def first_alone(self) -> bool:
        """Whether latents are decoded in Fun's chunks, not diffusers'."""
        return self.kind in ("inpaint", "control")

    @property
    def default_sampler(self) -> str:
        """Fun samples with plain DDIM whatever scheduler_config.json says; diffusers does what it says."""
        return "ddim" if self.first_alone else self.schedule.default_sampler

    @property
    def writes(self) -> bool:
        """Whether this process writes what it makes: of what all ranks make together, only the first."""
        return RANK == 0 or not self.on_all_ranks

    @functools.cached_property
    def num_parameters(self) -> dict[str, int]:
        """Of each network; on the way the header of every weight file is held against its config, so that
        nothing is found missing when hours of sampling are over. ValueError or OSError if something is."""
        t5 = self._from_headers(T5Encoder, T5Config, "text_encoder", ALIASES)
        vae = self._from_headers(VideoVAE, VAEConfig, "vae")
        dit = self._from_headers(VideoTransformer, TransformerConfig, "transformer")
        for file, _ in self.loras:
            from lora import read_lora  # here and below, so that lora.py can be deleted

            read_lora(dit, file)
        theirs = t5.config.d_model, vae.config.latent_channels
        if theirs != (dit.config.text_embed_dim, dit.config.out_channels):
            raise ValueError(f"{self.model_dir}: the transformer's text_embed_dim and out_channels do not "
                             f"fit the text encoder's d_model and the VAE's latent_channels, {theirs}; "
                             "take all components from one checkpoint")  # fmt: skip
        networks = {"text_encoder": t5, "vae": vae, "transformer": dit}
        return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}

    def _from_headers(self, network: type, config_class: type, name: str, aliases: dict = {}) -> nn.Module:
        folder = component_dir(self.model_dir, name)
        module = build(network, config_class, folder)
        check_weights(module, folder, aliases)
        return module

    @contextlib.contextmanager
    def use(self, name: str, stage: str) -> Iterator[nn.Module]:
        """One network (text_encoder, vae or transformer), loaded for the block and timed as `stage`.

        One that is there already, from a block around this one for instance, is used untimed and stays.
        """
        if name in self.loaded:
            yield self.loaded[name]
            return
        start = time.perf_counter()
        if self.compile:
            gc.collect()  # compiled blocks refer to themselves
        torch.cuda.empty_cache()  # what the stage before has left; a no-op without a GPU
        try:
            yield self.load(name)
        finally:
            if not self.keep:
                self.loaded.pop(name, None)
            self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - start

    def load(self, name: str) -> nn.Module:
        """One network, which stays in memory until it is taken from `loaded`."""
        if name not in self.loaded:
            self.loaded[name] = self._load(name)
        return self.loaded[name]

    @torch.inference_mode(False)  # what is kept can be trained afterwards
    def _load(self, name: str) -> nn.Module:
        if name == "text_encoder":  # if it goes again at once, its layers need not be in memory together
            return T5Encoder.from_pretrained(self.model_dir, self.dtype, self.device, stream=not self.keep)
        if name == "vae":
            vae = VideoVAE.from_pretrained(self.model_dir, self.dtype, self.device)
            with contextlib.suppress(ModuleNotFoundError):  # vae_fast.py may be deleted
                from vae_fast import speed_up

                speed_up(vae)
            return vae
        device = "cpu" if self.low_memory else self.device
        dit = VideoTransformer.from_pretrained(self.model_dir, self.dtype, device)
        for file, weight in self.loras:
            from lora import load_lora

            load_lora(dit, file, weight)
        if self.low_memory:
            from float8 import shrink

            shrink(dit, self.device)
        if self.on_all_ranks:
            from parallel import divide

            divide(dit)
        if self.compile:
            for block in dit.transformer_blocks:
                block.compile()
        return dit


load_models = Models  # as a function: it only looks at the folder; networks come when they are used
