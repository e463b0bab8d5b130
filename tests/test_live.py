"""--log: the numbers of the logs in tensorboard, read by its own reader, and in what stands in for
wandb and trackio."""

import json
import sys

import pytest

SHORT = """--steps 4 --problems-per-step 2 --group-size 4 --eval-problems 2 --eval-n 2
--eval-every 3 --save-every 2 --reasoning-warmup 1 --self-reward-warmup 1 --max-new-tokens 32
--c-ref -31.3""".split()
STAND_IN = """
import json, pathlib
def say(**row):
    with open(pathlib.Path(__file__).with_suffix(".said"), "a") as file:
        file.write(json.dumps(row) + "\\n")
def init(**how):
    say(init={k: how[k] for k in how if k != "config"}, steps=how["config"]["steps"])
def log(numbers, step):
    say(step=step, numbers=numbers)
def finish():
    say(finish=True)
"""


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_the_logs(run):
    """{(name, step): value} of every number of the two logs."""
    found = {}

    def add(value, name, step):
        if isinstance(value, dict):
            for key, inner in value.items():
                add(inner, f"{name}/{key}", step)
        elif not name.endswith("/step") and isinstance(value, (int, float)):
            found[name, step] = value

    for name in ("metrics", "evals"):
        for row in rows(run / f"{name}.jsonl"):
            add(row, name, row["step"])
    assert {("metrics/reward", 4), ("evals/accuracy", 0), ("evals/accuracy", 4)} <= set(found)
    assert ("evals/majority_vote/2", 3) in found
    return found


@pytest.fixture
def broken_off(call, tmp_path):
    """broken_off(kind): a run with --log kind, gone back to step 2 and resumed."""

    def run(kind):
        out = tmp_path / "run"
        assert call("train.py", *SHORT, "--log", kind, "--out", out)[0] == 0
        (out / "checkpoints" / "latest").write_text("step-000002\n")
        code, _, err = call("train.py", "--resume", out)
        assert code == 0, err
        return out

    return run


def test_tensorboard_shows_the_logs_through_a_resume(broken_off):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = broken_off("tensorboard")
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    shown = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert (name, event.step) not in shown  # what was done again is there once
            shown[name, event.step] = event.value
    assert shown == pytest.approx(in_the_logs(out), rel=1e-6)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(kind, text of the module) -> the file of what it was told."""

    def install(kind, text=STAND_IN):
        (tmp_path / f"{kind}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, kind, raising=False)
        return tmp_path / f"{kind}.said"

    yield install
    for kind in ("wandb", "trackio"):
        sys.modules.pop(kind, None)


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_the_others_are_told_the_same_in_one_run(broken_off, stand_in, kind):
    told = stand_in(kind)
    out = broken_off(kind)
    said = rows(told)
    first, second = (row for row in said if "init" in row)
    assert first == second and first["steps"] == 4  # the same run, under the same name
    assert first["init"]["resume"] == "allow" and first["init"]["name"].startswith("run-")
    assert (first["init"].get("id") == first["init"]["name"]) == (kind == "wandb")
    assert sum("finish" in row for row in said) == 2 and "finish" in said[-1]
    shown = {(name, row["step"]): value for row in said if "numbers" in row
             for name, value in row["numbers"].items()}  # fmt: skip
    assert shown == in_the_logs(out)


@pytest.mark.parametrize("text", [
    STAND_IN.replace("    say(step", "    raise OSError('no network')\n    say(step"),
    STAND_IN.replace("    say(init", "    raise RuntimeError('not logged in')\n    say(init"),
    "import nothing_of_that_name",
])  # fmt: skip
def test_a_service_that_fails_costs_the_curves_and_not_the_run(call, stand_in, tmp_path, text):
    stand_in("wandb", text)
    code, _, err = call("train.py", *SHORT, "--log", "wandb", "--out", tmp_path / "run")
    assert code == 0 and err.count("wandb") == 1, err
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 4


def test_what_is_not_installed_is_said_before_anything_begins(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    code, _, err = call("train.py", *SHORT, "--log", "trackio", "--out", tmp_path / "run")
    assert code == 2 and "pip install trackio" in err and len(err.strip().splitlines()) == 1
    assert call("train.py", *SHORT, "--log", "excel", "--out", tmp_path / "run")[0] == 2
    assert not (tmp_path / "run").exists()
