"""The KV cache against plain attention over lists of keys and values, under random traffic."""

import random

import pytest
import torch
from torch.testing import assert_close

from nanolaser.cache import KVCache

L, H, K, D = 2, 4, 2, 8
SLOT = L * 2 * K * D * 4  # bytes of one token's keys and values


def attention(q, keys, values):
    """The last token (H, D) over all tokens so far (n, K, D): (H, D), by the definition."""
    keys, values = (x.repeat_interleave(H // K, dim=1) for x in (keys, values))
    scores = torch.einsum("hd,nhd->hn", q, keys) / D**0.5
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), values)


class Traffic:
    """A cache, and beside it each sequence's keys and values as plain lists, a layer each."""

    def __init__(self, seed, longest, budget):
        self.rng, self.longest = random.Random(seed), longest
        self.g = torch.Generator().manual_seed(seed)
        self.cache = KVCache(L, K, D, longest, budget=budget)
        self.known: dict[int, list] = {}  # sequence -> [(keys (n, K, D), values)] a layer
        self.preempted = self.longest_reached = 0

    def heads(self, rows, tokens):
        """Random queries, keys and values, as a layer of the model has them."""
        return [torch.randn(rows, n, tokens, D, generator=self.g) for n in (H, K, K)]

    def prefill(self):
        """One to three prompts of any length, each the start of one to three sequences."""
        lengths = [self.rng.randint(1, self.longest // 2) for _ in range(self.rng.randint(1, 3))]
        sources, free = [], self.cache.free_bytes
        for p, n in enumerate(lengths):
            for _ in range(self.rng.randint(1, 3)):
                free -= self.cache.bytes_for(n)
                if free >= 0:
                    sources.append(p)
        sequences = [self.rng.randrange(10**9) for _ in sources]
        past = self.cache.admit(sequences, sources, lengths)
        for layer in range(L):
            q, k, v = self.heads(len(lengths), max(lengths) + 2)  # two of padding
            got = past.attend(layer, q, k, v)
            for i, p in zip(sequences, sources):
                n = lengths[p]
                keys, values = (x[p, :, :n].transpose(0, 1) for x in (k, v))
                assert_close(got[p, :, n - 1], attention(q[p, :, n - 1], keys, values))
                self.known.setdefault(i, []).append((keys, values))

    def decode(self):
        """One more token for every sequence; the newest give way where there is no room."""
        while not self.cache.reserve():
            self.drop([self.cache.running[-1]])
            self.preempted += 1
        running = self.cache.running
        assert sorted(running) == sorted(self.known)
        if not running:
            return
        past = self.cache.decode()
        assert past.positions[:, 0].tolist() == [len(self.known[i][0][0]) for i in running]
        for layer in range(L):
            q, k, v = self.heads(len(running), 1)
            got = past.attend(layer, q, k, v)
            for row, i in enumerate(running):
                keys, values = (torch.cat((old, new[row].transpose(0, 1)))
                                for old, new in zip(self.known[i][layer], (k, v)))  # fmt: skip
                self.known[i][layer] = keys, values
                assert_close(got[row, :, 0], attention(q[row, :, 0], keys, values))
        full = [i for i in running if len(self.known[i][0][0]) == self.longest]
        self.drop(full)  # as the sampler does: there is no room for more
        self.longest_reached += len(full)

    def drop(self, sequences):
        self.cache.drop(sequences)
        for i in sequences:
            del self.known[i]


@pytest.mark.parametrize("rows", [None, 4, 30])  # of the longest kind that the budget holds
@pytest.mark.parametrize("seed", range(3))
def test_every_sequence_keeps_its_own_keys_and_values(monkeypatch, seed, rows):
    """Prefills, decodes and drops in any order: rows are moved, buckets grow and shrink, and every
    query sees exactly its own past; and the budget is kept."""
    monkeypatch.setattr(KVCache, "BLOCK", 4)
    longest = 21  # rows of 4, 8, 16 and 24 slots
    budget = None if rows is None else rows * 24 * SLOT
    t = Traffic(seed, longest, budget)
    for _ in range(80):
        what = t.rng.random()
        if what < 0.2:
            t.prefill()
        elif what < 0.9:
            t.decode()
        elif t.known:
            t.drop(t.rng.sample(sorted(t.known), t.rng.randint(1, len(t.known))))
        assert budget is None or t.cache.bytes <= budget
        assert sorted(t.cache.running) == sorted(t.known)
    assert t.longest_reached > 0 and (t.preempted > 0) == (rows == 4)
    t.drop(sorted(t.known))
    assert t.cache.bytes == 0 and t.cache.running == []


def test_memory_follows_the_lengths_there_are():
    """By hand: rows of 64, 128 and 192 slots, eight at a time."""
    cache = KVCache(L, K, D, longest=150)
    assert [cache.bytes_for(n) for n in (1, 63, 64, 127, 128, 150)] == [
        SLOT * slots for slots in (64, 64, 128, 128, 192, 192)
    ]
    assert cache.bytes == 0
    cache.admit(list(range(20)), [0] * 19 + [1], [63, 127])
    assert cache.bytes == SLOT * (24 * 64 + 8 * 128)  # one long row makes no other longer
    cache.decode()
    assert cache.reserve()  # all are full, and move up
    cache.decode()
    cache.drop([19, *range(1, 17)])
    assert sorted(cache.running) == [0, 17, 18]
    assert cache.bytes == SLOT * 8 * 128  # the rest is given back
    cache.drop([0, 17, 18])
    assert cache.bytes == 0


def test_a_budget_is_kept_while_rows_move():
    """Five short rows' worth: two full ones of four cannot move up beside what is there."""
    budget = 5 * 64 * SLOT
    cache = KVCache(L, K, D, longest=128, budget=budget)
    cache.admit([0, 1, 2, 3], [0, 0, 1, 1], [63, 5])
    assert cache.free_bytes == budget / 5
    cache.decode()
    # moving two needs 4 + 2 * 2 rows' worth, one by one 4 + 2
    assert not cache.reserve() and cache.bytes <= budget
    cache.drop([3])
    assert not cache.reserve()  # one has moved; the other: 3 + 2 of 5, with its old row 6
    cache.drop([1])
    assert cache.reserve() and cache.bytes <= budget
    assert cache.running == [2, 0]  # bucket by bucket: 0 has moved up
    with pytest.raises(AssertionError, match="budget"):
        cache.admit([7, 8, 9], [0, 0, 0], [5])
