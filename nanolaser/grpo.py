"""
One update of the policy: rollouts and their advantages in, one optimizer step out.

    sample                  problems -> rollouts, each rank its share
    update                  rollouts, advantages, class weights -> a step of AdamW
      accumulate_gradients    micro-batch by micro-batch (packing.py: how they are cut and laid out)
        targets                 which log-probs are read, and what for: the one trap in here
        loss                    the loss, written out

The loss of a batch of N rollouts with M response tokens, N_e of them finished:

    1/M * sum over tokens of the clipped surrogate  +  alpha/N_e * sum of w (r_s - r_v)^2

M and N_e are counted over the whole batch before it is cut, so the gradient does not depend on the
cut; and what has neither advantage nor weight adds exactly 0, so it need not be computed.
alpha = tau = 0 is plain GRPO, exactly.  In textbook operations, a row at a time: tests/plain.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import laser, log
from .lora import merged
from .model import CausalLM
from .packing import Packing, micro_batches
from .readout import loss_backward
from .rollout import Rollout
from .sampler import generate
from .scale.distributed import ALONE, World, gathered
from .scale.optimizer import Optimizer

# ---------------------------------------------------------------------------------------------
# problems -> rollouts


def sample(
    model: CausalLM, tokenizer, problems: list, n: int, world: World = ALONE, first: int = 0,
    **sampling,
) -> list[Rollout]:  # fmt: skip
    """n solutions of each of this rank's share of the problems from the `first` on; `prompt_id`
    counts among all problems, and `sampling` goes to sampler.generate."""
    mine = world.shard(range(first, len(problems)))
    # A problem keeps its random stream, whoever samples it: any number of ranks draws the same.
    with merged(model, world):  # LoRA: one product in place of three
        rollouts = generate(
            gathered(model, world), tokenizer, [problems[i].problem for i in mine], n=n,
            streams=[i * n for i in mine], **sampling,
        )  # fmt: skip
    for rollout in rollouts:
        rollout.prompt_id = mine[rollout.prompt_id]
    return rollouts


def of_all_ranks(rollouts: list[Rollout], world: World) -> list[Rollout]:
    """The rollouts of all problems, in their order, from each rank's own."""
    if world.size == 1:
        return rollouts
    return [Rollout(**r) for r in world.gather([vars(r) for r in rollouts], by="prompt_id")]


def stack(rollouts: list[Rollout], name: str, group_size: int) -> Tensor:
    """One field of P * G rollouts in the order of their problems, as a tensor (P, G) of bool, or
    of fp64 with nan for None."""
    values = [getattr(r, name) for r in rollouts]
    dtype = torch.bool if isinstance(values[0], bool) else torch.float64
    values = [math.nan if x is None else x for x in values]
    return torch.tensor(values, dtype=dtype).view(-1, group_size)


# ---------------------------------------------------------------------------------------------
# rollouts -> what is read of them


class Targets(NamedTuple):
    """The n log-probs that a micro-batch is about, a column for each thing to know of them.

    Two kinds share the table: the response tokens of rollouts with an advantage, and z_c after the
    end of rollouts with a weight.  Hidden state t predicts token t + 1, so a response token is read
    one BEFORE where it stands, and z_c AT the stop token, where it would come next.  A rollout with
    prompt "ab", response "cd EOS", advantage 0.7 and weight 1.2:

        token           a    b    c    d   EOS
        read there           c    d   EOS  z_c
        advantage           0.7  0.7  0.7   0        z_c is no action: nobody has ever drawn it
        weight               0    0    0   1.2
    """

    place: Tensor  # (n,) hidden state to read, of those of the micro-batch
    token: Tensor  # (n,) whose log-prob is wanted
    temperature: Tensor  # (n,) that of sampling; always 1 for z_c
    advantage: Tensor  # (n,) the rollout's own for each of its tokens
    weight: Tensor  # (n,) in the loss on r_s
    r_v: Tensor  # (n,) and c_ref, for z_c; 0 for response tokens, which have no use for it
    c_ref: Tensor  # (n,) nats
    sampled: Tensor  # (n,) what the sampler had read; nan for another token than it had
    old: Tensor  # (n,) what was read before the batch's first update; nan: that is now


