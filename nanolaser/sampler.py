"""
Sampling: problems in, rollouts out, each with log pi(z_c) read one token after its end.

    waiting prompts --prefill once--> fan out to the group's rows --one token a row a turn-->
        row drew a stop token  -> that token is fed once more; the model's next-token
                                  distribution there gives log pi(z_c); the row leaves
        row reached its limit  -> truncated: it has no end, so no z_c; the row leaves

Rows leave the batch in the turn they end and waiting prompts take their places (continuous
batching), so the cost follows the tokens really produced.  Reading z_c costs one token in the
same batch: no second model, no second pass.

Randomness: the n-th token of a rollout is drawn with a number that depends on (seed, stream, n)
alone, where the stream is the rollout's place in the call, or what the caller says it is.  So the
same seed gives the same text whatever rows happen to share the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .cache import KVCache
from .model import CausalLM
from .readout import token_logprobs
from .rollout import Rollout


PREFILL_TOKENS = 16_384  # of prompts, padding included, in one forward pass
STRETCH = 16  # prompts so many times longer than what the model was trained on are a mistake


# ---------------------------------------------------------------------------------------------
# randomness without generators

# SplitMix64's constants, as signed 64-bit integers (torch has no full unsigned arithmetic).
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def _splitmix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: int64 -> int64, every input bit stirs every output bit."""
    shift = lambda y, n: (y >> n) & ((1 << (64 - n)) - 1)  # noqa: E731  logical, not arithmetic
    x = (x ^ shift(x, 30)) * _MIX1
    x = (x ^ shift(x, 27)) * _MIX2
    return x ^ shift(x, 31)


def uniforms(seed: int, rows: Tensor, steps: Tensor) -> Tensor:
    """Float64 in [0, 1), one for each (seed, row, step): the same on every device, in any order.

    A counter-based generator: no state to carry for a row that moves, waits or is started anew.
    """
    key = _splitmix(torch.full_like(rows, seed) * _GOLDEN + _GOLDEN)
    key = _splitmix(key + rows * _GOLDEN)
    bits = _splitmix(key + steps * _GOLDEN)
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """One token id below `size` a row (R,) from logits (R, V) and uniforms (R,), by inverting the
    CDF; and the log-probs (R,) of these tokens, in nats, in the distribution before top-p.

    temperature 0 is argmax.  Nothing is sorted unless top_p < 1 asks for it.
    """
    if temperature == 0.0:
        token = logits[:, :size].argmax(-1, keepdim=True)  # (R, 1)
        return token[:, 0], logits.gather(1, token)[:, 0] - logits.logsumexp(-1)
    # One pass of exponentials serves both.  What is drawn is never so unlikely that its
    # probability would be rounded to 0, or its logarithm less exact than a logit - logsumexp.
    probs = (logits if temperature == 1.0 else logits / temperature).softmax(-1)  # (R, V)
    weights, order = probs[:, :size], None
    if top_p < 1.0:
        # the smallest set of tokens whose probability reaches top_p; the most likely always in
        weights, order = weights.sort(-1, descending=True)
        before = weights.cumsum(-1) - weights
        weights = weights.masked_fill(before >= top_p * weights.sum(-1, keepdim=True), 0.0)
    cdf = weights.cumsum(-1)
    # Scaled by the CDF's own last entry (fp32 sums end near 1, not at 1); a token of probability
    # zero has an interval of width zero, and right=True never lands in one.
    end = cdf[:, -1:]  # (R, 1)
    target = (uniform[:, None] * end.double()).to(cdf.dtype)
    # fp32 may round the target up to the very end, beyond which there is no token: stay below it.
    # The first entry that reaches the end is again one of a width above zero.
    target = torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))
    token = torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[-1] - 1)
    token = token if order is None else order.gather(1, token)
    return token[:, 0], probs.gather(1, token)[:, 0].log()


# ---------------------------------------------------------------------------------------------
# the sampler


