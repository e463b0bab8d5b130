"""
LaSeR in one file, in textbook operations: read this first, then the same thing fast.

    python tests/plain.py      # one training step of the embedded model, printed; a few seconds

This is the whole method, written as one would write it on paper: one solution at a time, a forward
pass over the whole text for every token, all logits of all tokens, autograd for the gradient.  No
KV cache, no padding, no micro-batches, no chunks; everything in float64.  It is far too slow to
train with.  The tests hold nanolaser/ to it: the fast code has to draw the same tokens and to
arrive at the same rewards, advantages, loss, gradient and weights.

The idea in three sentences.  A language model solves problems, a checker says which solutions are
right, and reinforcement learning makes right ones more likely (steps 1, 2, 4 and 5 without their
lines on r_s: GRPO).  LaSeR also teaches the model to say how sure it is of each solution, in ONE
number: the log-probability of a special token z_c, read right after the solution's end.  It costs
one token, and once learned it needs no checker: it ranks and weighs solutions to new problems.

    1. sample    G solutions y of each problem x, token by token;  log pi(z_c | x, y) after the end
    2. check     r_v = 1 if the checker accepts the answer, else 0
    3. reward    r_s = beta_v (log pi(z_c | x, y) - c_ref): what the model itself thinks of y
    4. compare   advantage = how much better a solution is than the others of its group
    5. update    one AdamW step on  policy loss + alpha * class-weighted mean of (r_s - r_v)^2

    here                                   fast, in nanolaser/
    forward, rotate, rms_norm              model.py       the same decoder, rows in a batch
    splitmix64, uniform, sample            sampler.py     with a KV cache (cache.py), many at a time
    advantages, class_weights, loss        laser.py       the same equations on tensors
    read                                   readout.py     without ever holding (T, V) logits
    train_step                             grpo.py, train.py

Shapes: T tokens, C hidden size, H query heads, K key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------
# 0. The model: a LLaMA / Qwen2 decoder.  `w` holds its weights under Hugging Face's names.


def forward(w: dict[str, Tensor], config, tokens: list[int]) -> Tensor:
    """Logits (T, V) of one text: row t is what the model expects after token t."""
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    T, eps = len(tokens), config.rms_norm_eps

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].double().T
        return y + w[f"{name}.bias"].double() if f"{name}.bias" in w else y

    # Token t may look at itself and to its left: -inf before the softmax is probability 0 after.
    future = torch.ones(T, T, dtype=torch.bool).triu(1)  # (T, T), True above the diagonal
    x = w["model.embed_tokens.weight"].double()[tokens]  # (T, C), the residual stream
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        # Attention: every token gathers from earlier ones what is like its question.
        h = rms_norm(x, w[f"{layer}.input_layernorm.weight"], eps)
        q = rotate(linear(h, f"{layer}.self_attn.q_proj").view(T, H, D), config)
        k = rotate(linear(h, f"{layer}.self_attn.k_proj").view(T, K, D), config)
        v = linear(h, f"{layer}.self_attn.v_proj").view(T, K, D)
        # Grouped-query attention: H / K query heads share one key-value head.
        k, v = (y.repeat_interleave(H // K, dim=1) for y in (k, v))  # (T, H, D)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(D)  # (H, T, T)
        shares = scores.masked_fill(future, -math.inf).softmax(-1)  # each row sums to 1
        gathered = torch.einsum("hqk,khd->qhd", shares, v).reshape(T, H * D)
        x = x + linear(gathered, f"{layer}.self_attn.o_proj")
        # MLP (SwiGLU): every token for itself.
        h = rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        gate, up = (linear(h, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        x = x + linear(gate * torch.sigmoid(gate) * up, f"{layer}.mlp.down_proj")
    x = rms_norm(x, w["model.norm.weight"], eps)
    # The output matrix; small models use the embedding a second time ("tied").
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return x @ head.double().T  # (T, V)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x divided by its root mean square, times a weight."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double()


def rotate(x: Tensor, config) -> Tensor:
    """Rotary position embedding of x (T, heads, D): the numbers i and i + D/2 of a head are a point
    in the plane, turned by an angle that grows with the token's position t."""
    assert config.rope_scaling is None, "plain rope only"
    T, _, D = x.shape
    speed = config.rope_theta ** (-torch.arange(0, D, 2).double() / D)  # (D/2,) radians per token
    angle = (torch.arange(T).double()[:, None] * speed)[:, None]  # (T, 1, D/2)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---------------------------------------------------------------------------------------------
