"""
Many processes, one run: torchrun --nproc-per-node 8 train.py ..., on one node or on many.

Every process is a rank and runs the same train.py from top to bottom.  What is spread over the
ranks, and how it comes together again:

    weights, gradients, AdamW's state    sharded: a rank holds some rows of every tensor (torch's
                                         FSDP2); a layer is gathered while it computes, and for a
                                         checkpoint one tensor after the other
    problems                             sharded: a rank samples and checks its share, with a copy
                                         of all weights that is gone when it has sampled
    rollouts                             gathered: every rank knows the whole batch, so groups,
                                         class weights and counts are those of one process
    micro-batches                        sharded; the gradients are summed over all ranks

So the update is one process's, but for the order in which the terms of a sum are added.

A World knows who this process is.  That of a process on its own (ALONE) has nothing to do, and each
method gives back what it was given, so train.py reads the same for one and for many.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import CausalLM

# Whoever waits this long waits for a rank that hangs.  (One that died is noticed at once; a slow
# one may be downloading a model, or sampling much longer solutions than the others.)
TIMEOUT = datetime.timedelta(hours=2)
# gloo and NCCL have no exception of their own for a peer that is gone: their RuntimeErrors say it.
LOST = ("gloo", "nccl", "peer", "connection", "socket", "broken pipe")


class World:
    """The ranks of a run, seen from one of them."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store=None):
        self.rank, self.size = rank, size  # among all ranks
        self.local_rank = local_rank  # among those of this machine: the number of its GPU
        self.is_first = rank == 0  # it alone prints and writes
        self.store = store  # torchrun's key-value store, which outlives the ranks

    def device(self, wanted: str) -> str:
        """The device of this rank, where the user's --device is `wanted`; ValueError if this
        machine has fewer GPUs than ranks."""
        if self.size == 1:
            return wanted
        if wanted == "cpu" or not torch.cuda.is_available():
            return "cpu" if wanted == "auto" else wanted
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{os.environ.get('LOCAL_WORLD_SIZE')} processes on this machine, but only "
                f"{torch.cuda.device_count()} GPUs: a lower --nproc-per-node, or --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    # -- who does what -----------------------------------------------------------------------

    def shard(self, items: Sequence) -> list:
        """This rank's share of a list that everybody has: every size-th item."""
        # 8 problems on 3 ranks: rank 0 has 0 3 6, rank 1 has 1 4 7, rank 2 has 2 5.
        return list(items[self.rank :: self.size])

    def rounds(self, items: Sequence) -> Iterator[tuple[Any, bool]]:
        """The items of `shard`, each with True; and as many rounds on every rank, the last one
        with (some item, False) where there are no more: computed along, but not counted."""
        # Of sharded weights each rank holds a part that the others need in every forward pass:
        # a rank with nothing left to do must go through it, or the others would wait for ever.
        # 5 micro-batches on 3 ranks are two rounds: 0 1 2, then 3 4 and once more 4, for nothing.
        for start in range(0, len(items), self.size):
            mine = start + self.rank
            yield (items[mine], True) if mine < len(items) else (items[-1], False)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """What is done in here is done on the first rank of each machine, then on the others: its
        downloads are there for them, and its errors come before theirs."""
        # An exchange works as a barrier: nobody leaves it before everybody has come to it.
        if self.local_rank > 0:
            self.gather([])
        yield
        if self.local_rank == 0:
            self.gather([])

    # -- what ranks tell each other -----------------------------------------------------------

    def gather(self, items: list, by: str | int | None = None) -> list:
        """The items of all ranks, on every rank: anything that JSON can hold.  They come rank
        after rank or, to undo `shard`, sorted by item[by]."""
        # Rank 0 calls gather([[0, "a"], [2, "c"]], by=0) and rank 1 gather([[1, "b"]], by=0):
        # both get [[0, "a"], [1, "b"], [2, "c"]].
        if self.size == 1:
            return items
        # JSON in tensors of bytes: torch's own way to send objects is pickle, which we do not use.
        data = torch.frombuffer(bytearray(json.dumps(items).encode()), dtype=torch.uint8)
        texts = (bytes(x.numpy()) for x in self._all_gather_bytes(data))
        items = [item for text in texts for item in json.loads(text)]
        return items if by is None else sorted(items, key=lambda item: item[by])

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on every rank: anything that JSON can hold."""
        return self.gather([value])[0]

    def all_gather(self, rows: Tensor) -> Tensor:
        """The whole tensor (n, ...) on every rank, of which each holds its `local_rows`."""
        if self.size == 1 or not rows.dim():
            return rows
        # (n_r, ...) -> bytes, for any dtype -> (n, ...)
        parts = self._all_gather_bytes(rows.detach().contiguous().view(-1).view(torch.uint8))
        return torch.cat([p.view(rows.dtype).view(-1, *rows.shape[1:]) for p in parts])

    def _all_gather_bytes(self, data: Tensor) -> list[Tensor]:
        """The bytes (n_r,) of every rank r, by gloo where they lie in host memory, else by NCCL."""

        def exchange(mine: Tensor) -> list[Tensor]:
            parts = [torch.empty_like(mine) for _ in range(self.size)]
            torch.distributed.all_gather(parts, mine)
            return parts

        # Only equal lengths can be gathered: so first the lengths, then the bytes, padded to the
        # longest and cut again.
        lengths = torch.cat(exchange(torch.tensor([len(data)], device=data.device))).tolist()
        padded = data.new_zeros(max(lengths))
        padded[: len(data)] = data
        return [part[:n] for part, n in zip(exchange(padded), lengths)]

    # -- sharded tensors ----------------------------------------------------------------------

    def local_rows(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a whole tensor (n, ...), a view, cut as torch's fully_shard does;
        a number (0 dimensions) is everybody's."""
        if self.size == 1 or not tensor.dim():
            return tensor
        # Equal pieces, the last ones shorter or empty: 5 rows on 4 ranks are 2 2 1 0.
        rows = -(-len(tensor) // self.size)
        return tensor[self.rank * rows : (self.rank + 1) * rows]

    def fully_shard(self, model: CausalLM, device: torch.device) -> None:
        """Shard a model that has no weights yet (it is on the device meta) over the ranks'
        devices, layer by layer; `scatter` makes its weights."""
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # A layer's rows are gathered from all ranks just before its forward pass, and again before
        # its backward pass; after it the gradients are reduced, and each rank keeps its own rows.
        # So a rank holds 1/size of the weights, and one or two whole layers at a time.
        self.mesh = init_device_mesh(device.type, (self.size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=self.mesh)
        # The rest, embedding and output matrix, stays gathered from a forward pass until its
        # backward pass: the readout, which is no module, finds the plain output matrix there.
        fully_shard(model, mesh=self.mesh)

    def scatter(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A weight of a sharded model, from the whole tensor, which every rank reads from the
        checkpoint: a copy of this rank's rows alone."""
        rows = self.local_rows(tensor).to(device, dtype, copy=True)
        if self.size == 1:
            return rows
        from torch.distributed.tensor import DTensor, Shard

        shape = {"shape": tensor.shape, "stride": tensor.stride()}
        return DTensor.from_local(rows, self.mesh, [Shard(0)], run_check=False, **shape)

    def reduce_gradient(self, grad: Tensor) -> Tensor:
        """This rank's rows of a parameter's gradient, as the SUM over ranks."""
        # fully_shard takes the mean over ranks, for losses that are means over a rank's own rows.
        # Ours is a sum, each term divided by the counts of the whole batch: with 2 ranks and the
        # terms 1/4 + 1/4 and 1/4 + 1/4 the gradient is 1, and not the mean 1/2.
        return grad if self.size == 1 else local(grad).mul_(self.size)

    # -- how it ends --------------------------------------------------------------------------

    def may_speak(self) -> bool:
        """True for the first rank that asks, False ever after: whoever fails first says why, and
        what the others meet then only follows from it."""
        try:
            return self.size == 1 or self.store.add("spoken", 1) == 1
        except RuntimeError:  # torchrun itself is gone, and its store with it
            return True


ALONE = World()


@contextlib.contextmanager
def join() -> Iterator[World]:
    """The world of this process: the ranks that torchrun started, else itself, ALONE.
    ConnectionResetError if another rank died."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "MASTER_ADDR" not in os.environ:
        yield ALONE
        return
    import torch.distributed as dist

    # 1. torchrun has put into the environment who we are, and where its store is.
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    world = World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), store)
    if not world.is_first:  # print and tqdm.write: said once
        sys.stdout = open(os.devnull, "w")
    try:
        # gloo also where there are GPUs: what `gather` sends lies in host memory
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        yield world
    except SystemExit:  # why has been said already: what follows from it need not be
        world.may_speak()
        raise
    # 2. What ends a run is said once, by the rank that saw it first.
    except BaseException as error:
        # As soon as one rank ends, torchrun sends SIGTERM to all: whoever has the word must come
        # to say it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        # A rank that fails asks before its connections break, so it is ahead of those who only
        # notice that they did.  One that was killed cannot ask: the first to miss it speaks.
        if not world.may_speak():
            time.sleep(0.5)  # torchrun reports the exit code of the rank that ended first
            os._exit(1)
        lost = isinstance(error, RuntimeError) and any(x in str(error).lower() for x in LOST)
        if lost and not os.environ.get("NANOLASER_TRACEBACK"):
            raise ConnectionResetError(
                "another rank died or was killed (torchrun's report says which); "
                "--resume goes on from the run's last checkpoint"
            ) from None
        raise
    dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this rank holds, a view; any other tensor as it is."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor


def gathered(model: CausalLM, world: World) -> CausalLM:
    """A copy of a sharded model with all its weights, for forward passes that each rank makes on
    its own (sampling); any other model as it is."""
    if world.size == 1 or not hasattr(model.model.norm.weight, "to_local"):
        return model
    # Sampling makes thousands of small forward passes, one a token: to gather every layer for each
    # would cost far more than one gathered copy of all, 15 GB for 7B in bf16.
    with torch.device("meta"):
        copy = CausalLM(model.config)
    # (adapters, which a plain copy lacks, are in the weights: see lora.merged)
    weights = {n: world.all_gather(local(model.get_parameter(n))) for n in copy.state_dict()}
    copy.load_state_dict(weights, assign=True)
    return copy.requires_grad_(False)
