"""--reward: a function of the user's own in the checker's place, in training and in evaluation."""

import json
import re

import pytest
import torch

from nanolaser import grpo, laser
from nanolaser.reward import load_reward
from tests import plain
from tests.conftest import ROOT
from tests.core import FakeTokenizer, random_model, random_rollouts, slow_readout

SHORT = """--steps 3 --problems-per-step 2 --group-size 4 --eval-problems 2 --eval-n 2
--eval-every 9 --save-every 2 --reasoning-warmup 1 --self-reward-warmup 1 --max-new-tokens 48
--c-ref -31.3""".split()
EVALUATE = "--data arithmetic --n 2 --max-problems 3".split()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def examples():
    """{file name: text} of the examples in docs/own-reward.md."""
    page = (ROOT / "docs" / "own-reward.md").read_text("utf-8")
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", page, re.DOTALL)
    assert sorted(name for name, _ in blocks) == ["my_reward.py", "unit_tests.py"]
    return dict(blocks)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the examples, to stand in."""
    for name, text in examples().items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    load_reward.cache_clear()  # another test's own.py is another one
    return tmp_path


def write(here, text):
    (here / "own.py").write_text(text)
    load_reward.cache_clear()


@pytest.mark.parametrize("name", ["my_reward.py:shows_work", "unit_tests.py:passed"])
def test_the_examples_of_the_docs_train_and_evaluate(here, call, name):
    expected = load_reward(name)
    code, _, err = call("train.py", *SHORT, "--reward", name, "--out", "run")
    assert code == 0, err
    code, _, err = call("evaluate.py", "--model", "run", *EVALUATE, "--reward", name,
                        "--output", "results")  # fmt: skip
    assert code == 0, err
    trained, evaluated = rows(here / "run/samples.jsonl"), rows(here / "results/samples.jsonl")
    for row in trained + evaluated:
        assert [row["r_v"]] == expected([row["problem"]], [row["response"]], [row["gold"]])
    values = {row["r_v"] for row in trained + evaluated}
    assert len(values) > 2 and all(0 <= v <= 1 for v in values)
    results = json.loads((here / "results/results.json").read_text())["arithmetic"]
    right = [row["r_v"] > 0.5 for row in evaluated]
    assert results["accuracy"] == pytest.approx(sum(right) / len(right))


def test_the_examples_pay_for_what_they_say(here):
    right, wrong = "1+2=3\n3*4=12\n12-2=10\n\\boxed{10}", "1+2=3\n3*4=13\n13-3=10\n\\boxed{10}"
    work = load_reward("my_reward.py:shows_work")
    assert work(["p"] * 3, [right, "\\boxed{10}", right], ["10", "10", "9"]) == [1.0, 0.6, 0.0]
    passed = load_reward("unit_tests.py:passed")
    assert passed(["p"] * 3, [right, wrong, "no"], ["10", "10", "10"]) == [1.0, 0.75, 0.0]


def test_evaluations_do_not_mix_rewards(here, call):
    write(here, "def half(problem, response, answer):\n    return 0.5\n")
    arguments = ["evaluate.py", *EVALUATE, "--output", "results"]
    assert call(*arguments, "--reward", "own.py:half")[0] == 0
    assert call(*arguments, "--reward", "own.py:half")[0] == 0  # the same: goes on
    code, _, err = call(*arguments)
    assert code == 2 and "reward" in err
    write(here, "def half(problem, response, answer):\n    return 0.6\n")
    assert call(*arguments, "--reward", "own.py:half")[0] == 2
    assert {row["r_v"] for row in rows(here / "results/samples.jsonl")} == {0.5}


def test_a_resumed_run_executes_what_is_named_and_is_the_same_run(here, call):
    for out in ("whole", "part"):
        assert call("train.py", *SHORT, "--reward", "unit_tests.py:passed", "--out", out)[0] == 0
    (here / "part/checkpoints/latest").write_text("step-000002\n")
    config = here / "part/config.json"
    hidden = here / "part/hidden.py"
    hidden.write_text(f"open({str(here / 'executed')!r}, 'w')\n" + examples()["unit_tests.py"])
    named = config.read_text()
    config.write_text(named.replace("unit_tests.py:passed", "part/hidden.py:passed"))
    code, _, err = call("train.py", "--resume", "part")
    assert code == 2 and "part/hidden.py:passed" in err and not (here / "executed").exists()
    config.write_text(named)
    code, _, err = call("train.py", "--resume", "part", "--reward", "unit_tests.py:passed")
    assert code == 0, err
    for name in ("metrics.jsonl", "samples.jsonl", "evals.jsonl"):
        ours, theirs = ([{k: v for k, v in row.items() if "second" not in k}
                         for row in rows(here / f / name)] for f in ("part", "whole"))
        assert ours == theirs


@pytest.mark.parametrize("body, line, said", [
    ("    raise KeyError('no')", 3, "KeyError"),
    ("    return 1 / 0 if len(response) else 0", 3, "ZeroDivision"),
    ("    return float('nan')", 1, "nan"),
    ("    return 1.5", 1, "1.5"),
    ("    return -0.1", 1, "-0.1"),
    ("    return None", 1, "None"),
    ("    return '1'", 1, "'1'"),
])
def test_a_bad_reward_stops_the_run_with_file_line_and_problem(here, call, body, line, said):
    write(here, f"def own(problem, response, answer):\n    x = 1\n{body}\n")
    code, _, err = call("train.py", *SHORT, "--reward", "own.py:own", "--out", "run")
    assert code == 2 and f"own.py:{line}" in err and said in err and "=?" in err
    assert len(err.strip().splitlines()) == 1


def test_lists_must_be_answered_by_as_many_numbers(here, call):
    write(here, "def own(problems, responses, answers):\n    return [0.5] * (len(problems) - 1)\n")
    code, _, err = call("train.py", *SHORT, "--reward", "own.py:own", "--out", "run")
    assert code == 2 and "own.py:1" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name, text, said", [
    ("own.py", "", "FILE.py:FUNCTION"), ("own.txt:f", "", "FILE.py:FUNCTION"),
    ("gone.py:f", "", "gone.py"), ("own.py:f", "g = 1", "function f"),
    ("own.py:f", "f = 1", "function f"), ("own.py:f", "def f(x): return 1", "three"),
    ("own.py:f", "x = 1\n\ndef f(:", "own.py:3"), ("own.py:f", "\nimport nowhere", "own.py:2"),
])  # fmt: skip
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_file_that_gives_no_reward_is_one_line_before_anything_begins(
    here, call, script, name, text, said
):
    write(here, text)
    code, _, err = call(script, "--reward", name, "--data", "arithmetic")
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1
    assert not (here / "runs").exists() and not (here / "results").exists()


def test_fractional_rewards_in_every_equation():
    """Right is r_v > 0.5; the target of the loss on r_s is r_v itself."""
    model, rollouts = random_model(), random_rollouts()
    solutions = []
    for i, r in enumerate(rollouts):
        r.r_v = i / 11
        solutions.append(plain.Solution(r.prompt_tokens, r.response_tokens, finished=r.finished,
                                        r_v=r.r_v))  # fmt: skip
    r_v, finished = (grpo.stack(rollouts, name, 4) for name in ("r_v", "finished"))
    plain.class_weights(solutions)
    weights = laser.class_weights(r_v.float(), finished).flatten()
    assert weights.tolist() == pytest.approx([s.weight for s in solutions], rel=1e-6)
    for s, group in zip(range(0, 12, 4), laser.group_advantages(r_v)):
        normal = plain.normalised([x.r_v for x in solutions[s : s + 4]])
        assert group.tolist() == pytest.approx(normal, abs=1e-5)
    loss = grpo.Loss(alpha=1.0, c_ref=-10.0, z_c_id=FakeTokenizer.z_c_id)
    stats = grpo.accumulate_gradients(model, rollouts, torch.zeros(12), weights, loss, 60)
    logp = [slow_readout(model, r)[1] for r in rollouts]
    ended = [(s, p) for s, p in zip(solutions, logp) if s.finished]
    error = sum(s.weight * (0.1 * (p.item() + 10) - s.r_v) ** 2 for s, p in ended) / len(ended)
    assert stats["self_reward_loss"] == pytest.approx(error, rel=1e-5)
