"""The tables, names, flags and commands of README and docs, held against the code."""

import re
import shlex
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import GOLDENS

import sample
import train
from diffusion import NUM_TIMESTEPS, SAMPLER_OF_CLASS, SAMPLERS, SNR_SHIFTED, Schedule
from inpaint import MASK_KINDS, inpaint_condition, resize_mask
from kinds import is_cogvideox15, legal_num_frames, max_num_frames, model_kind, native_fps, native_size
from media import read_mask
from request import TAKES, Request
from sample import generate, load_models
from sizes import frames_for
from transformer import TransformerConfig, position_rule
from vae import VideoVAE, decode_chunks, encode_chunks

ROOT = Path(__file__).parent.parent
PLACES = ["README.md", *(f"docs/{name}.md" for name in ("facts", "questions", "speed", "differences"))]
PLACES += ["checkpoints/tiny/README.md"]
TEXTS = {place: (ROOT / place).read_text(encoding="utf-8") for place in PLACES}
README, FACTS = TEXTS["README.md"], TEXTS["docs/facts.md"]
ALL = "\n".join(TEXTS.values())
PROSE = re.sub(r"```.*?```", "", ALL, flags=re.DOTALL)


def table(first_header: str) -> list[dict[str, str]]:
    """The rows of the table of docs/facts.md whose header line begins so, as {header: cell}, no backticks."""
    [text] = [text for text in FACTS.replace("`", "").split("\n\n") if text.startswith(first_header)]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def numbers(cell: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", cell)]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of each command in its code blocks, variables filled in."""
    variables, found = {}, []
    for line in "\n".join(code_blocks(text, "bash")).splitlines():
        if match := re.match(r"([A-Z])=(\S+)", line):
            variables[match[1]] = match[2]
            continue
        for part in line.split(" && "):
            part = re.sub(r"\$([A-Z])\b", lambda m: variables[m[1]], part.strip())
            if part.startswith(("python ", "torchrun ")):
                found.append(shlex.split(part, comments=True))
    return found


def test_the_readme_is_a_front_door():
    assert len(README.splitlines()) <= 250 and len(README.split()) <= 2500


# ---------------------------------------------------------------- models

EXAMPLE = {
    "text": "cogvideox-2b-t2v",
    "inpaint": "fun-5b-inp",
    "control": "fun-2b-control",
    "image": "cogvideox-5b-i2v",
}


@pytest.mark.parametrize("row", table("| kind |"), ids=lambda row: row["kind"])
def test_kinds_of_models_are_as_the_table_says(row, monkeypatch):
    channels = numbers(row["in_channels"])[0]
    learned = "use_learned_positional_embeddings" in row["in_channels"]
    rope = {"use_rotary_positional_embeddings": learned, "use_learned_positional_embeddings": learned}
    config = TransformerConfig(in_channels=channels, **rope)
    assert model_kind(config) == row["kind"]
    described = re.sub(r"frame \d", "", row["what the channels are, in order"])
    assert sum(numbers(described)) == channels
    takes = {name.strip() for name in row["takes besides a prompt"].split(",")}
    assert takes == TAKES[model_kind(config)]

    models = load_models(GOLDENS / EXAMPLE[row["kind"]])
    by_file = row["default sampler"] == "of scheduler_config.json"
    wanted = models.schedule.default_sampler if by_file else row["default sampler"]
    assert models.default_sampler == wanted != ("ddim" if by_file else models.schedule.default_sampler)
    used = []

    def decode_stream(self, latents, tiled=False, first_alone=True):
        used.append(first_alone)
        yield torch.zeros(1, 3, 1, 16, 16)

    monkeypatch.setattr(VideoVAE, "decode_stream", decode_stream)
    list(sample.decode(models, torch.zeros(1, 16, 2, 2, 2)))
    assert used == [row["decode chunks"].startswith("1")]


def facts_of_models() -> dict[str, dict[str, str]]:
    """The column of the second table for each small copy."""
    rows = table("| | CogVideoX-2B, Fun 2B |")
    columns = [{row[""]: row[header] for row in rows} for header in rows[0] if header]
    return {name: facts for facts in columns for name in facts["small copy in tests/goldens"].split(", ")}


@pytest.mark.parametrize("name, facts", facts_of_models().items())
def test_facts_of_the_models_are_as_the_table_says(name, facts):
    models = load_models(GOLDENS / name)
    small = models.config
    assert models.vae_config.scaling_factor == float(facts["latent scale scaling_factor"])
    assert models.schedule.config.snr_shift_scale == float(facts["snr_shift_scale, for the -cog samplers"])
    assert small.use_rotary_positional_embeddings == facts["positions"].startswith("RoPE")
    assert small.use_learned_positional_embeddings == ("stored table" in facts["positions"])
    rule = facts["off the native size"]
    wanted = "regenerate" if "computed anew" in rule else None
    if name.startswith("fun") and "Fun: native table stretched" in rule:
        wanted = "interpolate"
    assert position_rule(small) == wanted

    pair = int(facts["latent frames in one token"])
    assert (small.patch_size_t or 1) == pair
    heads, width, layers = numbers(facts["heads × width, layers"])
    real = TransformerConfig(
        in_channels=small.in_channels,
        use_rotary_positional_embeddings=small.use_rotary_positional_embeddings,
        use_learned_positional_embeddings=small.use_learned_positional_embeddings,
        ofs_embed_dim=small.ofs_embed_dim and 512,
        num_attention_heads=heads,
        attention_head_dim=width,
        num_layers=layers,
        **({"sample_height": 300, "sample_width": 300, "patch_size_t": 2} if pair == 2 else {}),
        **({"sample_frames": 81} if is_cogvideox15(small) else {}),
    )
    assert native_fps(real) == int(facts["frames a second"])
    assert native_size(real) == tuple(numbers(facts["native height × width × frames"]))
    assert real.max_text_seq_length == int(facts["text tokens"])
    limited = name.startswith("fun") and facts["most frames"].startswith("Fun")
    assert max_num_frames(real) == (49 if limited else 16385)


# ---------------------------------------------------------------- the mask


def test_the_masks_of_training_are_as_the_table_says():
    assert {row["kind of mask"]: float(row["share"]) for row in table("| kind of mask |")} == MASK_KINDS


def test_the_mask_means_at_each_stage_what_the_table_says(monkeypatch):
    facts = {row["stage"]: (row["generate"], row["keep"]) for row in table("| stage | generate |")}
    grey = torch.arange(256, dtype=torch.uint8).view(16, 16).numpy()
    white = read_mask(grey, 1, 16, 16)[0].flatten()
    for value, cell in zip((1, 0), facts["user's file, grey levels"]):
        low, high = numbers(cell)
        assert all(white[level] == value for level in range(low, high + 1))
    assert facts["mask in memory, sampling and training"] == ("1", "0")
    assert facts["argument of inpaint_condition"] == ("1", "0")
    seen = []
    moments = VideoVAE.moments
    monkeypatch.setattr(VideoVAE, "moments", lambda self, x, *rest: seen.append(x) or moments(self, x, *rest))
    pixels, mask = torch.full((1, 3, 5, 16, 16), 0.25), torch.ones(1, 1, 5, 16, 16)
    mask[..., 8:] = 0  # the right half is kept
    for variant, title in (("fun-2b-inp", "2B"), ("fun-5b-inp", "5B")):
        with torch.no_grad():
            condition = inpaint_condition(VideoVAE.from_pretrained(GOLDENS / variant), pixels, mask)
        channel = condition[0, 0, 0, 0]
        for place, cell in zip((0, 1), facts[f"mask channel the network sees, {title}"]):
            assert channel[place] == pytest.approx(float(cell))
        assert (condition[0, 1:, :, :, 0] != 0).any()
    assert facts["pixels the VAE encodes"] == ("-1 (black)", "the pixel")
    assert (seen[0][..., :8] == -1).all() and (seen[0][..., 8:] == 0.25).all()
    resized = resize_mask(1 - mask, (2, 2, 2))[0, 0, 0, 0].tolist()
    assert resized == [float(cell) for cell in facts["mask channel before scaling"]]


@pytest.mark.parametrize("row", table("| known frames |"), ids=lambda row: row["known frames"])
def test_known_frames_read_in_the_latents_as_the_table_says(row):
    known = torch.zeros(1, 1, 13, 8, 8)
    low_high = numbers(row["known frames"])
    frames = range(low_high[0], low_high[1] + 1) if "…" in row["known frames"] else low_high
    known[:, :, list(frames)] = 1
    assert resize_mask(known, (4, 1, 1)).flatten().tolist() == [float(row[f"latent {i}"]) for i in range(4)]


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize("row", table("| frames | latent frames |"), ids=lambda row: row["frames"])
@torch.no_grad()
def test_frames_and_chunks_are_as_the_table_says(row):
    vae = VideoVAE.from_pretrained(GOLDENS / "fun-2b-inp")
    frames, latent_frames = int(row["frames"]), int(row["latent frames"])
    assert encode_chunks(frames) == numbers(row["encode chunks"])
    for kinds, first_alone in (("inpaint and control", True), ("text and image", False)):
        assert decode_chunks(latent_frames, first_alone) == numbers(row[f"decode chunks, {kinds}"])
        decoded = vae.decode(torch.zeros(1, 16, latent_frames, 2, 2), first_alone=first_alone)
        assert decoded.shape[2] == int(row[f"frames decoded, {kinds}"])
    assert vae.encode(torch.zeros(1, 3, frames, 16, 16)).shape[2] == latent_frames


def test_v15_makes_the_frames_of_the_table():
    rope = {"use_rotary_positional_embeddings": True, "patch_size_t": 2}
    config = TransformerConfig(in_channels=33, sample_height=300, sample_width=300, **rope)
    [made] = table("| asked of V1.5 |")
    counts = [(int(asked), int(cell)) for asked, cell in made.items() if asked.isdigit()]
    assert len(counts) == 8 and all(legal_num_frames(config, asked) == cell for asked, cell in counts)


def test_budgets_give_the_frames_of_the_table():
    for row in table("| budget |"):
        budget, *cells = row.items()
        for size, cell in cells:
            side = int(size.removesuffix("²"))
            assert frames_for(int(budget[1]), side, side) == int(cell), (budget, size)


# ---------------------------------------------------------------- samplers and defaults


def test_samplers_are_as_the_table_says():
    rows = table("| name |")
    ends = "next in the list", f"t - {NUM_TIMESTEPS}//num_steps"
    assert {row["name"] for row in rows} == set(SAMPLERS)
    for row in rows:
        name, x = row["name"], torch.ones(1, 16, 1, 2, 2)
        assert SAMPLER_OF_CLASS[row["class in scheduler_config.json"]] == name
        assert (row["alphas_cumprod"] == "SNR-shifted") == (name in SNR_SHIFTED)
        schedule = Schedule(snr_shift=name in SNR_SHIFTED)
        timesteps, randn = schedule.timesteps(7), Mock(return_value=torch.zeros_like(x))
        final = list(SAMPLERS[name](lambda x, t: 0.5 * x + 1, x, schedule, timesteps, randn))[-1]
        assert randn.call_count == 7 * int(row["draws a step"])
        # The length of the uncut list sets the stride; steps to the next in the list do not see it.
        other = list(SAMPLERS[name](lambda x, t: 0.5 * x + 1, x, schedule, timesteps, randn, 5))[-1]
        assert row["a step ends at"] == (ends[0] if torch.equal(final, other) else ends[1])


def test_defaults_are_as_the_table_says():
    for row in table("| setting |"):
        default = getattr(Request("a cat"), row["setting"])
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else str(default) or '""'
        assert row["default"] == shown, row["setting"]


# ---------------------------------------------------------------- names, flags, commands


def test_places_in_the_code_exist():
    """`file.py` `name`, `name`: each name is defined in that file, as is each part of Class.member."""
    places = re.findall(r"`(\w+\.py)`((?:,? `[\w.]+`)+)", PROSE)
    assert len(places) > 60
    for file, names in places:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            for part in [] if name.endswith(".py") else name.split("."):
                defined = rf"^ *((def|class) {part}\b|{part}(:.*)? =|{part}: )"
                assert re.search(defined, source, re.MULTILINE), f"{file} {name}"


def test_every_file_and_name_in_backticks_exists():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("t*/*.py"), *GOLDENS.glob("*/*/*.json")]
    words = set(re.findall(r"\w+", " ".join(path.read_text(encoding="utf-8") for path in sources)))
    for text in re.findall(r"`([^`\n]+)`", PROSE):
        if re.fullmatch(r"[\w/]+\.py|tests/\S+|docs/\S+|LICENSE", text):
            assert (ROOT / text).exists(), text
        elif match := re.fullmatch(r"([A-Za-z_][\w.]*)(\(.*\))?", text):
            assert set(match[1].split(".")) <= words, text


