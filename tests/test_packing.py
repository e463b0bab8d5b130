"""Many texts in one row of tokens: each text's hidden states and gradients are its own forward
pass's, whichever way attention is computed."""

import pytest
import torch
from torch.testing import assert_close

from nanolaser import packing
from nanolaser.packing import Packing, micro_batches
from nanolaser.rollout import Rollout
from tests.core import random_model, random_rollouts


def text_of(r):
    return r.prompt_tokens + r.response_tokens


@pytest.mark.parametrize("unmasked", [0.0, 100.0], ids=["whole texts", "behind a mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_texts_are_computed_as_if_alone(monkeypatch, unmasked, dtype):
    """Values and gradients; prompts of several lengths, groups of several sizes, one response."""
    monkeypatch.setitem(packing.UNMASKED, "cpu", unmasked)
    model = random_model().to(dtype)
    rollouts = random_rollouts(count=11)  # groups of 4, 4 and 3
    packed = Packing(rollouts, model.device, model.dtype)
    assert len(packed.parts) == (2 if unmasked else 1)
    hidden = model(packed.tokens, packed)[0]
    assert len(hidden) == sum(len(r.response_tokens) for r in rollouts) + sum(
        len(r.prompt_tokens) for r in rollouts[::4])
    g = torch.Generator().manual_seed(0)
    alone, mine, loss, expected = [], [], 0, 0
    for r, text in zip(rollouts, packed.texts):
        assert packed.tokens[0, text].tolist() == text_of(r)
        mine.append(hidden[text])
        alone.append(model(torch.tensor([text_of(r)]))[0])
        weight = torch.randn(alone[-1].shape, generator=g).to(dtype)
        loss, expected = loss + (mine[-1] * weight).sum(), expected + (alone[-1] * weight).sum()
    bound = 1e-5 if dtype == torch.float32 else 0.05
    for a, b in zip(mine, alone):
        assert_close(a, b, atol=bound * b.abs().max().item(), rtol=0)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected))):
        assert_close(a, b, atol=bound * b.abs().max().item(), rtol=0)


def test_the_example_of_the_docstring():
    rollouts = [Rollout(0, [1, 2], [3, 4]), Rollout(0, [1, 2], [5]), Rollout(1, [6], [7, 8])]
    packed = Packing(rollouts, torch.device("cpu"), torch.float32)
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    assert packed.texts == [[0, 1, 2, 3], [0, 1, 4], [5, 6, 7]]


def test_the_mask_is_made_where_it_saves_scores():
    """Long prompts with short responses, but not the other way round; and never a huge one."""
    def parts(prompt, response, count=8):
        rollouts = [Rollout(0, [1] * prompt, [2] * response) for _ in range(count)]
        return len(Packing(rollouts, torch.device("cpu"), torch.float32).parts)

    assert parts(200, 16) == parts(100, 64) == 2
    assert parts(16, 1000) == 1
    assert parts(1500, 1500) == 1


def test_micro_batches_hold_every_row_once_within_the_budget():
    rollouts = random_rollouts(count=40)
    length = [len(text_of(r)) for r in rollouts]
    for budget in (1, 30, 60, 200, 10**6):
        cuts = micro_batches(rollouts, budget)
        assert sorted(i for rows in cuts for i in rows) == list(range(40))
        for rows in cuts:
            packed = Packing([rollouts[i] for i in rows], torch.device("cpu"), torch.float32)
            assert len(rows) == 1 or packed.tokens.numel() <= budget
            assert len(rows) == 1 or max(length[i] for i in rows) * len(rows) <= 2 * budget
    assert len(cuts) == 1 and micro_batches([], 10) == []


def test_groups_stay_whole_as_long_as_they_fit():
    """5 tokens of prompt and 4 x 5 of response: 25 to compute, 40 in attention."""
    rollouts = random_rollouts(count=20, equal_length=True)
    for i, r in enumerate(rollouts):
        r.prompt_tokens = [4 + i // 4] * 5
    for budget in (25, 49, 50, 60):
        for rows in micro_batches(rollouts, budget):
            groups = [i // 4 for i in rows]
            assert all(groups.count(g) == 4 for g in groups)
    # too large for the budget: cut, but no further than need be
    assert sorted(map(len, micro_batches(rollouts[:4], 20))) == [1, 3]
