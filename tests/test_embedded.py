"""benchmarks/embedded.py: what it still has to do, and what it makes of finished runs."""

import json

import numpy as np
import pytest

from benchmarks import embedded
from benchmarks.embedded import Options, Seeds, next_command, rows_of
from tests.test_metrics import benchmark_rows

DONE = {"summary.json": {"c_ref": -31.5}, "results/results.json": {}}


def put(folder, **files):
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))


def test_what_is_finished_is_not_repeated_and_what_was_interrupted_goes_on(tmp_path):
    o = Options(runs=str(tmp_path), steps=36, problems=7)
    train = next_command("grpo-1", o)
    assert train[:5] == ["train.py", "--algorithm", "grpo", "--seed", "1"]
    assert train[train.index("--reasoning-warmup") + 1] == 4  # as 40 of 360
    put(tmp_path / "grpo-1", **{"config.json": {}})
    assert next_command("grpo-1", o)[:2] == ["train.py", "--resume"]
    put(tmp_path / "grpo-1", **{"summary.json": {}})
    evaluate = next_command("grpo-1", o)
    assert evaluate[0] == "evaluate.py" and "--generative" in evaluate
    put(tmp_path / "grpo-1", **DONE)
    assert next_command("grpo-1", o) is None
    put(tmp_path / "laser-1", **DONE)
    assert next_command("base-1", o)[-2:] == ["--c-ref", -31.5]  # where LaSeR started


def test_a_command_that_fails_ends_the_others_and_is_named(tmp_path, monkeypatch):
    """Two at a time: one fails at once, the other would sleep for a minute."""
    script = tmp_path / "child.py"
    script.write_text("import sys, time; print('why', flush=True)\n"
                      "time.sleep(60) if sys.argv[1] == 'long' else sys.exit(3)")
    monkeypatch.setattr(embedded, "ROOT", tmp_path)
    monkeypatch.setattr(embedded, "next_command", lambda name, o: ["child.py", name])
    with pytest.raises(ValueError, match="short failed"):
        embedded.work(["long", "short", "never"], Options(runs=str(tmp_path), jobs=2))
    assert (tmp_path / "short.log").read_text() == "why\n"
    assert not (tmp_path / "never.log").exists()


def test_a_command_that_does_not_get_further_is_no_endless_loop(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text("")
    monkeypatch.setattr(embedded, "ROOT", tmp_path)
    monkeypatch.setattr(embedded, "next_command", lambda name, o: ["child.py"])
    with pytest.raises(ValueError, match="failed"):
        embedded.work(["idle"], Options(runs=str(tmp_path)))


def test_judgements_take_the_place_of_r_s(tmp_path):
    place = {"dataset": "arithmetic", "prompt_id": 0}
    samples = [{**place, "sample": i, "r_s": 0.5} for i in range(3)]
    said = [{**place, "sample": 0, "score": 1.0}, {**place, "sample": 2, "score": None}]
    other = {**place, "dataset": "arithmetic-hard", "sample": 0, "r_s": 0.1}
    for name, rows in (("samples", [*samples, other]), ("judgements", said)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    words = rows_of(tmp_path, "arithmetic", "words")
    assert [row["r_s"] for row in words] == [1.0, None, None]
    assert rows_of(tmp_path, "arithmetic", "r_s") == samples


def test_means_and_differences_are_over_seeds_and_paired():
    """The second method is the first but that its third seed is right everywhere."""
    first = [benchmark_rows(30, 8, seed) for seed in range(3)]
    second = [*first[:2], [row | {"r_v": 1, "answer": "4"} for row in first[2]]]
    a, b = Seeds(first, (0, 1, 2)), Seeds(second, (0, 1, 2))
    each = [np.mean([row["r_v"] for row in rows]) for rows in first]
    assert a.each("accuracy") == pytest.approx(each)
    whole = a.interval("accuracy", 200)
    assert whole.value == pytest.approx(np.mean(each)) and whole.low < whole.value < whole.high
    change = b.minus("accuracy", a, "accuracy", 200)
    assert change.value == pytest.approx((1 - each[2]) / 3)
    # a third of the draws of three seeds leave the third one out (8 of 27): no difference there
    assert change.low == 0.0 < change.high
    same = a.minus("majority_vote@8", a, "majority_vote@8", 50)
    assert tuple(same) == (0, 0, 0)
    with pytest.raises(AssertionError, match="different problems"):
        a.minus("accuracy", Seeds([benchmark_rows(29)], (0,)), "accuracy", 50)


@pytest.mark.slow
def test_the_whole_in_miniature(call, tmp_path):
    small = ["--runs", tmp_path, "--steps", 2, "--problems", 4, "--seeds", "0,1", "--jobs", 2,
             "--draws", 50]  # fmt: skip
    code, out, err = call("benchmarks/embedded.py", *small)
    assert code == 0, err
    record = json.loads(out.splitlines()[-1])
    for who in ("base in words", "GRPO in words", "LaSeR in words", "LaSeR r_s"):
        for where in ("held-out", "hard"):
            numbers = record[f"{who}, {where}"]["best of 8"]
            low, high = numbers["interval"][1:]
            assert low <= numbers["interval"][0] <= high and len(numbers["seeds"]) == 2
    assert len(record["right by rank of r_s"]["hard"]) == 8
    assert "| LaSeR r_s, hard |" in out and "accuracy: LaSeR - GRPO" in out
    code, out, _ = call("benchmarks/embedded.py", *small)  # nothing is left to do
    assert code == 0 and json.loads(out.splitlines()[-1]) == record and "train.py" not in out
    code, _, err = call("benchmarks/embedded.py", *small, "--steps", 3)
    assert code == 2 and "not to be mixed" in err
