"""Every equation on five numbers worked out by hand, and the corners where groups degenerate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from nanolaser import laser

NAN = float("nan")


def near(value, expected, atol=2e-6):
    assert_close(value, tensor(expected), atol=atol, rtol=0)


# ---------------------------------------------------------------- the self-reward and its loss


def test_self_reward_by_hand():
    # beta_v 0.1, c_ref -23: ten nats above the reference are a whole 1
    logp = tensor([-23.0, -18.0, -13.0, -12.0, -28.0])
    near(laser.self_reward(logp, -23.0, 0.1), [0.0, 0.5, 1.0, 1.1, -0.5])
    assert laser.self_reward(-18.0, -23.0, 0.1) == pytest.approx(0.5)  # plain numbers too


def test_class_weights_by_hand():
    r_v = tensor([1.0, 0, 0, 0, 1.0])
    finished = tensor([True, True, True, True, False])
    # N_c = 1, N_i = 3 (the truncated right one does not count): 4/2 and 4/6
    weights = laser.class_weights(r_v, finished)
    near(weights, [2.0, 2 / 3, 2 / 3, 2 / 3, 0.0])
    assert weights[:1].sum() == pytest.approx(weights[1:4].sum())  # both classes, the same say
    assert weights.sum() == pytest.approx(4)  # and a mean weight of one


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_class_weights_with_an_empty_class(value):
    weights = laser.class_weights(torch.full((5,), value), torch.ones(5, dtype=torch.bool))
    near(weights, [0.5] * 5)  # the paper's formula: N / (2 N)


def test_class_weights_when_all_are_truncated():
    none = torch.zeros(5, dtype=torch.bool)
    assert laser.class_weights(tensor([1.0, 0, 0, 1, 0]), none).tolist() == [0.0] * 5


def test_self_reward_loss_and_gradient_by_hand():
    # r_s = 1, .5, 0, 1.1 (not clipped), none;  w (r_s - r_v)^2 = 0, .125, 1, 1.21, none
    logp = tensor([-13.0, -18.0, -23.0, -12.0, NAN], requires_grad=True)
    r_v, weights = tensor([1.0, 0, 1, 0, 1]), tensor([2.0, 0.5, 1, 1, 0])
    loss = laser.self_reward_loss(logp, r_v, weights, -23.0, 0.1)
    near(loss.detach(), 2.335)
    loss.backward()
    # 2 w (r_s - r_v) beta_v; the row without an end gets none, and passes no nan on
    near(logp.grad, [0.0, 0.05, -0.2, 0.22, 0.0])


@pytest.mark.parametrize(
    "kind, expected",
    [("bce", 2 * math.log(4) - 0.5 * math.log(0.75)), ("sft", 2.5 * math.log(4))])
def test_ablation_losses_by_hand(kind, expected):
    logp = tensor([math.log(0.25)] * 2 + [NAN], requires_grad=True)
    r_v, weights = tensor([1.0, 0, 1]), tensor([2.0, 0.5, 0])
    loss = laser.self_reward_loss(logp, r_v, weights, -23.0, 0.1, kind)
    near(loss.detach(), expected)
    loss.backward()
    # bce: -w on right ones, w pi / (1 - pi) on wrong ones.  sft: -w on both, for the log-prob is
    # then that of the token that each is to imitate
    near(logp.grad, [-2.0, 0.5 * 0.25 / 0.75 if kind == "bce" else -0.5, 0.0])


@pytest.mark.parametrize("kind", ["bce", "sft"])
def test_what_bce_and_sft_teach_is_a_probability(kind):
    """A readout that they have taught perfectly: pi(z_c) is 0.99 after right solutions and 0.01
    after wrong ones.  On the scale of mse both would be far above 0.5."""
    logp = tensor([math.log(0.99), math.log(0.01)])
    near(laser.self_reward(logp, -23.0, 0.1, kind), [0.99, 0.01])
    assert laser.self_reward(math.log(0.5), -23.0, 0.1, kind) == pytest.approx(0.5)
    assert (laser.self_reward(logp, -23.0, 0.1) > 0.5).all()


def test_bce_stays_finite_at_both_ends():
    logp = tensor([0.0, -200.0], requires_grad=True)
    laser.self_reward_loss(logp, tensor([0.0, 1.0]), torch.ones(2), 0.0, 0.1, "bce").backward()
    assert logp.grad.isfinite().all()


def test_no_finished_row_means_no_loss_and_no_nan():
    logp = torch.full((5,), NAN, requires_grad=True)
    weights = laser.class_weights(torch.ones(5), torch.zeros(5, dtype=torch.bool))
    loss = laser.self_reward_loss(logp, torch.ones(5), weights, -23.0, 0.1)
    loss.backward()
    assert loss.item() == 0.0 and logp.grad.tolist() == [0.0] * 5


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="mse, bce or sft"):
        laser.self_reward_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), 0.0, 0.1, "l1")


# ---------------------------------------------------------------- advantages


def test_group_advantages_by_hand():
    # mean .4, unbiased variance (2 * .36 + 3 * .16) / 4 = .3
    std = math.sqrt(0.3)
    got = laser.group_advantages(tensor([[1.0, 0, 0, 1, 0]]))
    near(got, [[0.6 / std, -0.4 / std, -0.4 / std, 0.6 / std, -0.4 / std]], atol=5e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.3, 0.7])
def test_equal_rewards_give_exactly_zero(value):
    # 0.7 eight times has a rounded mean and a std of 6e-8: noise must not become a signal
    assert not laser.group_advantages(torch.full((2, 8), value)).any()


def test_groups_do_not_see_each_other():
    a, b = tensor([[1.0, 0, 0, 1]]), tensor([[1.0, 1, 1, 0]])
    together = laser.group_advantages(torch.cat((a, b)))
    assert_close(together, torch.cat((laser.group_advantages(a), laser.group_advantages(b))))


R_V = tensor([[1.0, 0, 0, 1, 0]])
R_S = tensor([[1.2, 0.5, -0.3, 0.9, 0.99]])
FINISHED = tensor([[True, True, True, True, False]])


def test_mixed_advantages_by_hand():
    # r_s counts as 1, .5, 0, .9, 0 (clipped, clipped, and truncated): mean .48, variance .227
    std_v, std_s = math.sqrt(0.3), math.sqrt(0.227)
    a_v = [x / std_v for x in (0.6, -0.4, -0.4, 0.6, -0.4)]
    a_s = [x / std_s for x in (0.52, 0.02, -0.48, 0.42, -0.48)]
    expected = [[0.75 * v + 0.25 * s for v, s in zip(a_v, a_s)]]
    got = laser.mixed_advantages(R_V, R_S, FINISHED, tau=0.25)
    assert_close(got, tensor(expected), atol=1e-5, rtol=0)


def test_tau_zero_is_grpo_bit_for_bit():
    got = laser.mixed_advantages(R_V, torch.full((1, 5), NAN), FINISHED, tau=0.0)
    assert torch.equal(got, laser.group_advantages(R_V))


def test_std_threshold_falls_back_group_by_group():
    # std(r_s) of the first group is .055: below .1.  That of the second is above.
    flat, wide = [0.5, 0.6, 0.5, 0.6, 0.5], [0.0, 0.9, 0.1, 1.0, 0.2]
    finished = torch.ones(2, 5, dtype=torch.bool)
    r_v = R_V.repeat(2, 1)
    got = laser.mixed_advantages(r_v, tensor([flat, wide]), finished, tau=0.5, min_std=0.1)
    a_v = laser.group_advantages(r_v)
    assert torch.equal(got[0], a_v[0]) and not torch.equal(got[1], a_v[1])
    # lowered, the same group passes
    opened = laser.mixed_advantages(r_v, tensor([flat, wide]), finished, tau=0.5, min_std=0.01)
    assert not torch.equal(opened[0], a_v[0])


def test_threshold_looks_at_clipped_values():
    # all above 1: after clipping they are the same, and there is nothing to normalise
    r_s = tensor([[1.5, 3.0, 9.0, 2.0, 1.1]])
    got = laser.mixed_advantages(R_V, r_s, torch.ones(1, 5, dtype=torch.bool), tau=0.5)
    assert torch.equal(got, laser.group_advantages(R_V))


def test_tau_one_is_r_s_alone():
    """The paper's ablation, r_s as the only reward: r_v has no say, also in groups whose r_s hardly
    varies, where a mixture falls back on r_v."""
    flat = tensor([[0.5, 0.56, 0.5, 0.56, 0.5]])  # std .033: below the threshold of .1
    finished = torch.ones(1, 5, dtype=torch.bool)
    got = laser.mixed_advantages(R_V, flat, finished, tau=1.0)
    assert torch.equal(got, laser.group_advantages(flat))
    assert torch.equal(got, laser.mixed_advantages(1 - R_V, flat, finished, tau=1.0))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3, 3), st.booleans(), st.booleans()), min_size=2, max_size=9),
    st.floats(0.01, 0.99))
def test_truncated_row_never_gains_from_self_reward(group, tau):
    """In the paper's released code a truncated row's r_s is read at its first token and can gain
    from it: here its mixed advantage never exceeds its share of A_v."""
    r_s, finished, right = (tensor([list(x)]) for x in zip(*group))
    r_v, r_s = right.float(), torch.where(finished, r_s, NAN)
    got = laser.mixed_advantages(r_v, r_s, finished, tau, min_std=0.0)
    assert got.isfinite().all()
    a_v = laser.group_advantages(r_v)
    share = torch.where(a_v > 0, a_v, (1 - tau) * a_v)
    assert (got <= share + 1e-5)[~finished].all()


def test_all_truncated_group_keeps_a_v():
    none = torch.zeros(1, 5, dtype=torch.bool)
    got = laser.mixed_advantages(R_V, torch.full((1, 5), NAN), none, tau=0.5)
    assert torch.equal(got, laser.group_advantages(R_V))


# ---------------------------------------------------------------- the policy loss


def test_policy_loss_by_hand():
    ratio = tensor([1.0, 1.5, 0.5, 4.0, 0.5])
    advantages = tensor([2.0, 1.0, -1.0, -1.0, 1.0])
    # -2 (ratio 1), -1.2 (clipped above), .8 (clipped below), 3 (dual clip; 4 without it), -.5
    loss = laser.policy_loss(ratio.log(), torch.zeros(5), advantages)
    near(loss, -2 - 1.2 + 0.8 + 3 - 0.5)
    clipped, kl = laser.off_policy(ratio.log(), torch.zeros(5), advantages)
    assert clipped.item() == 2
    near(kl, 0 + (0.5 - math.log(1.5)) + (3 - math.log(4)) + 2 * (-0.5 + math.log(2)))


def test_policy_gradient_at_ratio_one_is_minus_the_advantage():
    logprobs = tensor([-1.0, -2, -3, -4, -5], requires_grad=True)
    advantages = tensor([2.0, 1, 0, -1, -0.5])
    laser.policy_loss(logprobs, logprobs.detach(), advantages).backward()
    clipped, kl = laser.off_policy(logprobs, logprobs.detach(), advantages)
    assert torch.equal(logprobs.grad, -advantages)
    assert clipped.item() == 0 and kl.item() == 0.0


def test_where_the_clip_is_active_no_gradient_flows():
    logprobs = tensor([1.5, 0.5, 4.0]).log().requires_grad_()
    laser.policy_loss(logprobs, torch.zeros(3), tensor([1.0, -1, -1])).backward()
    assert logprobs.grad.tolist() == [0.0, 0.0, 0.0]


def test_uneven_clip_range():
    ratio, zeros = tensor([1.5, 0.5]), torch.zeros(2)
    loss = laser.policy_loss(ratio.log(), zeros, tensor([1.0, -1.0]), 0.4, 0.3)
    near(loss, -1.3 + 0.6)


def test_kl_estimates_old_from_new():
    """k3 under samples of the old policy has the mean KL(old || new): here the mean is taken
    exactly, over all of a vocabulary of five."""
    old = tensor([0.1, 0.4, 0.2, 0.25, 0.05])
    new = tensor([0.3, 0.1, 0.3, 0.1, 0.2])
    zero = torch.zeros(1)
    k3 = [laser.off_policy(n[None].log(), o[None].log(), zero)[1] for n, o in zip(new, old)]
    near((old * torch.stack(k3)).sum(), (old * (old / new).log()).sum().item())


def test_a_wild_ratio_stays_finite():
    logprobs = tensor([500.0, -500.0], requires_grad=True)
    loss = laser.policy_loss(logprobs, torch.zeros(2), tensor([-1.0, 1.0]))
    loss.backward()
    kl = laser.off_policy(logprobs.detach(), torch.zeros(2), tensor([-1.0, 1.0]))[1]
    assert loss.isfinite() and kl.isfinite() and logprobs.grad.isfinite().all()


# ---------------------------------------------------------------- phases


def test_phases_count_steps_from_one():
    names = [laser.phase(step, 2, 3) for step in range(1, 8)]
    assert names == ["reasoning"] * 2 + ["self-reward"] * 3 + ["integrated"] * 2
    assert laser.phase(1, 0, 0) == "integrated"