@torch.no_grad()
def generate(
    model: CausalLM,
    tokenizer,
    prompts: list[str] | list[list[int]],
    n: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_rows: int = 256,
    kv_cache_gb: float | None = None,
    on_tokens: Callable[[int], None] | None = None,
    on_finish: Callable[[Rollout], None] | None = None,
    on_turn: Callable[[list[Rollout]], None] | None = None,
    streams: list[int] | None = None,
) -> list[Rollout]:
    """n solutions of each prompt (problem text, or ready token ids): P * n rollouts, in order.

    `on_tokens(k)` hears of every turn's k new tokens, `on_finish(rollout)` of every rollout as
    it ends, `on_turn(rollouts)` of all that are in flight.  At most max_rows are, at a time.
    `streams` holds the random stream of each prompt's first solution, the next ones count up from
    it: a problem that keeps its stream keeps its solutions, whatever else is sampled in the call.
    `kv_cache_gb` (GB of 1e9 bytes; None: any) bounds the KV cache: prompts wait until they fit, and
    if rows outgrow it the youngest give way and go on later; the tokens are the same.
    ValueError for a count below 1, an empty prompt, or if one row at its longest would not fit.
    """
    for name, count in (("n", n), ("max_new_tokens", max_new_tokens), ("max_rows", max_rows)):
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")
    ids = [tokenizer.encode_prompt(p) if isinstance(p, str) else list(p) for p in prompts]
    _refuse_empty(ids)
    rollouts = [Rollout(i, x, sample_id=j) for i, x in enumerate(ids) for j in range(n)]
    firsts = [i * n for i in range(len(ids))] if streams is None else streams
    rows = [first + j for first in firsts for j in range(n)]
    longest = max(map(len, ids), default=0) + max_new_tokens
    budget = None if kv_cache_gb is None else int(kv_cache_gb * 1e9)
    cache = KVCache(model.config, longest, model.device, model.dtype, budget)
    needed = cache.bytes_for(longest)
    if budget is not None and needed > budget:
        raise ValueError(
            f"a KV cache of {kv_cache_gb:g} GB does not hold one row of {longest} tokens, which "
            f"takes {needed / 1e9:.3g} GB: raise --kv-cache-gb or lower --max-new-tokens"
        )
    batch = _Batch(model, tokenizer, rollouts, rows, cache, max_rows, temperature, top_p, seed)
    while batch.waiting or cache.ids:
        ended, drawn = batch.turn(max_new_tokens)
        if on_tokens is not None:
            on_tokens(drawn)
        if on_turn is not None:
            on_turn([rollouts[i] for i in cache.ids] + ended)
        for rollout in ended:
            if on_finish is not None:
                on_finish(rollout)
    return rollouts


def check_prompts(model: CausalLM, tokenizer, problems: list[str]) -> None:
    """Warns of problems whose prompt alone is longer than the model was made for; ValueError for
    one over STRETCH times as long: before anything is sampled, and not as an error of memory hours
    later."""
    positions = model.config.max_position_embeddings
    lengths = [len(tokenizer.encode_prompt(problem)) for problem in problems]
    longer = [i for i, length in enumerate(lengths) if length > positions]
    if not longer:
        return
    worst = max(longer, key=lengths.__getitem__)
    begins = f"{' '.join(problems[worst][:200].split())[:40]}..."
    said = f"problem {worst + 1} has {lengths[worst]} tokens; the model was made for {positions}"
    if lengths[worst] > STRETCH * positions:
        raise ValueError(f"{said}: {begins}")
    # A benchmark is the same for every model: such a problem is asked, and hardly ever solved.
    print(f"warning: {len(longer)} of {len(problems)} problems are too long: {said}: {begins}",
          file=sys.stderr)  # fmt: skip


def _refuse_empty(prompts: list[list[int]]) -> None:
    # The first token is drawn at the prompt's last one: without any it would be another row's.
    if not all(prompts):
        raise ValueError(
            f"prompt {prompts.index([])} is empty: no token to go on from; does the chat template "
            "write the message?"
        )


