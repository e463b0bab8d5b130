"""The batched update against a slow, obvious one: a loop over rows and tokens, full logits."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from nanolaser import grpo, laser
from nanolaser.rollout import Rollout
from nanolaser.sampler import generate
from tests.core import (
    BETA_V, C_REF, FakeTokenizer, all_logprobs, random_model, random_rollouts, slow_readout)

TOKENIZER = FakeTokenizer()
G = 4
EVERYTHING = 10**6  # a token budget that holds any batch
BUDGETS = [1, 30, 60, EVERYTHING]  # one row at a time, few, some, all


def batch_of(rollouts, seed=0, tau=0.0):
    """A batch with random verdicts; r_s in the rows is made up, to steer tau."""
    g = torch.Generator().manual_seed(seed)
    r_v = (torch.rand(len(rollouts), generator=g) < 0.5).float().tolist()
    r_s = torch.rand(len(rollouts), generator=g).tolist()
    rows = [
        {"r_v": v, "r_s": s if r.finished else None, "finished": r.finished}
        for r, v, s in zip(rollouts, r_v, r_s)
    ]
    return grpo.make_batch(rollouts, rows, G, tau, min_std=0.1), rows


def loss_of(**changes):
    usual = dict(alpha=0.5, beta_v=BETA_V, c_ref=C_REF, z_c_id=TOKENIZER.z_c_id)
    return grpo.Loss(**{**usual, **changes})


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradient(model, batch, loss, budget=EVERYTHING, old=None):
    model.zero_grad(set_to_none=True)
    sums = grpo.accumulate_gradients(model, batch, loss, budget, old)
    result = flat_gradient(model)
    model.zero_grad(set_to_none=True)
    return result, sums


def slow_loss(model, batch, loss, old=None):
    """The objective as one writes it on paper; plain GRPO where alpha is 0."""
    policy, judged = 0.0, []
    for i, rollout in enumerate(batch.rollouts):
        logprobs, logp_zc = slow_readout(model, rollout, loss.z_c_id, loss.temperature)
        before = logprobs.detach() if old is None else old[i]
        advantage = batch.advantages[i].item()
        for now, then in zip(logprobs, before):
            ratio = (now - then).exp()
            term = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            if advantage < 0:
                term = term.clamp(min=3 * advantage)
            policy = policy - term
        if rollout.finished:
            judged.append((logp_zc, batch.r_v[i].item()))
    policy = policy / sum(len(r.response_tokens) for r in batch.rollouts)
    right = sum(v for _, v in judged)
    error = 0.0
    for logp_zc, v in judged:
        same = right if v else len(judged) - right
        r_s = loss.beta_v * (logp_zc - loss.c_ref)
        error = error + len(judged) / (2 * same) * (r_s - v) ** 2 / len(judged)
    return policy, error


def slow_gradient(model, batch, loss, old=None):
    model.zero_grad(set_to_none=True)
    policy, error = slow_loss(model, batch, loss, old)
    (policy + loss.alpha * error).backward()
    result = flat_gradient(model)
    model.zero_grad(set_to_none=True)
    return result, float(policy.detach()), float(error.detach())


def same(a, b, tolerance=1e-6):
    """Equal up to `tolerance` of the largest entry: fp32 sums in another order."""
    assert_close(a, b, atol=tolerance * b.abs().max().item(), rtol=0)


@pytest.fixture(scope="module")
def model():
    return random_model()


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_equals_slow_reference(untied, temperature):
    model = random_model(tie_word_embeddings=not untied)
    batch, _ = batch_of(random_rollouts(), tau=0.3)
    loss = loss_of(temperature=temperature)
    got, sums = gradient(model, batch, loss, 60)
    expected, policy, error = slow_gradient(model, batch, loss)
    same(got, expected, 5e-6)
    assert sums.policy_loss == pytest.approx(policy, abs=1e-6)
    assert sums.self_reward_loss == pytest.approx(error, rel=1e-5)
    assert sums.clip_fraction == 0 and sums.approx_kl == 0


def test_alpha_and_tau_zero_is_grpo_exactly(model):
    """Neither c_ref, beta_v, z_c nor r_s has a say: bit for bit, and equal to plain GRPO."""
    rollouts = random_rollouts()
    batch, rows = batch_of(rollouts, tau=0.0)
    assert torch.equal(batch.advantages.view(-1, G),
                       laser.group_advantages(torch.tensor([r["r_v"] for r in rows]).view(-1, G)))
    got, sums = gradient(model, batch, loss_of(alpha=0.0))
    same(got, slow_gradient(model, batch, loss_of(alpha=0.0))[0], 5e-6)
    assert sums.self_reward_loss == 0
    for row in rows:
        row["r_s"] = None
    deaf = grpo.make_batch(rollouts, rows, G, 0.0, 0.1)
    other, _ = gradient(model, deaf, loss_of(alpha=0.0, c_ref=math.nan, beta_v=9.0, z_c_id=30))
    assert torch.equal(got, other)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_gradient_is_the_same_for_any_micro_batches(model, alpha):
    batch, _ = batch_of(random_rollouts(count=24), tau=0.3)
    whole, sums = gradient(model, batch, loss_of(alpha=alpha))
    for budget in BUDGETS[:-1]:
        cut, cut_sums = gradient(model, batch, loss_of(alpha=alpha), budget)
        same(cut, whole)
        for name in ("policy_loss", "self_reward_loss", "entropy", "sampler_gap"):
            assert getattr(cut_sums, name) == pytest.approx(getattr(sums, name), rel=1e-4, abs=1e-6)
        assert cut_sums.real_tokens == sums.real_tokens <= cut_sums.padded_tokens


def test_gradient_is_the_same_for_any_order_of_rows(model):
    batch, _ = batch_of(random_rollouts(count=16), tau=0.3)
    whole, _ = gradient(model, batch, loss_of(), 60)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4))
    pick = {k: getattr(batch, k)[order] for k in ("advantages", "r_v", "finished", "weights")}
    shuffled = grpo.Batch([batch.rollouts[i] for i in order], **pick,
                          tokens=batch.tokens, ended=batch.ended)
    same(gradient(model, shuffled, loss_of(), 60)[0], whole)


def test_activation_checkpointing_changes_nothing():
    model = random_model()
    batch, _ = batch_of(random_rollouts())
    whole, _ = gradient(model, batch, loss_of())
    model.gradient_checkpointing = True
    same(gradient(model, batch, loss_of())[0], whole)


def test_what_the_padding_holds_changes_nothing(model, monkeypatch):
    batch, _ = batch_of(random_rollouts())
    whole, _ = gradient(model, batch, loss_of())
    pad = grpo.pad

    def litter(rows, device):
        tokens, lengths = pad(rows, device)
        for row, n in zip(tokens, lengths):
            # stop tokens and z_c itself, where a mask made from ids would stumble
            row[n:] = torch.tensor([1, 3, 0, 20] * 9)[: len(row) - n]
        return torch.cat((tokens, torch.full((len(rows), 3), 3)), 1), lengths

    monkeypatch.setattr(grpo, "pad", litter)
    same(gradient(model, batch, loss_of())[0], whole)


def test_micro_batches_hold_every_row_once_within_the_budget():
    rollouts = random_rollouts(count=40)
    length = [len(r.prompt_tokens) + len(r.response_tokens) for r in rollouts]
    for budget in BUDGETS:
        cuts = list(grpo.micro_batches(rollouts, budget))
        assert sorted(i for rows in cuts for i in rows) == list(range(40))
        for rows in cuts:
            assert len(rows) == 1 or max(length[i] for i in rows) * len(rows) <= budget
    assert len(cuts) == 1 and list(grpo.micro_batches([], 10)) == []


# ---------------------------------------------------------------- the end of a solution


@pytest.mark.parametrize("stop", FakeTokenizer.stop_ids + (0,))
def test_the_stop_token_has_a_gradient(model, stop):
    """Also where the stop token is the padding id (0): an end that is learned from must never
    be inferred from an id.  Two rows, one token each: the only gradient there is."""
    rollouts = [Rollout(0, [5, 6], [stop], [0.0], finished=True),
                Rollout(0, [5, 6], [9], [0.0], finished=False)]
    rows = [{"r_v": 1.0, "finished": True}, {"r_v": 0.0, "finished": False}]
    batch = grpo.make_batch(rollouts, rows, 2, 0.0, 0.1)
    assert batch.advantages[0] > 0 > batch.advantages[1]
    got, _ = gradient(model, batch, loss_of(alpha=0.0))
    same(got, slow_gradient(model, batch, loss_of(alpha=0.0))[0], 5e-6)
    batch.advantages[1] = 0.0  # the stop token alone
    alone, _ = gradient(model, batch, loss_of(alpha=0.0))
    assert alone.abs().max() > 1e-3


def test_z_c_lies_outside_the_response():
    """It is read once for each finished row, after all response tokens and at temperature 1;
    its position is the stop token's own."""
    rollouts = random_rollouts()
    t = grpo.Targets.of(rollouts, 3, 0.7)
    assert t.responses == sum(len(r.response_tokens) for r in rollouts)
    assert t.target[: t.responses].tolist() == [y for r in rollouts for y in r.response_tokens]
    assert t.temperature[: t.responses].eq(0.7).all() and t.temperature[t.responses:].eq(1).all()
    assert t.target[t.responses:].eq(3).all()
    ended = [b for b, r in enumerate(rollouts) if r.finished]
    assert t.row[t.responses:].tolist() == ended
    for b, position in zip(ended, t.position[t.responses:].tolist()):
        sequence = rollouts[b].prompt_tokens + rollouts[b].response_tokens
        assert position == len(sequence) - 1 and sequence[position] in TOKENIZER.stop_ids
    # and a response token is read one before it stands
    first = slice(t.responses)
    for b, position, token in torch.stack((t.row, t.position, t.target), 1)[first].tolist():
        assert (rollouts[b].prompt_tokens + rollouts[b].response_tokens)[position + 1] == token


