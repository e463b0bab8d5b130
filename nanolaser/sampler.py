"""
Sampling: problems in, rollouts out, each with log pi(z_c) read one token after its end.

The textbook (tests/plain.py) writes one solution at a time and sends the whole text through the
model for every token.  Here many are written at a time, and a KV cache (cache.py) leaves one token
a row to compute.  What happens to one rollout, problem 12 7, in steps of the loop below:

    step   fed to the model     log-probs come out after    and then
     1     12 7 (PREFILL)       7                           5 is drawn
     2     5    (DECODE)        5                           9 is drawn
     3     9    (DECODE)        9                           STOP is drawn: finished
     4     STOP (DECODE)        STOP                        log pi(z_c) is read; the row is freed

So LaSeR costs one more token in the same batch: no second model, no second pass.  A rollout that
reaches its limit first is truncated: it has no end, so no z_c, and leaves at once.  Waiting prompts
take the rows that are freed (continuous batching): the cost follows the tokens really produced,
where a static batch waits for its longest row.

Shapes: R running rows, P prompts, T tokens, C hidden size, V vocabulary, N rollouts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cache import KVCache
from .model import CausalLM
from .packing import cut_by_tokens, pad
from .readout import logits_of, mixed
from .rollout import Rollout

PREFILL_TOKENS = 16_384  # of prompts, padding included, in one forward pass

# ---------------------------------------------------------------------------------------------
# randomness without generators, and the next token


def _splitmix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: int64 -> int64, every input bit stirs every output bit."""
    shift = lambda y, n: (y >> n) & ((1 << (64 - n)) - 1)  # noqa: E731  logical, not arithmetic
    x = (x ^ shift(x, 30)) * _MIX1
    x = (x ^ shift(x, 27)) * _MIX2
    return x ^ shift(x, 31)


# Its constants, as signed 64-bit integers (torch has no full unsigned arithmetic).
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def uniforms(seed: int, streams: Tensor, steps: Tensor) -> Tensor:
    """Float64 in [0, 1), one a (seed, stream, step): the same on any device, in any order."""
    # Counter-based: where torch.rand keeps a state that every draw moves on, this is a hash of its
    # arguments.  A row that moves, waits or begins anew has nothing to carry, and the same seed
    # gives the same text whatever rows happen to share the batch.
    key = _splitmix(torch.full_like(streams, seed) * _GOLDEN + _GOLDEN)
    key = _splitmix(key + streams * _GOLDEN)
    bits = _splitmix(key + steps * _GOLDEN)
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53  # the upper 53 bits: a double has 53


def sample_next(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """One token id below `size` a row (R,) from logits (R, V) and uniforms (R,), the most likely at
    temperature 0; and their log-probs (R,) in nats, in the distribution before top-p."""
    if temperature == 0.0:
        token = logits[:, :size].argmax(-1, keepdim=True)  # (R, 1)
        return token[:, 0], logits.gather(1, token)[:, 0] - logits.logsumexp(-1)
    # One pass of exponentials serves both.  What is drawn is never so unlikely that its
    # probability would be rounded to 0, or its logarithm less exact than a logit - logsumexp.
    probs = (logits if temperature == 1.0 else logits / temperature).softmax(-1)  # (R, V)
    weights, order = probs[:, :size], None
    if top_p < 1.0:  # only then is anything sorted
        # The smallest set of tokens whose probability reaches top_p; the most likely always in.
        #     probs 0.5 0.3 0.2, top_p 0.6:  before them lie 0 0.5 0.8, so the first two are kept
        weights, order = weights.sort(-1, descending=True)
        before = weights.cumsum(-1) - weights
        weights = weights.masked_fill(before >= top_p * weights.sum(-1, keepdim=True), 0.0)
    # The textbook is torch.multinomial(weights, 1), with a random number of its own.  Ours comes
    # from outside: lay the weights end to end on a line, and see into which of them it falls.
    #     weights 0.5 0.2 0.3,  cdf 0.5 0.7 1.0,  uniform 0.6  ->  token 1
    cdf = weights.cumsum(-1)  # (R, size)
    # Scaled by the CDF's own last entry (fp32 sums end near 1, not at 1); a token of probability
    # zero has an interval of width zero, and right=True never lands in one.
    end = cdf[:, -1:]  # (R, 1)
    target = (uniform[:, None] * end.double()).to(cdf.dtype)  # (R, 1)
    # fp32 may round the target up to the very end, beyond which there is no token: stay below it.
    # The first entry that reaches the end is again one of a width above zero.
    target = torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))
    token = torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[-1] - 1)
    token = token if order is None else order.gather(1, token)  # a place in the order -> an id
    return token[:, 0], probs.gather(1, token)[:, 0].log()


