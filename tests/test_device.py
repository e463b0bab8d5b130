"""What a GPU would refuse, and where the host would wait for it, on a device that is pretended."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from nanolaser import grpo, load_pretrained, scoring
from nanolaser.checkpoint import load_state, save_pretrained
from nanolaser.sampler import generate
from tests.core import C_REF, FakeTokenizer, make_batch, random_model, random_rollouts, update
from tests.pretend import Device

TOKENIZER = FakeTokenizer()
LOSS = dict(alpha=0.5, c_ref=C_REF, z_c_id=TOKENIZER.z_c_id)


@pytest.fixture
def models():
    """A model, and its copy on the device."""
    model = random_model()
    with Device() as device:
        yield model, device.move(copy.deepcopy(model)), device


def test_host_and_device_do_not_mix(models):
    """The device itself: or the tests below would show nothing."""
    _, there, device = models
    with pytest.raises(AssertionError, match="host and device"):
        there.model.norm.weight + torch.ones(32)
    assert (there.model.norm.weight + 1.0).device.type == "pretend" and not device.waits
    there.model.norm.weight[0].item()
    there.model.norm.weight.cpu()
    there.model.norm.weight[torch.tensor([1, 2])]
    assert device.waits == ["_local_scalar_dense", "_to_copy", "index from the host"]


def test_sampling_waits_once_a_turn(models):
    here, there, device = models
    turns = []
    options = dict(n=3, max_new_tokens=9, max_rows=4, temperature=0.8, top_p=0.9)
    prompts = ["abc", "d1", "0123"]
    expected = generate(here, TOKENIZER, prompts, **options)
    found = generate(there, TOKENIZER, prompts, on_step=turns.append, **options)
    assert len(turns) > 9 and {r.finished for r in found} == {True, False}
    # and once for the rotary frequencies, which are made on the host
    assert device.waits == ["_to_copy"] + ["tolist"] * len(turns)
    for a, b in zip(found, expected, strict=True):
        assert a.response_tokens == b.response_tokens and a.finished == b.finished
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("updates", [1, 3])
def test_an_update_waits_for_its_statistics_and_its_norm(models, updates):
    """However many micro-batches it has; what the first of several updates reads is fetched once a
    micro-batch, to be compared with later."""
    here, there, device = models
    rollouts = random_rollouts()
    for i, r in enumerate(rollouts):
        r.r_v, r.r_s = float(i % 2), 0.1 * (i % 3) if r.finished else None
    batch = make_batch(rollouts, 4)
    sums, waits = [], []
    for model in (here, there):
        optimizer = grpo.Optimizer(model, 1e-3, 0.01)
        device.waits.clear()
        sums.append(update(model, optimizer, batch, grpo.Loss(**LOSS), 60, 1.0, updates))
        waits.append(list(device.waits))
    again = waits[1].count("_to_copy") - 1  # the rotary frequencies
    assert again == (0 if updates == 1 else len(grpo.micro_batches(rollouts, 60))) != 1
    asked = [name for name in waits[1] if name != "_to_copy"]
    assert asked == ["tolist", "_local_scalar_dense"] * updates and not waits[0]
    assert sums[0] == pytest.approx(sums[1], rel=1e-3, abs=1e-5)
    for p, q in zip(here.parameters(), there.parameters()):
        assert_close(q.detach().raw, p.detach(), atol=2e-4, rtol=1e-3)


def test_c_ref_and_evaluation_stay_on_the_device(models):
    here, there, _ = models
    problems = [SimpleNamespace(problem=p) for p in ("abc", "d1", "7")]
    options = dict(max_new_tokens=8, seed=3)
    found, expected = (
        scoring.estimate(m, TOKENIZER, problems, 8, **options) for m in (there, here))
    assert found.mean == pytest.approx(expected.mean, abs=1e-4)
    found, expected = (grpo.sample(m, TOKENIZER, problems, 2, **options) for m in (there, here))
    assert [r.response_tokens for r in found] == [r.response_tokens for r in expected]


def test_weights_and_optimizer_state_come_back_from_the_device(models, tmp_path, tiny_checkpoint):
    _, tokenizer = load_pretrained(tiny_checkpoint)
    here = load_pretrained(tiny_checkpoint)[0]
    there = models[2].move(copy.deepcopy(here))
    states = []
    for model in (here, there):
        optimizer = grpo.Optimizer(model, 1e-3, 0.01)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.clip(1.0), optimizer.step()
        folder = tmp_path / str(len(states))
        save_pretrained(model, tokenizer, folder, (optimizer.state(), {}))
        states.append((load_pretrained(folder)[0].state_dict(), load_state(folder / "state")[0]))
    for mine, theirs in zip(*states):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
