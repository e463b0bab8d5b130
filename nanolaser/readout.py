"""
From hidden states to log-probabilities, without ever holding a (B, T, V) tensor.

Two numbers are wanted of a language model here: the log-probability of each response token (for
the policy gradient) and that of z_c after the end (for the self-reward).  Both are

    log pi(target) = logit[target] / T - logsumexp(logits / T)

so one function serves both, in one pass: a flat list of hidden states, each with a target and a
temperature.  The policy's tokens carry the sampling temperature, z_c always carries 1.

Precision, said once for the whole project: logits and logsumexp are computed in fp32 whatever
the model computes in.  r_s spans 0 to 1 over 10 nats (beta_v = 0.1), and a bf16 logit near 20
comes in steps of 0.125: it would round r_s to multiples of 0.0125.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A block of logits is at most CHUNK_TOKENS x CHUNK_VOCAB fp32 numbers: 64 MiB.  Large enough
# that matrix products run at full speed, small beside any model's weights.
CHUNK_TOKENS = 2048
CHUNK_VOCAB = 8192


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps one number a token (its logsumexp); backward computes the logits anew."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, inverse_temperature, with_entropy):
        """Log-probs (N,) and entropies (N,) or (0,), one pass over the blocks of logits."""
        N = hidden.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)  # fp32, or fp64 in gradcheck
        peak = hidden.new_full((N,), -torch.inf, dtype=wide)  # running maximum of the logits
        total = hidden.new_zeros(N, dtype=wide)  # running sum of exp(logit - peak)
        mean = hidden.new_zeros(N, dtype=wide)  # running sum of exp(logit - peak) * logit
        chosen = hidden.new_zeros(N, dtype=wide)  # the target's own logit
        for v, w, n, logits in _logit_blocks(hidden, weight, inverse_temperature, wide):
            new_peak = torch.maximum(peak[n], logits.amax(1))
            shrink = (peak[n] - new_peak).exp()  # what was summed under the old maximum
            here = targets[n] - v.start
            inside = (here >= 0) & (here < w.shape[0])  # is the target in this block?
            picked = logits.gather(1, here.clamp(0, w.shape[0] - 1)[:, None])[:, 0]
            chosen[n] = torch.where(inside, picked, chosen[n])
            p = (logits - new_peak[:, None]).exp_()
            total[n] = total[n] * shrink + p.sum(1)
            if with_entropy:
                mean[n] = mean[n] * shrink + p.mul_(logits).sum(1)
            peak[n] = new_peak
            del logits, p  # else the next block is computed while this one still lies there
        lse = peak + total.log()
        ctx.save_for_backward(hidden, weight, targets, inverse_temperature, lse)
        # H = logsumexp - E[logit]; a statistic to look at, never differentiated
        entropy = lse - mean / total if with_entropy else lse.new_empty(0)
        ctx.mark_non_differentiable(entropy)
        return chosen - lse, entropy

    @staticmethod
    def backward(ctx, grad, _):
        """Gradients of hidden (N, C) and weight (V, C): softmax minus target, block by block."""
        hidden, weight, targets, inverse_temperature, lse = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if need_hidden else None
        # The one V-sized buffer.  When the weight already holds a gradient (second and later
        # micro-batches) it is added to right there, and autograd is told there is nothing left.
        in_place = need_weight and weight.is_leaf and weight.grad is not None
        grad_weight = None
        if need_weight:
            grad_weight = weight.grad if in_place else torch.zeros_like(weight)
        for v, w, n, logits in _logit_blocks(hidden, weight, inverse_temperature, lse.dtype):
            # d log pi / d logit = (1[target] - softmax) / T
            slope = logits.sub_(lse[n, None]).exp_().neg_()  # (n, Vb), where the logits were
            here = targets[n] - v.start
            row = ((here >= 0) & (here < w.shape[0])).nonzero()[:, 0]
            slope[row, here[row]] += 1.0
            slope *= (grad[n] * inverse_temperature[n])[:, None]
            if need_hidden:
                grad_hidden[n] += slope @ w
            if need_weight:
                grad_weight[v] += slope.T @ hidden[n].to(slope.dtype)
            del logits, slope
        grad_hidden = grad_hidden.to(hidden.dtype) if need_hidden else None
        return grad_hidden, None if in_place else grad_weight, None, None, None


def _logit_blocks(hidden: Tensor, weight: Tensor, inverse_temperature: Tensor, wide):
    """Yield (vocabulary slice, its weights, token slice, logits / T) block by block, in `wide`."""
    # Vocabulary outside, tokens inside: a bf16 weight is then widened once a block, not once for
    # each chunk of tokens.
    for first in range(0, weight.shape[0], CHUNK_VOCAB):
        v = slice(first, min(first + CHUNK_VOCAB, weight.shape[0]))
        w = weight[v].to(wide)  # (Vb, C)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            n = slice(start, min(start + CHUNK_TOKENS, hidden.shape[0]))
            # (n, Vb), given no name here: a generator keeps its variables while it waits
            yield v, w, n, (hidden[n].to(wide) @ w.T).mul_(inverse_temperature[n, None])


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities in nats of `targets` (...) after hidden states (..., C), fp32 (...).

    weight is the (V, C) output matrix; `temperature` a number or one for each target (...).
    Differentiable in hidden and weight.  With `with_entropy` also returns the entropy (...) in
    nats of each whole distribution, not differentiable.  Extra memory beyond inputs, gradients
    and a few numbers a token, in fp32 numbers: forward 2 * CHUNK_TOKENS * CHUNK_VOCAB, backward
    CHUNK_TOKENS * CHUNK_VOCAB + CHUNK_VOCAB * C; for a bf16 weight 2 * CHUNK_VOCAB * C more.
    """
    shape = targets.shape
    assert hidden.shape[:-1] == shape, f"hidden {tuple(hidden.shape)} for targets {tuple(shape)}"
    wide = torch.promote_types(hidden.dtype, torch.float32)
    T = torch.as_tensor(temperature, dtype=wide, device=hidden.device).expand(shape).reshape(-1)
    logprobs, entropy = _TokenLogprobs.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), 1.0 / T, with_entropy
    )
    if with_entropy:
        return logprobs.view(shape), entropy.view(shape)
    return logprobs.view(shape)
