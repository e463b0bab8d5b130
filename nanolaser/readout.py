"""
From hidden states to log-probabilities, without ever holding a (B, T, V) tensor.

Two numbers are wanted of a language model here: the log-probability of each response token (for
the policy gradient, at the sampling temperature) and that of z_c after the end (for the
self-reward, always at temperature 1).  One flat list of targets serves both.  The textbook:

    logits = hidden @ weight.T / temperature                               # (N, V)
    logprobs = log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]  # (N,)
    loss(logprobs).backward()

At N = 2048 tokens of Qwen2.5 (V = 152,064) it holds 1.2 GB of logits, as many log-probs and as
many gradients.  But of each row of V numbers only one is kept, and rows do not need each other: so
they are read block by block, one after the other in the same memory.

    token_logprobs   the first two lines, differentiable.  Its backward pass computes the logits
                     again: four matrix products where the textbook needs three
    loss_backward    all three lines, for a loss that is a sum over targets: while a block lies
                     there, its share of loss and gradient is computed.  Three products

Precision, said once for the whole project: logits and logsumexp are computed in fp32 whatever
the model computes in.  r_s spans 0 to 1 over 10 nats (beta_v = 0.1), and a bf16 logit near 20
comes in steps of 0.125: it would round r_s to multiples of 0.0125.  A bf16 matrix is widened for
that, but for a GPU that multiplies bf16 and sums in fp32 by itself (`mixed`), at many times the
speed.  A product of two bf16 numbers is exact in fp32, so the logits are the same; backward, the
softmax is rounded to bf16 before it is multiplied: a relative error of 0.2 % in the gradient.

Shapes: N targets, n of them in a block, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Logits in a block, all V of each row: 128 MiB in fp32, 220 rows of Qwen2.5.  Matrix products run
# at full speed, and it is small beside the weights.
BLOCK_LOGITS = 2**25
# Rows of a bf16 output matrix that are widened to fp32 at a time.
CHUNK_VOCAB = 8192

# ---------------------------------------------------------------------------------------------
# products with the output matrix


def mixed(weight: Tensor) -> bool:
    """Whether products of bf16 numbers are summed and returned in fp32 (torch 2.8 on, on CUDA)."""
    return weight.is_cuda and weight.dtype == torch.bfloat16 and hasattr(torch.ops.aten.mm, "dtype")


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits (N, V) in fp32 of hidden states (N, C), all at once; `weight` in fp32 or `mixed`."""
    if mixed(weight):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.T


