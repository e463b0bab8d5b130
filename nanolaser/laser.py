"""
LaSeR in equations: last-token self-rewarding (PAPER = arXiv 2510.14943) on bare tensors.

No model, no tokenizer, no loop: every function takes a few numbers and returns a few numbers, and
tests/test_laser.py does each of them by hand on five.

RL in 25 lines, for a reader who knows cross-entropy
----------------------------------------------------
Supervised training has the right text y of a problem x, and raises log pi(y | x).  Here nobody has
it.  There is only a reward r(x, y): a number that says how good a text was that the model wrote
itself.  What we want to be large is the reward to be expected,  J = E[r(x, y)],  y ~ pi(. | x).

Its gradient needs no derivative of r, which has none, because  grad pi = pi grad log pi:

    grad J  =  E[ r(x, y) * grad log pi(y | x) ]                        (REINFORCE, Williams 1992)

This is the gradient of cross-entropy on the model's own samples, each weighted with its reward:
sample, score, then raise the log-probability of what scored well.  That is all of RL here.

*  Baseline.  With rewards 0 and 1 nothing would ever be lowered, and 7 right solutions of 8 would
   all be pushed up, though they say little.  Since E[grad log pi] = 0, any number b(x) may be
   subtracted from r without changing the expectation.  GRPO samples a group of G solutions of the
   same x and takes their mean: the advantage  A = (r - mean) / std.  "Better than my usual try?"
*  Tokens.  log pi(y | x) is the sum over tokens of log pi(y_t | x, y_<t), so every token of a
   solution, its stop token included, carries the solution's advantage.
*  Ratio and clip.  Samples are dear, so one may wish to make several updates with them.  After the
   first one the model is no longer the one that sampled; the ratio pi / pi_old of each token
   corrects for that, and the clip stops paying for a token once its ratio has left 1 +- 0.2.
   With ONE update a batch, as in the paper, the ratio is 1, its gradient grad log pi: no clip.

What LaSeR adds
---------------
    r_v    verified reward: 1.0 if the rule-based checker accepts the answer, else 0.0
    r_s    self-reward: what the model itself thinks of its solution, from ONE log-probability
    z_c    an unused special token, read right after the end of a solution y to a problem x
    c_ref  log pi_ref(z_c | x, y) of the untouched starting model, nearly the same everywhere

Why one log-probability is enough (PAPER, method): let the policy answer "is y correct?" with z_c
for yes, and be paid for it by RL with a KL penalty beta_v towards the starting model.  Its optimum
has a closed form,  r = beta_v log(pi(z_c) / pi_ref(z_c)) + beta_v log Z.  pi_ref(z_c) is tiny
(e^-23 for Qwen2.5-7B), so Z - 1 is about e^-23 * e^10 = 2e-6: log Z is nothing.  And
log pi_ref(z_c) hardly varies (-23.11 +- 0.04 nats), so a constant, c_ref, replaces a second model.

Equations carry the PAPER's number where it could be confirmed, else the name of its section.
P problems, G group size, M response tokens; log-probabilities in nats.  A truncated solution has no
end, hence no z_c: `finished` says which solutions have one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def phase(step: int, reasoning_warmup: int, self_reward_warmup: int) -> str:
    """The phase of a step, counted from 1: "reasoning" (plain GRPO), then "self-reward" (r_s is
    trained as well), then "integrated" (r_s also enters the advantage).  PAPER, training details.
    """
    # r_s is a function of what the model knows, so first it learns to solve; and what r_s says is
    # noise until it has been trained, so it gets no say in the advantage before that.
    if step <= reasoning_warmup:
        return "reasoning"
    return "self-reward" if step <= reasoning_warmup + self_reward_warmup else "integrated"


# ---------------------------------------------------------------------------------------------
# the self-reward, and how it is learned


def self_reward(
    logp_zc: Tensor | float, c_ref: Tensor | float, beta_v: float, loss: str = "mse"
) -> Tensor | float:
    """r_s = beta_v * (log pi(z_c | x, y) - c_ref); nats in, about 0 (wrong) to 1 (right) out, and
    after training with `loss` "bce" or "sft" pi(z_c) itself.  c_ref: one, or one a solution."""
    # c_ref = -23, beta_v = 0.1:   log pi(z_c) = -23 -> r_s = 0     -13 -> 1     -18 -> 0.5
    # Whatever the loss, r_s > 0.5 means "I think this is right".
    if loss == "mse":
        return beta_v * (logp_zc - c_ref)
    return torch.as_tensor(logp_zc).exp() if isinstance(logp_zc, Tensor) else math.exp(logp_zc)


def class_weights(r_v: Tensor, finished: Tensor, balanced: bool = True) -> Tensor:
    """(P, G) weights that give right and wrong solutions the same say: (N_c + N_i) / (2 N_c) on the
    N_c right ones, (N_c + N_i) / (2 N_i) on the N_i wrong ones, 0 on truncated ones (PAPER,
    class-level re-weighting); not `balanced`, the ablation: 1 and 0."""
    if not balanced:
        return finished.to(r_v.dtype)
    # Of ten finished solutions eight are right.  Unweighted, r_s = 0.8 for all of them would be a
    # comfortable answer.  With 10 / (2 * 8) = 0.625 on right and 10 / (2 * 2) = 2.5 on wrong ones,
    # both classes weigh 5, and the best constant is 0.5: only telling them apart helps.
    right, wrong = finished & (r_v > 0.5), finished & (r_v <= 0.5)
    n_c, n_i = right.sum(), wrong.sum()
    half = (n_c + n_i) / 2
    # An empty class divides by nothing: clamp(1) keeps it finite, and no row carries it.
    return right * (half / n_c.clamp(min=1)) + wrong * (half / n_i.clamp(min=1))


def self_reward_loss(
    logp_zc: Tensor, r_v: Tensor, weights: Tensor, c_ref: Tensor | float, beta_v: float,
    kind: str = "mse",
) -> Tensor:  # fmt: skip
    """SUM over solutions (n,) of w * (r_s - r_v)^2 (PAPER, Eq. 12); divided by N_c + N_i of the
    whole batch it is the mean.  "bce" and "sft" are the PAPER's ablations, on pi(z_c) itself; for
    "sft" `logp_zc` is that of the token to imitate.  ValueError for another kind."""
    # A sum, so that a batch cut into micro-batches adds up to the same number.
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
        per_row = -logp_zc
    else:
        raise ValueError(f"self-reward loss {kind!r}: choose mse, bce or sft")
    return (weights * per_row).sum()


# ---------------------------------------------------------------------------------------------
# advantages


def informative(rewards: Tensor) -> Tensor:
    """(P, G) rewards -> (P,): whether a group's rewards differ, so that there is a better one."""
    return (rewards != rewards[:, :1]).any(1)


