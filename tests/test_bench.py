"""bench.py at its small sizes: the work is the same as the peers', and a difference is not passed over."""

import pytest
import torch

import bench

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
ARGUMENTS = ["--rounds", "1", "--leave-out", "import", "--device", "cpu", "--threads", "1"]  # like all tests


def test_ours_and_theirs_do_the_same_work(capsys):
    assert bench.main([*ARGUMENTS, "--only", "dit", "t5", "sampling"]) == 0
    said = capsys.readouterr()
    rows = [line.split(" | ") for line in said.out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == [
        "| DiT forward, 208 tokens",
        "| DiT forward + backward, 208 tokens",
        "| DiT forward, 832 tokens",
        "| DiT forward + backward, 832 tokens",
        "| T5, two prompts",
        "| prompt to frames, 9×64², 10 steps",
    ]
    assert all(float(row[2]) > 0 for row in rows[2:]) and "TOO LARGE" not in said.err


@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_the_vaes_agree(kind):
    with torch.no_grad():
        cases = bench.vae_cases(bench.SIZES["tiny"], torch.float32, torch.device("cpu"))
        found = [case for case in cases if kind in case.name]
        assert len(found) == 2 and all(bench.difference(case) < 1e-5 for case in found)


def test_the_card_measures_what_is_asked_for(capsys):
    match = ["T5", "208 tokens, eager, checkpointing full"]
    assert bench.main(["--card", "--match", *match, "--rounds", "2", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    step, t5 = ([cell.strip(" |") for cell in line.split(" | ")] for line in said[-2:])
    assert step[0] == "tiny forward + backward, 208 tokens, eager, checkpointing full"
    assert t5[0] == "T5, two prompts" and said[-3].startswith("| --- ")
    assert all(float(number) > 0 for number in (step[1], step[2], step[4], t5[1], t5[4]))


def test_another_result_fails_the_run(monkeypatch, capsys):
    right = bench.T5Encoder.forward
    monkeypatch.setattr(bench.T5Encoder, "forward", lambda self, ids: 1.01 * right(self, ids))
    assert bench.main([*ARGUMENTS, "--only", "t5"]) == 1
    assert "TOO LARGE" in capsys.readouterr().err


def test_growth_counts_what_work_allocates():
    grown = bench.growth(lambda: torch.ones(20_000_000).exp().sum(), torch.device("cpu"))  # twice 80 MB
    assert 100 < grown < 250


def test_flops_are_those_of_the_known_table():
    """78 TFLOP for 13312 + 226 tokens through 2B, 223 through 5B."""
    flops = [bench.dit_flops(config, 13312 + 226) / 1e12 for config in bench.CARDS["real"].dits.values()]
    assert [round(each) for each in flops] == [78, 223]
