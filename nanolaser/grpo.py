"""
One step of training, between the sampler and the optimizer: rollouts -> rewards -> advantages
-> loss -> update.  train.py calls these functions in this order, top to bottom.

The loss of a batch of N rollouts with M response tokens in all (class weights w):

    1/M * sum over tokens of the clipped surrogate  +  alpha/(N_c + N_i) * sum of w (r_s - r_v)^2

M, N_c and N_i are counted over the whole batch before it is cut into micro-batches, so the
gradient does not depend on the cut.  alpha = tau = 0 is plain GRPO, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import laser, metrics
from .checker import extract_answer, is_equivalent
from .scale.distributed import ALONE, World, gathered, local
from .model import CausalLM
from .readout import loss_backward, token_logprobs
from .rollout import Rollout
from .sampler import generate, pad
from .scale.optimizer import Optimizer

# ---------------------------------------------------------------------------------------------
# problems -> rollouts -> rows with rewards


def sample(
    model: CausalLM, tokenizer, problems: list, n: int, world: World = ALONE, **sampling
) -> list[Rollout]:
    """n solutions of each problem, or of this rank's share of the problems; `prompt_id` counts
    among all of them."""
    mine = world.shard(range(len(problems)))
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
    return [Rollout(**r) for r in world.gather([vars(r) for r in rollouts], by="prompt_id")]


def check(
    rollouts: list[Rollout],
    problems: list,
    tokenizer,
    strict: bool = False,
    token_ids: bool = False,
) -> list[dict]:
    """One row a rollout, as samples.jsonl writes it: r_v from the rule-based checker (None where
    the problem has no gold answer), r_s from log pi(z_c) (None where there is no end, or c_ref is
    unknown).

    strict is the paper's training reward: exactly one \\boxed{}, else 0.  token_ids adds the
    tokens themselves, for whoever wants to score exactly these (text may be cut differently).
    """
    rows = []
    # In a group many solutions end in the same answer: each distinct one is judged once.
    verdicts: dict[tuple[str, str], bool] = {}
    for rollout in rollouts:
        problem = problems[rollout.prompt_id]
        response = tokenizer.decode(rollout.response_tokens)
        # A model that repeats the instruction leaves its \boxed{} empty: that is no answer, and
        # must not win a vote.
        answer = extract_answer(response, strict=strict) or None
        judged = answer is not None and problem.answer is not None
        if judged and (answer, problem.answer) not in verdicts:
            verdicts[answer, problem.answer] = is_equivalent(answer, problem.answer)
        r_v = float(judged and verdicts[answer, problem.answer])
        r_s = None
        if rollout.logp_zc is not None and tokenizer.c_ref is not None:
            r_s = laser.self_reward(rollout.logp_zc, tokenizer.c_ref, tokenizer.beta_v)
        rows.append(
            {
                "problem": problem.problem,
                "gold": problem.answer,
                "response": response,
                "answer": answer,
                "r_v": None if problem.answer is None else r_v,
                "r_s": r_s,
                "logp_zc": rollout.logp_zc,
                "finished": rollout.finished,
                "response_tokens": len(rollout.response_tokens),
                "prompt_id": rollout.prompt_id,
            }
        )
        if token_ids:
            rows[-1]["prompt_token_ids"] = rollout.prompt_tokens
            rows[-1]["response_token_ids"] = rollout.response_tokens
    return rows


# ---------------------------------------------------------------------------------------------
# rows -> batch


@dataclass
class Batch:
    """What one update needs, a row a rollout; everything on the CPU until its micro-batch."""

    rollouts: list[Rollout]
    advantages: Tensor  # (N,)
    r_v: Tensor  # (N,) in {0, 1}
    finished: Tensor  # (N,) bool: has an end, hence a z_c readout
    weights: Tensor  # (N,) class weights, 0 on truncated rows
    tokens: int  # M, response tokens of the whole batch
    ended: int  # N_c + N_i, finished rollouts of the whole batch


def make_batch(
    rollouts: list[Rollout], rows: list[dict], group_size: int, tau: float, min_std: float
) -> Batch:
    """Group-normalise the rewards of P * G rollouts (in prompt-major order) and count."""
    r_v = torch.tensor([row["r_v"] for row in rows])  # (N,)
    finished = torch.tensor([row["finished"] for row in rows])
    groups = lambda x: x.view(-1, group_size)  # noqa: E731  (N,) -> (P, G)
    if tau:
        r_s = torch.tensor([row["r_s"] if row["finished"] else 0.0 for row in rows])
        advantages = laser.mixed_advantages(
            groups(r_v), groups(r_s), groups(finished), tau, min_std
        )
    else:
        advantages = laser.group_advantages(groups(r_v))
    return Batch(
        rollouts=rollouts,
        advantages=advantages.flatten(),
        r_v=r_v,
        finished=finished,
        weights=laser.class_weights(r_v, finished),
        tokens=sum(len(r.response_tokens) for r in rollouts),
        ended=int(finished.sum()),
    )


def micro_batches(rollouts: list[Rollout], budget: int) -> Iterator[list[int]]:
    """Row indices of each micro-batch: neighbours in length, at most `budget` padded tokens."""
    # Sorted by length, a micro-batch holds rows of nearly one length: little padding is computed.
    # A prompt is computed anew for each row of its group.  Computing it once would save at most
    # 23 % of the update on the embedded model, where a third of all tokens are prompts, and at
    # most 4 % where 100 tokens of prompt precede 2000 of solution: not worth a second kind of
    # forward pass, with keys and values that carry gradients from one row to another.
    length = [len(r.prompt_tokens) + len(r.response_tokens) for r in rollouts]
    rows: list[int] = []
    for i in sorted(range(len(rollouts)), key=length.__getitem__, reverse=True):
        # the first row of a micro-batch is its longest, so it alone decides the padded width
        if rows and length[rows[0]] * (len(rows) + 1) > budget:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


# ---------------------------------------------------------------------------------------------
# batch -> gradient


@dataclass
class Targets:
    """Which hidden states of a padded micro-batch are read, and what for.

    One flat list for both readouts: first the M response tokens of all rows, then z_c of the
    rows that have an end.  Hidden state t predicts token t + 1, so the tokens of a response
    that starts at `p` are read at p - 1 .. p + n - 2, and z_c at p + n - 1: at the stop token.
    """

    row: Tensor  # (M + E,) row in the micro-batch
    position: Tensor  # (M + E,) hidden state to read
    target: Tensor  # (M + E,) token whose log-prob is wanted
    temperature: Tensor  # (M + E,) the sampling temperature for tokens, 1 for z_c
    responses: int  # M: the first M entries are response tokens

    @classmethod
    def of(cls, rollouts: list[Rollout], z_c_id: int, temperature: float) -> Targets:
        """Lay out the targets of these rollouts, rows in the order given."""
        row, position, target = [], [], []
        for b, r in enumerate(rollouts):
            p, n = len(r.prompt_tokens), len(r.response_tokens)
            row += [b] * n
            position += range(p - 1, p + n - 1)
            target += r.response_tokens
        responses = len(row)
        for b, r in enumerate(rollouts):
            if r.finished:
                row.append(b)
                position.append(len(r.prompt_tokens) + len(r.response_tokens) - 1)
                target.append(z_c_id)
        heat = torch.ones(len(row))
        heat[:responses] = temperature
        return cls(*map(torch.tensor, (row, position, target)), heat, responses)

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        tensors = (self.row, self.position, self.target, self.temperature)
        return Targets(*(x.to(device) for x in tensors), self.responses)


def read_hidden(
    model: CausalLM, rollouts: list[Rollout], z_c_id: int, temperature: float
) -> tuple[Tensor, Targets]:
    """The hidden states (M + E, C) from which all targets of these rows are read, one forward
    pass over right-padded rows; and the targets, on the same device."""
    tokens, _ = pad([r.prompt_tokens + r.response_tokens for r in rollouts], model.device)
    hidden = model(tokens)  # (B, T, C)
    t = Targets.of(rollouts, z_c_id, temperature).to(hidden.device)
    return hidden[t.row, t.position], t


def read(
    model: CausalLM, rollouts: list[Rollout], z_c_id: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs of all response tokens (M,) and log pi(z_c) of the finished rows (E,), in nats."""
    hidden, t = read_hidden(model, rollouts, z_c_id, temperature)
    logprobs = token_logprobs(hidden, model.lm_head_weight, t.target, t.temperature)
    return logprobs[: t.responses], logprobs[t.responses :]