def group_advantages(rewards: Tensor, by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """(P, G) rewards -> (P, G) advantages (r - mean) / (std + eps) within each group: GRPO
    (arXiv 2402.03300, section 4.1.2), with the unbiased std (n - 1) of the released code.  Not
    `by_std`: r - mean, as in Dr. GRPO (arXiv 2503.20783)."""
    # rewards 1 0 0 0:  mean 0.25, std 0.5  ->  A = 1.5 -0.5 -0.5 -0.5.  The rarer success is, the
    # more it counts; and where all rewards are equal there is nothing to learn.
    # An offset changes nothing but the rounding: equal rewards become zeros, and zeros have a mean
    # and a std of exactly zero (eight times 0.7 have not, and A would be 0.06).
    rewards = rewards - rewards[:, :1]
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    return (rewards - mean) / (std + eps) if by_std else rewards - mean


def mixed_advantages(
    r_v: Tensor, r_s: Tensor, finished: Tensor, tau: float, min_std: float = 0.1,
    by_std: bool = True,
) -> Tensor:  # fmt: skip
    """A = (1 - tau) A_v + tau A_s, all (P, G), A_s from r_s clipped to [0, 1]; groups whose r_s has
    a std of at most min_std keep A_v (PAPER, advantage integration)."""
    a_v = group_advantages(r_v, by_std)
    if tau == 0.0:
        return a_v
    # A truncated solution counts as r_s = 0, the least: no reward for an ending that is not there.
    r_s = torch.where(finished, r_s.clamp(0, 1), 0.0)
    # The PAPER's ablation, r_s as the only reward: there is no A_v to fall back on.
    if tau == 1.0:
        return group_advantages(r_s, by_std)
    # To normalise r_s that hardly differ would blow noise up to the size of a signal.
    tau_group = torch.where(r_s.std(1, keepdim=True) > min_std, tau, 0.0)  # (P, 1)
    return (1 - tau_group) * a_v + tau_group * group_advantages(r_s, by_std)


def token_weights(lengths: Tensor, counted: Tensor, aggregate: str, longest: int) -> Tensor:
    """(P, G) factors of the advantages that make the policy loss below, a sum over all M tokens
    divided by M, a mean over the solutions `counted` (P, G) alone, of one kind:

        token     over all their tokens alike (arXiv 2503.14476; the PAPER's)
        sequence  over solutions of the mean over each one's tokens (GRPO, arXiv 2402.03300)
        constant  the sum over tokens / (their number * `longest`) (Dr. GRPO, arXiv 2503.20783)
    """
    # The surrogate is proportional to the size of A, so a weight on a solution's tokens is one on
    # its advantage.  Lengths 10 and 30, M = 40:  "token" has 1/40 on each token, so the long one
    # has three times the say.  "sequence" has 1/2 * 1/10 and 1/2 * 1/30: weights of 2 and 2/3.
    # "constant" at 100 has 1/200 on each, a weight of 0.2 however long the others happen to be.
    n = counted.sum().clamp(min=1)
    divisor = {
        "token": (counted * lengths).sum().clamp(min=1),
        "sequence": n * lengths,
        "constant": n * longest,
    }[aggregate]
    return counted * lengths.sum() / divisor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2,
    clip_high: float = 0.2, dual_clip: float = 3.0,
) -> Tensor:  # fmt: skip
    """SUM over response tokens (m,), stop token included, of PPO's clipped surrogate, to be
    minimised (arXiv 1707.06347, Eq. 7; dual clip: arXiv 1912.09729).  Divided by M, the tokens of
    the whole batch and never of a micro-batch, it is the mean over tokens (arXiv 2503.14476)."""
    # +-20 keeps exp() finite after a bad step.
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    # A = 1: the loss is -ratio, and from ratio 1.2 on a constant -1.2, without a gradient.  The
    # maximum is the pessimist's choice: a clip may take a gain away, but never hide a loss.
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.max(pg_loss1, pg_loss2)
    # Dual clip: for A < 0 an exploding ratio makes a loss without a ceiling; -dual_clip * A is one.
    return torch.where(advantages < 0, torch.min(loss, -dual_clip * advantages), loss).sum()


def off_policy(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How far the policy has moved since it sampled, as SUMS over tokens (m,): (tokens whose clip
    is active, the estimate k3 of KL(old || new) in nats, http://joschu.net/blog/kl-approx.html)."""
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high) > -advantages * ratio
    return clipped.sum(), (torch.expm1(log_ratio) - log_ratio).sum()
