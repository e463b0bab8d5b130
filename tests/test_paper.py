"""benchmarks/paper.py: what it still has to do, what it makes of finished runs, and that the text
and the pictures in docs/ are those of the numbers in docs/."""

import json
import re

import numpy as np
import pytest

from benchmarks import paper, paper_text
from benchmarks.paper import Options, Seeds, Task, rows_of, tasks
from tests.conftest import ROOT
from tests.test_metrics import benchmark_rows


def put(folder, **files):
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))


# ---------------------------------------------------------------------------------------------
# what is to be done


def test_every_variant_is_a_command_line_and_an_interrupted_run_is_resumed(tmp_path):
    import train
    from nanolaser.cli import parse_args

    o = Options(runs=str(tmp_path), steps=36, seeds=2)
    todo = {t.name: t for t in tasks(o)}
    assert len(todo) == len({t.makes for t in todo.values()})  # no two make the same file
    for variant, options in paper.VARIANTS.items():
        name = f"{variant.replace(' ', '-')}-seed1"
        command = [str(x) for x in todo[f"train {name}"].command()]
        given, _ = parse_args(train.Options, command[1:])  # train.py knows all of it
        assert given.seed == 1 and given.steps == 36
        if "--reasoning-warmup" not in options:
            assert given.reasoning_warmup == 4  # as 40 of 360
        assert [str(tmp_path / name / "summary.json")] == [
            str(x) for x in todo[f"evaluate {name}"].needs]
    put(tmp_path / "grpo-seed1", **{"config.json": {}})
    assert todo["train grpo-seed1"].command()[:2] == ["train.py", "--resume"]


def test_ablations_have_fewer_seeds_and_the_main_ones_come_first():
    names = [t.name for t in tasks(Options(seeds=5)) if t.name.startswith("train")]
    assert names[:6] == [f"train {v}-seed{s}" for s in range(3) for v in ("laser", "grpo")]
    assert names.count("train grpo-seed4") == 1 and "train tau-1-seed3" not in names


def some(tmp_path, script, *names, needs=()):
    """Tasks whose command writes the file that says so, or does what `script` says."""
    (tmp_path / "child.py").write_text(script)
    return [Task(f"child {n}", tmp_path / n, lambda n=n: ["child.py", tmp_path / n], list(needs))
            for n in names]


