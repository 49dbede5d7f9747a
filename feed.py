"""The samples of a run as tensors: encoded when their turn comes, or before a phase and kept."""

import functools
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import data
from data import Batch, Epochs, Files, Loader, Micro, load_sample
from log import as_time
from presets import Config, Phase
from runtime import NUM_RANKS, RANK, say, sum_over_ranks, wait_for_ranks


class Feed:
    """For each phase `steps`, lists of micro-batches; `batches`, the tensors of those of this rank, in order;
    and `held_out`, micro-batches of one sample with their tensors."""

    def __init__(self, task, config: Config, files: Files, cache_dir: Path | None, num_workers: int):
        """task: train_dit.Denoising, or train_vae.Reconstruction    cache_dir: of --cache-latents"""
        self.task, self.config, self.files, self.cache_dir = task, config, files, cache_dir
        self.loader = Loader(files.records, files.failures, num_workers)
        self.held_out_loader = Loader(files.held_out, max_failures=1.0)
        self.cache = None
        self.digests, self.held_out_digests = [], []  # of the records' contents
        if cache_dir:
            from cache import content_digests

            self.digests = content_digests(files.records)
            self.held_out_digests = content_digests(files.held_out)

    def begin(self, phase: Phase, epoch: int, number: int, num_steps: int) -> None:
        """Make ready for so many steps of a phase, from a place in an epoch's list on."""
        config = self.config
        self.plan = self.task.plan(phase)
        self.read = functools.partial(load_sample, plan=self.plan)
        names = [int(digest, 16) for digest in self.digests]  # so an entry does not depend on its place
        self.epochs = Epochs(
            self.files.records, self.plan, config.seed, config.cached_draws, config.only_full, names
        )
        self.held_out_micros = data.held_out_micros(self.files.held_out, self.plan, config.seed)
        size = phase.global_batch // config.batch_size
        self.steps, ahead = itertools.tee(self.epochs.steps(epoch, number, size))
        mine = (micro for micros in ahead for micro in micros[RANK::NUM_RANKS])
        if not self.cache_dir:
            held_out = self.encoded(self.held_out_loader, self.held_out_micros)
            self.held_out = list(zip(held_out, self.held_out_micros))
        if not config.cached_draws:
            self.batches = self.encoded(self.loader, mine)
            return
        began = time.perf_counter()
        asked = list(self.epochs.asked(epoch, number, size, num_steps))
        count = self.fill_folder(asked) if self.cache_dir else self.fill_device(asked)
        say(f"{count} samples encoded in {as_time(time.perf_counter() - began)}")
        self.task.models.loaded.clear()  # VAE and T5 have done their part
        wait_for_ranks()
        self.batches = self.cache.batches(mine)

    def encoded(self, loader: Loader, micros: Iterable[Micro]) -> Iterator[Batch]:
        for samples in loader.each(micros, self.read):
            yield self.task.encode(samples)

    def fill_folder(self, asked: list[Micro]) -> int:
        """Each rank makes its part. Opened anew in each phase, as texts are named by what T5 has become."""
        self.cache = self.task.cache(self.loader, self.plan, self.cache_dir, self.digests)
        held_out = self.task.cache(self.held_out_loader, self.plan, self.cache_dir, self.held_out_digests)
        count = self.cache.fill(asked[RANK::NUM_RANKS])
        count += held_out.fill(self.held_out_micros[RANK::NUM_RANKS])
        count = int(sum_over_ranks(torch.tensor(count)))  # by then all ranks have made theirs
        self.held_out = list(zip(held_out.batches(self.held_out_micros), self.held_out_micros))
        return count

    def fill_device(self, asked: list[Micro]) -> int:
        self.cache = self.cache or self.task.cache(self.loader, self.plan, None, [])
        self.cache.read = self.read
        return self.cache.fill(asked)
