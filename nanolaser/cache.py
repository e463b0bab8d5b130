"""
The key-value cache: what the model has computed of texts that are still being written.

A new token looks at the keys and values of all tokens before it.  Those never change, so they are
kept, and only the new token passes the model; in the textbook (tests/plain.py) the whole text does.

An example.  Sequences 7 and 9 will both begin with prompt 0 (a b c), 8 with prompt 1 (f g):

    prefill = cache.admit([7, 9, 8], sources=[0, 0, 1], lengths=[3, 2])
    model([[a, b, c], [f, g, _]], prefill)     # PREFILL: every prompt passes the model once

        sequence   slot 0   1   2   3          # a slot holds one token's keys and values
        7               a   b   c              # both from row 0 of the prefill
        9               a   b   c
        8               f   g                  # from row 1; nobody looks at what _ left behind

    cache.reserve()                            # is there a free slot for a new token each?
    model([[p], [q], [r]], cache.decode())     # DECODE: one token each, in cache.running's order

        7               a   b   c   p          # p has looked at a b c p, in slots 0 to 3
        9               a   b   c   q
        8               f   g   r

    cache.drop([9])                            # DROP: its row is free; cache.running is now [7, 8]

Where rows lie.  Sequences of very different lengths share a batch, and in one tensor a single long
one would make all others as long.  So rows lie in buckets of 64, 128, 256, ... slots, and a
sequence that has filled its row moves one bucket up.  Memory and attention then follow the lengths
there are: at worst half of a row is empty, and a row is copied each time its length doubles.

Shapes: R sequences, P prompts, T tokens, H query heads, K key-value heads, D head size, S slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Bucket:
    """Rows of `slots` slots each: row r is that of sequences[r], and lengths[r] of its slots hold
    a token.  Behind the last sequence there may be rows that are free."""

    def __init__(self, slots: int, layers: int, empty: Tensor):
        self.slots = slots
        # One tensor (rows, slots, 2, K, D) a layer: side by side, one copy moves keys and values.
        self.layers = [empty.new_zeros(0, slots, *empty.shape) for _ in range(layers)]
        self.rows = 0  # how many there are, free ones included
        self.sequences: list[int] = []
        self.lengths: list[int] = []  # known here, so that nobody has to ask the device

    def resize(self, rows: int) -> None:
        """Have so many rows."""
        self.rows, used = rows, len(self.sequences)
        # Layer by layer, so that never more than one of them is there twice.
        for i, old in enumerate(self.layers):
            # zeros, not garbage: what a mask hides still enters as 0 * value, and 0 * nan is nan
            self.layers[i] = old.new_zeros(rows, *old.shape[1:])
            self.layers[i][:used] = old[:used]
            del old  # freed before the next layer's is made

    def take(self, other: Bucket, row: int) -> None:
        """Move a sequence of another bucket to the first free row of this one."""
        n, new = other.lengths[row], len(self.sequences)
        for mine, theirs in zip(self.layers, other.layers):
            mine[new, :n] = theirs[row, :n]
        self.sequences.append(other.sequences[row])
        self.lengths.append(n)
        other.drop(row)

    def drop(self, row: int) -> None:
        """Free a row: the last sequence moves into it, and nothing else is touched."""
        # Without row 1, sequences 7 9 8 5 become 7 5 8: one copy, where closing the gap takes two.
        last, n = self.sequences.pop(), self.lengths.pop()
        if row < len(self.sequences):
            for tensor in self.layers:
                tensor[row, :n] = tensor[len(self.sequences), :n]
            self.sequences[row], self.lengths[row] = last, n


class KVCache:
    """Keys and values of sequences of at most `longest` tokens, in at most `budget` bytes (None:
    any); layers, kv_heads and head_dim are the model's L, K and D."""

    BLOCK = 64  # slots of a row in the smallest bucket; every row is a whole number of blocks
    ROWS = 8  # by which a bucket grows where the budget is not tight: fewer copies

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, longest: int, device="cpu",
        dtype=torch.float32, budget: float | None = None,
    ):  # fmt: skip
        sizes = [self.BLOCK]
        while sizes[-1] < longest:
            sizes.append(2 * sizes[-1])
        # No more than needed: for longest = 150 the buckets have 64, 128 and 192 slots, not 256.
        sizes[-1] = _round_up(longest, self.BLOCK)
        empty = torch.empty(2, kv_heads, head_dim, device=device, dtype=dtype)
        self.buckets = [Bucket(slots, layers, empty) for slots in sizes]
        self.slot_bytes = layers * empty.nbytes  # one token's keys and values in all layers
        self.budget = float("inf") if budget is None else budget  # bytes

    # -- who is in it, and what it takes -------------------------------------------------------

    @property
    def running(self) -> list[int]:
        """The sequences, in the order in which `decode` takes their tokens: bucket by bucket."""
        return [i for bucket in self.buckets for i in bucket.sequences]

    @property
    def bytes(self) -> int:
        """Memory taken, free rows and empty slots included."""
        return sum(b.rows * b.slots for b in self.buckets) * self.slot_bytes

    @property
    def free_bytes(self) -> float:
        """What is left of the budget for the rows of new sequences."""
        return self.budget - sum(len(b.sequences) * b.slots for b in self.buckets) * self.slot_bytes

    def bytes_for(self, length: int) -> int:
        """Bytes of the row of a sequence of so many tokens, with room for one more."""
        return self._bucket_for(length).slots * self.slot_bytes

    def _bucket_for(self, length: int) -> Bucket:
        """The smallest bucket in which a row of so many tokens has room for one more."""
        # the longest there can be is about to leave: it needs no room
        return next((b for b in self.buckets if length < b.slots), self.buckets[-1])

    def _ensure(self, bucket: Bucket, rows: int) -> bool:
        """Have at least so many rows in a bucket; False if the budget does not allow it."""
        if rows <= bucket.rows:
            return True
        row_bytes, wanted = bucket.slots * self.slot_bytes, _round_up(rows, self.ROWS)
        if self.bytes + (wanted - bucket.rows) * row_bytes > self.budget:
            # Tight: give back every free row of every bucket, and take no more than needed.
            wanted = rows
            for other in self.buckets:
                if other.rows > len(other.sequences):
                    other.resize(len(other.sequences))
        if self.bytes + (wanted - bucket.rows) * row_bytes > self.budget:
            return False
        bucket.resize(wanted)
        return True

    # -- admit, reserve, decode, drop ----------------------------------------------------------

    def admit(self, sequences: list[int], sources: list[int], lengths: list[int]) -> Prefill:
        """Rows for new sequences: what is returned goes to the forward pass over their prompts, and
        each gets the keys and values of the pass's row `source`, of which the first lengths[source]
        tokens are real.  They have to fit into `free_bytes`."""
        places: dict[Bucket, list[tuple[int, int]]] = {}
        for i, p in zip(sequences, sources):
            places.setdefault(self._bucket_for(lengths[p]), []).append((i, p))
        copies = []
        for bucket, new in places.items():
            rows = slice(len(bucket.sequences), len(bucket.sequences) + len(new))
            assert self._ensure(bucket, rows.stop), "sequences are admitted beyond the budget"
            copies.append((bucket, rows, _on([p for _, p in new], bucket)))
            bucket.sequences += [i for i, _ in new]
            bucket.lengths += [lengths[p] for _, p in new]
        return Prefill(copies)

    def reserve(self) -> bool:
        """A free slot for one more token each; False beyond the budget: drop one, and try again."""
        # Whose row is full moves one bucket up.  From the top, so that nobody is looked at twice.
        for bucket, above in reversed(list(zip(self.buckets, self.buckets[1:]))):
            full = [r for r, n in enumerate(bucket.lengths) if n == bucket.slots]
            while full:
                # All at once, or, where old and new rows do not fit beside each other, half as
                # many: their old rows are given back, and then there is room for the next.
                n = len(full)
                while n and not self._ensure(above, len(above.sequences) + n):
                    n //= 2
                if not n:
                    return False
                for _ in range(n):  # the last first: it may fill the hole of an earlier one
                    above.take(bucket, full.pop())
        return True

    def decode(self) -> Decode:
        """For the forward pass over one more token of every sequence (R, 1), in the order of
        `running`; `reserve` comes first."""
        return Decode([bucket for bucket in self.buckets if bucket.sequences])

    def drop(self, sequences: list[int]) -> None:
        """Free the rows of sequences, and give memory back where most of it is unused."""
        leaving = set(sequences)
        for bucket in self.buckets:
            for row in reversed([r for r, i in enumerate(bucket.sequences) if i in leaving]):
                bucket.drop(row)
            used = len(bucket.sequences)
            if used < bucket.rows // 2 - self.ROWS or not used:
                bucket.resize(_round_up(used, self.ROWS))