def targets(rows: list[tuple], texts: list[list[int]], c: Loss, device: torch.device) -> Targets:
    """What is read of rollouts: rows of (rollout, advantage, weight, c_ref, old log-probs of its
    response or None), one after the other; texts[.] says where the tokens of each of them lie."""
    table = []
    for (r, advantage, weight, c_ref, old), text in zip(rows, texts):
        if advantage:
            # text a b c d EOS, prompt a b: read at b c d, where c d EOS are expected
            n, places = len(r.response_tokens), text[len(r.prompt_tokens) - 1 : -1]
            columns = r.logprobs, [math.nan] * n if old is None else old.tolist()
            for place, token, *known in zip(places, r.response_tokens, *columns, strict=True):
                table.append((place, token, c.temperature, advantage, 0.0, 0.0, 0.0, *known))
        if weight:
            # The sampler has read z_c; "sft" reads another token after wrong solutions.
            token, sampled = c.z_c_id, r.logp_zc
            if c.kind == "sft" and r.r_v <= 0.5:
                token, sampled = c.z_wrong_id, math.nan
            table.append((text[-1], token, 1.0, 0.0, weight, r.r_v, c_ref, sampled, math.nan))
    return Targets(*(torch.tensor(column).to(device, non_blocking=True) for column in zip(*table)))


# ---------------------------------------------------------------------------------------------
# the loss


@dataclass
class Loss:
    """What the loss needs besides the rollouts; the names are the paper's."""

    alpha: float = 0.1
    beta_v: float = 0.1
    c_ref: float | Tensor = 0.0  # (N,): one of each rollout
    z_c_id: int = 0
    z_wrong_id: int = 0  # "sft" alone: the token to imitate after wrong solutions
    temperature: float = 1.0
    kind: str = "mse"
    clip_low: float = 0.2
    clip_high: float = 0.2


def loss(logprobs: Tensor, t: Targets, c: Loss, M: int, N: int) -> Tensor:
    """The share of targets with log-probs (n,) in the loss of M tokens and N finished rollouts."""
    policy, self_reward = loss_sums(logprobs, t, c)
    return policy / M + c.alpha * (self_reward / N)


def loss_sums(logprobs: Tensor, t: Targets, c: Loss) -> tuple[Tensor, Tensor]:
    """(policy loss, loss on r_s) of some targets, as sums."""
    # The same two formulas for tokens and z_c: either has a 0 where the other has its factor.
    old = old_of(logprobs, t)
    policy = laser.policy_loss(logprobs, old, t.advantage, c.clip_low, c.clip_high)
    if not c.alpha:  # plain GRPO, which has no c_ref
        return policy, torch.zeros_like(policy)
    return policy, laser.self_reward_loss(logprobs, t.r_v, t.weight, t.c_ref, c.beta_v, c.kind)


def old_of(logprobs: Tensor, t: Targets) -> Tensor:
    """Log-probs (n,) under the policy that sampled.  On-policy they are these very numbers, without
    a gradient: the ratio is exactly 1."""
    return torch.where(t.old.isnan(), logprobs.detach(), t.old)