def test_z_c_gets_no_policy_gradient(model):
    """With alpha = 0 the output row of z_c, which no token here is, is only ever pushed down by
    the softmax: the same as in a reference that has never heard of z_c."""
    untied = random_model(tie_word_embeddings=False)
    batch, _ = batch_of(random_rollouts())
    for loss in (loss_of(alpha=0.0), loss_of(alpha=0.0, z_c_id=35)):
        untied.zero_grad(set_to_none=True)
        grpo.accumulate_gradients(untied, batch, loss, EVERYTHING)
        mine = untied.lm_head.weight.grad[3].clone()
        untied.zero_grad(set_to_none=True)
        slow_loss(untied, batch, loss)[0].backward()
        same(mine, untied.lm_head.weight.grad[3], 1e-5)


@pytest.mark.parametrize("equal_length", [False, True])
def test_each_row_reads_its_own_z_c(model, equal_length):
    """The paper's released code, packing rows without padding, took the NEXT row's first prompt
    token for z_c.  Here every row's value is its own, whatever stands beside it, in rows of
    equal length (packed: no padding between them) and ragged ones."""
    rollouts = random_rollouts(equal_length=equal_length)
    logprobs, logp_zc = grpo.read(model, rollouts, 3, 1.0)
    expected, expected_zc = zip(*(slow_readout(model, r) for r in rollouts))
    same(logprobs, torch.cat(expected).float(), 1e-5)
    own = [z for z in expected_zc if z is not None]
    same(logp_zc, torch.stack(own).float(), 1e-5)
    following = [r.prompt_tokens[0] for r in rollouts[1:]]
    assert 3 not in following and len(own) == 10


