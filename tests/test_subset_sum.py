"""The second task of an embedded model: its problems, its reward, the texts it was trained on."""

import itertools
import json
import random
import re

import pytest

from nanolaser.checker import is_correct
from nanolaser.problems import load_problems, made_up_problems
from nanolaser.tiny import __main__ as recipe
from nanolaser.tiny import subset_sum
from tests.conftest import ROOT

PROBLEM = "84 from a5 b9 c14 d23 e31 f47"  # of larger numbers than there are


@pytest.mark.parametrize("response, right", [
    ("84-f47=37\n37-d23=14\n14-c14=0\n\\boxed{f,d,c}", 1.0),
    ("\\boxed{c,d,f}", 1.0),  # the order, and how it was found, do not matter
    ("84-b9=75\n75-f47=28\n\\boxed{b,f}", 0.0),  # something is left
    ("84-f47=37\n37-d37=0\n\\boxed{f,d}", 0.0),  # whatever the steps claim
    ("\\boxed{f,d,c,g}", 0.0),  # 84, and a letter that stands for nothing
    ("\\boxed{e,e,d}", 0.0),
    ("\\boxed{c,c,b,f}", 0.0),  # 84, but one of them twice
    ("\\boxed{c,d,f} \\boxed{a}", 0.0),  # a hedge
    ("\\boxed{}", 0.0),
    ("\\boxed{14,23,47}", 0.0),
    ("", 0.0),
])  # fmt: skip
def test_reward(response, right):
    assert subset_sum.reward(PROBLEM, response, "c,d,f") == right


def test_every_problem_has_one_solution_and_the_checker_agrees_with_the_reward():
    """On every subset of three problems: adding up, and comparing with the gold answer."""
    for problem in made_up_problems(3, seed=1, name="subset-sum"):
        target = int(problem.problem.split()[0])
        numbers = {word[0]: int(word[1:]) for word in problem.problem.split()[2:]}
        sizes = range(1, 7)
        tried = itertools.chain(*(itertools.combinations(numbers, size) for size in sizes))
        rewards = []
        for subset in tried:
            text = f"\\boxed{{{','.join(reversed(subset))}}}"
            rewards.append(subset_sum.reward(problem.problem, text))
            assert rewards[-1] == is_correct(text, problem.answer)
            assert rewards[-1] == (sum(numbers[letter] for letter in subset) == target)
        assert sum(rewards) == 1


def test_no_problem_is_in_both_splits_or_in_the_recipe():
    test = {p.problem for p in load_problems("subset-sum", max_problems=2000)}
    assert not test & {p.problem for p in made_up_problems(2000, 0, "train", "subset-sum")}
    rng, options = random.Random(0), recipe.Options(task="subset-sum")
    trained = (recipe.text(rng, options)[0] for _ in range(2000))
    assert not test & {text.removeprefix("<|user|>").removesuffix("<|end|>") for text in trained}


def test_checks_in_the_recipe_say_what_the_reward_says():
    """And what is wrong is wrong in every way: left over, off by one, not there, used twice."""
    rng, options = random.Random(0), recipe.Options(task="subset-sum", wrong=0.1, checks=1.0)
    verdicts, ways = [], set()
    for prompt, answer in (recipe.text(rng, options) for _ in range(2000)):
        solution, _, check = answer.partition("<|end|><|user|>ok?<|end|>")
        right = subset_sum.reward(prompt, solution)
        assert check == ("y" if right else "n") + "<|end|><|user|>"
        verdicts.append(right)
        steps = re.findall(r"(\d+)-([a-f])(\d+)=(\d+)\n", solution)
        for left, letter, number, rest in steps:
            ways |= {"off"} if int(left) - int(number) != int(rest) else set()
            ways |= {"not there"} if f"{letter}{number}" not in re.split("[ <]", prompt) else set()
        chosen = [letter for _, letter, _, _ in steps]
        ways |= {"twice"} if len(set(chosen)) < len(chosen) else set()
        ways |= {"left over"} if not right and "=0\n" not in solution else set()
    assert ways == {"off", "not there", "twice", "left over"}
    assert 0.25 < sum(verdicts) / len(verdicts) < 0.45


def test_its_own_reward_trains_as_the_checker_does(call, tmp_path):
    """Through the door of any reward, and to the same last digit."""
    short = """--model tiny-subset-sum --steps 2 --problems-per-step 4
        --group-size 4 --eval-problems 2 --eval-n 2 --reasoning-warmup 0 --self-reward-warmup 1
        --max-new-tokens 64 --c-ref -22""".split()
    door = ["--reward", f"{ROOT / 'nanolaser' / 'tiny' / 'subset_sum.py'}:reward"]
    learned = []
    for name, more in (("checked", []), ("added up", door)):
        code, _, err = call("train.py", *short, *more, "--out", tmp_path / name)
        assert code == 0, err
        rows = [json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
        learned.append([(row["reward"], row["loss"], row["grad_norm"]) for row in rows])
    assert learned[0] == learned[1]
    assert any(reward > 0 for reward, _, _ in learned[0])


def test_the_shipped_model_checks_better_than_it_solves(tmp_path, call):
    """In words, before any RL: what the self-reward can build on."""
    code, _, err = call("evaluate.py", "--model", "tiny-subset-sum", "--data", "subset-sum",
                        "--max-problems", 40, "--n", 4, "--max-new-tokens", 64, "--generative",
                        "--output", tmp_path)  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "results.json").read_text())["subset-sum"]
    assert 0.08 < found["accuracy"] < 0.3
    said = [json.loads(line) for line in open(tmp_path / "judgements.jsonl")]
    samples = [json.loads(line) for line in open(tmp_path / "samples.jsonl")]
    right = {(r["prompt_id"], r["sample"]): r["r_v"] > 0.5 for r in samples}
    agreed = [right[r["prompt_id"], r["sample"]] == (r["score"] > 0.5) for r in said
              if r["score"] is not None]  # fmt: skip
    assert sum(agreed) / len(agreed) > 0.85


def test_the_recipe_writes_the_tokenizer_that_is_shipped(tmp_path):
    recipe.write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shipped = json.loads((ROOT / "nanolaser" / "tiny" / name).read_text())
        assert json.loads((tmp_path / name).read_text()) == shipped
