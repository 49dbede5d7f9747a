"""Draw how training runs compare, for the report's claims; needs matplotlib.

    python tools/evaluate.py RUN/checkpoints/step-000300 --out RUN/step-000300 --tasks …      for each of them
    python tools/claims.py runs/interpolate-0 runs/interpolate-1 runs/slice-0 --out claim.png

Left: validation loss over the steps, from RUN/log.jsonl. Beside it: how clips were judged, from
RUN/step-*.jsonl, all tasks together, with 95 % intervals. Runs that differ only in what follows the last
hyphen, the seed, have one colour. The same numbers are printed as JSON.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from evaluate import WORDS, number

matplotlib.use("Agg")
from matplotlib import pyplot

MEASURES = (*WORDS, "all", "fit", "worst_fit")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def validation(run: Path) -> dict[int, float]:
    """step -> loss"""
    entries = read_lines(run / "log.jsonl")
    return {entry["step"]: entry["val_loss"] for entry in entries if "val_loss" in entry}


def fidelity(run: Path, measures: list[str]) -> dict[str, dict[int, list[float]]]:
    """measure -> step -> [value, low, high]"""
    found: dict[str, dict[int, list[float]]] = {measure: {} for measure in measures}
    for path in sorted(run.glob("step-*.jsonl")):
        results = [entry["result"] for entry in read_lines(path)]
        for measure in measures:
            step = int(path.stem.removeprefix("step-"))
            found[measure][step] = number(measure, [result[measure] for result in results])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("claim.png"))
    parser.add_argument("--measures", nargs="+", default=["all", "fit"], choices=MEASURES)
    args = parser.parse_args(argv)
    figure, axes = pyplot.subplots(1, 1 + len(args.measures), figsize=(4 * (1 + len(args.measures)), 3.2))
    colors, numbers = {}, {}
    for run in args.runs:
        name = run.name.rsplit("-", 1)[0]
        label = None if name in colors else name
        color = colors.setdefault(name, f"C{len(colors)}")
        losses, judged = validation(run), fidelity(run, args.measures)
        numbers[run.name] = {"val_loss": losses} | judged
        axes[0].plot(losses.keys(), losses.values(), color=color, label=label)
        for axis, measure in zip(axes[1:], args.measures):
            for step, (value, low, high) in judged[measure].items():
                axis.errorbar(step, value, [[value - low], [high - value]], color=color, capsize=2, fmt="o")
    for axis, title in zip(axes, ["validation loss", *args.measures]):
        axis.set(title=title, xlabel="steps")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(args.out, dpi=100)
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