def test_entropy_is_that_of_the_response_tokens_at_the_sampling_temperature(model):
    rollouts = random_rollouts()
    _, sums = gradient(model, batch_of(rollouts)[0], loss_of(temperature=0.7), 60)
    entropies = []
    for r in rollouts:
        table = all_logprobs(model, r.prompt_tokens + r.response_tokens, 0.7)
        p = len(r.prompt_tokens)
        read = table[p - 1 : p - 1 + len(r.response_tokens)]
        entropies.append(-(read.exp() * read).sum(-1))
    assert sums.entropy == pytest.approx(torch.cat(entropies).mean().item(), abs=1e-5)


def test_mixed_advantages_use_the_rows_own_r_s():
    """r_s moves with its row: exchange two rows of a group, and only they change places."""
    rollouts = random_rollouts(count=4, truncated=(2,))
    rows = [{"r_v": v, "r_s": s, "finished": f} for v, s, f in
            ((1.0, 0.9, True), (0.0, 0.2, True), (1.0, None, False), (0.0, 0.6, True))]
    one = grpo.make_batch(rollouts, rows, 4, 0.4, 0.1)
    r_s = torch.tensor([[0.9, 0.2, 0.0, 0.6]])
    a_v, a_s = laser.group_advantages(torch.tensor([[1.0, 0, 1, 0]])), laser.group_advantages(r_s)
    assert_close(one.advantages, (0.6 * a_v + 0.4 * a_s)[0])
    assert one.weights.tolist() == pytest.approx([1.5, 0.75, 0, 0.75])
    assert (one.ended, one.tokens) == (3, sum(len(r.response_tokens) for r in rollouts))
    swap = [1, 0, 2, 3]
    two = grpo.make_batch([rollouts[i] for i in swap], [rows[i] for i in swap], 4, 0.4, 0.1)
    assert_close(two.advantages, one.advantages[swap])