def test_what_is_there_is_not_repeated_and_what_waits_comes_after(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    script = "import sys; open(sys.argv[1], 'x').write('x'); open(sys.argv[1] + '.log', 'x')"
    o = Options(runs=str(tmp_path / "runs"), jobs=2)
    second = some(tmp_path, script, "b", needs=[tmp_path / "a"])
    paper.work([*second, *some(tmp_path, script, "a")], o)  # in the wrong order
    said = capsys.readouterr().out
    assert said.index("child a") < said.index("child b") and "not timed yet" in said
    paper.work([*second, *some(tmp_path, script, "a", "c")], o)  # open(.., "x"): once, or it fails
    said = capsys.readouterr().out
    assert "child c; 1 commands left, 0 min\n" in said and "child a" not in said
    with pytest.raises(ValueError, match="waits for"):
        paper.work(some(tmp_path, script, "d", needs=[tmp_path / "never"]), o)


def test_a_command_that_fails_or_makes_nothing_ends_the_others_and_is_named(tmp_path, monkeypatch):
    """Two at a time: one fails at once, the other would sleep for a minute."""
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    script = ("import sys, time; print('why', flush=True)\n"
              "time.sleep(60) if sys.argv[1].endswith('long') else sys.exit(3)")
    o = Options(runs=str(tmp_path), jobs=2)
    with pytest.raises(ValueError, match="short failed"):
        paper.work(some(tmp_path, script, "long", "short", "never"), o)
    assert (tmp_path / "child short.log").read_text() == "why\n"
    assert not (tmp_path / "child never.log").exists()
    with pytest.raises(ValueError, match="idle failed"):  # and is no endless loop
        paper.work(some(tmp_path, "", "idle"), o)


# ---------------------------------------------------------------------------------------------
# numbers


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
    a, b = Seeds(first), Seeds(second)
    value, low, high, each = a.interval("accuracy", 200)
    assert each == pytest.approx([np.mean([r["r_v"] for r in rows]) for rows in first], abs=1e-4)
    assert value == pytest.approx(np.mean(each), abs=1e-4) and low < value < high
    change, low, high = b.minus("accuracy", a, "accuracy", 200)
    assert change == pytest.approx((1 - each[2]) / 3, abs=1e-4)
    # a third of the draws of three seeds leave the third one out (8 of 27): no difference there
    assert low == 0.0 < high
    assert a.minus("majority_vote@8", a, "majority_vote@8", 50) == [0, 0, 0]
    # what has two seeds is compared on these two
    assert Seeds(second[:2]).minus("accuracy", a, "accuracy", 50) == [0, 0, 0]
    with pytest.raises(AssertionError, match="different problems"):
        a.minus("accuracy", Seeds([benchmark_rows(29)]), "accuracy", 50)


def test_a_fitted_threshold_mends_a_shifted_score():
    rows = benchmark_rows(200, 8)
    for row in rows:
        row["r_s"] = None if row["r_s"] is None else row["r_s"] - 0.35  # 0.5 now stands at 0.15
    found = paper.refitted([rows], draws=10)
    assert found["fitted"] > found["0.5"] + 0.1
    assert found["threshold"][0] == pytest.approx(0.2, abs=0.1)


def test_a_verdict_follows_from_the_interval():
    verdict = paper_text.verdict
    assert verdict([0.02, 0.01, 0.03], "higher") == verdict([-0.02, -0.03, -0.01], "lower")
    assert verdict([0.02, 0.01, 0.03], "higher") == paper_text.YES
    assert verdict([0.02, 0.01, 0.03], "lower") == paper_text.NO
    assert verdict([0.02, -0.01, 0.05], "higher") == paper_text.OPEN
    assert verdict([0.001, -0.004, 0.006], "same") == paper_text.YES
    assert verdict([0.02, 0.012, 0.03], "same") == paper_text.NO
    assert verdict([0.0, -0.03, 0.03], "same") == paper_text.OPEN  # wide is not equal
    assert verdict(None, "same") == verdict([0.5, None, None], "higher") == paper_text.MISSING


# ---------------------------------------------------------------------------------------------
# text


@pytest.mark.skipif(not (ROOT / "docs" / "paper.json").exists(), reason="nothing was run yet")
def test_text_and_pictures_in_docs_are_those_of_the_numbers(tmp_path):
    docs = ROOT / "docs"
    (tmp_path / "paper.json").write_text((docs / "paper.json").read_text())
    paper_text.write(tmp_path)
    assert (tmp_path / "paper.md").read_text() == (docs / "paper.md").read_text()
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.read_text() == (docs / "pictures" / picture.name).read_text()
    # and it would be noticed if they were not
    changed = json.loads((docs / "paper.json").read_text())
    changed["table"]["laser"]["held-out"]["accuracy"][0] += 0.01
    assert paper_text.markdown(changed) != (docs / "paper.md").read_text()


@pytest.mark.slow
def test_the_whole_in_miniature(call, tmp_path):
    small = ["--runs", tmp_path / "runs", "--docs", tmp_path, "--steps", 2, "--problems", 4,
             "--seeds", 2, "--jobs", 2, "--draws", 50, "--only", "laser,grpo,tau 1"]  # fmt: skip
    code, out, err = call("benchmarks/paper.py", *small)
    assert code == 0, err
    record = json.loads((tmp_path / "paper.json").read_text())
    for who in ("base in words", "grpo in words", "laser in words", "laser", "tau 1"):
        for where in ("held-out", "hard"):
            value, low, high, each = record["table"][who][where]["best_of@8"]
            assert low <= value <= high and len(each) == (1 if who == "base in words" else 2)
    assert len(record["rank"]["hard"]) == 8 and len(record["transfer"]["hard"]) == 4
    assert list(record["votes"]["hard"]["majority_vote"]) == ["1", "2", "4", "8", "16", "32"]
    text = (tmp_path / "paper.md").read_text()
    assert "| LaSeR r_s, hard |" in text and re.search(r"tau 1, hard \| 2 \|", text)
    code, out, _ = call("benchmarks/paper.py", *small)  # nothing is left to do
    assert code == 0 and "train" not in out and (tmp_path / "paper.md").read_text() == text
    code, _, err = call("benchmarks/paper.py", *small, "--begin", "report")
    assert code == 0 and (tmp_path / "paper.md").read_text() == text
