"""What can happen to a run, really done to it: kills, signals, a full disk, NaN, corrupt files.

What kills, signals or fills a disk happens to processes of their own; tests/slow has the long
version of the kills.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanolaser.checkpoint import load_pretrained, save_pretrained
from nanolaser.files import RunFolder, finite

from . import kills

# Four steps in a second: with c_ref given, nothing has to be estimated.
SHORT = """--c-ref -24 --steps 4 --problems-per-step 2 --group-size 2 --max-new-tokens 16
--reasoning-warmup 1 --self-reward-warmup 1 --eval-data arithmetic --eval-problems 2
--eval-n 1 --eval-every 2 --save-every 1""".split()
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and limits")


def one_line(err: str, *said: str) -> None:
    """Exactly one line of error, warnings aside, and it says what is wrong."""
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: "), err
    for words in said:
        assert words in errors[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished short run; tests damage copies of it."""
    out = tmp_path_factory.mktemp("faults") / "whole"
    code, _, err = kills.train(*SHORT, "--out", out)
    assert code == 0, err
    return out


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of the finished run, as if it had died after step 2."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "checkpoints" / "latest").write_text("step-000002\n")
    return out


# ---------------------------------------------------------------------------------------------
# kills and signals


@posix
def test_two_kills_leave_no_trace(tmp_path):
    data, whole, out = kills.problems(tmp_path / "five.jsonl"), tmp_path / "whole", tmp_path / "out"
    code, _, err = kills.train(*kills.OPTIONS, "--data", data, "--out", whole)
    assert code == 0, err
    done, inside = kills.kills(out, data, ["write", "step"], random.Random(0))
    assert done == 2 and inside >= 1
    kills.assert_same(out, whole)


def test_resuming_a_finished_run_changes_nothing(whole, run):
    """As after a kill between the last evaluation and summary.json."""
    (run / "checkpoints" / "latest").write_text("step-000004\n")
    (run / "summary.json").unlink()
    code, _, err = kills.train("--resume", run)
    assert code == 0, err
    kills.assert_same(run, whole)


def begun(out: Path) -> bool:
    """Is the first step done?"""
    log = out / "metrics.jsonl"
    return log.exists() and log.stat().st_size > 0


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_in_a_checkpoint(tmp_path, number):
    out = tmp_path / "run"
    process = kills.start(*SHORT, "--steps", 1000, "--save-every", 1000, "--out", out)
    assert kills.until(process, lambda: begun(out))
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr
    step = kills.rows(out / "metrics.jsonl")[-1]["step"]
    last = stdout.splitlines()[-1]
    assert f"after step {step}" in last and f"--resume {out}" in last
    assert "checkpoint" in stderr and "Traceback" not in stderr  # said when it was heard
    assert (out / "checkpoints" / "latest").read_text() == f"step-{step:06d}\n"
    load_pretrained(out)


@posix
def test_a_signal_before_the_first_step_ends_at_once(tmp_path):
    out = tmp_path / "run"
    process = kills.start(*SHORT, "--eval-problems", 400, "--eval-n", 64, "--out", out)
    assert kills.until(process, lambda: (out / "config.json").exists())
    time.sleep(2)  # in the midst of the evaluation
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143 and not (out / "metrics.jsonl").exists()
    assert len(stderr.strip().splitlines()) == 1 and f"--resume {out}" in stderr


# ---------------------------------------------------------------------------------------------
# the disk


def limit_file_size():
    """In the child: no file may grow beyond 200 kB, as under a quota."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@posix
def test_beyond_a_limit_the_old_checkpoint_stays(run):
    kept = {p: p.read_bytes() for p in (run / "checkpoints" / "step-000002").rglob("*.*")}
    code, _, err = kills.train("--resume", run, preexec_fn=limit_file_size)
    assert code == 1
    one_line(err, "File too large", "model.safetensors")
    assert (run / "checkpoints" / "latest").read_text() == "step-000002\n"
    assert all(p.read_bytes() == content for p, content in kept.items())
    assert not kills.half_written(run)
    code, _, err = kills.train("--resume", run)
    assert code == 0, err


def mount(folder: Path, options: str) -> None:
    """A small file system of its own at the folder; the test is skipped where that needs rights
    we do not have."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")


