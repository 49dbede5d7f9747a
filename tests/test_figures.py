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


def test_places_on_the_models_own_grid_are_rows_and_columns_by_any_rule():
    """What is read back from the vectors is where the token stands; 1e-3 of a token, as sines are float32."""
    rows, columns = figures.NATIVE
    wanted = np.mgrid[:1, :rows, :columns][:, 0]
    for rule in ("interpolate", "regenerate", "slice"):
        places = figures.places_told(figures.NATIVE, rule).numpy()
        assert np.abs(places - wanted).max() < 1e-3


def test_a_stretched_corner_is_told_it_is_a_corner():
    """Half a token off at most, as tokens' centres are stretched, not their edges."""
    _, row, column = figures.places_told((48, 72), "interpolate")[:, -1, -1].tolist()
    assert abs(row - 29) < 0.5 and abs(column - 44) < 0.5
    _, row, column = figures.places_told((48, 72), "regenerate")[:, -1, -1].tolist()
    assert abs(row - 47) < 0.5 and abs(column - 71) < 0.5