def _widened(weight: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (vocabulary slice, its rows of the output matrix in `wide`: a view, or a copy)."""
    step = CHUNK_VOCAB if weight.dtype != wide else len(weight)
    for first in range(0, len(weight), step):
        v = slice(first, first + step)
        yield v, weight[v].to(wide)


# ---------------------------------------------------------------------------------------------
# block by block: forward, and backward


def _blocks(hidden: Tensor, weight: Tensor, targets: Tensor, inverse_temperature: Tensor):
    """Yield (rows: slice, exps (n, V), sums (n,), log-probs (n,)) of block after block, where
    exps / sums is the softmax; the next block is computed in the same memory."""
    N, V, wide = len(hidden), len(weight), inverse_temperature.dtype  # fp32, usually
    # N = 5 targets in blocks of n = 2:  rows 0 1 | rows 2 3 | row 4
    n = min(N, max(1, BLOCK_LOGITS // V))
    buffer = hidden.new_empty(n, V, dtype=wide)  # the only (., V) tensor there is
    for start in range(0, N, max(n, 1)):
        rows = slice(start, min(start + n, N))
        # 1. Logits.  The temperature divides n * C hidden numbers, not n * V logits, but in bf16.
        logits = buffer[: rows.stop - start]  # (n, V)
        if mixed(weight):
            torch.mm(hidden[rows], weight.T, out_dtype=wide, out=logits)
            logits.mul_(inverse_temperature[rows, None])
        else:
            h = hidden[rows].to(wide) * inverse_temperature[rows, None]  # (n, C)
            for v, w in _widened(weight, wide):
                torch.mm(h, w.T, out=logits[:, v])
            del h, w  # a generator keeps its variables while it waits
        # 2. log pi(target) = logit[target] - logsumexp(logits).  The largest logit is taken out of
        #    the sum first: exp(1000) overflows, exp(1000 - 1000) does not.
        of_target = logits.gather(1, targets[rows, None])[:, 0]  # (n,)
        peak = logits.amax(1)  # (n,)
        exps = logits.sub_(peak[:, None]).exp_()  # in place: the logits are gone
        sums = exps.sum(1)  # (n,)
        yield rows, exps, sums, of_target - peak - sums.log()


def _gradients(
    hidden, weight, targets, inverse_temperature, derivative, grad_weight, learns=slice(None)
):
    """(log-probs (N,), entropies (N,), gradient of hidden (N, C)) in fp32; the gradient of the
    output matrix's rows `learns` (all: V) is added to grad_weight, unless that is None.
    `derivative(logprobs (n,), rows)` is that of the loss by each log-prob of a block (n,)."""
    wide = inverse_temperature.dtype
    grad_hidden = torch.empty_like(hidden, dtype=wide)
    logprobs, entropy = (grad_hidden.new_empty(len(hidden)) for _ in range(2))
    for block in _blocks(hidden, weight, targets, inverse_temperature):
        rows, exps, sums, logprobs[rows] = block
        # 1. By the logits:  d log pi(target) / d logits = onehot(target) - softmax, for instance
        #        softmax 0.5 0.3 0.2, target 1:  -0.5  +0.7  -0.2
        #    One number a row changes, and exps has become sums * (softmax - onehot): the factor
        #    -1 / (T * sums) waits for the small tensors.
        exps.scatter_add_(1, targets[rows, None], -sums[:, None])
        h, scale = hidden[rows].to(wide), inverse_temperature[rows] / sums  # (n, C), (n,)
        # 2. By the hidden states: through the output matrix.  The row that the distribution would
        #    give on average, less that of the target, times sums:
        mean_minus_target = torch.zeros_like(h)  # (n, C)
        if mixed(weight):
            exps = exps.to(weight.dtype)
            torch.mm(exps, weight, out_dtype=wide, out=mean_minus_target)
        else:
            for v, w in _widened(weight, wide):
                mean_minus_target.addmm_(exps[:, v], w)
        # The entropy comes for free: H = logsumexp - mean logit = -log pi(target) - (mean logit -
        # logit[target]), and what stands in brackets is h . mean_minus_target / (T * sums).
        entropy[rows] = (h * mean_minus_target).sum(1).mul_(scale).add_(logprobs[rows]).neg_()
        factor = (derivative(logprobs[rows], rows) * scale)[:, None]  # (n, 1)
        grad_hidden[rows] = mean_minus_target.mul_(-factor)
        # 3. By the output matrix: summed over all blocks.
        if grad_weight is not None and mixed(weight):
            own = exps[:, learns].T, (h * factor).to(exps.dtype)
            torch.addmm(grad_weight, *own, out_dtype=wide, alpha=-1, out=grad_weight)
        elif grad_weight is not None:
            grad_weight.addmm_(exps[:, learns].T, h * factor, alpha=-1)
    return logprobs, entropy, grad_hidden


def _flat(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor):
    """(hidden (N, C), targets (N,), 1 / temperature (N,) in fp32, or fp64 in gradcheck)."""
    shape = targets.shape
    assert hidden.shape[:-1] == shape, f"hidden {tuple(hidden.shape)} for targets {tuple(shape)}"
    # To look costs nothing here; on a GPU the host would have to wait for everything queued, and
    # `gather` is checked there by the device itself.
    if targets.device.type == "cpu" and ((targets < 0) | (targets >= len(weight))).any():
        raise ValueError(f"a target is not one of the {len(weight)} tokens of the vocabulary")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not isinstance(temperature, Tensor):
        temperature = hidden.new_full((), temperature, dtype=wide)  # made there: no copy, no wait
    T = temperature.to(hidden.device, wide).expand(shape).reshape(-1)
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), 1.0 / T


# ---------------------------------------------------------------------------------------------
# the two doors


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps its inputs alone; backward computes the logits anew."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, inverse_temperature):
        """(N, C), (V, C), (N,), (N,) -> (N,)"""
        ctx.save_for_backward(hidden, weight, targets, inverse_temperature)
        logprobs = torch.empty_like(inverse_temperature)
        for rows, *_, block in _blocks(hidden, weight, targets, inverse_temperature):
            logprobs[rows] = block
        return logprobs

    @staticmethod
    def backward(ctx, grad):
        """The loss's derivative by each log-prob (N,) is given -> that by hidden and weight."""
        hidden, weight, *rest = ctx.saved_tensors
        by_weight = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        _, _, by_hidden = _gradients(hidden, weight, *rest, lambda _, rows: grad[rows], by_weight)
        by_weight = None if by_weight is None else by_weight.to(weight.dtype)
        return by_hidden.to(hidden.dtype), by_weight, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor = 1.0
) -> Tensor:
    """Log-probs (...) in nats, fp32, of `targets` (...) after hidden states (..., C), for whose
    gradient and that of the output matrix (V, C) the logits are computed again.
    ValueError for a target that is no token (on a CPU)."""
    h, ids, inverse = _flat(hidden, weight, targets, temperature)
    return _TokenLogprobs.apply(h, weight, ids, inverse).view(targets.shape)


