"""
Lists of token ids as forward passes: padded side by side where only their ends are read (`pad`,
`cut_by_tokens`); packed for the update, with each prompt once and no padding in between.

The textbook (tests/plain.py) sends prompt and response of every rollout through the model.  But the
G rollouts of a group begin with the same prompt, and a causal model computes the same numbers for
it each time.  So a micro-batch is packed into ONE row of tokens, each distinct prompt followed by
all that was written after it.  Rollouts "ab" + "cd", "ab" + "e" and "f" + "gh":

    place       0  1  2  3  4  5  6  7
    token       a  b  c  d  e  f  g  h             8 tokens, where three padded rows have 12
    position    0  1  2  3  2  0  1  2             each in its own text
    texts       [0 1 2 3]  [0 1 4]  [5 6 7]        where the tokens of each rollout lie

Almost all of a model looks at one token at a time, and is done with that.  Attention alone looks at
texts: `attend` picks them out of the row, computes them side by side, and puts the results back.
Autograd sums up what a prompt's keys and values owe to all its rollouts.

Shapes: N packed tokens, R rollouts, P distinct prompts, T tokens of the longest text, H query
heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .rollout import Rollout

# In attention texts are padded, and each has the prompt for itself: R * T is at most so many times
# the token budget.
ATTENDED = 2
# A mask is worth it up to so many times the scores without: measured on a CPU, assumed for a GPU,
# whose fastest kernels take none.
UNMASKED = {"cpu": 1.6}
ON_A_GPU = 0.5
MASK_NUMBERS = 2**24  # of a mask at most: 64 MiB in fp32

# ---------------------------------------------------------------------------------------------
# which rows share a forward pass


def pad(rows: list[list[int]], device="cpu", filler: int = 0) -> tuple[Tensor, Tensor]:
    """Token lists -> ids (B, T), filled up on the right, and their lengths (B,)."""
    tokens = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, filler)
    return tokens.to(device), torch.tensor([len(row) for row in rows]).to(device)


def longest_first(lengths: list[int]) -> list[int]:
    """Row indices by length: neighbours are then of like length, which leaves little padding; and
    memory that does not suffice is found out at once."""
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def cut_by_tokens(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows of these lengths in batches of at most `budget` tokens, padding included: lists of row
    indices.  [3, 9, 4, 8] and 20  ->  [1, 3], [2, 0], of 2 x 9 and 2 x 4 tokens."""
    padded = lambda rows: len(rows) * lengths[rows[0]]  # noqa: E731  the first is the longest
    return list(_join(([i] for i in longest_first(lengths)), padded, budget))


def micro_batches(rollouts: list[Rollout], budget: int) -> list[list[int]]:
    """Row indices of each micro-batch: at most `budget` tokens are computed in one, a prompt that
    its rows share counting once.  A group is cut only where it would not fit by itself."""
    # A prompt of 200 and 8 responses of 100 tokens are 1,000 to compute.  A budget of 2,000 holds
    # two such groups; one of 600 cuts each of them in two, and then computes each prompt twice.
    length = [len(r.prompt_tokens) + len(r.response_tokens) for r in rollouts]
    groups: dict[tuple, list[int]] = {}
    for i in longest_first(length):
        groups.setdefault(tuple(rollouts[i].prompt_tokens), []).append(i)
    prompt = {i: (g, len(tokens)) for g, tokens in enumerate(groups) for i in groups[tokens]}

    def cost(rows: list[int]) -> float:
        responses = sum(length[i] - prompt[i][1] for i in rows)
        prompts = sum(size for _, size in {prompt[i] for i in rows})
        attended = len(rows) * max(length[i] for i in rows)
        return max(prompts + responses, attended / ATTENDED)

    # First rows to pieces of a group, mostly all of it; then those to micro-batches.
    rows = [[[i] for i in group] for group in groups.values()]
    pieces = [piece for group in rows for piece in _join(group, cost, budget)]
    return list(_join(pieces, cost, budget))


def _join(
    parts: Iterable[list[int]], cost: Callable[[list[int]], float], budget: float
) -> Iterator[list[int]]:
    """Join neighbours while their common cost is within the budget; what costs more stays alone."""
    rows: list[int] = []
    for part in parts:
        if rows and cost(rows + part) > budget:
            yield rows
            rows = []
        rows = rows + part
    if rows:
        yield rows


