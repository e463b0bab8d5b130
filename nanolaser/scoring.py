"""
log pi(z_c | x, y) of solutions that are there already: anybody's, and c_ref from the model's own.

    score       log pi(z_c) of given solutions: the sampler's number, from one plain forward pass
    estimate    c_ref: its mean over solutions of the untouched model, before the first step
    reference   or, in place of the constant, its value for each solution, in every step

r_s is how far log pi(z_c) has risen above c_ref.  In a language model that has never seen z_c used
it is nearly the same whatever x and y are (PAPER: -23.11 +- 0.04 nats for Qwen2.5), so its mean
over a few hundred solutions stands for the second model that one would otherwise have to carry
along.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .grpo import of_all_ranks, sample
from .model import CausalLM
from .packing import cut_by_tokens, pad
from .readout import token_logprobs
from .rollout import Rollout
from .sampler import refuse_empty
from .scale.distributed import ALONE, World, gathered

FEW_ENDED = 30  # solutions below which c_ref is said to be uncertain


@torch.no_grad()
def read_last(
    model: CausalLM, prompts: list[list[int]], responses: list[list[int]], token_ids: list[int],
    batch_tokens: int = 16_384, on_read: Callable[[int], None] | None = None,
) -> Tensor:  # fmt: skip
    """log pi(token | x, y) in nats, (N, K) in fp32 on the CPU: the K tokens' log-probs right after
    each of N given solutions, whose last token is the stop token.  `on_read(k)` hears of every k
    solutions done.  ValueError for an empty prompt."""
    refuse_empty(prompts)
    # The last token of a row is the stop token, and the hidden state there predicts what would
    # come next: z_c, if the model thinks the solution right.
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    columns = torch.tensor(token_ids, device=model.device)
    values = torch.empty(len(rows), len(token_ids))
    for batch in cut_by_tokens([len(row) for row in rows], batch_tokens):
        tokens, lengths = pad([rows[i] for i in batch], model.device)
        # (B, C) hidden states are all that is kept of (B, T, C): V logits for B positions, not B T.
        hidden = model(tokens)[torch.arange(len(batch)), lengths - 1]
        first = token_logprobs(hidden, model.lm_head_weight, columns[:1].expand(len(batch)))  # (B,)
        # A row's tokens share one softmax, so log-probs differ as logits do: the V-wide sum of the
        # first token serves all K.  Logits 2.0 and 1.5, the first -0.7: the second is -1.2.
        logits = hidden.float() @ model.lm_head_weight[columns].float().T  # (B, K)
        values[batch] = (first[:, None] + (logits - logits[:, :1])).cpu()
        if on_read is not None:
            on_read(len(batch))
    return values


def score(
    model: CausalLM, z_c_id: int, prompts: list[list[int]], responses: list[list[int]],
    batch_tokens: int = 16_384, on_scored: Callable[[int], None] | None = None,
) -> list[float]:  # fmt: skip
    """log pi(z_c | x, y) in nats of N given solutions, as the sampler reads it; see `read_last`."""
    return read_last(model, prompts, responses, [z_c_id], batch_tokens, on_scored)[:, 0].tolist()


class NothingEnded(ValueError):
    """Not one of the sampled solutions was finished."""


@dataclass
class CRef:
    """log pi(z_c | x, y) of the untouched model, in nats, over `count` finished solutions."""

    mean: float
    std: float | None  # None: of one solution there is no spread
    count: int
    others: list[tuple[str, float, float]]  # (token, mean, std) of other unused special tokens


def estimate(
    model: CausalLM, tokenizer, problems: list, pairs: int, world: World = ALONE, **sampling
) -> CRef:
    """c_ref as the mean over up to `pairs` sampled (problem, solution) pairs (300 in the PAPER),
    and the same for every other unused special token, steadiest first; NothingEnded, a ValueError,
    if not one solution was finished."""
    # As many problems as pairs, where there are so many: one solution of each.
    n, model = -(-pairs // len(problems)), gathered(model, world)
    rollouts = of_all_ranks(sample(model, tokenizer, problems, n, world, **sampling), world)
    # A solution that was cut off has no end after which z_c could be read.
    rollouts = [r for r in rollouts if r.finished][:pairs]
    if not rollouts:
        raise NothingEnded("c_ref cannot be estimated: no solution came to an end within "
                           "--max-new-tokens; raise it, or give --c-ref a number")
    # Read after the fact, by one more forward pass: the sampler reads z_c alone, and here the other
    # tokens that might do are of interest as well.
    candidates = [tokenizer.z_c_id, *tokenizer.unused_special_ids()]
    # Each rank reads its share; with their numbers they come back in order.  Of 5 rollouts on two
    # ranks one reads 0 2 4, the other 1 3.
    mine = world.shard(range(len(rollouts)))
    prompts = [rollouts[i].prompt_tokens for i in mine]
    responses = [rollouts[i].response_tokens for i in mine]
    read = read_last(model, prompts, responses, candidates).tolist()
    rows = world.gather([[i, *values] for i, values in zip(mine, read)], by=0)
    values = torch.tensor(rows)[:, 1:]  # (pairs, candidates)
    mean, count = values.mean(0).tolist(), len(values)
    if not math.isfinite(mean[0]):
        raise ValueError("the model's log-probs are not finite: try --dtype float32")
    # One solution has a mean and no spread, and says nothing of which token is steadier.
    if count == 1:
        return CRef(mean[0], None, 1, [])
    std = values.std(0).tolist()
    others = sorted(zip(tokenizer.tokens(candidates[1:]), mean[1:], std[1:]), key=lambda x: x[2])
    return CRef(mean[0], std[0], count, others)


def reference(model: CausalLM, z_c_id: int, rollouts: list[Rollout], world: World = ALONE) -> None:
    """Fill in logp_ref = log pi_ref(z_c | x, y) in nats of this rank's rollouts that have an end,
    `model` being the frozen reference."""
    # One forward pass a batch of solutions; to sample them took one for every token.
    ended = [r for r in rollouts if r.finished]
    texts = [r.prompt_tokens for r in ended], [r.response_tokens for r in ended]
    for r, logp in zip(ended, score(gathered(model, world), z_c_id, *texts)):
        r.logp_ref = logp


def doubts(c: CRef, o) -> list[str]:
    """What is odd about an estimate of c_ref for a run of these options."""
    said = []
    # Cut off in a trial with short solutions, most of the 300 say nothing.
    if c.count < FEW_ENDED:
        off = "by any amount" if not c.std else f"by {2 * c.std / c.count**0.5:.1f} nats"
        said.append(f"{c.count} solutions are few; c_ref may well be off {off} (--max-new-tokens "
                    f"{o.max_new_tokens} cut off the others)")
    # r_s = 1 stands for log pi(z_c) = c_ref + 1 / beta_v, and that is below 0.
    room = -1 / o.beta_v
    if c.mean > room:
        least = math.ceil(-100 / c.mean) / 100
        said.append(f"r_s cannot reach 1 from there; --beta-v has to be at least {least}")
    # The spread is noise in r_s before anything is learned: beta_v * std of a scale of 0 to 1.
    if c.std is not None and c.std > 0.2 / o.beta_v:
        better = [f"{t} ({m:.1f} +- {s:.2f})" for t, m, s in c.others if s < c.std and m < room]
        said.append(f"that is a wide spread for --beta-v {o.beta_v}; steadier tokens for --z-c: "
                    f"{', '.join(better[:3]) or 'none'}")
    return said