def test_all_truncated_is_plain_grpo_without_nan(model):
    rollouts = random_rollouts(truncated=range(12))
    batch, _ = batch_of(rollouts, tau=0.5)
    got, sums = gradient(model, batch, loss_of(), 60)
    assert batch.ended == 0 and sums.self_reward_loss == 0.0 and got.isfinite().all()
    assert torch.equal(got, gradient(model, batch, loss_of(alpha=0.0), 60)[0])


def test_nothing_to_learn_is_exactly_zero(model):
    """Every group all right, and no loss on r_s: not a small gradient, none."""
    rollouts = random_rollouts(truncated=())
    rows = [{"r_v": 1.0, "r_s": 0.5, "finished": r.finished} for r in rollouts]
    batch = grpo.make_batch(rollouts, rows, G, 0.5, 0.1)
    assert not batch.advantages.any()
    assert not gradient(model, batch, loss_of(alpha=0.0))[0].any()


def test_self_reward_loss_learns_both_answers():
    """Fifty steps on one batch: r_s goes to 1 on right solutions and 0 on wrong ones."""
    model = random_model()
    batch, _ = batch_of(random_rollouts())
    batch.advantages.zero_()
    optimizer = grpo.Optimizer(model, lr=1e-2, weight_decay=0.0)
    for _ in range(50):
        sums, _, _ = grpo.update(model, optimizer, batch, loss_of(alpha=1.0), EVERYTHING, 1.0)
    assert sums.self_reward_loss < 0.01
    _, logp_zc = grpo.read(model, batch.rollouts, 3, 1.0)
    r_s = laser.self_reward(logp_zc.detach(), C_REF, BETA_V)
    assert ((r_s > 0.5) == (batch.r_v[batch.finished] > 0.5)).all()


# ---------------------------------------------------------------- updates


