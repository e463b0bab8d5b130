"""The optimizer alone, on gradients that are simply there: what it adds to torch's AdamW.

Gradients over ranks, with processes, are in test_distributed.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from nanolaser.scale.distributed import World
from nanolaser.scale.optimizer import Optimizer

from .core import random_model

DTYPES = (torch.float32, torch.bfloat16)


def backward(model, seed: int, size: float = 1.0) -> None:
    """One micro-batch: add to every .grad what only depends on the seed."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        grad = (size * torch.randn(p.shape, generator=g)).to(p.dtype)
        p.grad = grad if p.grad is None else p.grad + grad


def update(model, optimizer, seed: int, micro_batches: int = 40) -> float:
    """One update as grpo.py makes it; the gradient's norm."""
    for i in range(micro_batches):
        backward(model, 1000 * seed + i)
        optimizer.accumulate()
    norm = optimizer.clip(1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def test_a_float32_model_is_stepped_as_torch_does():
    ours, theirs = random_model(), random_model()
    optimizer = Optimizer(ours, lr=0.01, weight_decay=0.1)
    adam = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    for seed in range(3):
        norm = update(ours, optimizer, seed)
        for i in range(40):
            backward(theirs, 1000 * seed + i)
        assert norm == torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item()
        adam.step()
        adam.zero_grad()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_offload_changes_no_bit(dtype):
    """Also where the gradients of more micro-batches come than are summed in bf16."""
    models = [random_model().to(dtype) for _ in range(2)]
    plain, away = (Optimizer(m, 0.01, 0.1, offload) for m, offload in zip(models, (False, True)))
    for seed in range(3):
        assert update(models[0], plain, seed) == update(models[1], away, seed)
    assert all(map(torch.equal, *(m.parameters() for m in models)))
    assert plain.state().keys() == away.state().keys()  # and one's checkpoint is the other's
    assert all(torch.equal(away.state()[name], x) for name, x in plain.state().items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offload", [False, True])
def test_a_saved_state_goes_on_bit_by_bit(dtype, offload):
    """Saved after two updates and taken up by another process: the third is the same."""
    model, twin = (random_model(seed).to(dtype) for seed in (0, 1))
    optimizer = Optimizer(model, 0.01, 0.1, offload)
    update(model, optimizer, 0), update(model, optimizer, 1)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    twin.load_state_dict(model.state_dict())
    resumed = Optimizer(twin, 0.01, 0.1, offload)
    resumed.load_state(saved)
    update(model, optimizer, 2), update(twin, resumed, 2)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert all(torch.equal(resumed.state()[name], x) for name, x in optimizer.state().items())
    # what was loaded was copied: going on did not change it
    assert all((saved[name] == 2).all() for name in saved if name.endswith(".step"))


def test_a_state_from_before_the_first_step_goes_on():
    """All updates before were skipped: AdamW has no moments yet."""
    model = random_model()
    optimizer = Optimizer(model, 0.01, 0.1)
    optimizer.load_state(Optimizer(model, 0.01, 0.1).state())
    assert math.isfinite(update(model, optimizer, 0))


def test_the_state_of_another_model_is_refused():
    model = random_model()
    optimizer = Optimizer(model, 0.01, 0.1)
    update(model, optimizer, 0)
    for other, word in ((dict(hidden_size=48), "shape"), (dict(num_hidden_layers=3), "missing")):
        with pytest.raises(ValueError, match=word):
            Optimizer(random_model(**other), 0.01, 0.1).load_state(optimizer.state())


def test_bf16_weights_follow_masters_that_do_move():
    """At lr 1e-5 no step moves a bf16 weight above 0.1 (steps of 2^-11 and more): each is rounded
    away.  A hundred of them together do."""
    model, bare = random_model().bfloat16(), random_model().bfloat16()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizer(model, lr=1e-5, weight_decay=0.0)
    adam = torch.optim.AdamW(bare.parameters(), lr=1e-5, weight_decay=0.0)
    for _ in range(100):
        for p in (*model.parameters(), *bare.parameters()):
            p.grad = torch.ones_like(p)
        optimizer.step(), adam.step(), optimizer.zero_grad()
    large = [s.abs() > 0.1 for s in start]
    moved = sum((p != s)[big].sum() for p, s, big in zip(model.parameters(), start, large))
    stuck = all(torch.equal(p[big], s[big]) for p, s, big in zip(bare.parameters(), start, large))
    assert moved > 100 and stuck


def test_gradients_of_a_bf16_model_are_summed_in_fp32():
    """1,024 micro-batches with something in common, as they have in training.  In bf16 each term
    would be rounded to the steps of a sum that is a thousand times as large, and half of the
    gradient lost; so the sum has to be as good as one in float64, but for a sum of 16 in bf16."""
    model = random_model().bfloat16()
    optimizer = Optimizer(model, 0.01, 0.0)
    exact = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    naive = [torch.zeros_like(p) for p in model.parameters()]
    for seed in range(1024):
        g = torch.Generator().manual_seed(seed)
        for p, e, n in zip(model.parameters(), exact, naive):
            grad = (1 + torch.randn(p.shape, generator=g)).bfloat16()
            p.grad = grad if p.grad is None else p.grad + grad
            e += grad
            n += grad
        optimizer.accumulate()
    optimizer.clip(math.inf)
    error = lambda sums: math.sqrt(  # noqa: E731
        sum((s.double() - e).square().sum() for s, e in zip(sums, exact))
        / sum(e.square().sum() for e in exact)
    )
    assert error([master.grad for master in optimizer.master]) < 2e-3
    assert error(naive) > 0.1  # or this test would show nothing


@pytest.mark.parametrize("offload", [False, True])
def test_a_gradient_that_is_not_finite_leaves_nothing_behind(offload):
    """It is forgotten whole, also what has been moved into fp32 already."""
    model, twin = random_model().bfloat16(), random_model().bfloat16()
    optimizer, other = Optimizer(model, 0.01, 0.1, offload), Optimizer(twin, 0.01, 0.1, offload)
    for i in range(20):
        backward(model, i, math.inf if i == 3 else 1.0)
        optimizer.accumulate()
    assert not math.isfinite(optimizer.clip(1.0))
    optimizer.zero_grad()
    assert update(model, optimizer, 1) == update(twin, other, 1)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_the_norm_is_that_of_all_ranks():
    """Two ranks, one with (2, 3, 6) and one with (8, 0, 4): see the comment in `clip`."""

    class TwoRanks(World):
        def gather(self, items, by=None):
            return [*items, math.hypot(8, 0, 4)]

    model = random_model()
    optimizer = Optimizer(model, 0.01, 0.0, world=TwoRanks())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    mine = next(model.parameters()).grad.view(-1)
    mine[:3] = torch.tensor([2.0, 3.0, 6.0])
    total = math.sqrt(4 + 9 + 36 + 64 + 16)
    assert optimizer.clip(1.0) == pytest.approx(total)
    grad = optimizer.master[0].grad.view(-1)[:3]
    assert torch.allclose(grad, torch.tensor([2.0, 3.0, 6.0]) / total, rtol=1e-5)
