"""The batched update against a slow, obvious one: a loop over rows and tokens, full logits."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from nanolaser import grpo, laser, log, scoring
from nanolaser import reward as reward_module
from nanolaser.reward import boxed_answer, judge, judged_rows
from nanolaser.rollout import Rollout
from nanolaser.sampler import generate
from tests.core import (
    BETA_V, C_REF, FakeTokenizer, all_logprobs, make_batch, random_model, random_rollouts,
    read, slow_readout, update)

TOKENIZER = FakeTokenizer()
G = 4
EVERYTHING = 10**6  # a token budget that holds any batch
BUDGETS = [1, 30, 60, EVERYTHING]  # one row at a time, few, some, all


def batch_of(rollouts, seed=0, tau=0.0):
    """A batch with random verdicts and random r_s, to steer tau."""
    g = torch.Generator().manual_seed(seed)
    r_v = (torch.rand(len(rollouts), generator=g) < 0.5).float().tolist()
    r_s = torch.rand(len(rollouts), generator=g).tolist()
    for r, v, x in zip(rollouts, r_v, r_s):
        r.r_v, r.r_s = v, x if r.finished else None
    return make_batch(rollouts, G, tau)


def loss_of(**changes):
    usual = dict(alpha=0.5, beta_v=BETA_V, c_ref=C_REF, z_c_id=TOKENIZER.z_c_id)
    return grpo.Loss(**{**usual, **changes})


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradient(model, batch, loss, budget=EVERYTHING, old=None):
    model.zero_grad(set_to_none=True)
    sums = grpo.accumulate_gradients(
        model, batch.rollouts, batch.advantages, batch.weights, loss, budget, old)
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
            judged.append((logp_zc, rollout.r_v))
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
    batch = batch_of(random_rollouts(), tau=0.3)
    loss = loss_of(temperature=temperature)
    got, sums = gradient(model, batch, loss, 60)
    expected, policy, error = slow_gradient(model, batch, loss)
    same(got, expected, 5e-6)
    assert sums["policy_loss"] == pytest.approx(policy, abs=1e-6)
    assert sums["self_reward_loss"] == pytest.approx(error, rel=1e-5)
    assert sums["clip_fraction"] == 0 and sums["approx_kl"] == 0


def test_alpha_and_tau_zero_is_grpo_exactly(model):
    """Neither c_ref, beta_v, z_c nor r_s has a say: bit for bit, and equal to plain GRPO."""
    rollouts = random_rollouts()
    batch = batch_of(rollouts, tau=0.0)
    r_v = torch.tensor([r.r_v for r in rollouts]).view(-1, G)
    assert torch.equal(batch.advantages.view(-1, G), laser.group_advantages(r_v))
    got, sums = gradient(model, batch, loss_of(alpha=0.0))
    same(got, slow_gradient(model, batch, loss_of(alpha=0.0))[0], 5e-6)
    assert sums["self_reward_loss"] == 0
    for r in rollouts:
        r.r_s = None
    deaf = make_batch(rollouts, G)
    other, _ = gradient(model, deaf, loss_of(alpha=0.0, c_ref=math.nan, beta_v=9.0, z_c_id=30))
    assert torch.equal(got, other)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_gradient_is_the_same_for_any_micro_batches(model, alpha):
    batch = batch_of(random_rollouts(count=24), tau=0.3)
    whole, sums = gradient(model, batch, loss_of(alpha=alpha))
    for budget in BUDGETS[:-1]:
        cut, cut_sums = gradient(model, batch, loss_of(alpha=alpha), budget)
        same(cut, whole)
        for name in ("policy_loss", "self_reward_loss", "entropy", "sampler_gap"):
            assert cut_sums[name] == pytest.approx(sums[name], rel=1e-4, abs=1e-6)
        assert 0 <= cut_sums["padding_share"] <= sums["padding_share"] < 1


def test_gradient_is_the_same_for_any_order_of_rows(model):
    batch = batch_of(random_rollouts(count=16), tau=0.3)
    whole, _ = gradient(model, batch, loss_of(), 60)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4))
    shuffled = SimpleNamespace(rollouts=[batch.rollouts[i] for i in order],
                               advantages=batch.advantages[order], weights=batch.weights[order])
    same(gradient(model, shuffled, loss_of(), 60)[0], whole)


def test_activation_checkpointing_changes_nothing():
    model = random_model()
    batch = batch_of(random_rollouts())
    whole, _ = gradient(model, batch, loss_of())
    model.gradient_checkpointing = True
    same(gradient(model, batch, loss_of())[0], whole)


# ---------------------------------------------------------------- what is left out


def computed(model, batch, loss, budget=EVERYTHING):
    """(gradient, statistics, tokens that went through the model)"""
    tokens = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, out: tokens.append(inputs[0].numel()))
    try:
        return *gradient(model, batch, loss, budget), sum(tokens)
    finally:
        hook.remove()


def test_a_prompt_is_computed_once_for_its_group(model):
    batch = batch_of(random_rollouts())
    responses = sum(len(r.response_tokens) for r in batch.rollouts)
    batch.advantages[:] = torch.arange(12) - 5.5
    prompts = sum(len(r.prompt_tokens) for r in batch.rollouts[::G])
    assert computed(model, batch, loss_of())[2] == prompts + responses
    every = sum(len(r.prompt_tokens) for r in batch.rollouts)
    assert computed(model, batch, loss_of(), budget=1)[2] == every + responses


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_rows_without_a_gradient_are_left_out_and_nobody_misses_them(model, alpha):
    """One group of three has no advantage (and one of its rows no end): the gradient is that of all
    rows, computed at length; the counts that divide are the batch's."""
    batch = batch_of(random_rollouts(truncated=(2, 5, 7)))
    batch.advantages[4:8] = 0.0
    batch.advantages[:4] = torch.tensor([0.5, -0.5, 1.0, -1.0])
    got, sums, tokens = computed(model, batch, loss_of(alpha=alpha), 60)
    expected, policy, error = slow_gradient(model, batch, loss_of(alpha=alpha))
    same(got, expected, 5e-6)
    assert sums["policy_loss"] == pytest.approx(policy, abs=1e-6)
    assert sums["loss"] == pytest.approx(policy + alpha * error, rel=1e-5)
    kept = [i for i in range(12) if not 4 <= i < 8 or alpha and i in (4, 6)]
    rest = SimpleNamespace(rollouts=[batch.rollouts[i] for i in kept],
                           advantages=batch.advantages[kept], weights=batch.weights[kept])
    assert tokens == computed(model, rest, loss_of(alpha=alpha), 60)[2]
    # what the rows left out have no part in is said of the others
    assert sums["entropy"] == pytest.approx(
        computed(model, rest, loss_of(alpha=alpha), 60)[1]["entropy"], rel=1e-5)
    assert (sums["zc_gap"] is None) == (alpha == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_learn_is_a_step_with_a_gradient_of_zero(dtype):
    """Every group all right, no loss on r_s: nothing is computed, moments fade, weights decay."""
    model = random_model().to(dtype)
    rollouts = random_rollouts(truncated=())
    batch = batch_of(rollouts)
    optimizer = grpo.Optimizer(model, lr=0.01, weight_decay=0.1)
    update(model, optimizer, batch, loss_of(), EVERYTHING, 1.0)  # there are moments now
    state = optimizer.state()
    twin = [torch.nn.Parameter(m.detach().clone()) for m in optimizer.master]
    adam = torch.optim.AdamW(twin, lr=0.01, weight_decay=0.1, fused=True)
    for name, p in zip(optimizer.names, twin):
        keys = ("step", "exp_avg", "exp_avg_sq")
        adam.state[p] = {key: state[f"{name}.{key}"].clone() for key in keys}
        p.grad = torch.zeros_like(p)
    adam.step()
    for r in rollouts:
        r.r_v, r.r_s = 1.0, 0.5
    batch = make_batch(rollouts, G, tau=0.5)
    assert not batch.advantages.any()
    sums = update(model, optimizer, batch, loss_of(alpha=0.0), EVERYTHING, 1.0, updates=1)
    assert sums["grad_norm"] == sums["loss"] == sums["skipped_updates"] == 0
    assert sums["entropy"] is sums["sampler_gap"] is None
    assert all(map(torch.equal, optimizer.master, twin))


# ---------------------------------------------------------------- the end of a solution


@pytest.mark.parametrize("stop", FakeTokenizer.stop_ids + (0,))
def test_the_stop_token_has_a_gradient(model, stop):
    """Also where the stop token is the padding id (0): an end that is learned from must never
    be inferred from an id.  Two rows, one token each: the only gradient there is."""
    rollouts = [Rollout(0, [5, 6], [stop], [0.0], finished=True, r_v=1.0, logp_zc=-9.0),
                Rollout(0, [5, 6], [9], [0.0], finished=False, r_v=0.0)]
    batch = make_batch(rollouts, 2)
    assert batch.advantages[0] > 0 > batch.advantages[1]
    got, _ = gradient(model, batch, loss_of(alpha=0.0))
    same(got, slow_gradient(model, batch, loss_of(alpha=0.0))[0], 5e-6)
    batch.advantages[1] = 0.0  # the stop token alone
    alone, _ = gradient(model, batch, loss_of(alpha=0.0))
    assert alone.abs().max() > 1e-3


def test_z_c_lies_outside_the_response():
    """It is read once for each finished row, at the stop token and at temperature 1; a response
    token is read one before it stands."""
    rollouts = random_rollouts()
    texts = [range(100 * i, 100 * i + len(r.prompt_tokens) + len(r.response_tokens))
             for i, r in enumerate(rollouts)]  # fmt: skip
    for r in rollouts:
        r.r_v = 0.0
    rows = [(r, 0.5, float(r.finished), -15.0, None) for r in rollouts]
    t = grpo.targets(rows, texts, loss_of(temperature=0.7), torch.device("cpu"))
    ends = t.weight > 0
    assert ends.sum() == sum(r.finished for r in rollouts)
    assert t.token[ends].eq(TOKENIZER.z_c_id).all() and t.temperature[ends].eq(1).all()
    assert not t.advantage[ends].any() and t.advantage[~ends].eq(0.5).all()
    assert t.temperature[~ends].eq(0.7).all()
    assert t.token[~ends].tolist() == [y for r in rollouts for y in r.response_tokens]
    for place, token, end in zip(t.place.tolist(), t.token.tolist(), ends.tolist()):
        row, position = divmod(place, 100)
        text = rollouts[row].prompt_tokens + rollouts[row].response_tokens
        if end:
            assert position == len(text) - 1 and text[position] in TOKENIZER.stop_ids
        else:
            assert text[position + 1] == token


def test_z_c_gets_no_policy_gradient(model):
    """With alpha = 0 the output row of z_c, which no token here is, is only ever pushed down by
    the softmax: the same as in a reference that has never heard of z_c."""
    untied = random_model(tie_word_embeddings=False)
    batch = batch_of(random_rollouts())
    for loss in (loss_of(alpha=0.0), loss_of(alpha=0.0, z_c_id=35)):
        untied.zero_grad(set_to_none=True)
        grpo.accumulate_gradients(
            untied, batch.rollouts, batch.advantages, batch.weights, loss, EVERYTHING)
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
    logprobs, logp_zc = read(model, rollouts)
    expected, expected_zc = zip(*(slow_readout(model, r) for r in rollouts))
    same(logprobs, torch.cat(expected).float(), 1e-5)
    own = [z for z in expected_zc if z is not None]
    same(logp_zc, torch.stack(own).float(), 1e-5)
    following = [r.prompt_tokens[0] for r in rollouts[1:]]
    assert 3 not in following and len(own) == 10


def test_entropy_is_that_of_the_response_tokens_at_the_sampling_temperature(model):
    rollouts = random_rollouts()
    _, sums = gradient(model, batch_of(rollouts), loss_of(temperature=0.7), 60)
    entropies = []
    for r in rollouts:
        table = all_logprobs(model, r.prompt_tokens + r.response_tokens, 0.7)
        p = len(r.prompt_tokens)
        read = table[p - 1 : p - 1 + len(r.response_tokens)]
        entropies.append(-(read.exp() * read).sum(-1))
    assert sums["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), abs=1e-5)


def test_mixed_advantages_use_the_rows_own_r_s():
    """r_s moves with its row: exchange two rows of a group, and only they change places."""
    rollouts = random_rollouts(count=4, truncated=(2,))
    for r, v, x in zip(rollouts, (1.0, 0.0, 1.0, 0.0), (0.9, 0.2, None, 0.6)):
        r.r_v, r.r_s = v, x
    one = make_batch(rollouts, 4, tau=0.4)
    r_s = torch.tensor([[0.9, 0.2, 0.0, 0.6]])
    a_v, a_s = laser.group_advantages(torch.tensor([[1.0, 0, 1, 0]])), laser.group_advantages(r_s)
    assert_close(one.advantages, (0.6 * a_v + 0.4 * a_s)[0])
    assert one.weights.tolist() == pytest.approx([1.5, 0.75, 0, 0.75])
    swap = [1, 0, 2, 3]
    two = make_batch([rollouts[i] for i in swap], 4, tau=0.4)
    assert_close(two.advantages, one.advantages[swap])


def test_all_truncated_is_plain_grpo_without_nan(model):
    rollouts = random_rollouts(truncated=range(12))
    batch = batch_of(rollouts, tau=0.5)
    got, sums = gradient(model, batch, loss_of(), 60)
    assert sums["self_reward_loss"] == 0.0 and got.isfinite().all()
    assert torch.equal(got, gradient(model, batch, loss_of(alpha=0.0), 60)[0])


def test_self_reward_loss_learns_both_answers():
    """Fifty steps on one batch: r_s goes to 1 on right solutions and 0 on wrong ones."""
    model = random_model()
    batch = batch_of(random_rollouts())
    batch.advantages.zero_()
    optimizer = grpo.Optimizer(model, lr=1e-2, weight_decay=0.0)
    for _ in range(50):
        sums = update(model, optimizer, batch, loss_of(alpha=1.0), EVERYTHING, 1.0)
    assert sums["self_reward_loss"] < 0.01
    _, logp_zc = read(model, batch.rollouts)
    r_s = laser.self_reward(logp_zc.detach(), C_REF, BETA_V)
    assert (r_s > 0.5).tolist() == [r.r_v > 0.5 for r in batch.rollouts if r.finished]


# ---------------------------------------------------------------- updates


@pytest.mark.parametrize("updates", [1, 3])
def test_updates_equal_a_slow_loop(updates):
    """Several optimizer steps on one batch: the old log-probs stay those of the sampling model,
    so from the second step on the ratio is not 1 and the clip acts."""
    model = random_model()
    slow = copy.deepcopy(model)
    batch = batch_of(random_rollouts(), tau=0.3)
    for rollout in batch.rollouts:
        rollout.logprobs = slow_readout(model, rollout)[0].tolist()
    loss, clip = loss_of(), 0.4
    optimizer = grpo.Optimizer(model, lr=0.01, weight_decay=0.01)
    sums = update(model, optimizer, batch, loss, 60, clip, updates)

    adam = torch.optim.AdamW(slow.parameters(), lr=0.01, weight_decay=0.01)
    old = {i: slow_readout(slow, r)[0].detach() for i, r in enumerate(batch.rollouts)}
    for _ in range(updates):
        adam.zero_grad()
        policy, error = slow_loss(slow, batch, loss, old)
        (policy + loss.alpha * error).backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(slow.parameters(), clip)
        adam.step()
    norm = sums["grad_norm"]
    assert sums["skipped_updates"] == 0 and norm > clip
    assert norm == pytest.approx(expected_norm.item(), rel=1e-3)
    assert sums["policy_loss"] == pytest.approx(policy.item(), rel=1e-3, abs=1e-5)
    assert (sums["clip_fraction"] > 0) == (sums["approx_kl"] > 1e-4) == (updates > 1)
    # the gap is that of the sampler's numbers, not how far the policy has moved since
    assert sums["sampler_gap"] < 1e-4
    for mine, theirs in zip(model.parameters(), slow.parameters()):
        # Adam divides by tiny second moments: the share of a step is what counts
        assert_close(mine, theirs, atol=2e-4, rtol=1e-3)


def test_non_finite_gradient_is_skipped():
    model = random_model()
    batch = batch_of(random_rollouts())
    optimizer = grpo.Optimizer(model, lr=0.01, weight_decay=0.1)
    update(model, optimizer, batch, loss_of(), EVERYTHING, 1.0)
    before = copy.deepcopy(list(model.parameters()))
    state = copy.deepcopy(optimizer.state())
    sound = batch.advantages.clone()
    batch.advantages[0] = math.inf
    sums = update(model, optimizer, batch, loss_of(), 60, 1.0, updates=2)
    assert sums["skipped_updates"] == 2 and not math.isfinite(sums["grad_norm"])
    assert all(map(torch.equal, before, model.parameters()))
    assert all(torch.equal(state[k], v) for k, v in optimizer.state().items())
    assert all(p.grad is None for p in model.parameters())
    # the bad batch has left nothing behind: the next one counts as if it had never been
    batch.advantages[:] = sound
    sums = update(model, optimizer, batch, loss_of(), 60, 1.0)
    assert sums["skipped_updates"] == 0 and math.isfinite(sums["grad_norm"])
    assert not any(map(torch.equal, before, model.parameters()))


def test_sampler_gap_of_real_rollouts():
    model = random_model()
    rollouts = generate(model, TOKENIZER, ["abc", "d1"], n=G, max_new_tokens=10, temperature=0.8)
    batch = batch_of(rollouts)
    sums = gradient(model, batch, loss_of(temperature=0.8), 40)[1]
    assert 0 < sums["sampler_gap"] < 1e-4
    # with the wrong temperature the gap shows it
    assert gradient(model, batch, loss_of(temperature=1.0), 40)[1]["sampler_gap"] > 0.01


# ---------------------------------------------------------------- what the optimizer adds


def twenty_steps(dtype, offload=False):
    """(losses, how the masters moved, weights, state) after 20 updates on 20 batches."""
    model = random_model().to(dtype)
    optimizer = grpo.Optimizer(model, lr=1e-4, weight_decay=0.01, offload=offload)
    start = [master.detach().clone() for master in optimizer.master]
    losses = []
    for seed in range(20):
        batch = batch_of(random_rollouts(seed), seed, tau=0.3)
        sums = update(model, optimizer, batch, loss_of(), 60, 1.0)
        losses.append(sums["policy_loss"] + 0.5 * sums["self_reward_loss"])
        assert not sums["skipped_updates"]
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


# ---------------------------------------------------------------- rows, statistics, c_ref


def test_judging_fills_in_answers_and_rewards():
    problems = [SimpleNamespace(problem="1", answer="7"), SimpleNamespace(problem="2", answer="8")]
    ids = TOKENIZER.encode_prompt
    rollouts = [
        Rollout(0, ids("1"), ids("ab{7}") + [1], [], logp_zc=-12.0, finished=True),
        Rollout(0, ids("1"), ids("{8}") + [2], [], logp_zc=-17.0, finished=True),
        Rollout(1, ids("2"), ids("{8}{8}") + [1], [], logp_zc=-14.0, finished=True),
        Rollout(1, ids("2"), ids("abc"), []),
    ]
    rows = judged_rows(rollouts, problems, TOKENIZER)
    assert [row["r_v"] for row in rows] == [1.0, 0.0, 1.0, 0.0]
    assert [row["r_s"] for row in rows] == [pytest.approx(0.3), pytest.approx(-0.2),
                                            pytest.approx(0.1), None]
    assert [row["answer"] for row in rows] == ["7", "8", "8", None]
    assert rows[0]["response"] == "ab\\boxed{7}" and rows[0]["response_tokens"] == 6
    stats = log.statistics(rollouts, 2)
    assert stats["reward"] == 0.5 and stats["zero_std_groups"] == 0
    assert stats["r_s_correct"] == pytest.approx(0.2) and stats["r_s_wrong"] == pytest.approx(-0.2)
    assert stats["finished_share"] == stats["boxed_share"] == 0.75
    assert stats["response_tokens"] == pytest.approx(20 / 4) and stats["checker_errors"] == 0
    # the training reward wants exactly one box
    judge(rollouts, problems, TOKENIZER, gate="box")
    assert [r.r_v for r in rollouts] == [1, 0, 0, 0]


@pytest.mark.parametrize("gate", [None, "box"])
def test_an_empty_box_is_no_answer(gate):
    rollout = Rollout(0, [3], TOKENIZER.encode_prompt("{}") + [1], [], logp_zc=-12.0, finished=True)
    judge([rollout], [SimpleNamespace(problem="1", answer="")], TOKENIZER, gate)
    assert "\\boxed{}" in rollout.response and rollout.answer is None and rollout.r_v == 0


@pytest.mark.parametrize(("response", "answer"), [
    ("hm</think><answer>\\boxed{7}</answer>", "7"),
    ("\\boxed{3}</think> <answer>so \\boxed{7}</answer>", "7"),  # boxes are not counted
    ("\\boxed{7}", None),
    ("hm</think><answer>7</answer>", None),
    ("hm</think></think><answer>\\boxed{7}</answer>", None),
    ("<answer>\\boxed{7}</answer>hm</think>", None),
    ("hm</think><answer>\\boxed{7}</answer> and more", None),
])  # fmt: skip
def test_the_gate_of_prompts_that_ask_for_tags(response, answer):
    assert boxed_answer(response, "tags") == answer


def test_a_checker_that_raises_costs_one_reward_and_not_the_run(monkeypatch):
    def fails(answer, gold):
        raise RecursionError("too deep")

    monkeypatch.setattr(reward_module, "is_equivalent", fails)
    ids = TOKENIZER.encode_prompt
    rollouts = [Rollout(0, ids("1"), ids("{7}") + [1], logp_zc=-12.0, finished=True),
                Rollout(0, ids("1"), ids("abc") + [1], logp_zc=-12.0, finished=True)]
    judge(rollouts, [SimpleNamespace(problem="1", answer="7")], TOKENIZER)
    assert [r.r_v for r in rollouts] == [0, 0] and "too deep" in rollouts[0].checker_error
    assert log.statistics(rollouts, 2)["checker_errors"] == 1


def test_statistics_of_a_hopeless_step():
    rollouts = [Rollout(0, [4], [5], [0.0], r_v=0.0) for _ in range(4)]
    stats = log.statistics(rollouts, 2)
    assert stats["r_s_correct"] is stats["r_s_wrong"] is None and stats["zero_std_groups"] == 2


def test_watch_speaks_after_patience():
    watch = log.Watch()
    good = dict(zero_std_groups=0, boxed_share=0.5, finished_share=1.0, reward=0.5)
    easy = {**good, "zero_std_groups": 2, "reward": 1.0}
    assert not any(watch.look(m, 2) for m in [easy] * 19 + [good] + [easy] * 19)
    for bad, word in ((dict(finished_share=0, boxed_share=0, zero_std_groups=2), "max-new-tokens"),
                      (dict(boxed_share=0), "boxed"),
                      (dict(zero_std_groups=2), "group-size")):
        watch = log.Watch()
        said = [watch.look({**good, **bad}, 2) for _ in range(40)]
        assert [i for i, s in enumerate(said) if s] == [19, 39] and word in said[19][0]


@pytest.mark.parametrize(("reward", "finished", "word"), [
    (1.0, 1.0, "all right: harder"), (0.0, 1.0, "all wrong: easier"),
    (0.5, 1.0, "no problem is of medium difficulty"), (0.0, 0.2, "80% were cut off"),
])  # fmt: skip
def test_watch_names_the_likely_cause_of_groups_without_contrast(reward, finished, word):
    watch = log.Watch()
    m = dict(zero_std_groups=2, boxed_share=0.5, finished_share=finished, reward=reward)
    assert word in [watch.look(m, 2) for _ in range(20)][-1][0]


def test_c_ref_is_the_mean_over_finished_solutions(model):
    problems = [SimpleNamespace(problem=p) for p in ("abc", "d1", "7")]
    options = dict(max_new_tokens=12, seed=3)
    c = scoring.estimate(model, TOKENIZER, problems, pairs=40, **options)
    rollouts = generate(model, TOKENIZER, [p.problem for p in problems], n=14, **options)
    picked = [r for r in rollouts if r.finished][:40]
    values = torch.tensor([r.logp_zc for r in picked])
    assert len(picked) == c.count > 5 and c.mean == pytest.approx(values.mean().item(), abs=1e-5)
    assert c.std == pytest.approx(values.std().item(), abs=1e-5)
    assert [o[2] for o in c.others] == sorted(o[2] for o in c.others)
    for token, other_mean, other_std in c.others:
        values = torch.stack([slow_readout(model, r, int(token[1:-1]))[1] for r in picked])
        assert other_mean == pytest.approx(values.mean().item(), abs=1e-5)
        assert other_std == pytest.approx(values.std().item(), abs=1e-5)
    assert {token for token, _, _ in c.others} == {"<0>", "<36>"}


def test_c_ref_needs_an_end():
    model = random_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[[1, 2]] = 0.0  # logit 0 beside one of plus or minus hundreds
        model.lm_head.weight[4] = 100.0 * torch.sign(model.lm_head.weight[4])
        model.lm_head.weight[5] = -model.lm_head.weight[4]
    with pytest.raises(ValueError, match="max-new-tokens"):
        scoring.estimate(model, TOKENIZER, [SimpleNamespace(problem="abc")], 10,
                            max_new_tokens=5)
