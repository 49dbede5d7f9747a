"""How training runs compare, for the report's claims: a Markdown table, a line for each run.

    python tools/evaluate.py RUN/checkpoints/step-000300 --out RUN/step-000300 --tasks …      for each of them
    python tools/claims.py runs/interpolate-0 runs/interpolate-1 runs/slice-0 --measures shape fit

Validation loss over the steps, from RUN/log.jsonl; then how clips were judged, from RUN/step-*.jsonl, all
tasks together, with 95 % intervals.
"""

import argparse
import json
from pathlib import Path

from evaluate import WORDS, number

MEASURES = (*WORDS, "all", "fit", "worst_fit")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def columns(run: Path, measures: list[str]) -> dict[tuple[str, int], str]:
    """(measure, step) -> what the table says"""
    found = {}
    for entry in read_lines(run / "log.jsonl"):
        if "val_loss" in entry:
            found["validation loss", entry["step"]] = f"{entry['val_loss']:.4f}"
    for path in sorted(run.glob("step-*.jsonl")):
        step = int(path.stem.removeprefix("step-"))
        results = [entry["result"] for entry in read_lines(path)]
        for measure in measures:
            value, low, high = number(measure, [result[measure] for result in results])
            found[measure, step] = f"{value:.2f} ({low:.2f} … {high:.2f})"
    return found


def table(runs: dict[str, dict[tuple[str, int], str]], measures: list[str]) -> list[str]:
    given = {column for found in runs.values() for column in found}
    heads = sorted(given, key=lambda column: (["validation loss", *measures].index(column[0]), column[1]))
    lines = ["| run | " + " | ".join(f"{measure} at {step}" for measure, step in heads) + " |"]
    lines.append("|---" * (1 + len(heads)) + "|")
    for name, found in runs.items():
        lines.append(f"| {name} | " + " | ".join(found.get(head, "") for head in heads) + " |")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--measures", nargs="+", default=["all", "fit"], choices=MEASURES)
    args = parser.parse_args(argv)
    runs = {run.name: columns(run, args.measures) for run in args.runs}
    print("\n".join(table(runs, args.measures)))


if __name__ == "__main__":
    main()
