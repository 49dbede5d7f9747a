"""tools/claims.py: a table of runs."""

import json

import claims


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_runs_stand_below_each_other_with_gaps_where_nothing_was_judged(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "log.jsonl", [{"step": 1, "loss": 3}, {"step": 20, "val_loss": 0.5}])
    results = [{"all": True, "fit": 0.75}, {"all": False, "fit": 0.75}]
    write_lines(tmp_path / "b" / "step-000020.jsonl", [{"result": result} for result in results])
    claims.main([str(tmp_path / "a"), str(tmp_path / "b"), "--measures", "all", "fit"])
    assert capsys.readouterr().out.splitlines() == [
        "| run | validation loss at 20 | all at 20 | fit at 20 |",
        "|---|---|---|---|",
        "| a | 0.5000 |  |  |",
        "| b | 0.5000 | 0.50 (0.09 … 0.91) | 0.75 (0.75 … 0.75) |",  # of two, Wilson's interval
    ]