def loss_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss: Callable[[Tensor, slice], Tensor],
    temperature: float | Tensor = 1.0, z_c: tuple[int, Tensor | None] = (0, None),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`loss(token_logprobs(...)).backward()` at three quarters of the cost, of flat inputs (N, C),
    (V, C), (N,): (log-probs (N,), entropy (N,) in nats of each whole distribution), both fp32.

    The loss is a SUM over targets: `loss(logprobs (n,), rows)` returns the share of a block `rows`
    of the N, and is called once for each.  With `z_c` = (its id, a parameter (1, C)) the output
    matrix is frozen, and that parameter gets the gradient of its one row.

    Memory, in numbers of fp32, beyond inputs, gradients and a few numbers a token: a block of n * V
    logits with n = BLOCK_LOGITS // V rows, and 3 * n * C.  A bf16 output matrix costs V * C more,
    its gradient being summed in fp32 and rounded once, and CHUNK_VOCAB * C.
    """
    z_c_id, row = z_c
    learns, leaf = (slice(None), weight) if row is None else (slice(z_c_id, z_c_id + 1), row)

    def derivative(logprobs: Tensor, rows: slice) -> Tensor:
        """Autograd on a block's loss alone, a graph of n numbers."""
        with torch.enable_grad():
            x = logprobs.detach().requires_grad_()
            return torch.autograd.grad(loss(x, rows), x)[0]  # (n,)

    # 1. Through the readout, block by block.
    with torch.no_grad():
        h, ids, inverse = _flat(hidden, weight, targets, temperature)
        in_place, by_leaf = _sums_in_place(leaf, inverse.dtype), None
        if leaf.requires_grad:
            by_leaf = leaf.grad if in_place else torch.zeros_like(leaf, dtype=inverse.dtype)
        inputs = h, weight, ids, inverse, derivative, by_leaf, learns
        logprobs, entropy, by_hidden = _gradients(*inputs)
    # 2. Through the model: autograd goes on from the gradients found.
    outputs, gradients = [], []
    if hidden.requires_grad:
        outputs.append(hidden)
        gradients.append(by_hidden.to(hidden.dtype))
    if leaf.requires_grad and not in_place:
        outputs.append(leaf)
        gradients.append(by_leaf.to(leaf.dtype))
    del inputs, by_hidden, by_leaf  # autograd is then their only owner, and need not copy
    torch.autograd.backward(outputs, gradients)
    return logprobs, entropy


def _sums_in_place(weight: Tensor, wide: torch.dtype) -> bool:
    """Whether a gradient may be added to weight.grad, where that of earlier micro-batches lies."""
    # A hook has to see the gradient come by (data-parallel training hangs on them), and a subclass
    # such as DTensor has its own idea of what a gradient is: those go through autograd.
    hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.is_leaf and not hooks
    return plain and weight.dtype == wide and weight.grad is not None