def test_every_link_leads_somewhere():
    for place, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert target.startswith("https://") or ((ROOT / place).parent / target).exists(), target


def test_every_flag_is_in_the_help_of_its_program(capsys):
    known = {}
    for program in (sample, train):
        with pytest.raises(SystemExit):
            program.parse(["--help"])
        known[f"{program.__name__}.py"] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for name in ("check_data.py", "tools/bench.py", "tools/evaluate.py", "tools/claims.py"):
        known[name] = set(re.findall(r'"(--[a-z-]+)"', (ROOT / name).read_text(encoding="utf-8")))
    for line in ALL.splitlines():
        for file, arguments in re.findall(r"([\w/]+\.py)( [^&`]*)", line):
            if file in known:
                assert set(re.findall(r"(?<!\S)--[a-z-]+", arguments)) <= known[file], line
    in_prose = {
        flag for text in re.findall(r"`([^`\n]+)`", PROSE) for flag in re.findall(r"^--[a-z-]+", text)
    }
    assert in_prose and in_prose <= set.union(*known.values()) | {"--shutdown-timeout"}


def test_every_training_command_asks_for_a_run_that_can_be(monkeypatch):
    monkeypatch.setattr(train.checkpoint, "find_model", Path)  # hub ids are not fetched
    count = 0
    for words in commands(ALL):
        if "train.py" in words:
            ranks = words[1].removeprefix("--nproc_per_node=") if words[0] == "torchrun" else 1
            monkeypatch.setattr(train, "NUM_RANKS", int(ranks))
            train.make_config(train.parse(words[words.index("train.py") + 1 :]))
            count += 1
    assert count >= 8


