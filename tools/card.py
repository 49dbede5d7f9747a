"""Bring the card of a model of the drawn world up to date: its numbers, its examples, its pictures.

    python tools/evaluate.py checkpoints/tiny --num 200 --out outputs/evaluation
    python tools/card.py checkpoints/tiny --evaluation outputs/evaluation --run runs/tiny

The words of MODEL/README.md are written by hand. Made here are what stands between <!-- NAME --> and
<!-- end -->, and the pictures beside it:

    parts, numbers   from the configs, and from the evaluation, which goes into training.json too
    examples.gif     a drawn clip, and what the card's own commands make
    heldout.png      the first twenty clips of the evaluation, which nobody has chosen
    curve.png        loss.png of the run
"""

import argparse
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluate import table  # noqa: E402
from figures import as_png  # noqa: E402

import sample  # noqa: E402
from media import read_video, write_video  # noqa: E402


def read_config(model: Path, name: str) -> dict:
    return json.loads((model / name / "config.json").read_text())


def parts(model: Path) -> list[str]:
    dit, vae, t5 = (read_config(model, name) for name in ("transformer", "vae", "text_encoder"))
    heads, head_dim = dit["num_attention_heads"], dit["attention_head_dim"]
    widths = ", ".join(map(str, vae["block_out_channels"]))
    sizes = {
        "transformer": f"{dit['num_layers']} blocks, {heads * head_dim} wide ({heads} heads of {head_dim}), "
        f"{dit['in_channels']} channels, sincos positions",
        "vae": f"4 times fewer frames, 8 times fewer rows and columns, 16 channels; {widths} wide inside",
        "text_encoder": f"{t5['num_layers']} layers, {t5['d_model']} wide, {t5['vocab_size']} words",
    }
    megabytes = {name: sum(file.stat().st_size for file in (model / name).iterdir()) / 1e6 for name in sizes}
    rows = [f"| `{name}` | {size} | {megabytes[name]:.1f} MB |" for name, size in sizes.items()]
    return ["| part | what | file |", "|---|---|---|", *rows]


def filled(card: str, name: str, lines: list[str]) -> str:
    """The card with these lines between its marks."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    assert marked.search(card), f"the card has no <!-- {name} --> … <!-- end -->"
    return marked.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], card)


def examples(card: str, clip: Path) -> np.ndarray:
    """uint8 f h w 3: a clip, then what each `python sample.py` of the card makes, side by side."""
    folder = re.search(r"^T=(.*)$", card, re.MULTILINE)[1]
    shown = [read_video(clip)]
    for line in re.findall(r"^python sample.py (.*)$", card, re.MULTILINE):
        arguments = shlex.split(line.replace("$T", folder))
        assert sample.main([*arguments, "--quiet"]) == 0, line
        shown.append(read_video(arguments[arguments.index("--out") + 1]))
    framed = [np.pad(frames, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=192) for frames in shown]
    return np.concatenate(framed, axis=2).repeat(2, axis=1).repeat(2, axis=2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="with README.md, training.json and assets/")
    parser.add_argument("--evaluation", type=Path, help="--out of tools/evaluate.py")
    parser.add_argument("--run", type=Path, help="the folder of the run that made it")
    args = parser.parse_args(argv)
    readme, origin = args.model / "README.md", args.model / "training.json"
    card = filled(readme.read_text(encoding="utf-8"), "parts", parts(args.model))
    if args.evaluation:
        summary = json.loads(Path(f"{args.evaluation}.json").read_text())
        card = filled(card, "numbers", list(table(summary)))
        found = json.loads(origin.read_text()) | {"evaluation": summary}
        origin.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        with Image.open(f"{args.evaluation}.png") as sheet:
            (args.model / "heldout.png").write_bytes(as_png(sheet, 120_000))
    if args.run:
        shutil.copyfile(args.run / "loss.png", args.model / "curve.png")
    readme.write_text(card, encoding="utf-8")
    write_video(examples(card, args.model / "assets" / "clip.mp4"), args.model / "examples.gif", 8)


if __name__ == "__main__":
    main()