def accumulate_gradients(
    model: CausalLM, rollouts: list[Rollout], advantages: Tensor, weights: Tensor, c: Loss,
    micro_batch_tokens: int, old_logprobs: dict[int, Tensor] | None = None, world: World = ALONE,
    optimizer: Optimizer | None = None,
) -> dict:  # fmt: skip
    """Add the gradient of the loss of N rollouts with advantages and weights (N,) to the
    parameters' .grad; returns the statistics of the batch, under the names of metrics.jsonl.

    old_logprobs: {row: log-probs of its response under the policy that sampled}; a row that is not
    there yet, the model still being that policy, is put in.
    """
    M = sum(len(r.response_tokens) for r in rollouts)
    N = max(sum(r.finished for r in rollouts), 1)
    # 1. Which rows have a gradient?  Late in a run many groups are all right, and their advantages
    #    exactly 0.  Such rows are left out, unless r_s is learned from them:
    #        advantage  weight     what is read
    #           0.7      1.2       response and z_c
    #           0.7      0         response: the row is truncated, or alpha = 0
    #           0        0.8       z_c
    #           0        0         nothing: the row does not pass the model
    A, w = advantages.tolist(), (weights * (c.alpha != 0)).tolist()
    c_ref = torch.as_tensor(c.c_ref).expand(len(rollouts)).tolist()
    learned = [i for i in range(len(rollouts)) if A[i] or w[i]]
    sums, sizes = [torch.zeros(9, device=model.device)], [(0, 0)]  # where nothing is to be learned
    cuts = micro_batches([rollouts[i] for i in learned], micro_batch_tokens)
    for rows, counted in world.rounds([[learned[j] for j in cut] for cut in cuts]):
        # 2. Forward pass, up to the hidden states: one for all rows, each prompt in it once, where
        #    the textbook has  hidden = model(prompt + response)  for each.
        packing = Packing([rollouts[i] for i in rows], model.device, model.dtype)
        hidden = model(packing.tokens, packing)[0]  # (tokens, C)

        # 3. What is read, and what it is to teach: nothing, if a rank only computes along.
        these = [(rollouts[i], A[i], w[i], c_ref[i], (old_logprobs or {}).get(i)) for i in rows]
        t = targets(these, packing.texts, c, model.device)
        t = t._replace(advantage=counted * t.advantage, weight=counted * t.weight)

        # 4. Loss and backward pass.  The textbook:
        #        logprobs = token_logprobs(hidden[t.place], W, t.token, t.temperature)
        #        loss(logprobs, t, c, M, N).backward()
        #    loss_backward does so for one block of targets after the other.
        logprobs, entropy = loss_backward(
            hidden[t.place], model.lm_head_weight, t.token,
            lambda logprobs, block, t=t: loss(logprobs, Targets(*(x[block] for x in t)), c, M, N),
            t.temperature, (c.z_c_id, model.z_c_row),
        )  # fmt: skip
        if optimizer is not None:
            optimizer.accumulate()  # gradients of a bf16 model are summed in fp32

        # 5. Statistics, from the log-probs that came by; they stay where they are until the end.
        if counted:
            sums.append(statistics(logprobs, entropy, t, c))
            sizes.append(packing.sizes)
        if old_logprobs is not None and rows[0] not in old_logprobs:
            read = [len(r.response_tokens) * bool(a) + bool(b) for r, a, b, *_ in these]
            for i, part in zip(rows, logprobs.cpu().split(read)):
                old_logprobs[i] = part[: len(rollouts[i].response_tokens)]
    # The host waits for the device here, once for all micro-batches.
    parts = [[*row, *size] for row, size in zip(torch.stack(sums).tolist(), sizes)]
    return log.update_statistics(world.gather(parts), c.alpha, M, N)


@torch.no_grad()
def statistics(logprobs: Tensor, entropy: Tensor, t: Targets, c: Loss) -> Tensor:
    """What a micro-batch adds to those of the batch, (9,): see log.update_statistics."""
    old, token = old_of(logprobs, t), t.advantage != 0
    moved = laser.off_policy(logprobs, old, t.advantage, c.clip_low, c.clip_high)
    # How far the sampler's numbers are off: against the policy that sampled, since how far this
    # one has moved is approx_kl's business.  For z_c there is no such reference: with
    # --updates-per-batch above 1 its gap holds the move as well.
    gap = (t.sampled - old).abs().nan_to_num(0.0)
    gaps = (gap * token).max(), (gap * ~token).max()
    read = token.sum(), (~token).sum()
    return torch.stack((*loss_sums(logprobs, t, c), *moved, (entropy * token).sum(), *read, *gaps))


def update(
    model: CausalLM, optimizer: Optimizer, rollouts: list[Rollout], advantages: Tensor,
    weights: Tensor, c: Loss, micro_batch_tokens: int, grad_clip: float, updates: int = 1,
) -> dict:  # fmt: skip
    """`updates` optimizer steps on one batch of rollouts with advantages and class weights (P, G);
    returns statistics and gradient norm of the last, and how many were skipped: norm not finite."""
    advantages, weights = advantages.flatten(), weights.flatten()
    # From the second step on the model is no longer the one that sampled: the first one keeps its
    # log-probs.  (The sampler's own would do but for rounding: by one code, the first ratio is 1.)
    old_logprobs, skipped = {} if updates > 1 else None, 0
    for _ in range(updates):
        stats = accumulate_gradients(
            model, rollouts, advantages, weights, c, micro_batch_tokens, old_logprobs,
            optimizer.world, optimizer,
        )  # fmt: skip
        # A single batch may have a gradient many times the usual: it is scaled down to grad_clip.
        grad_norm = optimizer.clip(grad_clip)
        if math.isfinite(grad_norm):
            optimizer.step()
        else:
            skipped += 1  # one bad batch must not poison the weights and both moments for good
        optimizer.zero_grad()
    return stats | {"grad_norm": grad_norm, "skipped_updates": skipped}