@pytest.mark.parametrize("place, at_least", [("README.md", 18), ("checkpoints/tiny/README.md", 5)])
def test_the_sampling_commands_run(place, at_least, tmp_path, monkeypatch):
    """All of them, one after the other in a new folder, in fewer steps; what is not there is not sampled."""
    for folder in ("tests", "checkpoints"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    frames, write_video = {}, sample.write_video

    def keep(chunks, path, fps):
        frames[path.name] = np.concatenate(list(chunks))
        write_video(frames[path.name], path, fps)

    monkeypatch.setattr(sample, "write_video", keep)
    count = 0
    for words in commands(TEXTS[place]):
        is_there = not any(word.startswith(("alibaba-pai", "runs")) for word in words)
        if words[:2] == ["python", "sample.py"] and is_there:
            before = set(tmp_path.rglob("*.*"))
            fewer = ["--num-steps", "2" if "--strength" in words else "1"]
            if place != "README.md" and "--video" not in words:
                fewer += ["--num-frames", "5"]
            if "--from-latents" in words:
                fewer = []
            assert sample.main([*words[2:], "--quiet", *fewer]) == 0, words
            assert len(set(tmp_path.rglob("*.*")) - before) >= 2, words  # a video and its record
            count += 1
    assert count >= at_least
    if place == "README.md":
        assert np.array_equal(frames["again.mp4"], frames["clip.mp4"])
        assert len(frames["v15.mp4"]) == 21 and len(frames["picture.png"]) == 1


def test_the_library_example_of_the_readme_runs(tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    [example] = code_blocks(README, "python")
    monkeypatch.setattr(sample, "generate", lambda *a, **k: generate(*a, **{**k, "num_steps": 2}))
    names = {}
    exec(example, names)
    assert names["frames"].shape == (13, 32, 48, 3) and names["latents"].shape == (1, 16, 4, 4, 6)
    assert (tmp_path / "outputs/library.mp4").exists()
