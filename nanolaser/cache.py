"""
The key-value cache: what the model has computed of rows that are still being written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

class Shelf:
    """Keys and values of rows that have at most `slots` tokens: row r is ids[r]'s, lengths[r] long.

    One tensor (rows, slots, 2, K, D) a layer, keys and values side by side so that one copy moves
    both.  There may be more rows than ids: those at the end are free.
    """

    def __init__(self, slots: int, layers: int, empty: Tensor):
        self.slots = slots
        self.layers = [empty.new_zeros(0, slots, *empty.shape) for _ in range(layers)]
        self.ids: list[int] = []
        self.lengths: list[int] = []  # tokens held, known without asking the device

    @property
    def rows(self) -> int:
        """How many there are, free ones included."""
        return len(self.layers[0])

    def resize(self, rows: int) -> None:
        """Have so many rows, layer by layer: never more than one layer is there twice."""
        n = len(self.ids)
        for i, old in enumerate(self.layers):
            # zeros, not garbage: what a mask hides still enters as 0 * value, and 0 * nan is nan
            self.layers[i] = old.new_zeros(rows, *old.shape[1:])
            self.layers[i][:n] = old[:n]
            del old  # freed before the next layer's is made

    def drop(self, row: int) -> None:
        """Remove a row: the last one moves into its place, and nothing else is touched."""
        n = self.lengths[-1]
        if row != len(self.ids) - 1:
            for tensor in self.layers:
                tensor[row, :n] = tensor[len(self.ids) - 1, :n]
        for facts in (self.ids, self.lengths):
            facts[row] = facts[-1]
            facts.pop()

    def take(self, other: Shelf, row: int) -> None:
        """Move a row of another shelf to a free row of this one."""
        n, new = other.lengths[row], len(self.ids)
        for mine, theirs in zip(self.layers, other.layers):
            mine[new, :n] = theirs[row, :n]
        self.ids.append(other.ids[row])
        self.lengths.append(n)
        other.drop(row)


@dataclass
class Part:
    """What one shelf has to do with a forward pass over the cache."""

    shelf: Shelf
    rows: slice  # decoding: of the batch; prefill: of the shelf
    where: Tensor  # decoding: the slot of each row's new token; prefill: the prompt a row copies
    mask: Tensor | None = None  # (rows, 1, 1, S): 0 where the new token may look, else -inf


class KVCache:
    """Keys and values of rows of all lengths, never taking more than `budget` bytes (None: any).

    Rows lie on shelves of 64, 128, 256, ... slots, the last one of `longest`; a row that has
    filled its place moves one shelf up.  So memory and attention follow the lengths there are: a
    long row makes no short one longer, about half of a row's slots are empty at worst, and a row
    is copied once each time its length doubles.

        cache.admit([7, 9], [0, 0], [5])   # rows 7 and 9 will both begin with prompt 0's 5 tokens
        model(prompts, cache)              # prefill of right-padded prompts
        cache.grow()                       # room for one more token in every row
        model(tokens, cache)               # decode: one token a row, in the order of cache.ids
        cache.drop([7])
    """

    BLOCK = 64  # slots of the smallest shelf
    ROWS = 8  # by which a shelf grows where the budget is not tight: fewer copies

    def __init__(
        self, config, longest: int, device="cpu", dtype=torch.float32,
        budget: float | None = None,
    ):  # fmt: skip
        sizes = [self.BLOCK]
        while sizes[-1] < longest:
            sizes.append(2 * sizes[-1])
        sizes[-1] = -(-longest // self.BLOCK) * self.BLOCK  # whole blocks, and no more than needed
        K, D, L = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
        empty = torch.empty(2, K, D, device=device, dtype=dtype)
        self.shelves = [Shelf(slots, L, empty) for slots in sizes]
        self.slot_bytes = L * empty.nbytes  # of one token
        self.budget = budget
        self.parts: list[Part] = []  # of the forward pass under way, or about to come
        self.filling = False  # is it a prefill?

    @property
    def ids(self) -> list[int]:
        """The owners of the rows, in the order in which decoding takes their tokens."""
        return [i for shelf in self.shelves for i in shelf.ids]

    @property
    def bytes(self) -> int:
        """Memory taken, free rows and empty slots included."""
        return sum(shelf.rows * shelf.slots for shelf in self.shelves) * self.slot_bytes

    @property
    def room(self) -> float:
        """Bytes of the budget that rows could still take."""
        taken = sum(len(shelf.ids) * shelf.slots for shelf in self.shelves) * self.slot_bytes
        return float("inf") if self.budget is None else self.budget - taken

    def bytes_for(self, length: int) -> int:
        """Bytes of a row of so many tokens and one more."""
        return self.shelf_for(length).slots * self.slot_bytes

    def shelf_for(self, length: int) -> Shelf:
        """The smallest shelf on which a row of so many tokens has room for one more."""
        # a row of the greatest length is about to leave: it needs no room
        return next((s for s in self.shelves if length < s.slots), self.shelves[-1])

    def _make(self, shelf: Shelf, rows: int) -> bool:
        """Have a shelf of `rows` rows or more; False if the budget does not allow it."""
        price = lambda n: (n - shelf.rows) * shelf.slots * self.slot_bytes  # noqa: E731
        fits = lambda n: self.budget is None or self.bytes + price(n) <= self.budget  # noqa: E731
        rounded = -(-rows // self.ROWS) * self.ROWS
        if rows > shelf.rows and fits(rounded):
            shelf.resize(rounded)
        elif rows > shelf.rows:
            for other in self.shelves:  # give back what is free, and take no more than needed
                if other.rows > len(other.ids):
                    other.resize(len(other.ids))
            if fits(rows):
                shelf.resize(rows)
        return rows <= shelf.rows

    def admit(self, ids: list[int], sources: list[int], lengths: list[int]) -> None:
        """Make a row for each of `ids`, for the next forward pass to fill: it takes the keys and
        values of that pass's row sources[.], of which the first lengths[source] are real.  They
        have to fit into `room`."""
        homes = [self.shelf_for(lengths[p]) for p in sources]
        self.filling, self.parts = True, []
        for shelf in self.shelves:
            new = [(i, p) for i, p, home in zip(ids, sources, homes) if home is shelf]
            if not new:
                continue
            rows = slice(len(shelf.ids), len(shelf.ids) + len(new))
            assert self._make(shelf, rows.stop), "rows are admitted beyond the budget"
            copied = torch.tensor([p for _, p in new], device=shelf.layers[0].device)
            self.parts.append(Part(shelf, rows, copied))
            shelf.ids += [i for i, _ in new]
            shelf.lengths += [lengths[p] for _, p in new]

    def grow(self) -> bool:
        """Make room for one more token in every row; False if the budget does not allow it: then
        some row has to leave before it is tried again."""
        # from the top, so that a row that has just moved is not looked at again
        for shelf, above in reversed(list(zip(self.shelves, self.shelves[1:]))):
            full = [r for r, n in enumerate(shelf.lengths) if n == shelf.slots]
            while full:
                n = len(full)
                # all at once, or in portions whose old places are given back in between
                while n and not self._make(above, len(above.ids) + n):
                    n //= 2
                if not n:
                    return False
                for _ in range(n):  # the last first: it may fill the hole of an earlier one
                    above.take(shelf, full.pop())
        return True

    def drop(self, ids: list[int]) -> None:
        """Remove the rows of `ids`, and give memory back where most of it lies idle."""
        gone = set(ids)
        for shelf in self.shelves:
            for row in reversed([r for r, i in enumerate(shelf.ids) if i in gone]):
                shelf.drop(row)
            if len(shelf.ids) < shelf.rows // 2 - self.ROWS or not shelf.ids:
                shelf.resize(-(-len(shelf.ids) // self.ROWS) * self.ROWS)

    def begin(self, tokens: int) -> Tensor:
        """Prepare a forward pass over `tokens` a row; their positions (B or 1, T) in their rows."""
        device, dtype = self.shelves[0].layers[0].device, self.shelves[0].layers[0].dtype
        if self.filling:
            return torch.arange(tokens, device=device)[None]
        assert tokens == 1, f"{tokens} tokens a row after the prefill; it decodes one by one"
        self.parts, start = [], 0
        for shelf in self.shelves:
            if not shelf.ids:
                continue
            n, S = len(shelf.ids), max(shelf.lengths) + 1  # with the new token
            assert S <= shelf.slots, "grow() comes before decoding"
            lengths = torch.tensor(shelf.lengths, device=device)[:, None]  # (n, 1)
            hidden = torch.arange(S, device=device) > lengths  # (n, S)
            mask = torch.zeros(n, S, device=device, dtype=dtype).masked_fill_(hidden, -torch.inf)
            where = torch.arange(n, device=device) * shelf.slots + lengths[:, 0]
            self.parts.append(Part(shelf, slice(start, start + n), where, mask[:, None, None]))
            start += n
        lengths = [n for shelf in self.shelves for n in shelf.lengths]
        return torch.tensor(lengths, device=device)[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep a layer's new keys and values (B, K, T, D), and let the queries (B, H, T, D) look
        at all their row has: (B, H, T, D)."""
        kv = torch.stack((k.transpose(1, 2), v.transpose(1, 2)), dim=2)  # (B, T, 2, K, D)
        if self.filling:
            for part in self.parts:
                T = min(kv.shape[1], part.shelf.slots)  # padding beyond a shelf is left out
                part.shelf.layers[layer][part.rows, :T] = kv[part.where, :T]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        # One new token: the H/K query heads that share keys become H/K *queries* of that key
        # head, so the cache is read as it lies and never repeated.
        q, seen = q.view(q.shape[0], k.shape[1], -1, q.shape[-1]), []  # (B, K, H/K, D)
        for part in self.parts:
            tensor, n, S = part.shelf.layers[layer], len(part.where), part.mask.shape[-1]
            tensor.view(-1, *kv.shape[2:]).index_copy_(0, part.where, kv[part.rows, 0])
            keys, values = tensor[:n, :S].permute(2, 0, 3, 1, 4)  # (n, K, S, D) each
            seen.append(F.scaled_dot_product_attention(q[part.rows], keys, values, part.mask))
        return torch.cat(seen).view(len(kv), -1, 1, q.shape[-1])

    def end(self) -> None:
        """Finish a forward pass: decoding has made every row longer by one."""
        if not self.filling:
            for shelf in self.shelves:
                shelf.lengths = [n + 1 for n in shelf.lengths]
        self.filling, self.parts = False, []
