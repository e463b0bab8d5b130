"""benchmarks/scores.py: its page is that of its numbers, which are what they are called."""

import json

import numpy as np
import pytest
import torch

from benchmarks import scores
from nanolaser import load_pretrained
from nanolaser.problems import load_problems
from tests.conftest import ROOT


def test_the_page_says_what_was_measured():
    data = ROOT / "docs" / "scores.json"
    if not data.exists():
        pytest.skip("not measured yet")
    record = json.loads(data.read_text())
    assert (ROOT / "docs" / "scores.md").read_text() == scores.page(record)
    assert (ROOT / "docs" / "pictures" / "scores.svg").read_text() == scores.picture(record)


@pytest.fixture(scope="module")
def small():
    """Scores of the embedded model's solutions of ten problems, by the embedded model itself."""
    o = scores.Options(problems=8, solved=2, probe_problems=12, n=4, draws=20)
    model, tokenizer = load_pretrained("tiny")
    tokenizer.c_ref = -36.0
    models = {kind: (model, tokenizer) for kind in ("laser", "grpo", "sft")}
    rows, _ = scores.solve(model, tokenizer, load_problems("arithmetic", "test", 10), o)
    heads = scores.probes(model, tokenizer, o)
    return o, rows, scores.all_scores(rows, "laser", models, heads, o)


def test_every_way_scores_every_solution(small):
    o, rows, found = small
    assert set(found) == set(scores.METHODS)
    for name, (x, tokens, milliseconds) in found.items():
        assert len(x) == len(rows) and milliseconds > 0
        assert not scores.METHODS[name] or name == "r_s" or all(0 <= s <= 1 for s in x), name
    # what the sampler read, read again
    assert found["r_s"][0] == pytest.approx([row["r_s"] for row in rows], abs=1e-4)
    # "<|user|>ok?<|end|>" and the token at which the answer is read
    assert found["P(yes)"][1] == 6 and found["mean log-prob"][1] == 0
    # the base model was taught to judge in words; its untrained r_s knows next to nothing
    right = np.array([row["r_v"] for row in rows])
    quality = {name: scores.quality(right, np.array(found[name][0]),
                                    np.array([row["prompt_id"] for row in rows]),
                                    np.array([row["prompt_id"] >= 8 for row in rows]), True, 20)
               for name in ("P(yes)", "r_s")}  # fmt: skip
    assert quality["P(yes)"]["auroc"][0] > 0.8 > quality["r_s"]["auroc"][0]
    low, high = quality["P(yes)"]["auroc"][1:]
    assert low <= quality["P(yes)"]["auroc"][0] <= high


def test_probes_learn_what_is_there_to_learn():
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0.3).float()
    probe = scores.fit(torch.nn.Linear(8, 1), x[:1500], y[:1500], 0.01)
    assert ((probe(x[1500:]) > 0.5).float() == y[1500:]).float().mean() > 0.95


def test_the_fitted_line_is_the_logistic_one():
    rng = np.random.default_rng(0)
    score = rng.normal(size=4000)
    right = rng.random(4000) < 1 / (1 + np.exp(-(3 * score - 1)))
    line = scores.fit_line(score, right)
    assert line(np.array([0.0, 1.0])) == pytest.approx(
        [1 / (1 + np.exp(1)), 1 / (1 + np.exp(-2))], abs=0.03)
    assert np.isfinite(scores.fit_line(np.array([0.0, 1.0]), np.array([False, True]))(score)).all()