@dataclass
class Loss:
    """What the loss needs besides the batch; the names are the paper's."""

    alpha: float = 0.1
    beta_v: float = 0.1
    c_ref: float = 0.0
    z_c_id: int = 0
    temperature: float = 1.0
    kind: str = "mse"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0


@dataclass
class Sums:
    """Statistics of one update, summed over micro-batches and divided once, at the end."""

    policy_loss: float = 0.0
    self_reward_loss: float = 0.0
    clip_fraction: float = 0.0
    approx_kl: float = 0.0
    entropy: float = 0.0
    sampler_gap: float = 0.0  # a maximum, not a sum
    padded_tokens: int = 0
    real_tokens: int = 0

    def of_all_ranks(self, world: World) -> Sums:
        """These of all ranks together."""
        parts = world.gather([vars(self)])
        total = {name: sum(part[name] for part in parts) for name in vars(self)}
        total["sampler_gap"] = max(part["sampler_gap"] for part in parts)
        return Sums(**total)


def loss_of_rows(
    batch: Batch, rows: list[int], loss: Loss, old: Tensor | None, device: torch.device
) -> tuple[Callable[[Tensor, slice], Tensor], Tensor]:
    """The loss of some rows as a function of their log-probs, in the order of `Targets`, stretch
    by stretch as `loss_backward` wants it; and (4,) zeros in which it adds up policy loss,
    self-reward loss, clipped tokens and KL.  old (M,): see `accumulate_gradients`.
    """
    sums = torch.zeros(4, device=device)
    # one advantage a rollout -> one a token
    counts = torch.tensor([len(batch.rollouts[i].response_tokens) for i in rows])
    advantages = batch.advantages[rows].repeat_interleave(counts).to(device)  # (M,)
    ended = [i for i in rows if batch.finished[i]]
    r_v, weights = (x[ended].to(device) for x in (batch.r_v, batch.weights))  # (E,)

    def loss_of(logprobs: Tensor, at: slice) -> Tensor:
        """The share of these log-probs, which are those of the targets `at`, in the loss."""
        # Response tokens first, then z_c, which lies outside the response: it has no advantage
        # and no part in the policy loss.
        A = advantages[at]
        tokens, logp_zc = logprobs[: len(A)], logprobs[len(A) :]
        before = tokens.detach() if old is None else old[at]
        policy, clipped, kl = laser.policy_loss(
            tokens, before, A, loss.clip_low, loss.clip_high, loss.dual_clip
        )
        total, reward_loss = policy / batch.tokens, torch.zeros_like(policy)
        if loss.alpha and len(logp_zc):
            z = slice(max(0, at.start - len(advantages)), at.stop - len(advantages))
            reward_loss = laser.self_reward_loss(
                logp_zc, r_v[z], weights[z], loss.c_ref, loss.beta_v, loss.kind
            ) / max(batch.ended, 1)
            total = total + loss.alpha * reward_loss
        sums.add_(torch.stack((policy, reward_loss, clipped, kl)).detach())
        return total

    return loss_of, sums