@pytest.mark.parametrize("updates", [1, 3])
def test_updates_equal_a_slow_loop(updates):
    """Several optimizer steps on one batch: the old log-probs stay those of the sampling model,
    so from the second step on the ratio is not 1 and the clip acts."""
    model = random_model()
    slow = copy.deepcopy(model)
    batch, _ = batch_of(random_rollouts(), tau=0.3)
    for rollout in batch.rollouts:
        rollout.logprobs = slow_readout(model, rollout)[0].tolist()
    loss, clip = loss_of(), 0.4
    optimizer = grpo.Optimizer(model, lr=0.01, weight_decay=0.01)
    sums, norm, skipped = grpo.update(model, optimizer, batch, loss, 60, clip, updates)

    adam = torch.optim.AdamW(slow.parameters(), lr=0.01, weight_decay=0.01)
    old = {i: slow_readout(slow, r)[0].detach() for i, r in enumerate(batch.rollouts)}
    for _ in range(updates):
        adam.zero_grad()
        policy, error = slow_loss(slow, batch, loss, old)
        (policy + loss.alpha * error).backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(slow.parameters(), clip)
        adam.step()
    assert skipped == 0 and norm == pytest.approx(expected_norm.item(), rel=1e-3) and norm > clip
    assert sums.policy_loss == pytest.approx(policy.item(), rel=1e-3, abs=1e-5)
    assert (sums.clip_fraction > 0) == (sums.approx_kl > 1e-4) == (updates > 1)
    # the gap is that of the sampler's numbers, not how far the policy has moved since
    assert sums.sampler_gap < 1e-4
    for mine, theirs in zip(model.parameters(), slow.parameters()):
        # Adam divides by tiny second moments: the share of a step is what counts
        assert_close(mine, theirs, atol=2e-4, rtol=1e-3)


def test_non_finite_gradient_is_skipped():
    model = random_model()
    batch, _ = batch_of(random_rollouts())
    optimizer = grpo.Optimizer(model, lr=0.01, weight_decay=0.1)
    grpo.update(model, optimizer, batch, loss_of(), EVERYTHING, 1.0)
    before = copy.deepcopy(list(model.parameters()))
    state = copy.deepcopy(optimizer.state())
    sound = batch.advantages.clone()
    batch.advantages[0] = math.inf
    _, norm, skipped = grpo.update(model, optimizer, batch, loss_of(), 60, 1.0, updates=2)
    assert skipped == 2 and not math.isfinite(norm)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(torch.equal(state[k], v) for k, v in optimizer.state().items())
    assert all(p.grad is None for p in model.parameters())
    # the bad batch has left nothing behind: the next one counts as if it had never been
    batch.advantages[:] = sound
    _, norm, skipped = grpo.update(model, optimizer, batch, loss_of(), 60, 1.0)
    assert skipped == 0 and math.isfinite(norm)
    assert not any(map(torch.equal, before, model.parameters()))


def test_sampler_gap_of_real_rollouts():
    model = random_model()
    rollouts = generate(model, TOKENIZER, ["abc", "d1"], n=G, max_new_tokens=10, temperature=0.8)
    batch, _ = batch_of(rollouts)
    _, sums = gradient(model, batch, loss_of(temperature=0.8), 40)
    assert 0 < sums.sampler_gap < 1e-4
    # with the wrong temperature the gap shows it
    assert gradient(model, batch, loss_of(temperature=1.0), 40)[1].sampler_gap > 0.01