# ---------------------------------------------------------------------------------------------
# many texts in one row


class Packing:
    """Rollouts as one row of tokens, and the attention among them: `model(packing.tokens, packing)`
    gives hidden states (1, N, C), those of rollout r at packing.texts[r]."""

    def __init__(self, rollouts: list[Rollout], device: torch.device, dtype: torch.dtype):
        # 1. Lay the tokens out, as in the example above.
        tokens: list[int] = []
        prompts: dict[tuple, list[int]] = {}  # prompt -> its places
        self.texts: list[list[int]] = []  # of each rollout: the places of its tokens
        for r in rollouts:
            prompt = tuple(r.prompt_tokens)
            if prompt not in prompts:
                prompts[prompt] = list(range(len(tokens), len(tokens) + len(prompt)))
                tokens += prompt
            own = range(len(tokens), len(tokens) + len(r.response_tokens))
            tokens += r.response_tokens
            self.texts.append([*prompts[prompt], *own])
        texts, _ = pad(self.texts, filler=-1)  # (R, T); what is read at -1 is never looked at
        positions = torch.empty(len(tokens), dtype=torch.long)
        for text in self.texts:
            positions[text] = torch.arange(len(text))

        # 2. Which queries look at which keys?  Either every text as a whole: causal attention, but
        #    a prompt's queries are computed for each of its rollouts.  Or the prompts by
        #    themselves, and of the texts the responses' queries alone; that needs a mask, since
        #    each response begins behind a prompt of its own length.  8 responses of 16 tokens to a
        #    prompt of 1,000 have 1/6 of the scores in the second way, 8 of 1,000 to a prompt of 16
        #    twice as many.
        own = [t[len(r.prompt_tokens) :] for t, r in zip(self.texts, rollouts)]
        responses, _ = pad(own, filler=-1)  # (R, n)
        masked = responses.numel() * texts.shape[1]  # R * n * T scores
        split = masked + sum(len(prompt) ** 2 / 2 for prompt in prompts)
        whole = texts.numel() * texts.shape[1] / 2  # R * T * T / 2
        if masked > MASK_NUMBERS or split > UNMASKED.get(device.type, ON_A_GPU) * whole:
            parts = [(texts, texts, None)]
        else:
            # A response's first query, behind a prompt of 2 tokens, stands at 2 in its text:
            #     T = 5:   0  0  0  -inf  -inf
            beyond = torch.arange(texts.shape[1]) > positions[responses][..., None]  # (R, n, T)
            mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf)
            alone, _ = pad(list(prompts.values()), filler=-1)  # (P, S)
            parts = [(alone, alone, None), (responses, texts, mask[:, None])]

        # 3. The way back: where, among all queries computed, is the one of each packed token?
        queries = torch.cat([queries.flatten() for queries, _, _ in parts])
        real = (queries >= 0).nonzero()[:, 0]
        back = torch.empty_like(positions)
        back[queries[real]] = real  # one of many, where a prompt's are there many times

        move = lambda x: None if x is None else x.to(device, non_blocking=True)  # noqa: E731
        self.tokens, self.positions = move(torch.tensor([tokens])), move(positions[None])
        self.parts, self.back = [tuple(map(move, part)) for part in parts], move(back)
        # what attention goes over, with padding and without
        self.sizes = texts.numel(), sum(map(len, self.texts))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (1, H, N, D), keys and values (1, K, N, D) -> (1, H, N, D)."""
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, heads, D)
        out = []
        for queries, keys, mask in self.parts:
            texts = [x[i].transpose(1, 2) for x, i in ((q, queries), (k, keys), (v, keys))]
            y = attention(*texts, mask)  # (R, H, n, D)
            out.append(y.transpose(1, 2).flatten(0, 1))  # (R * n, H, D)
        return torch.cat(out)[self.back].transpose(0, 1)[None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention, causal where there is no mask."""
    if mask is not None and q.device.type != "cpu":
        # With a mask AND shared heads a GPU would fall back to a product that keeps all scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