def _round_up(n: int, unit: int) -> int:
    """The next multiple of a unit: 150, 64 -> 192."""
    return -(-n // unit) * unit


def _on(numbers: list[int], bucket: Bucket) -> Tensor:
    """Numbers on a bucket's device as soon as it gets there: the host does not wait."""
    return torch.tensor(numbers).to(bucket.layers[0].device, non_blocking=True)


# ---------------------------------------------------------------------------------------------
# The two kinds of forward pass.  The model asks either for its tokens' `positions`, and in every
# layer to `attend`: to keep the new keys and values, and to let the queries look at all there are.


class Prefill:
    """A pass over prompts (P, T), right-padded, each of which fills one row or many."""

    positions = None  # 0 to T - 1, as without a cache

    def __init__(self, copies: list[tuple[Bucket, slice, Tensor]]):
        self.copies = copies  # (bucket, its new rows, the prompt that each of them copies)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (P, H, T, D), keys and values (P, K, T, D) -> (P, H, T, D)."""
        kv = torch.stack((k.transpose(1, 2), v.transpose(1, 2)), dim=2)  # (P, T, 2, K, D)
        for bucket, rows, source in self.copies:
            # The group's fan-out: one prompt's numbers go to the rows of all its sequences.
            T = min(kv.shape[1], bucket.slots)  # only padding lies beyond a bucket's rows
            bucket.layers[layer][rows, :T] = kv[source, :T]
        # A prompt looks at itself alone: plain causal attention, the cache is not read.
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Decode:
    """A pass over one new token (R, 1) of each of the R running sequences."""

    def __init__(self, buckets: list[Bucket]):
        self.parts, positions = [], []  # a part of the batch for each bucket
        for bucket in buckets:
            device, dtype = bucket.layers[0].device, bucket.layers[0].dtype
            batch = slice(len(positions), len(positions) + len(bucket.sequences))  # of R
            S = max(bucket.lengths) + 1  # slots that anyone looks at, the new token's included
            assert S <= bucket.slots, "reserve() comes before decode()"
            length = _on(bucket.lengths, bucket)[:, None]  # (rows, 1)
            # A sequence of 3 tokens puts the new one into slot 3 and may look at slots 0 to 3, of
            # S = 6:  mask 0 0 0 0 -inf -inf
            beyond = torch.arange(S, device=device) > length  # (rows, S)
            mask = torch.zeros(beyond.shape, device=device, dtype=dtype)
            mask = mask.masked_fill_(beyond, -torch.inf)[:, None, None]  # (rows, 1, 1, S)
            # where it lies if rows and slots are counted through: row * slots + length
            slot = torch.arange(len(length), device=device) * bucket.slots + length[:, 0]
            self.parts.append((bucket, batch, slot, mask))
            positions += bucket.lengths  # a text's first token has position 0
            bucket.lengths = [n + 1 for n in bucket.lengths]  # the new one counts from here on
        self.positions = _on(positions, buckets[0])[:, None]  # (R, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (R, H, 1, D), keys and values (R, K, 1, D) -> (R, H, 1, D)."""
        kv = torch.stack((k.transpose(1, 2), v.transpose(1, 2)), dim=2)  # (R, 1, 2, K, D)
        # The textbook repeats each key head for the H/K query heads that share it.  With one token
        # a row these can as well be H/K *queries* of one head: the cache is read as it lies.
        q = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])  # (R, K, H/K, D)
        seen = []
        for bucket, batch, slot, mask in self.parts:
            tensor, rows, S = bucket.layers[layer], len(slot), mask.shape[-1]
            # keep first, then look: a token also looks at itself
            tensor.view(-1, *kv.shape[2:]).index_copy_(0, slot, kv[batch, 0])
            keys, values = tensor[:rows, :S].permute(2, 0, 3, 1, 4)  # (rows, K, S, D) each
            seen.append(F.scaled_dot_product_attention(q[batch], keys, values, mask))
        return torch.cat(seen).view(len(kv), -1, 1, q.shape[-1])