def accumulate_gradients(
    model: CausalLM,
    batch: Batch,
    loss: Loss,
    micro_batch_tokens: int,
    old_logprobs: dict[int, Tensor] | None = None,
    world: World = ALONE,
    optimizer: Optimizer | None = None,
) -> Sums:
    """Add the gradient of the whole batch's loss to the parameters' .grad, by micro-batches.

    old_logprobs maps a row to its log-probs under the policy that sampled it; None means that
    the model still IS that policy (the first update of a batch): then the ratio is exactly 1.
    """
    s = Sums()
    for rows, counts in world.rounds(list(micro_batches(batch.rollouts, micro_batch_tokens))):
        rollouts = [batch.rollouts[i] for i in rows]
        hidden, t = read_hidden(model, rollouts, loss.z_c_id, loss.temperature)
        old = None
        if old_logprobs is not None:
            old = torch.cat([old_logprobs[i] for i in rows]).to(hidden.device)
        loss_of, sums = loss_of_rows(batch, rows, loss, old, hidden.device)
        if not counts:  # another rank's rows: their loss is counted there
            loss_of = lambda logprobs, _: 0.0 * logprobs.sum()  # noqa: E731
        # backward from the loss through the readout and the model, all in here
        logprobs, entropy = loss_backward(
            hidden, model.lm_head_weight, t.target, loss_of, t.temperature
        )
        if optimizer is not None:
            optimizer.accumulate()  # a bf16 model's gradients are summed in fp32
        if not counts:
            continue
        logprobs, entropy = logprobs[: t.responses], entropy[: t.responses]
        policy, reward_loss, clipped, kl = sums.tolist()
        s.policy_loss += policy / batch.tokens
        s.self_reward_loss += reward_loss
        s.clip_fraction += clipped / batch.tokens
        s.approx_kl += kl / batch.tokens
        s.entropy += entropy.sum().item() / batch.tokens
        sampled = torch.tensor([x for r in rollouts for x in r.logprobs])
        # against the policy that sampled: how far this one has moved since is approx_kl's business
        gap = (sampled - (logprobs if old is None else old).cpu()).abs().max().item()
        s.sampler_gap = max(s.sampler_gap, gap)
        lengths = [len(r.prompt_tokens) + len(r.response_tokens) for r in rollouts]
        s.padded_tokens += max(lengths) * len(rows)
        s.real_tokens += sum(lengths)
    return s.of_all_ranks(world)


