"""
One update of the policy: rollouts and their advantages in, one optimizer step out.

    sample            problems -> rollouts, each rank its share
    update            rollouts, advantages, class weights -> a step of AdamW
      micro_batches     cut the batch so that a forward pass fits into memory
      Targets           which hidden states are read, and what for: the one trap in here
      loss              the loss, written out
  
The loss of a batch of N rollouts with M response tokens, N_e of them finished:

    1/M * sum over tokens of the clipped surrogate  +  alpha/N_e * sum of w (r_s - r_v)^2

M and N_e are counted over the whole batch before it is cut, so the gradient does not depend on the
cut.  alpha = tau = 0 is plain GRPO, exactly.  The same in textbook operations, a row at a time:
tests/plain.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import laser
from .model import CausalLM
from .readout import loss_backward, token_logprobs
from .rollout import Rollout
from .sampler import cut_by_tokens, generate, pad
from .scale.distributed import ALONE, World, gathered
from .scale.optimizer import Optimizer

# ---------------------------------------------------------------------------------------------
# problems -> rollouts


def sample(
    model: CausalLM, tokenizer, problems: list, n: int, world: World = ALONE, first: int = 0,
    **sampling,
) -> list[Rollout]:  # fmt: skip
    """n solutions of each problem from the `first` on, or of this rank's share of them; `prompt_id`
    counts among all problems.  `sampling` goes to sampler.generate."""
    mine = world.shard(range(first, len(problems)))
    # A problem keeps its random stream, whoever samples it: any number of ranks draws the same.
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
    """One field of P * G rollouts in the order of their problems, as a tensor (P, G); fp64, nan
    for None, or bool."""
    values = [getattr(r, name) for r in rollouts]
    if isinstance(values[0], bool):
        return torch.tensor(values).view(-1, group_size)
    values = [math.nan if x is None else x for x in values]
    return torch.tensor(values, dtype=torch.float64).view(-1, group_size)


# ---------------------------------------------------------------------------------------------
# rollouts -> micro-batches


def micro_batches(rollouts: list[Rollout], budget: int) -> list[list[int]]:
    """Row indices of each micro-batch: neighbours in length, at most `budget` padded tokens."""
    lengths = [len(r.prompt_tokens) + len(r.response_tokens) for r in rollouts]
    return list(cut_by_tokens(lengths, budget))


@dataclass
class Targets:
    """Which hidden states of a padded micro-batch are read, and what for.

    One flat list for both readouts: first the m response tokens of all rows, then z_c of the e rows
    that have an end.  Hidden state t predicts token t + 1.  So a response of n tokens that begins
    at p is read at p - 1 .. p + n - 2, and z_c at p + n - 1: at the stop token, where it would
    come next.  Two rows, prompts "ab" and "a", the second one cut off before its end:

        position   0    1    2    3    4           row       0  0  0    1  1    0
        row 0      a    b    c    d   EOS          position  1  2  3    0  1    4
        row 1      a    f    g   pad  pad          token     c  d  EOS  f  g    z_c
                                                             \\__ m = 5 ____/   e = 1
    """

    row: Tensor  # (m + e,) row of the micro-batch
    position: Tensor  # (m + e,) hidden state to read
    token: Tensor  # (m + e,) whose log-prob is wanted
    temperature: Tensor  # (m + e,) that of sampling for tokens, always 1 for z_c
    responses: int  # m

    @classmethod
    def of(cls, rollouts: list[Rollout], z_ids: list[int], temperature: float) -> Targets:
        """Lay out the targets of these rollouts, the readout token of each being z_ids[.]."""
        row, position, token = [], [], []
        for b, r in enumerate(rollouts):
            p, n = len(r.prompt_tokens), len(r.response_tokens)
            row += [b] * n
            position += range(p - 1, p + n - 1)
            token += r.response_tokens
        m = len(row)
        for b, r in enumerate(rollouts):
            if r.finished:
                row.append(b)
                position.append(len(r.prompt_tokens) + len(r.response_tokens) - 1)
                token.append(z_ids[b])
        # z_c is no action that the policy takes: it is read at 1 whatever the sampling
        temperatures = torch.ones(len(row))
        temperatures[:m] = temperature
        return cls(*map(torch.tensor, (row, position, token)), temperatures, m)


def read_hidden(
    model: CausalLM, rollouts: list[Rollout], z_ids: list[int], temperature: float
) -> tuple[Tensor, Targets]:
    """The hidden states (m + e, C) from which all targets of these rows are read, by one forward
    pass over right-padded rows; and the targets, on the same device."""
    tokens, _ = pad([r.prompt_tokens + r.response_tokens for r in rollouts], model.device)
    hidden = model(tokens)  # (B, T, C)
    t = _to(Targets.of(rollouts, z_ids, temperature), hidden.device)
    return hidden[t.row, t.position], t


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
    dual_clip: float = 3.0

    def readout_token(self, r: Rollout) -> int:
        """The token whose log-prob is read at the end of a rollout."""
        return self.z_wrong_id if self.kind == "sft" and r.r_v <= 0.5 else self.z_c_id


@dataclass
class Learned:
    """What the m response tokens and e ends of a micro-batch are to learn."""

    advantages: Tensor  # (m,) each token has its rollout's
    old_logprobs: Tensor | None  # (m,) under the policy that sampled; None: it is this one
    r_v: Tensor  # (e,)
    weights: Tensor  # (e,) of the classes
    c_ref: Tensor  # (e,) nats

    def old(self, tokens: Tensor) -> Tensor:
        """log-probs (m,) under the policy that sampled.  On-policy they are these very numbers,
        without a gradient: the ratio is exactly 1."""
        return tokens.detach() if self.old_logprobs is None else self.old_logprobs

    def part(self, targets: slice) -> Learned:
        """That of some of the flat list of targets, response tokens first."""
        m = len(self.advantages)
        ends = slice(max(0, targets.start - m), max(0, targets.stop - m))
        old = None if self.old_logprobs is None else self.old_logprobs[targets]
        return Learned(self.advantages[targets], old, self.r_v[ends], self.weights[ends],
                       self.c_ref[ends])  # fmt: skip


def loss(logprobs: Tensor, x: Learned, c: Loss, M: int, N: int) -> Tensor:
    """What `logprobs` (targets,) contribute to the loss of a batch of M tokens and N ends."""
    policy, self_reward = loss_sums(logprobs, x, c)
    return policy / M + c.alpha * (self_reward / N)


def loss_sums(logprobs: Tensor, x: Learned, c: Loss) -> tuple[Tensor, Tensor]:
    """(policy loss, loss on r_s) of some targets, as sums."""
    m = len(x.advantages)
    tokens, logp_zc = logprobs[:m], logprobs[m:]  # z_c lies outside the response: no advantage
    policy = laser.policy_loss(
        tokens, x.old(tokens), x.advantages, c.clip_low, c.clip_high, c.dual_clip
    )
    if not c.alpha:  # plain GRPO: z_c is read, so that r_s can be logged, and nothing else
        return policy, torch.zeros_like(policy)
    return policy, laser.self_reward_loss(
        logp_zc, x.r_v, x.weights, x.c_ref, c.beta_v, c.kind
    )


def accumulate_gradients(
    model: CausalLM,
    rollouts: list[Rollout],
    advantages: Tensor,
    weights: Tensor,
    c: Loss,
    micro_batch_tokens: int,
    old_logprobs: dict[int, Tensor] | None = None,
    world: World = ALONE,
    optimizer: Optimizer | None = None,
) -> dict:
    """Add the gradient of the whole batch's loss to the parameters' .grad, micro-batch by
    micro-batch; returns the statistics of the batch, under the names of metrics.jsonl.

    advantages and weights: (N,).  old_logprobs maps a row to its log-probs under the policy that
    sampled it; None means that the model still IS that policy (the first update of a batch).
    """
    M = sum(len(r.response_tokens) for r in rollouts)
    N = max(sum(r.finished for r in rollouts), 1)
    c_ref = torch.as_tensor(c.c_ref, dtype=torch.float32).expand(len(rollouts))
    parts = []
    for rows, counts in world.rounds(micro_batches(rollouts, micro_batch_tokens)):
        # 1. Forward pass over the rows, up to the hidden states that are read.
        these = [rollouts[i] for i in rows]
        hidden, t = read_hidden(model, these, [c.readout_token(r) for r in these], c.temperature)

        # 2. What each of them is to learn: the advantage of a rollout is that of all its tokens.
        #    (A rank without rows of its own computes along with others' rows, and learns nothing.)
        lengths = torch.tensor([len(r.response_tokens) for r in these])
        ended = [i for i in rows if rollouts[i].finished]
        x = _to(Learned(
            advantages=counts * advantages[rows].repeat_interleave(lengths),
            old_logprobs=old_logprobs and torch.cat([old_logprobs[i] for i in rows]),
            r_v=torch.tensor([rollouts[i].r_v for i in ended]),
            weights=counts * weights[ended],
            c_ref=c_ref[ended],
        ), hidden.device)  # fmt: skip

        # 3. Loss and backward pass.  In the textbook's words, with logits (m + e, V):
        #        loss(token_logprobs(hidden, W, t.token, t.temperature), x, c, M, N).backward()
        #    loss_backward does that for one block of them after the other, and never holds all.
        logprobs, entropy = loss_backward(
            hidden, model.lm_head_weight, t.token,
            lambda logprobs, part, x=x: loss(logprobs, x.part(part), c, M, N), t.temperature,
        )  # fmt: skip

        if optimizer is not None:
            optimizer.accumulate()  # gradients of a bf16 model are summed in fp32

        # 4. Statistics, from the log-probs that came by.
        if counts:
            parts.append(_statistics(these, logprobs, entropy, x, c, M, N))
    return _total(world.gather(parts), c.alpha)


@torch.no_grad()
def _statistics(rollouts, logprobs, entropy, x: Learned, c: Loss, M: int, N: int) -> dict:
    """What one micro-batch adds to the batch's statistics, in one trip from device to host."""
    m = len(x.advantages)
    tokens, logp_zc = logprobs[:m], logprobs[m:]
    policy, self_reward = loss_sums(logprobs, x, c)
    clipped, kl = laser.off_policy(tokens, x.old(tokens), x.advantages, c.clip_low, c.clip_high)
    # How far the sampler's numbers are off: against the policy that sampled, since how far this
    # one has moved is approx_kl's business.  (After wrong solutions "sft" reads another token.)
    # zc_gap has no such reference: with --updates-per-batch above 1 it holds the move as well.
    sampled = tokens.new_tensor([p for r in rollouts for p in r.logprobs])
    gap = (sampled - x.old(tokens)).abs().max()
    ended = [r for r in rollouts if r.finished]
    read = [r.logp_zc if c.readout_token(r) == c.z_c_id else math.nan for r in ended]
    zc_gap = (logp_zc.new_tensor([0.0, *read]) - torch.cat((logp_zc.new_zeros(1), logp_zc))).abs()
    values = (policy, self_reward / N, clipped, kl, entropy[:m].sum(), gap)
    values = torch.stack((*values, zc_gap.nan_to_num(0.0).max())).tolist()
    policy, self_reward, clipped, kl, entropy, gap, zc_gap = values
    widths = [len(r.prompt_tokens) + len(r.response_tokens) for r in rollouts]
    return {
        "policy_loss": policy / M, "self_reward_loss": self_reward, "clip_fraction": clipped / M,
        "approx_kl": kl / M, "entropy": entropy / M, "sampler_gap": gap, "zc_gap": zc_gap,
        "padded_tokens": max(widths) * len(widths), "real_tokens": sum(widths),
    }  # fmt: skip