# ---------------------------------------------------------------------------------------------
# the sampler


@torch.no_grad()
def generate(
    model: CausalLM, tokenizer, prompts: list[str] | list[list[int]], n: int = 1,
    max_new_tokens: int = 256, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
    max_rows: int = 256, kv_cache_gb: float | None = None,
    on_finish: Callable[[Rollout], object] = lambda rollout: None,
    on_step: Callable[[list[Rollout]], object] = lambda running: None,
    streams: list[int] | None = None,
) -> list[Rollout]:  # fmt: skip
    """n solutions of each prompt (problem text, or ready token ids): P * n rollouts, in order.

    `on_finish` hears of every rollout as it ends, `on_step` of those that were running in a step,
    at most max_rows.  `streams` holds the stream of random numbers of each prompt's first solution,
    from which the others count up; a rollout's n-th token depends on (seed, stream, n) alone.
    `kv_cache_gb` (GB of 1e9 bytes; None: any) bounds the KV cache: prompts wait, and if rows grow
    beyond it the youngest are preempted and go on later, with the same tokens.
    ValueError for a count below 1, an empty prompt, or if one row at its longest would not fit.
    """
    # 1. What is asked for: N = P * n rollouts, prompt by prompt, each with a stream of its own.  (A
    #    problem that keeps its stream keeps its solutions, whatever else is sampled in the call.)
    for name, count in (("n", n), ("max_new_tokens", max_new_tokens), ("max_rows", max_rows)):
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")
    tokens = [tokenizer.encode_prompt(p) if isinstance(p, str) else list(p) for p in prompts]
    refuse_empty(tokens)
    rollouts = [Rollout(i, x, sample_id=j) for i, x in enumerate(tokens) for j in range(n)]
    firsts = [i * n for i in range(len(tokens))] if streams is None else streams
    streams = [first + j for first in firsts for j in range(n)]
    # 2. A cache in which the longest of them fits.
    longest, c = max(map(len, tokens), default=0) + max_new_tokens, model.config
    shape = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
    budget = None if kv_cache_gb is None else int(kv_cache_gb * 1e9)
    cache = KVCache(*shape, longest, model.device, model.dtype, budget)
    needed = cache.bytes_for(longest)
    if budget is not None and needed > budget:
        raise ValueError(
            f"a KV cache of {kv_cache_gb:g} GB does not hold one row of {longest} tokens, which "
            f"takes {needed / 1e9:.3g} GB: raise --kv-cache-gb or lower --max-new-tokens"
        )
    # 3. One token a step for every row, until nobody waits or runs.
    engine = _Engine(model, tokenizer, rollouts, streams, cache, max_rows)
    while engine.waiting or cache.running:
        left = engine.step(max_new_tokens, temperature, top_p, seed)
        on_step([rollouts[i] for i in cache.running] + left)
        for rollout in left:
            on_finish(rollout)
    return rollouts