def update(
    model: CausalLM,
    optimizer: Optimizer,
    batch: Batch,
    loss: Loss,
    micro_batch_tokens: int,
    grad_clip: float,
    updates: int = 1,
) -> tuple[Sums, float, int]:
    """`updates` optimizer steps on one batch: (statistics and gradient norm of the last one, how
    many were skipped because a gradient was not finite)."""
    old_logprobs, skipped, world = None, 0, optimizer.world
    if updates > 1:
        # From the second step on the model is no longer the one that sampled: keep its log-probs.
        # (The sampler's own would do but for rounding: scored by one code, the first ratio is 1.)
        old_logprobs = {}
        with torch.no_grad():
            for rows, _ in world.rounds(list(micro_batches(batch.rollouts, micro_batch_tokens))):
                rollouts = [batch.rollouts[i] for i in rows]
                logprobs, _ = read(model, rollouts, loss.z_c_id, loss.temperature)
                counts = [len(r.response_tokens) for r in rollouts]
                old_logprobs |= zip(rows, logprobs.cpu().split(counts))
    for _ in range(updates):
        sums = accumulate_gradients(
            model, batch, loss, micro_batch_tokens, old_logprobs, world, optimizer
        )
        grad_norm = optimizer.clip(grad_clip)
        if math.isfinite(grad_norm):
            optimizer.step()
        else:
            skipped += 1  # one bad batch must not poison the weights and both moments for good
        optimizer.zero_grad()
    return sums, grad_norm, skipped


# ---------------------------------------------------------------------------------------------
# looking at a step


def statistics(rows: list[dict], group_size: int) -> dict:
    """What the rows of one step say, under the names of metrics.jsonl; None where undefined."""
    r_v = torch.tensor([row["r_v"] for row in rows]).view(-1, group_size)  # (P, G)
    ended = [row for row in rows if row["r_s"] is not None]
    right = [row["r_s"] for row in ended if row["r_v"] > 0.5]
    wrong = [row["r_s"] for row in ended if row["r_v"] <= 0.5]
    mean = lambda x: sum(x) / len(x) if x else None  # noqa: E731
    spread = r_v.std(1)  # (P,)
    return {
        "reward": r_v.mean().item(),
        "reward_std": spread.mean().item(),
        "r_s_correct": mean(right),
        "r_s_wrong": mean(wrong),
        "verification_f1": metrics.verification_f1(
            [row["r_v"] > 0.5 for row in rows], [row["r_s"] for row in rows]
        ).f1,
        "response_tokens": mean([row["response_tokens"] for row in rows]),
        "finished_share": mean([float(row["finished"]) for row in rows]),
        "boxed_share": mean([float(row["answer"] is not None) for row in rows]),
        "zero_std_groups": int((spread == 0).sum()),
    }


