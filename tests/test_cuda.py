"""What only a GPU can show; skipped without one.  Small random models, seconds in all."""

import copy

import pytest
import torch
from torch.testing import assert_close

from nanolaser import grpo, readout
from nanolaser.model import CausalLM, ModelConfig
from nanolaser.packing import Packing
from nanolaser.sampler import generate
from nanolaser.scale import plan as planning
from nanolaser.tiny.__main__ import init_weights
from tests.core import (
    C_REF, FakeTokenizer, make_batch, random_model, random_rollouts, update)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOKENIZER = FakeTokenizer()
LOSS = dict(alpha=0.5, c_ref=C_REF, z_c_id=TOKENIZER.z_c_id)


def batch_of(rollouts):
    for i, r in enumerate(rollouts):
        r.r_v, r.r_s = float(i % 2), 0.1 * (i % 3) if r.finished else None
    return make_batch(rollouts, 4)


def close(mine, theirs, share):
    """Equal up to a share of the largest entry."""
    assert_close(mine.cpu().float(), theirs.float(), atol=share * theirs.abs().max().item(), rtol=0)


def gradients(model, batch, budget=60):
    stats = grpo.accumulate_gradients(
        model, batch.rollouts, batch.advantages, batch.weights, grpo.Loss(**LOSS), budget)
    return stats, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_hidden_states_are_the_cpus():
    model = random_model()
    there = copy.deepcopy(model).cuda()
    tokens = torch.arange(4, 34).view(3, 10)
    close(there(tokens.cuda()), model(tokens), 1e-4)


def test_the_sampler_draws_the_cpus_tokens():
    model = random_model()
    options = dict(n=3, max_new_tokens=9, max_rows=4, temperature=0.8)
    expected = generate(model, TOKENIZER, ["abc", "d1", "0123"], **options)
    found = generate(copy.deepcopy(model).cuda(), TOKENIZER, ["abc", "d1", "0123"], **options)
    for a, b in zip(found, expected, strict=True):
        assert a.response_tokens == b.response_tokens
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


@pytest.mark.parametrize("prompt", [3, 300], ids=["whole texts", "behind a mask"])
def test_the_update_has_the_cpus_gradient(prompt):
    """Both ways of attention, and whatever kernels they choose."""
    model, rollouts = random_model(), random_rollouts()
    for r in rollouts:
        r.prompt_tokens = [5 + r.prompt_id] * prompt
    there = copy.deepcopy(model).cuda()
    packed = Packing(rollouts, there.device, there.dtype)
    assert len(packed.parts) == (1 if prompt == 3 else 2)
    (mine, found), (theirs, expected) = (
        gradients(m, batch_of(rollouts), 10**5) for m in (there, model))
    close(found, expected, 1e-3)
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_bf16_weights_are_not_widened_and_lose_little():
    """The gap between sampler and update is that of bf16, and the readout uses bf16 products."""
    model = random_model(std=0.1).bfloat16().cuda()
    assert readout.mixed(model.lm_head_weight)
    rollouts = generate(model, TOKENIZER, ["abc", "d1", "k"], n=4, max_new_tokens=9)
    stats, found = gradients(model, batch_of(rollouts))
    assert stats["sampler_gap"] < 0.1 and found.isfinite().all()
    expected = gradients(copy.deepcopy(model).cpu(), batch_of(rollouts))[1]
    assert (found.cpu() - expected).float().norm() < 0.03 * expected.float().norm()


@pytest.mark.parametrize("offload", [False, True])
def test_offload_steps_the_same_weights(offload):
    model, batch = random_model().cuda().bfloat16(), batch_of(random_rollouts())
    before = copy.deepcopy(list(model.parameters()))
    optimizer = grpo.Optimizer(model, 1e-3, 0.0, offload=offload)
    stats = update(model, optimizer, batch, grpo.Loss(**LOSS), 60, 1.0)
    assert stats["skipped_updates"] == 0
    assert any(tensor.is_cuda for tensor in optimizer.state().values()) != offload
    assert not offload or optimizer.staging.is_pinned()
    assert not all(map(torch.equal, before, model.parameters()))


def test_state_saved_on_the_cpu_resumes():
    model, batch = random_model().cuda(), batch_of(random_rollouts())
    optimizer = grpo.Optimizer(model, 1e-3, 0.0)
    update(model, optimizer, batch, grpo.Loss(**LOSS), 60, 1.0)
    optimizer.load_state({name: tensor.cpu() for name, tensor in optimizer.state().items()})
    assert all(tensor.is_cuda for tensor in optimizer.state().values())
    assert update(model, optimizer, batch, grpo.Loss(**LOSS), 60, 1.0)["skipped_updates"] == 0


def test_the_plan_is_within_a_tenth_of_the_peak():
    """An update of four groups of eight, 200 + 300 tokens, on a model of 300M."""
    shape = ModelConfig("qwen2", 64_000, 1024, 4096, 16, 16, 4, 64, tie_word_embeddings=True,
                        attention_bias=True)  # fmt: skip
    model = init_weights(CausalLM(shape), 0).bfloat16().cuda()
    work = planning.Workload(4, 8, prompt_tokens=200, max_new_tokens=300)
    settings = planning.Settings(2 * (200 + 8 * 300))
    plan = planning.Plan(shape, 10**12, 10**12, torch.bfloat16, device="cuda", work=work,
                         settings=settings)  # fmt: skip
    rollouts = random_rollouts(count=32)
    for i, r in enumerate(rollouts):
        r.prompt_tokens, r.response_tokens, r.prompt_id = [4 + i // 8] * 200, [9] * 300, i // 8
        r.logprobs = [0.0] * 300
    batch = batch_of(rollouts)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        gradients(model, batch, settings.micro_batch_tokens)
    planned = sum(
        sizes[1] for what, sizes in plan.bytes.items()
        if what in ("weights", "gradients", "activations", "log-probs, or backward"))
    assert torch.cuda.max_memory_allocated() == pytest.approx(planned, rel=0.1)