# 1. Sample.


@dataclass
class Solution:
    """One solution, from its first token to its part in the loss; filled in from top to bottom."""

    x: list[int]  # the problem's tokens
    y: list[int] = field(default_factory=list)  # its own, the stop token included
    logprobs: list[float] = field(default_factory=list)  # log pi of each token of y, when sampled
    finished: bool = False  # ended by a stop token; else truncated: it has no end
    logp_zc: float | None = None  # log pi(z_c | x, y), None without an end
    r_v: float = 0.0  # the checker's verdict
    r_s: float = 0.0  # the model's own
    advantage: float = 0.0
    weight: float = 0.0  # in the loss on r_s


def splitmix64(x: int) -> int:
    """A good hash of 64 bits: every bit of x changes about half of the bits of the result."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def uniform(seed: int, stream: int, step: int) -> float:
    """A random number in [0, 1) that depends on these three alone: so the n-th token of a solution
    is the same, whatever else is sampled beside it, before it or after it."""
    golden = 0x9E3779B97F4A7C15
    key = splitmix64((seed * golden + golden) % 2**64)
    key = splitmix64((key + stream * golden) % 2**64)
    return (splitmix64((key + step * golden) % 2**64) >> 11) / 2**53


@torch.no_grad()
def sample(
    w, config, tokenizer, x: list[int], stream: int, seed: int, max_new_tokens: int, temperature
) -> Solution:
    """One solution of the problem x, drawn from the model token by token."""
    s = Solution(x)
    while not s.finished and len(s.y) < max_new_tokens:
        logits = forward(w, config, s.x + s.y)[-1]  # (V,), after the last token so far
        p = torch.softmax(logits / temperature, dim=-1)
        # Inverse transform: lay the probabilities end to end on a line and see where u falls.
        #     p = (0.5, 0.2, 0.3),  cdf = (0.5, 0.7, 1.0),  u = 0.6  ->  token 1
        # Rows of the output matrix beyond the tokenizer's size are padding: never drawn.
        cdf = p[: tokenizer.size].cumsum(-1)
        u = uniform(seed, stream, len(s.y)) * cdf[-1]
        token = int((cdf <= u).sum())  # the first whose cdf exceeds u
        s.y.append(token)
        s.logprobs.append(p[token].log().item())
        s.finished = token in tokenizer.stop_ids
    if s.finished:
        # LaSeR's one extra step: the model is fed the stop token as well, and asked what it expects
        # AFTER it.  z_c never follows: it is only looked at.  Always at temperature 1.
        #     x = [12, 7], y = [5, 9, STOP]:   row 4 of forward([12, 7, 5, 9, STOP])
        logits = forward(w, config, s.x + s.y)[-1]
        s.logp_zc = torch.log_softmax(logits, dim=-1)[tokenizer.z_c_id].item()
    return s


# ---------------------------------------------------------------------------------------------
# 3. and 4.  From rewards to advantages, one group at a time.


def normalised(rewards: list[float], eps: float = 1e-6) -> list[float]:
    """(r - mean) / std of a group: [1, 0, 0, 1] -> [0.87, -0.87, -0.87, 0.87]; all zero where the
    group is all right or all wrong, and there is nothing to compare."""
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)  # std divides by n - 1
    return [(r - mean) / (std + eps) for r in rewards]


def advantages(group: list[Solution], tau: float, min_std: float) -> None:
    """A = (1 - tau) A_v + tau A_s of the solutions to ONE problem."""
    a_v = normalised([s.r_v for s in group])
    # r_s has no bounds; what it claims beyond [0, 1] is not believed.  Truncated: 0, the least.
    r_s = [min(max(s.r_s, 0.0), 1.0) if s.finished else 0.0 for s in group]
    # Where r_s hardly differs, dividing by its std would blow noise up to the size of a signal.
    tau = tau if statistics.stdev(r_s) > min_std else 0.0
    for s, v, own in zip(group, a_v, normalised(r_s)):
        s.advantage = (1 - tau) * v + tau * own


def class_weights(solutions: list[Solution]) -> None:
    """Right and wrong solutions get the same say in the loss on r_s, whatever their numbers: of 6
    right and 2 wrong ones each right one weighs 8 / 12, each wrong one 8 / 4.  Truncated ones 0."""
    ended = [s for s in solutions if s.finished]
    for s in ended:
        s.weight = len(ended) / (2 * sum(
            (other.r_v > 0.5) == (s.r_v > 0.5) for other in ended))  # fmt: skip


# ---------------------------------------------------------------------------------------------
# 5. The loss, and the step.


def read(w, config, s: Solution, z_c_id: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The log-probs (n,) of a solution's n tokens and log pi(z_c), now, with gradients."""
    logits = forward(w, config, s.x + s.y)  # (T, V)
    # Row t speaks of token t + 1.  x = [12, 7], y = [5, 9, STOP]:
    #     token      12    7     5     9    STOP
    #     row t       0    1     2     3     4
    #     speaks of   7    5     9    STOP  z_c      y is read at rows 1, 2, 3, z_c at row 4
    first, n = len(s.x) - 1, len(s.y)
    of_y = torch.log_softmax(logits[first : first + n] / temperature, dim=-1)  # (n, V)
    logprobs = of_y[torch.arange(n), torch.tensor(s.y)]
    return logprobs, torch.log_softmax(logits[-1], dim=-1)[z_c_id]