class Watch:
    """Notices when there is nothing to learn from, and says the likely cause."""

    PATIENCE = 20  # steps

    def __init__(self):
        self.degenerate = self.unboxed = self.truncated = 0

    def look(self, m: dict, problems: int) -> list[str]:
        """Warnings after this step's metrics: none, or one for each thing that has gone on for
        another PATIENCE steps."""
        count = lambda n, bad: n + 1 if bad else 0  # noqa: E731
        self.degenerate = count(self.degenerate, m["zero_std_groups"] == problems)
        self.unboxed = count(self.unboxed, m["boxed_share"] == 0)
        self.truncated = count(self.truncated, m["finished_share"] == 0)
        due = lambda n: n and n % self.PATIENCE == 0  # noqa: E731
        said = []
        if due(self.truncated):
            said.append(
                f"every solution of {self.truncated} steps was cut off: raise --max-new-tokens"
            )
        elif due(self.unboxed):
            said.append(
                f"no solution of {self.unboxed} steps had a \\boxed{{}} answer: does this model "
                "know the format?  Look at samples.jsonl"
            )
        elif due(self.degenerate):
            if m["reward"] in (0.0, 1.0):
                which = "right: harder" if m["reward"] else "wrong: easier"
                cause = f"now all {which} --data, or a larger --group-size"
            else:
                cause = "no problem is of medium difficulty: other --data, a larger --group-size"
            cut = 1 - m["finished_share"]
            if cut > 0.5:
                cause = f"{cut:.0%} were cut off: raise --max-new-tokens"
            said.append(
                f"for {self.degenerate} steps every group was all right or all wrong, so there is "
                f"nothing to compare; {cause}"
            )
        return said


# ---------------------------------------------------------------------------------------------
# c_ref


def estimate_c_ref(
    model: CausalLM,
    tokenizer,
    problems: list,
    pairs: int = 300,
    world: World = ALONE,
    **sampling,
) -> tuple[float, float, int, list[tuple[str, float, float]]]:
    """Mean and standard deviation, in nats, of log pi(z_c | x, y) of the untouched model over up
    to `pairs` sampled (problem, solution) pairs (the paper uses 300); how many of them had an end
    to read it at; and the same for every unused special token, steadiest first: [(token, mean,
    std), ...].

    ValueError if not one solution was finished.
    """
    n = -(-pairs // len(problems))  # solutions of each problem, rounded up
    model = gathered(model, world)
    rollouts = of_all_ranks(sample(model, tokenizer, problems, n, world, **sampling), world)
    if not all(math.isfinite(sum(r.logprobs)) for r in rollouts):
        raise ValueError("the model's log-probs are not finite: its weights hold NaN or infinity")
    rollouts = [r for r in rollouts if r.finished]
    if len(rollouts) < 2:
        raise ValueError(
            "c_ref cannot be estimated: no solution came to an end within --max-new-tokens; "
            "raise it, or give --c-ref a number"
        )
    candidates = [tokenizer.z_c_id, *tokenizer.unused_special_ids()]
    columns = torch.tensor(candidates, device=model.device)
    values = []
    with torch.no_grad():
        for i, rows in world.shard(list(enumerate(micro_batches(rollouts[:pairs], 8192)))):
            picked = [rollouts[i] for i in rows]
            sequences = [r.prompt_tokens + r.response_tokens for r in picked]
            tokens, lengths = pad(sequences, model.device)
            last = torch.arange(len(rows), device=model.device)
            hidden = model(tokens)[last, lengths - 1]  # (B, C) at the stop tokens
            # all candidates share one logsumexp: target 0's log-prob is logit[0] - lse
            logits = hidden.float() @ model.lm_head_weight[columns].float().T  # (B, candidates)
            zeros = torch.zeros(len(rows), dtype=torch.long, device=model.device)
            first = hidden.float() @ model.lm_head_weight[0].float()  # (B,)
            lse = first - token_logprobs(hidden, model.lm_head_weight, zeros)
            values.append([i, (logits - lse[:, None]).tolist()])
    values = torch.tensor([v for _, rows in world.gather(values, by=0) for v in rows])
    # (pairs, candidates)
    mean, std = values.mean(0).tolist(), values.std(0).tolist()
    others = sorted(zip(tokenizer.tokens(candidates[1:]), mean[1:], std[1:]), key=lambda x: x[2])
    return mean[0], std[0], len(values), others