class _Engine:
    """Which rollouts wait, and which run: rollout i while sequence i has a row in the cache."""

    def __init__(self, model, tokenizer, rollouts, streams, cache, max_rows):
        self.model, self.tokenizer, self.rollouts, self.cache = model, tokenizer, rollouts, cache
        self.streams = torch.tensor(streams)  # (N,) of random numbers
        self.max_rows = min(max_rows, len(rollouts))  # that run at a time
        # (V, C): logits are fp32, so a bf16 matrix is widened, once a call, where it has to be.
        self.head = model.lm_head_weight
        self.head = self.head if mixed(self.head) else self.head.float()
        self.waiting = list(range(len(rollouts)))[::-1]  # a stack: the first prompts go first

    def step(self, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> list:
        """A token for every rollout that goes on, z_c of all that have ended; those that left."""
        # 1. DECODE: the newest token of every running rollout passes the model.  Rows that
        #    outgrow the cache's budget make room for each other: the youngest is preempted, having
        #    the least to lose.  Prompt and response are prefilled again later, as one prompt.
        while not self.cache.reserve():
            youngest = max(self.cache.running)
            self.cache.drop([youngest])
            self.waiting.append(youngest)
        running, hidden = self.cache.running, []
        if running:
            newest = [[self.rollouts[i].response_tokens[-1]] for i in running]
            newest = self.to_device(newest)  # (R, 1)
            hidden.append(self.model(newest, self.cache.decode())[:, 0])  # (R, C)
        # 2. PREFILL: waiting rollouts take free rows, each distinct prompt passing once.  Prompts
        #    of like length share a pass: one of 4000 tokens would make 64 short ones as long.
        groups = self.admit()  # [[0, 1, 2], [3]]: rollouts 0 to 2 share a prompt
        for batch in cut_by_tokens([self.length(g[0]) for g in groups], PREFILL_TOKENS):
            sequences, states = self.prefill([groups[g] for g in batch])
            running = running + sequences
            hidden.append(states)
        # 3. SAMPLE the next token from the last hidden state of every row.  Output rows beyond the
        #    tokenizer's size are padding of the matrix: never drawn.
        rollouts = [self.rollouts[i] for i in running]
        logits = logits_of(torch.cat(hidden), self.head)  # (R, V)
        steps = torch.tensor([len(r.response_tokens) for r in rollouts])  # (R,)
        uniform = self.to_device(uniforms(seed, self.streams[running], steps))
        tokens, logprobs = sample_next(logits, uniform, temperature, top_p, self.tokenizer.size)
        # 4. READ z_c where the token just fed was the stop token; at temperature 1, always.
        ended = [row for row, rollout in enumerate(rollouts) if rollout.finished]
        last = logits[self.to_device(torch.tensor(ended, dtype=torch.long))]  # (E, V)
        logp_zc = last[:, self.tokenizer.z_c_id] - last.logsumexp(-1)
        # The one place in a step where the host waits for the device.  (fp64 holds ids and fp32.)
        numbers = torch.cat([x.double() for x in (tokens, logprobs, logp_zc)]).tolist()
        R = len(rollouts)
        tokens, logprobs, logp_zc = numbers[:R], numbers[R : 2 * R], iter(numbers[2 * R :])
        # 5. LEAVE: those whose z_c is read, and those that have reached their limit without end.
        leaving = []
        for i, rollout, token, logprob in zip(running, rollouts, tokens, logprobs):
            if rollout.finished:  # and what was drawn after its end is nobody's
                rollout.logp_zc = next(logp_zc)
                leaving.append(i)
                continue
            rollout.response_tokens.append(int(token))
            rollout.logprobs.append(logprob)
            rollout.finished = token in self.tokenizer.stop_ids  # read in the next step
            if not rollout.finished and len(rollout.response_tokens) == max_new_tokens:
                leaving.append(i)  # truncated
        self.cache.drop(leaving)
        return [self.rollouts[i] for i in leaving]

    def admit(self) -> list[list[int]]:
        """As many waiting rollouts as there is room for, in groups that share their tokens."""
        # Few large prefills beat many small ones: wait until a quarter of the rows is free.
        rows = len(self.cache.running)
        if rows and self.max_rows - rows < max(1, self.max_rows // 4):
            return []
        groups: dict[tuple, list[int]] = {}
        free = self.cache.free_bytes
        while self.waiting and rows < self.max_rows:
            i = self.waiting[-1]
            free -= self.cache.bytes_for(self.length(i))
            if free < 0:
                break  # nobody overtakes: what waits longest is next
            # The solutions of a problem share its prompt; one that was preempted has tokens of its
            # own by now, and nobody to share them with.
            own = i if self.rollouts[i].response_tokens else -1
            groups.setdefault((self.rollouts[i].prompt_id, own), []).append(i)
            self.waiting.pop()
            rows += 1
        return list(groups.values())

    def length(self, i: int) -> int:
        """Tokens that a rollout has so far."""
        return len(self.rollouts[i].prompt_tokens) + len(self.rollouts[i].response_tokens)

    def prefill(self, groups: list[list[int]]) -> tuple[list[int], Tensor]:
        """The rollouts of groups, each now with a row of the cache, and their last hidden states
        (R, C), from one forward pass over the tokens that each group shares."""
        firsts = [self.rollouts[group[0]] for group in groups]
        tokens, lengths = pad([r.prompt_tokens + r.response_tokens for r in firsts])
        # Groups [[0, 1, 2], [3]]: sequences 0 1 2 3 begin with prompts 0 0 0 1.
        sequences = [i for group in groups for i in group]
        sources = [row for row, group in enumerate(groups) for _ in group]
        past = self.cache.admit(sequences, sources, lengths.tolist())
        hidden = self.model(self.to_device(tokens), past)  # (P, T, C)
        last = self.to_device(torch.stack((torch.tensor(sources), lengths[sources] - 1)))  # (2, R)
        return sequences, hidden[last[0], last[1]]  # each at its last real token

    def to_device(self, numbers: list | Tensor) -> Tensor:
        """Numbers of the host, on the device as soon as it gets there: nobody waits."""
        return torch.as_tensor(numbers).to(self.model.device, non_blocking=True)


def refuse_empty(prompts: list[list[int]]) -> None:
    """ValueError for a prompt of no tokens: its first token would be drawn at another row's."""
    if not all(prompts):
        raise ValueError(f"prompt {prompts.index([])} is empty: no token to go on from; does the "
                         "chat template write the message?")  # fmt: skip