def loss(w, config, solutions: list[Solution], z_c_id: int, o) -> tuple[Tensor, Tensor]:
    """(policy loss, self-reward loss); the sum to be minimised is policy + alpha * self-reward."""
    M = sum(len(s.y) for s in solutions)  # response tokens of the whole batch
    ended = sum(s.finished for s in solutions)
    policy, self_reward = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for s in solutions:
        logprobs, logp_zc = read(w, config, s, z_c_id, o.temperature)
        for logp, old in zip(logprobs, s.logprobs):
            # PPO's clipped surrogate.  ratio is 1 as long as the model is the one that sampled;
            # its gradient is then that of log pi: more of what has A > 0, less of the rest.  After
            # several steps on one batch the clip says: no more than 20 % from here.
            ratio = torch.exp(logp - old)
            gain = torch.min(
                s.advantage * ratio, s.advantage * ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
            )
            if s.advantage < 0:  # dual clip: a floor where the ratio explodes
                gain = torch.max(gain, torch.tensor(o.dual_clip * s.advantage))
            policy = policy - gain / M
        if s.finished:
            # Right solutions should have r_s = 1, wrong ones 0.  At beta_v = 0.1 and c_ref = -23,
            # "1" is log pi = -13: so improbable still that z_c is never drawn by chance.
            r_s = o.beta_v * (logp_zc - o.c_ref)
            self_reward = self_reward + s.weight * (r_s - s.r_v) ** 2 / ended
    return policy, self_reward


def adamw(w: dict[str, Tensor], state: dict, lr: float, weight_decay: float) -> None:
    """One AdamW step from the gradients in .grad; `state` is empty before the first."""
    state["t"] = t = state.get("t", 0) + 1
    b1, b2, eps = 0.9, 0.999, 1e-8
    for name, p in w.items():
        # Running means of the gradient and of its square, corrected for having begun at zero: a
        # weight moves by about lr, however large its gradients are.
        m, v = state.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
        m, v = b1 * m + (1 - b1) * p.grad, b2 * v + (1 - b2) * p.grad**2
        state[name] = m, v
        with torch.no_grad():
            p -= lr * weight_decay * p
            p -= lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)