class _Batch:
    """The rollouts in flight: those that own a row of the cache."""

    def __init__(
        self, model, tokenizer, rollouts, streams, cache, max_rows, temperature, top_p, seed
    ):
        self.model, self.tokenizer, self.rollouts, self.cache = model, tokenizer, rollouts, cache
        self.streams = torch.tensor(streams)  # of random numbers, one a rollout
        self.max_rows = min(max_rows, len(rollouts))
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.stop_ids = set(tokenizer.stop_ids)
        self.head = model.lm_head_weight.float()  # (V, C): logits are fp32; widened once a call
        self.waiting = list(range(len(rollouts)))[::-1]  # a stack: the first prompts go first

    def turn(self, max_new_tokens: int) -> tuple[list[Rollout], int]:
        """One token for every row that goes on, and z_c of every row that has ended: returns the
        rollouts that left and how many tokens were drawn."""
        parts = [*self.feed(), *self.admit()]
        ids = [i for part, _ in parts for i in part]
        hidden = torch.cat([states for _, states in parts])  # (R, C)
        rollouts = [self.rollouts[i] for i in ids]
        # Rows whose stop token has been fed have come here to be read, the others to draw.
        over = [row for row, rollout in enumerate(rollouts) if rollout.finished]
        tokens, logprobs, logp_zc = self.sample(hidden, ids, over)
        for row, value in zip(over, logp_zc):
            rollouts[row].logp_zc = value
        left = list(over)
        for row, rollout in enumerate(rollouts):
            if rollout.finished:
                continue
            rollout.response_tokens.append(tokens[row])
            rollout.logprobs.append(logprobs[row])
            rollout.finished = tokens[row] in self.stop_ids
            if not rollout.finished and len(rollout.response_tokens) == max_new_tokens:
                left.append(row)  # truncated
        self.cache.drop([ids[row] for row in left])
        return [rollouts[row] for row in left], len(ids) - len(over)

    def feed(self) -> Iterator[tuple[list[int], Tensor]]:
        """Run the model over every row's newest token: the rows' owners and hidden states."""
        while not self.cache.grow():
            # The youngest have the least to lose: prompt and response are read again later, as
            # one prompt, and the response goes on from there.
            youngest = max(self.cache.ids)
            self.cache.drop([youngest])
            self.waiting.append(youngest)
        ids = self.cache.ids
        if ids:
            newest = [[self.rollouts[i].response_tokens[-1]] for i in ids]
            tokens = torch.tensor(newest, device=self.model.device)  # (R, 1)
            yield ids, self.model(tokens, self.cache)[:, 0]

    def admit(self) -> Iterator[tuple[list[int], Tensor]]:
        """Prefill waiting prompts into free rows, each distinct prompt once: the new rows' owners
        and hidden states, piece by piece."""
        # Few large prefills beat many small ones: wait until a quarter of the rows is free.
        rows = len(self.cache.ids)
        if rows and self.max_rows - rows < max(1, self.max_rows // 4):
            return
        groups: dict[tuple, list[int]] = {}  # rollouts that go on from the same tokens
        room, length = self.cache.room, self.length
        while self.waiting and rows < self.max_rows:
            i = self.waiting[-1]
            room -= self.cache.bytes_for(length(i))
            if room < 0:
                break  # nobody overtakes: what waits longest is next
            started = i if self.rollouts[i].response_tokens else -1
            groups.setdefault((self.rollouts[i].prompt_id, started), []).append(i)
            self.waiting.pop()
            rows += 1
        # In pieces, neighbours in length together: one prompt of 4000 tokens among 64 short ones
        # would make all of them 4000 tokens long.
        shared = list(groups.values())
        for piece in cut_by_tokens([length(group[0]) for group in shared], PREFILL_TOKENS):
            yield self.prefill([shared[g] for g in piece])

    def length(self, i: int) -> int:
        """Tokens that a rollout has so far."""
        return len(self.rollouts[i].prompt_tokens) + len(self.rollouts[i].response_tokens)

    def prefill(self, groups: list[list[int]]) -> tuple[list[int], Tensor]:
        """Run the model over the tokens that each group of rollouts shares, and give every rollout
        a row with a copy of their keys and values: owners and hidden states of the rows."""
        firsts = [self.rollouts[group[0]] for group in groups]
        tokens, lengths = pad([r.prompt_tokens + r.response_tokens for r in firsts])
        ids = [i for group in groups for i in group]
        sources = [p for p, group in enumerate(groups) for _ in group]  # whose prompt a row copies
        self.cache.admit(ids, sources, lengths.tolist())
        hidden = self.model(tokens.to(self.model.device), self.cache)  # (P, T, C)
        return ids, hidden[sources, lengths[sources] - 1]  # (R, C)

    def sample(self, hidden: Tensor, ids: list[int], over: list[int]) -> tuple[list, list, list]:
        """Tokens drawn from hidden states (R, C) with the dice of rollouts `ids`, their log-probs,
        and log pi(z_c) at the rows `over`."""
        logits = hidden.float() @ self.head.T  # (R, V), of the last position only
        steps = torch.tensor([len(self.rollouts[i].response_tokens) for i in ids])
        uniform = uniforms(self.seed, self.streams[ids], steps).to(logits.device)
        # Output rows beyond the tokenizer are padding of the matrix: never drawn.
        size = self.tokenizer.size
        tokens, logprobs = draw(logits, uniform, self.temperature, self.top_p, size)
        ends = logits[over]  # (E, V); temperature 1, always
        logp_zc = ends[:, self.tokenizer.z_c_id] - ends.logsumexp(-1)
        # The one place in a turn where the host waits for the device.
        return tokens.tolist(), logprobs.tolist(), logp_zc.tolist()


def cut_by_tokens(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Cut rows of these lengths into batches of at most `budget` tokens, padding included: lists
    of row indices, the longest rows first.  A row longer than the budget is a batch of its own.

    Neighbours in length share a batch, so little of it is padding:

        cut_by_tokens([3, 9, 4, 8], 20)  ->  [1, 3], [2, 0]      # 2 x 9 and 2 x 4 tokens
        in the order given              ->  [0, 1], [2, 3]      # 2 x 9 and 2 x 8
    """
    batch: list[int] = []
    # Longest first also means that memory which does not suffice is found out at once.
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        # the first row of a batch is its longest, so it alone decides the padded width
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad(rows: list[list[int]], device="cpu") -> tuple[Tensor, Tensor]:
    """Token lists -> ids (B, T) padded with zeros on the right, and lengths (B,)."""
    lengths = torch.tensor([len(r) for r in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens.to(device), lengths.to(device)


@torch.no_grad()
def read_last(
    model: CausalLM,
    prompts: list[list[int]],
    responses: list[list[int]],
    token_ids: list[int],
    batch_tokens: int = 16_384,
    on_read: Callable[[int], None] | None = None,
) -> Tensor:
    """log pi(token | x, y) in nats, (N, K) in fp32 on the CPU: the K tokens' log-probs right after
    each of N given solutions, whose last token is the stop token.  ValueError for an empty prompt.

    One plain forward pass a batch; `on_read(k)` hears of every k solutions done.
    """
    _refuse_empty(prompts)
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    columns = torch.tensor(token_ids, device=model.device)
    values = torch.empty(len(rows), len(token_ids))
    for batch in cut_by_tokens([len(row) for row in rows], batch_tokens):
        tokens, lengths = pad([rows[i] for i in batch], model.device)
        hidden = model(tokens)[torch.arange(len(batch)), lengths - 1]  # (B, C) at the stop tokens
        if len(token_ids) == 1:
            logprobs = token_logprobs(hidden, model.lm_head_weight, columns.expand(len(batch)))
            values[batch] = logprobs[:, None].cpu()
        else:
            # All K tokens share one logsumexp = logit[0] - log pi(0): one pass over V, not K.
            logits = hidden.float() @ model.lm_head_weight[columns].float().T  # (B, K)
            zeros = torch.zeros(len(batch), dtype=torch.long, device=model.device)
            first = hidden.float() @ model.lm_head_weight[0].float()  # (B,)
            lse = first - token_logprobs(hidden, model.lm_head_weight, zeros)
            values[batch] = (logits - lse[:, None]).cpu()
        if on_read is not None:
            on_read(len(batch))
    return values


def score(
    model: CausalLM,
    z_c_id: int,
    prompts: list[list[int]],
    responses: list[list[int]],
    batch_tokens: int = 16_384,
    on_scored: Callable[[int], None] | None = None,
) -> list[float]:
    """log pi(z_c | x, y) in nats of N given solutions: the sampler's own number for the same
    tokens, see `read_last`."""
    return read_last(model, prompts, responses, [z_c_id], batch_tokens, on_scored)[:, 0].tolist()