@posix
def test_a_full_disk_keeps_the_old_checkpoint_and_resumes_when_there_is_room(tmp_path, whole):
    disk = tmp_path / "disk"
    mount(disk, "size=29m")  # two checkpoints of 12 MB
    try:
        code, _, err = kills.train(*SHORT, "--out", disk / "run")
        assert code == 1
        one_line(err, "No space left on device: ", "step-000003")
        assert (disk / "run" / "checkpoints" / "latest").read_text() == "step-000002\n"
        assert not kills.half_written(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=90m", str(disk)], check=True)
        code, _, err = kills.train("--resume", disk / "run")
        assert code == 0, err
        kills.assert_same(disk / "run", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def read_only(tmp_path):
    """A folder that cannot be written to, by root neither."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    mounted = os.access(folder, os.W_OK)
    if mounted:  # permission bits mean nothing to root
        folder.rmdir()
        mount(folder, "ro")
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@posix
def test_folders_that_cannot_be_written_to(read_only, call, tmp_path):
    code, _, err = kills.train(*SHORT, "--out", read_only / "run")
    assert code == 2
    one_line(err, str(read_only / "run"))
    code, _, err = call("evaluate.py", "--output", read_only / "run", "--max-problems", 1)
    assert code == 2
    one_line(err, str(read_only / "run"))
    (tmp_path / "in.jsonl").write_text('{"problem": "1+1=?", "response": "2"}\n')
    code, _, err = call("verify.py", "--input", tmp_path / "in.jsonl", "--output", read_only / "x")
    assert code == 2  # before anything is scored
    one_line(err, "cannot be written")


def test_the_line_of_a_full_disk_names_the_file(tmp_path, monkeypatch):
    run = RunFolder.create(str(tmp_path / "run"), "x", {})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    for write in (lambda: run.append("metrics.jsonl", []), lambda: run.write_json("x.json", {})):
        with pytest.raises(OSError, match=r"No space left on device: '.*(metrics.jsonl|x.json)'"):
            write()


# ---------------------------------------------------------------------------------------------
# another configuration, damaged checkpoints


def test_a_folder_of_another_run_is_refused_with_the_difference(run, call):
    before = (run / "metrics.jsonl").read_bytes()
    code, _, err = call("train.py", "--resume", run, "--lr", "0.5", "--steps", 9)
    assert code == 2
    one_line(err, "--lr 0.5", "0.0006", "--steps 9")
    code, _, err = call("train.py", *SHORT, "--lr", "0.5", "--out", run)
    assert code == 2
    one_line(err, "lr 0.0006", "0.5", f"--resume {run}")
    assert (run / "metrics.jsonl").read_bytes() == before
    config = run / "config.json"
    for content in ('{"options": {"nope": 1}}', '{"evaluation": {}}', '{"options": [1]}'):
        config.write_text(content)
        code, _, err = call("train.py", "--resume", run)
        assert code == 2
        one_line(err, str(config))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_model(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 64, "head_dim": 16}))


@pytest.mark.parametrize(("name", "damage", "said"), [
    ("model.safetensors", flip, "checksum"),
    ("state/state.safetensors", flip, "checksum"),
    ("model.safetensors", cut, "model.safetensors"),
    ("laser.json", os.unlink, "laser.json"),
    ("config.json", another_model, "config.json"),
    ("../latest", lambda path: path.write_text("step-9\0"), "step-000002, step-000003"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_not_resumed(run, call, name, damage, said):
    damage(run / "checkpoints" / "step-000002" / name)
    code, _, err = call("train.py", "--resume", run)
    assert code == 2
    one_line(err, said)
    if name != "../latest":  # what the line says helps
        (run / "checkpoints" / "latest").write_text("step-000001\n")
        assert RunFolder.reopen(str(run))[0].latest().name == "step-000001"


@pytest.mark.parametrize(("name", "damage"), [
    ("model.safetensors", cut), ("config.json", another_model), ("config.json", cut),
    ("laser.json", cut), ("tokenizer.json", cut),
])  # fmt: skip
def test_a_damaged_model_is_one_line_for_every_script(run, call, tmp_path, name, damage):
    damage(run / "checkpoints" / "step-000002" / name)
    for script, *arguments in (
        ("sample.py", "1+1=?"),
        ("verify.py", "--problem", "1+1=?", "--solution", "2"),
        ("evaluate.py", "--max-problems", 1, "--output", tmp_path / "results"),
    ):
        code, _, err = call(script, "--model", run, *arguments)
        assert code == 2
        one_line(err, name)


# ---------------------------------------------------------------------------------------------
# numbers that are none, and nothing to learn


def test_non_finite_updates_stop_the_run_and_poison_nothing(tmp_path):
    out = tmp_path / "run"
    code, _, err = kills.train(
        *SHORT, "--steps", 20, "--lr", "1e30", "--max-new-tokens", 96, "--out", out)
    assert code == 1
    one_line(err, "non-finite", "samples.jsonl", "--lr")
    metrics = kills.rows(out / "metrics.jsonl")  # refuses NaN
    # a broken model earns nothing: batches in which nothing is to be learned lie in between
    assert [m["skipped_updates"] for m in metrics if m["grad_norm"] != 0][-5:] == [1] * 5
    assert metrics[-1]["grad_norm"] is None
    last = [row for row in kills.rows(out / "samples.jsonl") if row["step"] == len(metrics)]
    assert len(last) == 2 * 2  # all rollouts of the last step, each once
    # what --resume would go on from is from before
    model, _ = load_pretrained(out)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_model_of_nan_is_refused(tiny, call, tmp_path):
    model, tokenizer = tiny
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    save_pretrained(model, tokenizer, tmp_path / "nan")
    code, _, err = call("train.py", *SHORT[2:], "--model", tmp_path / "nan", "--lr", 1,
                        "--data", "arithmetic", "--eval-data", "arithmetic",
                        "--micro-batch-tokens", 512, "--out", tmp_path / "run")  # fmt: skip
    assert code == 2
    one_line(err, "NaN")


def test_finite():
    assert finite({"a": [1.0, float("nan"), (float("-inf"), "x")], "b": None}) == {
        "a": [1.0, None, [None, "x"]], "b": None}  # fmt: skip


def test_nothing_to_learn_is_said_while_it_happens(tmp_path):
    options = [*SHORT, "--steps", 21, "--max-new-tokens", 4, "--save-every", 30]
    code, out, err = kills.train(*options, "--out", tmp_path / "run")
    assert code == 0, err
    assert re.search(r"^ +21 ", out, re.MULTILINE) and err.count("raise --max-new-tokens") == 1


# ---------------------------------------------------------------------------------------------
# data


LONG = "7+" * 500_000 + "1"  # a megabyte
ODD_ROWS = [
    {"id": "a", "problem": "1+1=?", "answer": "2"},
    {"id": "a", "problem": "1+2=?", "answer": "3"},
    {"problem": LONG, "answer": "5"},
    {"problem": "2+2=?", "answer": LONG},
    {"problem": "1+\0003=?", "answer": "4"},
    {"problem": "1+\ud8004=?", "answer": "5\udc00"},
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_odd_rows_are_trained_on_or_left_out_and_said(call, tmp_path):
    data = write(tmp_path / "odd.jsonl", ODD_ROWS)
    code, out, err = call("train.py", *SHORT, "--data", data, "--out", tmp_path / "run")
    assert code == 0, err
    assert "1 of 6 problems" in out and "512 tokens" in out  # what is too long
    assert "1 problems have an id" in err and "3 texts" in err and "2 of 6 gold answers" in err
    # an evaluation leaves nothing out in silence: another set of problems is another result
    code, _, err = call("train.py", *SHORT, "--eval-data", data, "--eval-problems", 9)
    assert code == 2
    one_line(err, "problem 3", "1000003 tokens", "512")


def test_problems_that_are_too_long_are_refused_before_anything_is_sampled(call, tmp_path):
    data = write(tmp_path / "odd.jsonl", ODD_ROWS)
    code, _, err = call("evaluate.py", "--data", data, "--output", tmp_path / "results")
    assert code == 2 and not (tmp_path / "results").exists()
    one_line(err, "problem 3 has 1000003 tokens")
    code, _, err = call("sample.py", LONG[:20_000])
    assert code == 2
    one_line(err, "problem 1 has")


def test_verify_takes_odd_rows(call, tmp_path):
    data = write(tmp_path / "in.jsonl", [
        {"problem": "1+1=?", "response": "\\boxed{2}", "gold": "2"},
        {"problem": LONG, "response": "\\boxed{2}", "gold": "2"},
        {"problem": "1+1=?", "response": LONG, "gold": LONG},
        {"problem": "1+\0001=?", "response": "\\boxed{2\0}", "gold": "2"},
        {"problem": "1+\ud8001=?", "response": "\\boxed{2\udc00}", "gold": "2\ud800"},
        {"problem": "", "response": "", "gold": ""},
    ])  # fmt: skip
    out = tmp_path / "out.jsonl"
    code, _, err = call("verify.py", "--c-ref", "-24", "--input", data, "--output", out)
    assert code == 0 and "2 solutions have over 2048 tokens" in err
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["r_s"] is None for row in scored] == [False, True, True, False, False, False]
    code, _, err = call("verify.py", "--problem", "1+1=?", "--solution", LONG[:20_000])
    assert code == 1 and "no r_s" in err


def test_a_template_that_writes_nothing_is_refused(tiny_checkpoint, call, tmp_path):
    copy = tmp_path / "silent"
    shutil.copytree(tiny_checkpoint, copy)
    (copy / "chat_template.jinja").write_text("{{ '' }}")
    code, _, err = call("sample.py", "--model", copy, "--c-ref", "-24", "1+1=?")
    assert code == 2
    one_line(err, "prompt 0 is empty", "chat template")
    code, _, err = call("verify.py", "--model", copy, "--c-ref", "-24", "--problem", "1+1=?",
                        "--solution", "2")  # fmt: skip
    assert code == 2
    one_line(err, "prompt 0 is empty")


def test_without_the_modules_of_posix(monkeypatch):
    """Windows has neither fcntl nor resource: importing must work all the same."""
    import importlib.util

    import nanolaser.files

    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("nanolaser.elsewhere", nanolaser.files.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.fcntl is module.resource is None
    assert module.peak_memory_bytes(torch.device("cpu")) >= 0