def train_step(w, config, tokenizer, problems: list[list[int]], check, o, seed: int, state: dict):
    """One step, from problems to changed weights: (solutions, policy loss, self-reward loss).

    `check(problem's index, y)` is the checker; `w` holds float32 leaves that require gradients.
    """
    groups = []
    for i, x in enumerate(problems):
        # 1. sample: every solution has a stream of random numbers of its own
        group = [
            sample(w, config, tokenizer, x, i * o.group_size + j, seed, o.max_new_tokens,
                   o.temperature)
            for j in range(o.group_size)
        ]  # fmt: skip
        for s in group:
            s.r_v = check(i, s.y)  # 2. check
            if s.finished:
                s.r_s = o.beta_v * (s.logp_zc - o.c_ref)  # 3. reward
        advantages(group, o.tau, o.min_std)  # 4. compare
        groups.append(group)
    solutions = [s for group in groups for s in group]
    class_weights(solutions)
    # 5. update
    policy, self_reward = loss(w, config, solutions, tokenizer.z_c_id, o)
    (policy + o.alpha * self_reward).backward()
    # Clip: the gradients of all weights together are one long vector, of at most this length.
    norm = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in w.values()))
    for p in w.values():
        p.grad *= min(1.0, o.grad_clip / norm)
    adamw(w, state, o.lr, o.weight_decay)
    for p in w.values():
        p.grad = None
    return solutions, policy.item(), self_reward.item()


@dataclass
class Settings:
    """train.py's options of the same names, as the embedded run has them, but fewer solutions."""

    group_size: int = 4
    max_new_tokens: int = 96
    temperature: float = 1.0
    alpha: float = 0.5
    beta_v: float = 0.1
    c_ref: float = -23.0
    tau: float = 0.1
    min_std: float = 0.1
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    lr: float = 4e-4
    weight_decay: float = 0.01
    grad_clip: float = 1.0


def main() -> None:
    """One step of the embedded model on two problems, and what became of each solution."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from nanolaser import is_correct, load_pretrained
    from nanolaser.problems import made_up_problems

    model, tokenizer = load_pretrained("tiny", device="cpu", dtype="float32")
    problems = made_up_problems(2, seed=0)
    check = lambda i, y: float(is_correct(tokenizer.decode(y), problems[i].answer))  # noqa: E731
    w = dict(model.named_parameters())
    prompts = [tokenizer.encode_prompt(p.problem) for p in problems]
    # c_ref is what log pi(z_c) is before any training, on average: nearly the same everywhere.
    first = [sample(w, model.config, tokenizer, x, i, 1, 96, 1.0) for i, x in enumerate(prompts)]
    o = Settings(c_ref=statistics.mean(s.logp_zc for s in first if s.finished))
    print(f"c_ref = {o.c_ref:.2f} nats")
    solutions, policy, self_reward = train_step(
        w, model.config, tokenizer, prompts, check, o, 0, {}
    )
    for i, s in enumerate(solutions):
        if i % o.group_size == 0:
            print(f"\n{problems[i // o.group_size].problem}")
            print(f"{'r_v':>5}{'r_s':>7}{'A':>7}{'weight':>8}  solution")
        own = f"{s.r_s:7.2f}" if s.finished else "      -"
        text = " ".join(tokenizer.decode(s.y).split())
        print(f"{s.r_v:5.0f}{own}{s.advantage:7.2f}{s.weight:8.2f}  {text[-60:]}")
    print(f"\npolicy loss {policy:.4f} + {o.alpha} * self-reward loss {self_reward:.4f}")


if __name__ == "__main__":
    main()
