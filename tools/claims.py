"""Draw how several training runs compare, for the report's claims in the README; needs matplotlib.

    python tests/claims.py runs/interpolate runs/regenerate runs/slice --out claim.png

Left: each run's validation loss over its steps, from RUN/log.jsonl. Right: the share of clips with each
attribute right, from what `evaluate.py RUN/checkpoints/step-000300 --out RUN/step-000300.jsonl` wrote, all
its tasks together; the bars are 95 % intervals. The same numbers are printed as JSON.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from evaluate import WORDS, wilson

matplotlib.use("Agg")
from matplotlib import pyplot


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def validation(run: Path) -> dict[int, float]:
    """step -> loss"""
    entries = read_lines(run / "log.jsonl")
    return {entry["step"]: entry["val_loss"] for entry in entries if "val_loss" in entry}


def fidelity(run: Path) -> dict[int, dict[str, tuple[float, float, float]]]:
    """step -> attribute -> (share right, low, high)"""
    shares = {}
    for path in sorted(run.glob("step-*.jsonl")):
        results = [entry["result"] for entry in read_lines(path)]
        hits = {word: sum(result[word] for result in results) for word in WORDS}
        shares[int(path.stem[5:])] = {
            word: (hit / len(results), *wilson(hit, len(results))) for word, hit in hits.items()
        }
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("claim.png"))
    parser.add_argument("--words", nargs="+", default=["motion", "shape"], choices=WORDS)
    args = parser.parse_args()
    figure, axes = pyplot.subplots(1, 1 + len(args.words), figsize=(4 * (1 + len(args.words)), 3.2))
    numbers = {}
    for color, run in enumerate(args.runs):
        losses, shares = validation(run), fidelity(run)
        numbers[run.name] = {"val_loss": losses, "fidelity": shares}
        axes[0].plot(losses.keys(), losses.values(), color=f"C{color}", label=run.name)
        for axis, word in zip(axes[1:], args.words):
            middle, low, high = zip(*(shares[step][word] for step in shares)) if shares else ((), (), ())
            pairs = (middle, low), (high, middle)  # rounding can bring one below the other
            spread = [[max(0.0, a - b) for a, b in zip(*pair)] for pair in pairs]
            axis.errorbar(shares.keys(), middle, spread, color=f"C{color}", capsize=2)
    for axis, title in zip(axes, ["validation loss", *(f"{word} right" for word in args.words)]):
        axis.set(title=title, xlabel="steps")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(args.out, dpi=100)
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
