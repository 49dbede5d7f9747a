"""tools/figures.py: the pictures of the documentation are what the code draws today."""

import figures
import numpy as np
import pytest
from PIL import Image

CAPTIONS = (figures.FIGURES_DIR / "README.md").read_text(encoding="utf-8")


def test_every_figure_is_small_and_has_a_caption():
    sizes = {path.stem: path.stat().st_size for path in figures.FIGURES_DIR.glob("*.png")}
    assert sizes.keys() == figures.FIGURES.keys()
    assert max(sizes.values()) < 60_000 and sum(sizes.values()) < 250_000
    assert all(f"({name}.png)" in CAPTIONS for name in sizes)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_the_figures_kept_are_what_the_code_draws(name, tmp_path):
    """To 2 grey levels in the mean: other processors round otherwise, and sampling enlarges it a little."""
    figures.main([name, "--out", str(tmp_path)])
    kept, drawn = (
        np.asarray(Image.open(folder / f"{name}.png").convert("RGB"), dtype=float)
        for folder in (figures.FIGURES_DIR, tmp_path)
    )
    assert kept.shape == drawn.shape, "run python tools/figures.py"
    assert np.abs(kept - drawn).mean() < 2, "the code draws another picture; run python tools/figures.py"
