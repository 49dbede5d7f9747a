"""tools/bench.py at its small sizes: the same work as the peers', and a difference is not passed over."""

from dataclasses import replace

import bench
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
WHERE = {"dtype": torch.float32, "device": torch.device("cpu")}
ARGUMENTS = ["--rounds", "1", "--device", "cpu", "--threads", "1"]
SMALL = replace(bench.SIZES["tiny"], vae_clips=[(32, 32, 9)], dit_clips=[(32, 32, 9)])


def rows_of(capsys) -> list[list[str]]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_networks_of_ours_and_theirs_do_the_same_work(capsys):
    assert bench.main([*ARGUMENTS, "--rows", "dit", "t5", "--clips", "32x32x9"]) == 0
    rows = rows_of(capsys)
    work = [f"{kind} {what} 32x32x9" for kind in SMALL.dits for what in ("guided step", "forward + backward")]
    work.append("T5, two prompts")
    assert [row[:2] for row in rows] == [[name, way] for name in work for way in ("peer", "ours")]
    assert all(float(row[2]) > 0 for row in rows)


def test_sampling_compares_settings_and_does_not_judge_them(capsys, monkeypatch):
    few = {"num_steps": 4}  # in place of 50
    ways = {"ours": few, "guidance in half the steps": {**few, "guidance_interval": (500, 999)}}
    monkeypatch.setattr(bench, "SAMPLING", ways)
    assert bench.main([*ARGUMENTS, "--rows", "sampling", "--clips", "32x32x5", "--models", "RoPE"]) == 0
    [first, second] = rows_of(capsys)
    assert first[0] == second[0] == "RoPE 50 steps 32x32x5"
    assert float(first[5]) == 0 and float(second[5]) > 1e-2


@torch.no_grad()
def test_all_ways_of_a_vae_agree_and_another_result_fails_the_run(monkeypatch, capsys):
    ways = bench.parse([]).ways  # with vae_fast.py, where it is
    cases = list(bench.vae_cases(SMALL, ways, WHERE))
    assert [case.name.split()[1] for case in cases] == ["encode", "decode"]
    for case in cases:
        first, *others = [run() for run in case.ways.values()]
        assert all(bench.difference(other, first) < 1e-5 for other in others)
    right = bench.T5Encoder.forward
    monkeypatch.setattr(bench.T5Encoder, "forward", lambda self, ids: 1.01 * right(self, ids))
    assert bench.main([*ARGUMENTS, "--rows", "t5"]) == 1
    assert "TOO LARGE" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [16, 0])
def test_a_step_of_fine_tuning_changes_what_is_to_learn_alone(rank):
    dit, learnt = bench.learner(replace(bench.SMALL_DIT, in_channels=33), rank, WHERE)
    before = {name: parameter.clone() for name, parameter in dit.named_parameters()}
    optimizer = torch.optim.AdamW(learnt, lr=1e-2)
    text = torch.randn(1, 32, 128)
    inputs = (torch.randn(1, 16, 3, 8, 8), torch.tensor([500]), text, torch.randn(1, 17, 3, 8, 8))
    bench.learn(dit, optimizer, inputs, "full", WHERE)
    changed = {name for name, parameter in dit.named_parameters() if not parameter.equal(before[name])}
    if rank:  # A starts to learn in the second step, as B is zero in the first
        assert changed and all("lora_" in name for name in changed)
    else:
        assert len(changed) > 0.9 * len(before)


def test_flops_are_those_of_the_known_table():
    """78 TFLOP for 13312 + 226 tokens through 2B, 223 through 5B."""
    flops = [bench.dit_flops(config, 13312 + 226) / 1e12 for config in bench.SIZES["whole"].dits.values()]
    assert [round(each) for each in flops] == [78, 223]
