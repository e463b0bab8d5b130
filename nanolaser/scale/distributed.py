"""
Many processes, one run: torchrun --nproc-per-node 8 train.py ..., on one node or on many.

What is spread over the ranks, and how it comes together again:

    weights, gradients, AdamW's state    a share of the rows of every tensor (torch's FSDP2); a
                                         layer is gathered while it computes, and for
                                         a checkpoint one tensor after the other
    problems                             a rank samples and checks its share, with a copy of all
                                         weights that is gone when it has sampled
    rollouts, rows                       gathered: every rank knows the whole batch, so groups,
                                         class weights and counts are those of one process
    micro-batches                        dealt out; the gradients are summed over all ranks

So the update is one process's, but for the order in which the terms of a sum are added.

A World knows who this process is; that of a process on its own (ALONE) has nothing to do, and each
method gives back what it was given.  train.py therefore reads the same for one and for many.
What ranks tell each other is JSON, in tensors of bytes: torch's own way to send objects is pickle.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
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
        self.rank, self.size, self.local_rank, self.store = rank, size, local_rank, store
        self.is_first = rank == 0  # it alone speaks and writes
        self.neighbours: dict[int, int] = {}  # rank -> process id, on this machine

    def device(self, wanted: str) -> str:
        """The device of this rank, where the user's --device is `wanted`; ValueError if this
        machine has fewer GPUs than ranks."""
        if self.size == 1 or wanted == "cpu" or not torch.cuda.is_available():
            return "cpu" if self.size > 1 and wanted == "auto" else wanted
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{len(self.neighbours)} processes on this machine, but {torch.cuda.device_count()}"
                " GPUs: a lower --nproc-per-node, or --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    # -- who does what -----------------------------------------------------------------------

    def deal(self, items: Sequence) -> list:
        """This rank's share of items that everybody has: every size-th one."""
        return list(items[self.rank :: self.size])

    def rounds(self, items: Sequence) -> Iterator[tuple[Any, bool]]:
        """The items of `deal`, each with True; a rank with one less than others gets the last item
        of all with False: it has to compute along, for they need its part of the weights."""
        for start in range(0, len(items), self.size):
            mine = start + self.rank
            yield (items[mine], True) if mine < len(items) else (items[-1], False)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """What is done in here is done on the first rank of each machine, then on the others: its
        downloads are there for them, and its errors come before theirs."""
        if self.local_rank > 0:
            self.gather([])
        yield
        if self.local_rank == 0:
            self.gather([])

    # -- what ranks tell each other -----------------------------------------------------------

    def gather(self, items: list, by: str | int | None = None) -> list:
        """The items of all ranks, on every rank: anything JSON can hold.  They come rank after
        rank, or, since lists were dealt, sorted by `item[by]`."""
        if self.size == 1:
            return items
        data = torch.frombuffer(bytearray(json.dumps(items).encode()), dtype=torch.uint8)
        texts = (bytes(x.numpy()) for x in self._gather_bytes(data))
        items = [item for text in texts for item in json.loads(text)]
        return items if by is None else sorted(items, key=lambda item: item[by])

    def tell(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        return self.gather([value])[0]

    def whole(self, rows: Tensor) -> Tensor:
        """The tensor of which every rank holds some rows (see `part`), on every rank."""
        if self.size == 1 or not rows.dim():
            return rows
        parts = self._gather_bytes(rows.detach().contiguous().view(-1).view(torch.uint8))
        return torch.cat([p.view(rows.dtype).view(-1, *rows.shape[1:]) for p in parts])

    def _gather_bytes(self, data: Tensor) -> list[Tensor]:
        """The bytes (n,) of every rank, by gloo where they lie in host memory, else by NCCL."""
        length = torch.tensor([len(data)], device=data.device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        torch.distributed.all_gather(lengths, length)
        lengths = torch.cat(lengths).tolist()
        # Equal lengths are what can be gathered: padded, then cut again.
        padded = data.new_zeros(max(lengths))
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(parts, padded)
        return [part[:n] for part, n in zip(parts, lengths)]

    # -- parts of tensors ---------------------------------------------------------------------

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor (n, ...), a view: equal pieces, the last ones shorter or
        empty, as fully_shard cuts them.  Numbers (0 dimensions) are everybody's."""
        if self.size == 1 or not tensor.dim():
            return tensor
        rows = -(-len(tensor) // self.size)
        return tensor[self.rank * rows : (self.rank + 1) * rows]

    def shard(self, model: CausalLM, device: torch.device) -> None:
        """Spread a model that has no weights yet (it is on the device meta) over the ranks'
        devices, layer by layer."""
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.mesh = init_device_mesh(device.type, (self.size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=self.mesh)
        # The rest, embedding and output matrix, stays gathered from a forward pass until its
        # backward pass: the readout, which is no module, finds the plain output matrix there.
        fully_shard(model, mesh=self.mesh)

    def spread(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A copy of a weight for a sharded model, made of this rank's rows alone."""
        rows = self.part(tensor).to(device, dtype, copy=True)
        if self.size == 1:
            return rows
        from torch.distributed.tensor import DTensor, Shard

        shape = {"shape": tensor.shape, "stride": tensor.stride()}
        return DTensor.from_local(rows, self.mesh, [Shard(0)], run_check=False, **shape)

    def summed(self, grad: Tensor) -> Tensor:
        """This rank's rows of a gradient, as a sum over ranks: fully_shard has taken the mean, but
        each rank's share of the loss is divided by the counts of the whole batch already."""
        return grad if self.size == 1 else local(grad).mul_(self.size)

    # -- how it ends --------------------------------------------------------------------------

    def may_speak(self) -> bool:
        """True for the first rank that asks: whoever fails first says why, and what the others
        meet then only follows from it."""
        try:
            return self.size == 1 or self.store.add("spoken", 1) == 1
        except RuntimeError:  # torchrun itself is gone
            return True

    def dead(self) -> int | None:
        """A rank of this machine whose process is no more, or None."""
        for rank, process in self.neighbours.items():
            try:
                os.kill(process, 0)
                status = Path(f"/proc/{process}/stat")  # Linux; else torchrun has to notice first
                if status.exists() and status.read_text().rpartition(")")[2].split()[0] in "ZX":
                    return rank
            except OSError:  # no such process, or no longer
                return rank
        return None


ALONE = World()


@contextlib.contextmanager
def join() -> Iterator[World]:
    """The world of this process: the ranks that torchrun started, else itself, ALONE.

    What ends it is said once, by one rank.  ConnectionResetError if another rank died.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "MASTER_ADDR" not in os.environ:
        yield ALONE
        return
    import torch.distributed as dist

    # The store is torchrun's: it is there before any rank is, and outlives them.
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    world = World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), store)
    if not world.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  print and tqdm.write: said once
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        for other, host, process in world.gather([[rank, socket.gethostname(), os.getpid()]]):
            if host == socket.gethostname():
                world.neighbours[other] = process
        yield world
    except BaseException as error:
        # torchrun is about to end all ranks: who has the word must come to say it
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        lost = isinstance(error, RuntimeError) and any(x in str(error).lower() for x in LOST)
        dead = None
        if lost:  # its connections are closed a moment before it is dead
            deadline = time.monotonic() + 1
            while (dead := world.dead()) is None and time.monotonic() < deadline:
                time.sleep(0.01)
        first = world.may_speak()  # after a look around: those who may not are about to go as well
        if isinstance(error, SystemExit):
            raise  # why has been said before
        if not first:
            os._exit(1)
        if lost and not os.environ.get("NANOLASER_TRACEBACK"):
            raise ConnectionResetError(obituary(dead)) from None
        raise
    dist.destroy_process_group()


def obituary(rank: int | None) -> str:
    """What is said when a rank is gone (None: one of another machine)."""
    who = "a rank" if rank is None else f"rank {rank}"
    return f"{who} died or was killed; --resume goes on from the run's last checkpoint"


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this rank holds, a view; any other tensor as it is."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor


def gathered(model: CausalLM, world: World) -> CausalLM:
    """A copy of a sharded model with all its weights, for passes that each rank makes on its own;
    any other model as it is."""
    if world.size == 1 or not hasattr(model.model.norm.weight, "to_local"):
        return model
    with torch.device("meta"):
        copy = CausalLM(model.config)
    weights = {name: world.whole(local(p)) for name, p in model.named_parameters()}
    copy.load_state_dict(weights, assign=True)
    return copy.requires_grad_(False)