def _total(parts: list[dict], alpha: float) -> dict:
    """The statistics of all micro-batches of all ranks, under the names of metrics.jsonl.  Each was
    divided by the counts of the whole batch, so sums are the batch's own; a gap is the largest."""
    total = {k: (max if k.endswith("_gap") else sum)(p[k] for p in parts) for k in parts[0]}
    padding = 1 - total.pop("real_tokens") / total.pop("padded_tokens")
    whole = total["policy_loss"] + alpha * total["self_reward_loss"]
    return {"loss": whole, **total, "padding_share": padding}


def _to(x, device: torch.device):
    """A dataclass with its tensors on a device."""
    moved = {f.name: getattr(x, f.name) for f in fields(x)}
    return type(x)(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})


# ---------------------------------------------------------------------------------------------
# the update


def update(
    model: CausalLM,
    optimizer: Optimizer,
    rollouts: list[Rollout],
    advantages: Tensor,
    weights: Tensor,
    c: Loss,
    micro_batch_tokens: int,
    grad_clip: float,
    updates: int = 1,
) -> dict:
    """`updates` optimizer steps on one batch of rollouts with advantages and class weights (P, G);
    returns the statistics and the gradient norm of the last one, and how many were skipped because
    a gradient was not finite."""
    advantages, weights = advantages.flatten(), weights.flatten()
    old_logprobs, skipped, world = None, 0, optimizer.world
    if updates > 1:
        # From the second step on the model is no longer the one that sampled: keep its log-probs.
        # (The sampler's own would do but for rounding: scored by one code, the first ratio is 1.)
        old_logprobs = {}
        with torch.no_grad():
            for rows, _ in world.rounds(micro_batches(rollouts, micro_batch_tokens)):
                these = [rollouts[i] for i in rows]
                hidden, t = read_hidden(model, these, [c.z_c_id] * len(rows), c.temperature)
                logprobs = token_logprobs(hidden, model.lm_head_weight, t.token, t.temperature)
                counts = [len(r.response_tokens) for r in these]
                old_logprobs |= zip(rows, logprobs[: t.responses].cpu().split(counts))
    for _ in range(updates):
        stats = accumulate_gradients(
            model, rollouts, advantages, weights, c, micro_batch_tokens, old_logprobs, world,
            optimizer,
        )
        # A single batch may have a gradient many times the usual: it is scaled down to grad_clip.
        grad_norm = optimizer.clip(grad_clip)
        if math.isfinite(grad_norm):
            optimizer.step()
        else:
            skipped += 1  # one bad batch must not poison the weights and both moments for good
        optimizer.zero_grad()
    return stats | {"grad_norm": grad_norm, "skipped_updates": skipped}
