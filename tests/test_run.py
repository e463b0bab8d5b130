"""A run's folder: never two runs in one, never a result overwritten, no half-written line read."""

import json
import subprocess
import sys

import pytest
import torch

from nanolaser.files import RunFolder, peak_memory_bytes, read_jsonl, run_of


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_unnamed_runs_get_a_number(here):
    paths = [RunFolder.create(None, "tiny-laser", {"steps": 3}).path for _ in range(3)]
    assert [str(p) for p in paths] == ["runs/tiny-laser", "runs/tiny-laser-2", "runs/tiny-laser-3"]
    config = json.loads((paths[0] / "config.json").read_text())
    assert config["options"] == {"steps": 3} and set(config["versions"]) == {"python", "torch"}


def test_a_run_is_never_overwritten(here):
    RunFolder.create("out", "x", {"steps": 3})
    with pytest.raises(ValueError, match="--resume out continues it"):
        RunFolder.create("out", "x", {"steps": 9})
    run, options = RunFolder.reopen("out")
    assert options == {"steps": 3} and run.latest() is None
    (here / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder.create("file", "x", {})


def test_a_folder_in_use_is_refused_and_free_after_a_crash(here):
    """Another process holds the lock, then is killed: what it leaves behind locks nobody out."""
    code = ("import sys; from nanolaser.files import RunFolder;"
            "r = RunFolder.create('out', 'x', {}); print('in', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match="in use by another run"):
            RunFolder.reopen("out")
    finally:
        other.kill()
        other.wait()
    RunFolder.reopen("out")


def test_a_folder_is_left_without_a_warning(here):
    code = "from nanolaser.files import RunFolder; RunFolder.create('out', 'x', {})"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment(),
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def environment():
    """This process's environment, with the project importable from any folder."""
    import os
    from pathlib import Path

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.mark.parametrize("damage", ["{", "[]", "{}", "\ud800"])
def test_a_damaged_config_is_one_clear_error(here, damage):
    RunFolder.create("out", "x", {})
    (here / "out" / "config.json").write_bytes(damage.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="damaged"):
        RunFolder.reopen("out")
    with pytest.raises(ValueError, match="no run there"):
        RunFolder.reopen("elsewhere")


def metrics(step, **more):
    """A row of metrics.jsonl with all that a resumed run reads of it."""
    seconds = dict(seconds_rollout=1.5, seconds_check=0, seconds_update=2.5)
    return {"step": step, **seconds, "response_tokens": 9.5, **more}


def test_logs_are_cut_back_to_the_checkpoint(here):
    run = RunFolder.create("out", "x", {})
    run.append("metrics.jsonl", [metrics(s, text="a\u2028b\n\x85") for s in range(1, 6)])
    run.append("samples.jsonl", [{"step": s} for s in (1, 1, 4, 4)])
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')  # the power failed here
    assert [row["step"] for row in run.read("metrics.jsonl")] == [1, 2, 3, 4, 5]
    run.cut_back(3)
    run.append("metrics.jsonl", [metrics(4)])
    assert [row["step"] for row in run.read("metrics.jsonl")] == [1, 2, 3, 4]
    assert run.read("samples.jsonl") == [{"step": 1}, {"step": 1}]
    assert run.read("evals.jsonl") == []


def test_lines_in_the_midst_that_are_no_rows_are_named(here):
    run = RunFolder.create("out", "x", {})
    good = json.dumps(metrics(2))
    bad = [json.dumps(metrics(step)) for step in ("2", True, None, 2.0)]
    bad += [good.replace("1.5", x) for x in ("NaN", "1e999", "null", '"x"')]
    for line in ("5", "[]", "null", "{", '{"step": 2}', "\xff", "[" * 100_000, *bad):
        text = f"{json.dumps(metrics(1))}\n{line}\n{json.dumps(metrics(3))}\n"
        (run.path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"metrics.jsonl:2 is damaged") as error:
            run.cut_back(5)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
        assert (run.path / "metrics.jsonl").read_bytes() == text.encode("latin-1")
    (run.path / "metrics.jsonl").write_text(good + "\n")
    (run.path / "evals.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=r"evals.jsonl:1 is damaged"):
        run.cut_back(5)


def test_a_line_cut_short_never_becomes_half_of_a_new_one(here):
    run = RunFolder.create("out", "x", {})
    (run.path / "timing.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "x"')
    run.append("timing.jsonl", [{"step": 3}])
    assert run.read("timing.jsonl") == [{"step": 1}, {"step": 3}]
    (run.path / "timing.jsonl").write_bytes(b'{"ste')
    run.append("timing.jsonl", [{"step": 4}])
    assert run.read("timing.jsonl") == [{"step": 4}]


def test_read_jsonl(here):
    path = here / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 0.10, "b": "\xe2\x80\xa8"}\n{"a": 3')
    with pytest.raises(ValueError, match=":4 is damaged"):
        list(read_jsonl(path))
    assert [n for n, _ in read_jsonl(path, cut=True)] == [1, 3]  # the lines, blank ones counted
    assert next(read_jsonl(path)) == (1, {"a": 1})  # read as they are asked for
    # a benchmark's answers are texts: 0.10 is not 0.1
    assert [row["a"] for _, row in read_jsonl(path, cut=True, parse_float=str)] == [1, "0.10"]
    bad = []
    rows = list(read_jsonl(path, {"b": str}, on_damage=lambda *what: bad.append(what)))
    assert [n for n, _ in rows] == [3] and [n for n, _ in bad] == [1, 4]
    assert all("damaged" not in why for _, why in bad)
    assert list(read_jsonl("stdin", data=b"")) == []
    with pytest.raises(ValueError, match="^stdin:1 is damaged"):
        list(read_jsonl("stdin", data=b"{"))


def test_what_run_a_path_belongs_to(here):
    run = RunFolder.create("out", "x", {"data": "gsm8k"})
    run.checkpoint(20).mkdir(parents=True)
    (run.checkpoint(20) / "config.json").write_text('{"model_type": "llama"}')
    for path in ("out", "out/", "out/checkpoints", "out/checkpoints/step-000020", run.path):
        assert run_of(path) == {"data": "gsm8k"}
    (here / "model").mkdir()
    for path in ("model", "nowhere", "out/config.json", "gpt2", "a/b", "/", "\0", "x" * 9999):
        assert run_of(path) is None
    (run.path / "config.json").write_text("{")
    assert run_of("out") is None


def test_a_line_cut_inside_a_character_is_no_row(here):
    run = RunFolder.create("out", "x", {})
    (run.path / "evals.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "x": "\xe2\x82')
    assert run.read("evals.jsonl") == [{"step": 1}]


def test_latest_names_the_newest_whole_checkpoint(here):
    run = RunFolder.create("out", "x", {})
    for step in (20, 120):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "config.json").write_text("{}")
        run.point_latest(step)
    assert run.latest() == run.path / "checkpoints" / "step-000120"
    (run.checkpoint(120) / "config.json").unlink()
    with pytest.raises(ValueError, match=r"'step-000120'.*\(step-000020\)"):
        run.latest()
    # somebody else's checkpoint is no checkpoint of this run, whole as it may be
    other = RunFolder.create("other", "x", {})
    other.checkpoint(20).mkdir(parents=True)
    (other.checkpoint(20) / "config.json").write_text("{}")
    for outside in ("../../other/checkpoints/step-000020", str(other.checkpoint(20).absolute())):
        (run.path / "checkpoints" / "latest").write_text(outside)
        with pytest.raises(ValueError, match="no checkpoint of this run"):
            run.latest()


def test_what_a_killed_process_was_writing_is_cleared_away(here):
    run = RunFolder.create("out", "x", {})
    run.append("metrics.jsonl", [{"step": 1}])
    (run.path / "checkpoints" / "step-000137.incomplete.tmp").mkdir(parents=True)
    (run.path / "checkpoints" / "step-000137.incomplete.tmp" / "model.safetensors").write_text("x")
    litter = ("metrics.jsonl.123.tmp", "config.json.9.tmp", "checkpoints/latest.77.tmp")
    for name in (*litter, "mine.tmp", "checkpoints/mine.tmp"):
        (run.path / name).write_text("x")
    del run  # and with it the lock
    left = sorted(p.name for p in RunFolder.reopen("out")[0].path.rglob("*"))
    assert left == [".lock", "checkpoints", "config.json", "metrics.jsonl", "mine.tmp", "mine.tmp"]


def test_peak_memory_is_in_bytes():
    assert 50 * 2**20 < peak_memory_bytes(torch.device("cpu")) < 2**40
