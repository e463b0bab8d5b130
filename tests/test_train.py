"""train.py as a user runs it: by subprocess, on the embedded model, with good and bad input."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanolaser import log, scoring
from nanolaser.cli import apply_preset, paper_defaults
from nanolaser.scoring import CRef
from train import Options, new_options

ROOT = Path(__file__).parents[1]
# Small, but through all three phases: reasoning (step 1), self-reward (2), integrated (3, 4).
SHORT = """--steps 4 --problems-per-step 2 --group-size 4 --eval-problems 4 --eval-n 2
--eval-every 2 --save-every 2
--reasoning-warmup 1 --self-reward-warmup 1 --max-new-tokens 48""".split()


def train(*arguments, cwd=ROOT, **more):
    """Run train.py; the completed process with its texts."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    env = {**os.environ, "CI": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, **more)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(row):
    return {k: v for k, v in row.items() if "second" not in k}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One undisturbed short run, shared by the tests that look at its files."""
    out = tmp_path_factory.mktemp("run") / "whole"
    done = train(*SHORT, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_files_of_a_run(run):
    out, done = run
    metrics = rows(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert [m["phase"] for m in metrics] == ["reasoning", "self-reward", "integrated", "integrated"]
    # the readout's loss is off in the first phase, and the sampler agrees with the trainer
    assert metrics[0]["self_reward_loss"] == 0 and metrics[1]["self_reward_loss"] > 0
    # on the tokens, and on z_c, which the advantage has from the one and the loss from the other
    assert max(m["sampler_gap"] or 0 for m in metrics) < 1e-3
    assert 0 < max(m["zc_gap"] or 0 for m in metrics) < 1e-3
    assert not any(m["checker_errors"] for m in metrics)
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= {"before", "after", "seconds", "tokens", "c_ref", "c_ref_std"}
    assert summary["before"]["problems"] == 4 and summary["before"]["n"] == 2
    assert [e["step"] for e in rows(out / "evals.jsonl")] == [0, 2, 4]
    assert len(rows(out / "samples.jsonl")) == 4 * 4
    assert (out / "checkpoints" / "latest").read_text().strip() == "step-000004"
    laser = json.loads((out / "checkpoints" / "step-000004" / "laser.json").read_text())
    assert laser["c_ref"] == summary["c_ref"]


def test_what_a_run_says(run):
    out, done = run
    lines = done.stdout.splitlines()
    # whole in a terminal of 80 columns, but for those that name the folder; no control characters
    assert not [line for line in lines if len(line) > 80 and str(out) not in line]
    assert all(character.isprintable() for line in lines for character in line)
    # each phase says what it is, and names the columns of its steps
    for phase in ("reasoning", "self-reward", "integrated"):
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{phase}, from step"))
        header = next(i for i in range(place, len(lines)) if lines[i].split()[:1] == ["step"])
        step = lines[header + 1]
        assert float(step.split()[1]) in {round(m["reward"], 2) for m in rows(out / "metrics.jsonl")
                                          if m["phase"] == phase}  # fmt: skip
        assert lines[header].index("reward") + 6 == step.index(step.split()[1]) + 4  # aligned
    # before and after, a vote, what to try next, and a page to look at
    e = rows(out / "evals.jsonl")
    (accuracy,) = [line for line in lines if line.startswith("accuracy, %")]
    assert [float(x) for x in accuracy.split()[2:4]] == [
        round(100 * x["accuracy"], 1) for x in (e[0], e[-1])]  # fmt: skip
    assert "sum of r_s" in done.stdout and "sample.py --model" in done.stdout
    assert "</html>" in (out / "report.html").read_text("utf-8")


def test_the_vote_shown_is_the_most_contested_one():
    answers = {0: ["7"] * 8, 1: ["1/2", "0.5", "3", "3", "3", "4", None, "1/2"],
               2: list("12345678")}  # fmt: skip
    solved = [{"prompt_id": i, "problem": f"problem {i}", "answer": answer, "r_s": 0.5,
               "r_v": float(answer in ("1/2", "0.5"))}
              for i, group in answers.items() for answer in group]  # fmt: skip
    head, _, first, second, *_ = log.vote_lines(solved).splitlines()
    assert "problem 1" in head  # all agree on the first, no two on the last
    assert {first.split()[0], second.split()[0]} == {"1/2", "3"}
    assert ["1/2", "3", "1.50", "right"] in (first.split(), second.split())  # 0.5 is one half


def test_resume_equals_uninterrupted(run, tmp_path):
    whole, _ = run
    part = tmp_path / "part"
    done = train(*SHORT, "--out", part)
    assert done.returncode == 0, done.stderr
    # go back to the checkpoint of step 2, as after a crash in step 3
    (part / "checkpoints" / "latest").write_text("step-000002\n")
    resumed = train("--resume", part)
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = rows(part / "metrics.jsonl"), rows(whole / "metrics.jsonl")
    assert [without_time(m) for m in ours] == [without_time(m) for m in theirs]
    a, b = (load_file(f / "checkpoints/step-000004/model.safetensors") for f in (whole, part))
    assert all((a[name] == b[name]).all() for name in b)
    # the summary counts the tokens of the whole run, not of its last part
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (part, whole))
    assert ours["tokens"] == theirs["tokens"]


def test_grpo_never_trains_the_readout(tmp_path):
    done = train(*SHORT, "--algorithm", "grpo", "--out", tmp_path / "grpo")
    assert done.returncode == 0, done.stderr
    assert all(m["self_reward_loss"] == 0 for m in rows(tmp_path / "grpo" / "metrics.jsonl"))


def test_a_file_as_data_needs_nothing_else(tmp_path):
    problems = [{"problem": f"{a}+{a + 1}=?", "answer": 2 * a + 1} for a in range(1, 11)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(p) + "\n" for p in problems))
    done = train(*SHORT, "--data", file, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert f"learns from 8 problems of {file}, evaluated on 2 others of it" in done.stdout
    # an epoch is four steps of two problems, and the first of each step's is kept
    seen = {row["problem"] for row in rows(tmp_path / "run" / "samples.jsonl")}
    assert len(seen) == 4 and not seen & {problems[0]["problem"], problems[5]["problem"]}
    assert rows(tmp_path / "run" / "evals.jsonl")[0]["problems"] == 2


@pytest.mark.parametrize("std, beta_v, warned", [
    (1.9, 0.1, False), (2.1, 0.1, True), (1.1, 0.2, True), (3.9, 0.05, False),
])  # fmt: skip
def test_a_c_ref_too_unsteady_for_beta_v_is_said_with_better_tokens(std, beta_v, warned):
    # the second is less steady, and from where the third is r_s = 1 cannot be reached
    others = [("<a>", -20.0, 0.5), ("<b>", -21.0, std + 1), ("<c>", -4.0, 0.1)]
    said = " ".join(scoring.doubts(CRef(-23.0, std, 300, others), Options(beta_v=beta_v)))
    assert ("<a>" in said) == ("--z-c" in said) == warned
    assert "<b>" not in said and "<c>" not in said


def test_a_c_ref_that_leaves_no_room_is_said():
    c = CRef(-8.0, 0.1, 300, [])
    assert "at least 0.13" in scoring.doubts(c, Options(beta_v=0.1))[0]
    assert scoring.doubts(c, Options(beta_v=0.13)) == []


@pytest.mark.parametrize("count, std, warned", [(29, 1.5, True), (30, 1.5, False), (1, None, True)])
def test_a_c_ref_from_few_solutions_is_said(count, std, warned):
    assert bool(scoring.doubts(CRef(-20.0, std, count, []), Options())) == warned


def paper(**given):
    """The options of a model that is not the embedded one."""
    return apply_preset(Options(model="m", **given), given, paper_defaults(Options))


def test_options_that_are_odd_are_said():
    assert log.doubts(paper(), 8192) == []
    (long,) = log.doubts(paper(), 4096)  # Qwen2.5-Math has so many
    assert "8192" in long and "4096" in long
    (never,) = log.doubts(paper(steps=200), 8192)
    assert "never trained" in never
    # one step more is one step of it, and GRPO wants none
    assert log.doubts(paper(steps=201), 8192) == []
    assert log.doubts(paper(steps=200, alpha=0.0), 8192) == []
    assert log.doubts(Options(), 512) == []


def test_alpha_zero_gives_r_s_no_share_in_the_advantage(capsys):
    o = new_options(Options(alpha=0.0), {"alpha"})
    assert o.tau == 0 and "--tau 0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="never trained"):
        new_options(Options(alpha=0.0, tau=0.3), {"alpha", "tau"})
    assert new_options(Options(), set()).tau == 0.1


def test_the_scripts_of_the_paper_are_the_defaults_of_their_models():
    """PAPER's scripts: warm-ups 200 and 200, of Open-Reasoner-Zero 0 and 200; two epochs of
    DeepMath; the evaluation uses all of MATH-500."""
    qwen, orz, octo = (
        new_options(Options(model=m), {"model"}) for m in ("qwen2.5-7b", "orz-7b", "octothinker-3b")
    )
    warmups = [(o.reasoning_warmup, o.self_reward_warmup) for o in (qwen, orz, octo)]
    assert warmups == [(200, 200), (0, 200), (200, 200)]
    assert octo.z_c == "<|reserved_special_token_0|>"  # 128002
    assert qwen.steps * qwen.problems_per_step > 1.9 * 103_022
    assert (qwen.eval_data, qwen.eval_problems, qwen.eval_n) == ("math500", 500, 2)
    # what the user says comes before what the model wants
    assert new_options(Options(model="orz-7b", reasoning_warmup=7), {"model", "reasoning_warmup"}
                       ).reasoning_warmup == 7  # fmt: skip


def laser_json(run):
    return json.loads((run / "checkpoints" / "step-000004" / "laser.json").read_text())


def test_training_on_keeps_the_models_own_c_ref(run, tmp_path):
    """Measured on a model whose readout speaks already, c_ref would be another, and r_s with it."""
    out, _ = run
    checkpoint = out / "checkpoints" / "step-000004"
    own = json.loads((checkpoint / "laser.json").read_text())
    assert own["c_ref"] is not None
    done = train("--model", checkpoint, "--data", "arithmetic", *SHORT, "--out", tmp_path / "on")
    assert done.returncode == 0, done.stderr
    assert laser_json(tmp_path / "on")["c_ref"] == own["c_ref"] and "estimate" in done.stdout
    anew = train("--model", checkpoint, "--data", "arithmetic", *SHORT, "--out", tmp_path / "anew",
                 "--c-ref", "estimate")  # fmt: skip
    assert anew.returncode == 0, anew.stderr
    assert laser_json(tmp_path / "anew")["c_ref"] != own["c_ref"]


@pytest.mark.parametrize("loss", ["bce", "sft"])
def test_after_bce_and_sft_the_score_is_a_probability(tmp_path, loss):
    """In training, in the evaluation, and in the checkpoint, for whoever reads it later."""
    done = train(*SHORT, "--self-reward-loss", loss, "--out", tmp_path / loss)
    assert done.returncode == 0, done.stderr
    for row in rows(tmp_path / loss / "samples.jsonl"):
        if row["r_s"] is not None:
            assert row["r_s"] == pytest.approx(math.exp(row["logp_zc"]), abs=1e-12)
    assert laser_json(tmp_path / loss)["self_reward_loss"] == loss


def test_sft_and_bce_are_different_runs(tmp_path):
    for loss in ("bce", "sft"):
        assert train(*SHORT, "--self-reward-loss", loss, "--out", tmp_path / loss).returncode == 0
    bce, sft = ([m["self_reward_loss"] for m in rows(tmp_path / x / "metrics.jsonl")]
                for x in ("bce", "sft"))  # fmt: skip
    # after a wrong solution bce leaves pi(z_c) = e^-31 as it is, sft wants another token's to be 1
    assert sft[1] > 1.5 * bce[1] > 0


def test_a_trial_is_the_whole_run_in_miniature(tmp_path):
    """All three phases, both evaluations, a checkpoint: in seconds."""
    done = train("--trial", "--out", tmp_path / "t")
    assert done.returncode == 0, done.stderr
    phases = [m["phase"] for m in rows(tmp_path / "t" / "metrics.jsonl")]
    assert phases == ["reasoning", "self-reward", "integrated"]
    assert json.loads((tmp_path / "t" / "summary.json").read_text())["after"]["problems"] == 4
    assert (tmp_path / "t" / "checkpoints" / "latest").read_text().strip() == "step-000003"


def test_a_plan_of_a_large_model_needs_no_download(hub):
    done = train("--model", "qwen2.5-7b", "--plan")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("qwen2.5-7b: 7,615,616,512 parameters")
    assert hub.log == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stepz", "3"], "--steps"),
        (["--model", "qwen2.5-7bb"], "qwen2.5-7b"),
        (["--group-size", "1"], "group-size"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--data", "empty.jsonl"], "empty.jsonl"),
        (["--data", "broken.jsonl"], "broken.jsonl:2"),
        (["--model", "hollow"], "hollow"),
        (["--z-c", "ab"], "token"),
        (["--resume", "nowhere"], "nowhere"),
        (["--out", "used"], "--resume"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, arguments, said):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"problem": "1+1", "answer": 2}\n{"problem": oops\n')
    (tmp_path / "hollow").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text("{}")
    done = train(*SHORT, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_two_runs_cannot_share_a_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "busy"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = train(*SHORT, "--out", out)
    assert done.returncode == 2 and "in use" in done.stderr