# ---------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_round_trip_is_bit_equal(dtype, offload):
    """Saved after two steps and taken up by another process: the third step is the same."""
    model = random_model().to(dtype)
    batch, _ = batch_of(random_rollouts())
    optimizer = grpo.Optimizer(model, lr=3e-3, weight_decay=0.01, offload=offload)
    step = lambda m, o: grpo.update(m, o, batch, loss_of(), 60, 1.0)  # noqa: E731
    step(model, optimizer), step(model, optimizer)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    twin = random_model(seed=1).to(dtype)
    twin.load_state_dict(model.state_dict())
    resumed = grpo.Optimizer(twin, lr=3e-3, weight_decay=0.01, offload=offload)
    resumed.load_state(saved)
    assert all(torch.equal(saved[k], v) for k, v in resumed.state().items())
    step(model, optimizer), step(twin, resumed)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert all(torch.equal(v, resumed.state()[k]) for k, v in optimizer.state().items())
    # what was loaded was copied: going on did not change the saved tensors
    assert all((saved[k] == 2).all() for k in saved if k.endswith(".step"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_saved_on_the_cpu_resumes_on_a_gpu():
    model, batch = random_model().cuda(), batch_of(random_rollouts())[0]
    optimizer = grpo.Optimizer(model, 1e-3, 0.0)
    grpo.update(model, optimizer, batch, loss_of(), EVERYTHING, 1.0)
    optimizer.load_state({name: tensor.cpu() for name, tensor in optimizer.state().items()})
    assert all(tensor.is_cuda for tensor in optimizer.state().values())
    assert grpo.update(model, optimizer, batch, loss_of(), EVERYTHING, 1.0)[2] == 0


def test_state_before_the_first_step_round_trips():
    model = random_model()
    batch, _ = batch_of(random_rollouts())
    fresh = grpo.Optimizer(model, 1e-3, 0.0)
    resumed = grpo.Optimizer(model, 1e-3, 0.0)
    resumed.load_state(fresh.state())  # all updates so far were skipped
    grpo.update(model, resumed, batch, loss_of(), EVERYTHING, 1.0)


def test_state_of_another_model_is_refused():
    batch, _ = batch_of(random_rollouts())
    model = random_model()
    optimizer = grpo.Optimizer(model, 1e-3, 0.0)
    grpo.update(model, optimizer, batch, loss_of(), EVERYTHING, 1.0)
    other = grpo.Optimizer(random_model(hidden_size=48), 1e-3, 0.0)
    with pytest.raises(ValueError, match="shape"):
        other.load_state(optimizer.state())
    deeper = grpo.Optimizer(random_model(num_hidden_layers=3), 1e-3, 0.0)
    with pytest.raises(ValueError, match="layers.2.*missing"):
        deeper.load_state(optimizer.state())


def test_bf16_weights_follow_fp32_masters():
    """At lr 1e-5 a bf16 weight is never moved by one step: each is rounded away.  The master
    adds them up, and the weight follows when they have grown to a bf16 step."""
    model = random_model().bfloat16()
    start = copy.deepcopy(list(model.parameters()))
    optimizer = grpo.Optimizer(model, lr=1e-5, weight_decay=0.0)
    bare = torch.optim.AdamW(copy.deepcopy(start), lr=1e-5, weight_decay=0.0)
    for step in range(100):
        for p, q in zip(model.parameters(), bare.param_groups[0]["params"]):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step(), bare.step(), optimizer.zero_grad()
        if step == 0:
            moved = [(p != s).float().mean() for p, s in zip(model.parameters(), start)]
            assert max(moved) < 0.1
    large = [s.abs() > 0.1 for s in start]  # a bf16 step there is at least 2^-11
    for p, q, master, s, big in zip(
            model.parameters(), bare.param_groups[0]["params"], optimizer.master, start, large):
        assert master.dtype == torch.float32 and p.dtype == torch.bfloat16
        assert_close(master, s.float() - 100 * 1e-5, atol=1e-5, rtol=0)
        assert torch.equal(p, master.bfloat16())
        assert torch.equal(q[big], s[big])  # without masters: nothing, a hundred times
    assert sum((p != s)[big].sum() for p, s, big in zip(model.parameters(), start, large)) > 100


def twenty_steps(dtype, offload=False):
    """(losses, how the masters moved, weights, state) after 20 updates on 20 batches."""
    model = random_model().to(dtype)
    optimizer = grpo.Optimizer(model, lr=1e-4, weight_decay=0.01, offload=offload)
    start = [master.detach().clone() for master in optimizer.master]
    losses = []
    for seed in range(20):
        batch, _ = batch_of(random_rollouts(seed), seed, tau=0.3)
        sums, _, skipped = grpo.update(model, optimizer, batch, loss_of(), 60, 1.0)
        losses.append(sums.policy_loss + 0.5 * sums.self_reward_loss)
        assert not skipped
    moved = torch.cat([(m.detach() - s).flatten() for m, s in zip(optimizer.master, start)])
    return torch.tensor(losses), moved, list(model.parameters()), optimizer.state()


def test_bf16_training_tracks_fp32():
    """bf16 weights and gradients, fp32 masters, moments and losses: over 20 steps no loss is off
    by more than 0.01 (they are about 0.25), and the way that all weights together have gone
    differs from fp32's by less than a tenth of its length.  No loss is scaled for it."""
    losses, moved, _, _ = twenty_steps(torch.bfloat16)
    expected, way, _, _ = twenty_steps(torch.float32)
    assert_close(losses, expected, atol=0.01, rtol=0)
    assert (moved - way).norm() < 0.1 * way.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_changes_no_bit(dtype):
    _, _, weights, state = twenty_steps(dtype)
    _, _, same_weights, same_state = twenty_steps(dtype, offload=True)
    assert all(map(torch.equal, weights, same_weights))
    assert state.keys() == same_state.keys()  # and one's checkpoint is the other's
    assert all(torch.equal(state[name], same_state[name]) for name in state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_takes_the_state_off_the_gpu():
    model, batch = random_model().cuda().bfloat16(), batch_of(random_rollouts())[0]
    optimizer = grpo.Optimizer(model, 1e-3, 0.0, offload=True)
    before = copy.deepcopy(list(model.parameters()))
    assert grpo.update(model, optimizer, batch, loss_of(), EVERYTHING, 1.0)[2] == 0
    assert not any(tensor.is_cuda for tensor in optimizer.state().values())
    assert optimizer.buffer.is_pinned()
    assert not all(map(torch.equal, before, model.parameters()))


def test_float32_model_is_its_own_master():
    model = random_model()
    optimizer = grpo.Optimizer(model, 1e-3, 0.0)
    assert all(m is p for m, p in zip(optimizer.master, model.parameters()))


# ---------------------------------------------------------------- rows, statistics, c_ref


def test_check_fills_the_rows():
    problems = [SimpleNamespace(problem="1", answer="7"), SimpleNamespace(problem="2", answer="8")]
    ids = TOKENIZER.encode_prompt
    rollouts = [
        Rollout(0, ids("1"), ids("ab{7}") + [1], [], logp_zc=-12.0, finished=True),
        Rollout(0, ids("1"), ids("{8}") + [2], [], logp_zc=-17.0, finished=True),
        Rollout(1, ids("2"), ids("{8}{8}") + [1], [], logp_zc=-14.0, finished=True),
        Rollout(1, ids("2"), ids("abc"), []),
    ]
    rows = grpo.check(rollouts, problems, TOKENIZER)
    assert [row["r_v"] for row in rows] == [1.0, 0.0, 1.0, 0.0]
    assert [row["r_s"] for row in rows] == [pytest.approx(0.3), pytest.approx(-0.2),
                                            pytest.approx(0.1), None]
    assert [row["answer"] for row in rows] == ["7", "8", "8", None]
    assert rows[0]["response"] == "ab\\boxed{7}" and rows[0]["response_tokens"] == 6
    # the training reward wants exactly one box
    strict = grpo.check(rollouts, problems, TOKENIZER, strict=True)
    assert [row["r_v"] for row in strict] == [1, 0, 0, 0]
    stats = grpo.statistics(rows, 2)
    assert stats["reward"] == 0.5 and stats["zero_std_groups"] == 0
    assert stats["r_s_correct"] == pytest.approx(0.2) and stats["r_s_wrong"] == pytest.approx(-0.2)
    assert stats["finished_share"] == stats["boxed_share"] == 0.75
    assert stats["response_tokens"] == pytest.approx(20 / 4)


@pytest.mark.parametrize("strict", [False, True])
def test_an_empty_box_is_no_answer(strict):
    rollout = Rollout(0, [3], TOKENIZER.encode_prompt("{}") + [1], [], logp_zc=-12.0, finished=True)
    (row,) = grpo.check([rollout], [SimpleNamespace(problem="1", answer="")], TOKENIZER, strict)
    assert "\\boxed{}" in row["response"] and row["answer"] is None and row["r_v"] == 0


def test_statistics_of_a_hopeless_step():
    row = dict(r_v=0.0, r_s=None, response_tokens=9, finished=False, answer=None)
    stats = grpo.statistics([row] * 4, 2)
    assert stats["r_s_correct"] is stats["r_s_wrong"] is None and stats["zero_std_groups"] == 2


def test_watch_speaks_after_patience():
    watch = grpo.Watch()
    good = dict(zero_std_groups=0, boxed_share=0.5, finished_share=1.0, reward=0.5)
    easy = {**good, "zero_std_groups": 2, "reward": 1.0}
    assert not any(watch.look(m, 2) for m in [easy] * 19 + [good] + [easy] * 19)
    for bad, word in ((dict(finished_share=0, boxed_share=0, zero_std_groups=2), "max-new-tokens"),
                      (dict(boxed_share=0), "boxed"),
                      (dict(zero_std_groups=2), "group-size")):
        watch = grpo.Watch()
        said = [watch.look({**good, **bad}, 2) for _ in range(40)]
        assert [i for i, s in enumerate(said) if s] == [19, 39] and word in said[19][0]


@pytest.mark.parametrize(("reward", "finished", "word"), [
    (1.0, 1.0, "all right: harder"), (0.0, 1.0, "all wrong: easier"),
    (0.5, 1.0, "no problem is of medium difficulty"), (0.0, 0.2, "80% were cut off"),
])  # fmt: skip
def test_watch_names_the_likely_cause_of_groups_without_contrast(reward, finished, word):
    watch = grpo.Watch()
    m = dict(zero_std_groups=2, boxed_share=0.5, finished_share=finished, reward=reward)
    assert word in [watch.look(m, 2) for _ in range(20)][-1][0]


def test_c_ref_is_the_mean_over_finished_solutions(model):
    problems = [SimpleNamespace(problem=p) for p in ("abc", "d1", "7")]
    options = dict(max_new_tokens=12, seed=3)
    mean, std, count, others = grpo.estimate_c_ref(
        model, TOKENIZER, problems, pairs=40, **options
    )
    rollouts = generate(model, TOKENIZER, [p.problem for p in problems], n=14, **options)
    picked = [r for r in rollouts if r.finished][:40]
    values = torch.tensor([r.logp_zc for r in picked])
    assert len(picked) == count > 5 and mean == pytest.approx(values.mean().item(), abs=1e-5)
    assert std == pytest.approx(values.std().item(), abs=1e-5)
    assert [o[2] for o in others] == sorted(o[2] for o in others)
    for token, other_mean, other_std in others:
        values = torch.stack([slow_readout(model, r, int(token[1:-1]))[1] for r in picked])
        assert other_mean == pytest.approx(values.mean().item(), abs=1e-5)
        assert other_std == pytest.approx(values.std().item(), abs=1e-5)
    assert {token for token, _, _ in others} == {"<0>", "<36>"}


def test_c_ref_needs_an_end():
    model = random_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[[1, 2]] = 0.0  # logit 0 beside one of plus or minus hundreds
        model.lm_head.weight[4] = 100.0 * torch.sign(model.lm_head.weight[4])
        model.lm_head.weight[5] = -model.lm_head.weight[4]
    with pytest.raises(ValueError, match="max-new-tokens"):
        grpo.estimate_c_ref(model, TOKENIZER, [SimpleNamespace(problem="abc")], 10,
                            max_new_tokens=5)
