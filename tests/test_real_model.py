"""benchmarks/real_model.py: problems that are what they claim, a probe that finds what is there and
nothing else, and a page that is its numbers'."""

import json
import random
import re

import pytest
import torch

from benchmarks import real_model, real_model_text
from nanolaser.checker import extract_answer, is_correct
from tests.conftest import ROOT


def test_every_worked_solution_is_right_and_says_nothing_of_right_and_wrong():
    rng, kinds = random.Random(1), set()
    for _ in range(500):
        row = real_model.word_problem(rng)
        *steps, _ = row["solution"].split("\n")
        for line in steps:
            x, operation, y, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", line).groups()
            whole = {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y),
                     "/": int(x) // int(y) if int(x) % int(y) == 0 else None}  # fmt: skip
            assert whole[operation] == int(result) > 0
        assert steps[-1].endswith(f"={row['answer']}")  # the last step is the answer
        assert is_correct(row["solution"], row["answer"])
        assert extract_answer(row["problem"]) is None
        assert not re.search(r"right|wrong|correct|true|false|yes|check", str(row), re.IGNORECASE)
        # every number of the solution's first step stands in the problem, or is a word of it
        numbers = set(re.findall(r"\d+", row["problem"]))
        assert set(re.findall(r"\d+", steps[0].partition("=")[0])) - numbers <= {"2"}
        kinds.add(re.sub(r"\d+|[A-Z][a-z]+", "", row["problem"]))
    assert len(kinds) > 20 and {2, 3} == {len(real_model.KINDS[i][2].split()) for i in range(22)}


def test_about_one_problem_in_eight_is_held_out():
    rng = random.Random(2)
    texts = [real_model.word_problem(rng)["problem"] for _ in range(800)]
    assert 60 < sum(map(real_model.held_out, texts)) < 140


@pytest.mark.parametrize("strength, low, high", [(2.0, 0.9, 1.0), (0.0, 0.3, 0.7)])
def test_a_probe_finds_a_direction_that_is_there_and_none_that_is_not(strength, low, high):
    random = torch.Generator().manual_seed(0)

    def side(n):
        right = torch.rand(n, generator=random) < 0.3
        x = torch.randn(n, 16, generator=random)
        x[:, 3] += strength * (2 * right.float() - 1)
        return {"states": 5 + 3 * x, "right": right, "problem": torch.arange(n) // 4}

    found = real_model.probed(side(400), side(200))
    assert low <= found["auroc"] <= high


@pytest.mark.skipif(not (ROOT / "docs" / "real-model.json").exists(), reason="nothing was run yet")
def test_the_page_and_the_pictures_are_those_of_the_numbers():
    docs = ROOT / "docs"
    found = json.loads((docs / "real-model.json").read_text())
    assert (docs / "real-model.md").read_text() == real_model_text.page(found)
    for name, picture in real_model_text.pictures(found).items():
        assert (docs / "pictures" / name).read_text() == picture
