"""
LaSeR in equations: last-token self-rewarding (arXiv 2510.14943) on bare tensors, nothing else.

Read this file first.  No model, no tokenizer, no loop: every function takes a few numbers and
returns a few numbers, and tests/test_laser.py checks each one on five numbers done by hand.

    r_v   verified reward: 1.0 if the rule-based checker accepts the answer, else 0.0
    r_s   self-reward: what the model itself thinks of its solution, from ONE log-probability
    z_c   an unused special token, read right after the end of a solution y to a problem x
    c_ref log pi_ref(z_c | x, y) of the untouched starting model, nearly the same everywhere

Why one log-probability is enough: KL-regularised RL on "is this solution correct?" with z_c
meaning yes has the closed form  r = beta_v * log(pi(z_c)/pi_ref(z_c)) + beta_v * log Z,  and
since pi_ref(z_c) is tiny (e^-23), Z is 1 to six digits.  And since log pi_ref(z_c) hardly varies,
a constant c_ref replaces a whole second model.

Conventions: P problems, G group size, N = P * G rollouts; log-probabilities in nats, fp32.
A truncated rollout has no end, hence no z_c: masks called `finished` say which rollouts have one.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------
# the self-reward and how it is learned


def self_reward(logp_zc: Tensor | float, c_ref: float, beta_v: float) -> Tensor | float:
    """r_s = beta_v * (log pi(z_c | x, y) - c_ref); nats in, about 0 (wrong) to 1 (right) out."""
    return beta_v * (logp_zc - c_ref)


def class_weights(r_v: Tensor, finished: Tensor) -> Tensor:
    """Weights (N,) that give right and wrong solutions the same say, whatever their numbers:
    w_c = (N_c + N_i) / (2 N_c) on right ones, w_i = (N_c + N_i) / (2 N_i) on wrong ones, 0 on
    truncated ones."""
    right, wrong = finished & (r_v > 0.5), finished & (r_v <= 0.5)
    n_c, n_i = right.sum(), wrong.sum()
    half = (n_c + n_i) / 2
    # An empty class divides by nothing: clamp(1) keeps it finite, and no row carries it.
    return right * (half / n_c.clamp(min=1)) + wrong * (half / n_i.clamp(min=1))


def self_reward_loss(
    logp_zc: Tensor,
    r_v: Tensor,
    weights: Tensor,
    c_ref: float,
    beta_v: float,
    kind: str = "mse",
) -> Tensor:
    """SUM over rollouts (N,) of w * (r_s - r_v)^2; divide by N_c + N_i for the paper's mean.

    A sum, so that a batch cut into micro-batches adds up to exactly the same number.  The loss
    uses r_s unclipped.  `bce` and `sft` are the paper's ablations, on pi(z_c) itself.
    """
    # where(), not a product: a truncated row has no log-probability, and 0 * nan is nan.  Before
    # the formula and not after it, or the nan would come back in the gradient.
    logp_zc = torch.where(weights > 0, logp_zc, -1.0)
    if kind == "mse":
        # At beta_v = 0.1 "right" means log pi = c_ref + 10: e^-13 for a 7B model.  So small a
        # probability never gets sampled, and reasoning does not feel it.  That is the point.
        per_row = (self_reward(logp_zc, c_ref, beta_v) - r_v) ** 2
    elif kind == "bce":
        # log(1 - pi) by log1mexp; the clamp keeps it finite should pi(z_c) reach 1
        log_not = torch.log(-torch.expm1(logp_zc.clamp(max=-1e-6)))
        per_row = -(r_v * logp_zc + (1 - r_v) * log_not)
    elif kind == "sft":
        per_row = -r_v * logp_zc  # imitate z_c after right solutions, say nothing after wrong ones
    else:
        raise ValueError(f"self-reward loss {kind!r}: choose mse, bce or sft")
    return (weights * per_row).sum()


# ---------------------------------------------------------------------------------------------
# advantages


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO: (P, G) rewards -> (P, G) advantages (r - mean) / (std + eps) within each group.

    std is the unbiased one (n - 1).  A group whose rewards are all equal teaches nothing and
    gets exactly zero.
    """
    # An offset changes nothing but the rounding: equal rewards become zeros, and zeros have a mean
    # and a std of exactly zero (eight times 0.7 have not, and A would be 0.06).
    rewards = rewards - rewards[:, :1]
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    return (rewards - mean) / (std + eps)


def mixed_advantages(
    r_v: Tensor, r_s: Tensor, finished: Tensor, tau: float, min_std: float = 0.1
) -> Tensor:
    """A = (1 - tau) A_v + tau A_s, all (P, G); A_s normalises r_s clipped to [0, 1].

    A truncated solution counts as r_s = 0, the least there is, so it can never be rewarded for
    an ending that it does not have.  Groups whose r_s hardly differ (std <= min_std) keep
    A = A_v: normalising would blow noise up to the size of a signal.
    """
    a_v = group_advantages(r_v)
    if tau == 0.0:
        return a_v
    r_s = torch.where(finished, r_s.clamp(0, 1), 0.0)
    tau_group = torch.where(r_s.std(1, keepdim=True) > min_std, tau, 0.0)  # (P, 1)
    return (1 - tau_group) * a_v + tau_group * group_advantages(r_s)


# ---------------------------------------------------------------------------------------------
# the policy loss


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate per token; inputs (M,) over all response tokens, EOS included.

    Returns (loss, clipped, kl), each the SUM over tokens: the loss to minimise, the number of
    tokens where the clip was active, and the k3 estimate of KL(old || new) in nats.  Divide by
    the token count of the whole batch, never of a micro-batch (Eq. of GRPO, token mean).
    """
    # One update per batch means old == new, ratio == 1: then this is plain policy gradient, and
    # the clips are idle.  +-20 keeps exp() finite after a bad step.
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
    ratio = log_ratio.exp()
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.max(pg_loss1, pg_loss2)
    # Dual clip: where the advantage is negative and the ratio explodes, max() above has no
    # ceiling; -dual_clip * A is one.
    loss = torch.where(advantages < 0, torch.min(loss, -dual_clip * advantages), loss)
    with torch.no_grad():
        clipped = (pg_loss2 > pg_loss1).sum()
        kl = (torch.expm1(log_ratio) - log_ratio).sum()
    return loss.sum(), clipped, kl


def phase(step: int, reasoning_warmup: int, self_reward_warmup: int) -> str:
    """The phase of a step (counted from 1): "reasoning" (plain GRPO), then "self-reward" (the
    readout is trained as well), then "integrated" (r_s also enters the advantage)."""
    if step <= reasoning_warmup:
        return "reasoning"
    return "self-reward" if step <= reasoning_warmup + self_reward_warmup else "integrated"
