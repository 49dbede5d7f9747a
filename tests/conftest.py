"""Fixtures shared by the tests: the small goldens in tests/goldens (see the README there)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import shapes
from media import write_video

GOLDENS = Path(__file__).parent / "goldens"
FUN = ["fun-2b-inp", "fun-5b-inp", "fun-1.5-5b-inp", "fun-2b-control"]
PLAIN = ["cogvideox-2b-t2v", "cogvideox-5b-t2v", "cogvideox-5b-i2v"]
V15 = ["cogvideox-1.5-5b-t2v", "cogvideox-1.5-5b-i2v"]
VARIANTS = FUN + PLAIN


def expected(variant: str) -> dict[str, Tensor]:
    """The reference's tensors for one variant, by name."""
    return load_file(GOLDENS / variant / "expected.safetensors")


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Largest absolute difference below `tolerance`, with both shapes equal and nothing NaN."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    error = (ours.double() - theirs.double()).abs().max().item()
    assert error < tolerance, f"largest difference {error:.2e}, tolerance {tolerance:.0e}"


# The goldens were recorded on an AMD processor. On Intel's, MKL takes other float32 roots, the reference's as
# well: what is equal to the bit elsewhere, and there to diffusers on the same machine, differs by rounding.
CPU_INFO = Path("/proc/cpuinfo")
ROUNDS_ALIKE = not (CPU_INFO.exists() and "GenuineIntel" in CPU_INFO.read_text())


def assert_same(ours: Tensor, theirs: Tensor, rounding: float) -> None:
    """Equal to the bit where the processor rounds as the recording one did; else within `rounding`."""
    assert ours.dtype == theirs.dtype
    if ROUNDS_ALIKE:
        assert torch.equal(ours, theirs)
    else:
        assert_close(ours, theirs, rounding)


torch.set_num_threads(1)  # the shapes are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder of eight square clips with captions, all of one bucket; controls.json there gives each another
    one as its control."""
    folder = tmp_path_factory.mktemp("clips")
    listed = []
    for i, clip in enumerate(shapes.records(8, 5, sizes=[(32, 32)])):
        write_video(clip.read(0, 9), folder / f"{i}.mp4")
        (folder / f"{i}.txt").write_text(clip.scene.caption())
        listed.append({"file_path": f"{i}.mp4", "control_file_path": f"{7 - i}.mp4", "text": "a"})
    (folder / "controls.json").write_text(json.dumps(listed))
    return folder
