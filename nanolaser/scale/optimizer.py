"""
AdamW for a model in bfloat16, for a GPU that is too small, and for many ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..model import CausalLM
from .distributed import ALONE, World, local


class Optimizer:
    """AdamW on fp32 master weights, whatever the model computes in.

    At lr 1e-6 a bf16 weight (8 bits of mantissa) would never move: every update is rounded away.
    A float32 model is its own master, and then nothing is copied.

    With `offload` masters and moments lie in host memory and are stepped there, on all cores: the
    device is spared 12 bytes a weight for one trip of the gradients to the host and of the weights
    back.  The arithmetic is the same.

    Of many ranks each keeps and steps its rows of every parameter: AdamW looks at no two weights
    together, so nothing but the norm of the gradient has to be agreed upon.
    """

    def __init__(
        self,
        model: CausalLM,
        lr: float,
        weight_decay: float,
        offload: bool = False,
        world: World = ALONE,
    ):
        self.world, self.whole = world, list(model.parameters())
        self.parameters = [local(p) for p in self.whole]  # alone: the model's own
        self.names = [name for name, _ in model.named_parameters()]
        self.narrow = model.dtype != torch.float32
        self.buffer = None
        if offload:
            # Everything travels through this one buffer, a parameter at a time: only page-locked
            # memory lets the link run at full speed.  (Not the masters: torch rounds each
            # page-locked block up to a power of two, which for them can mean twice the memory.)
            largest, pinned = max(p.numel() for p in self.parameters), model.device.type == "cuda"
            self.buffer = torch.empty(largest, dtype=model.dtype, pin_memory=pinned)
        copied = self.narrow or offload
        self.master = [self._copy(p) if copied else p for p in self.parameters]
        self.adam = torch.optim.AdamW(
            self.master, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True
        )

    def _copy(self, p: Tensor) -> Tensor:
        """The fp32 master of a parameter, where the optimizer steps it."""
        source = p.detach() if self.buffer is None else self._wire(p).copy_(p.detach())
        return source.to(torch.float32, copy=True).requires_grad_()

    def _wire(self, p: Tensor) -> Tensor:
        """The travelling buffer in the shape of a parameter."""
        return self.buffer[: p.numel()].view(p.shape)

    @property
    def param_groups(self) -> list[dict]:
        """AdamW's own, to set the learning rate in."""
        return self.adam.param_groups

    @torch.no_grad()
    def clip(self, largest: float) -> float:
        """Scale the gradient down to a norm of at most `largest`; the norm it had."""
        for p, whole in zip(self.parameters, self.whole):
            p.grad = self.world.summed(whole.grad)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters])
        # the root of the sum of the squares of all ranks' norms; of one alone, its own
        total = math.hypot(*self.world.gather([norm.item()]))
        torch.nn.utils.clip_grads_with_norm_(self.parameters, largest, norm.fill_(total))
        return total

    @torch.no_grad()
    def step(self) -> None:
        """One AdamW step on the masters, then the model's weights are rounded from them."""
        apart = [(m, p) for m, p in zip(self.master, self.parameters) if m is not p]
        for master, p in apart:
            if self.buffer is None:
                master.grad = p.grad.float()
                continue
            if master.grad is None:  # kept: to get gigabytes from the system anew is slow
                master.grad = torch.empty_like(master)
            master.grad.copy_(self._wire(p).copy_(p.grad))
        self.adam.step()
        for master, p in apart:
            if self.buffer is None:
                p.copy_(master)
                master.grad = None
            else:
                p.copy_(self._wire(p).copy_(master))  # rounded here: half the bytes travel

    def zero_grad(self) -> None:
        """Forget the gradients (set to None: the next backward pass makes them anew)."""
        for p in (*self.parameters, *self.whole):
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything an exact resume needs, as named tensors; of many ranks, this one's rows."""
        tensors = {}
        for name, master in zip(self.names, self.master):
            for key, value in self.adam.state[master].items():  # step, exp_avg, exp_avg_sq
                tensors[f"{name}.{key}"] = value
            if self.narrow:  # else the checkpoint's own weights are as exact
                tensors[f"{name}.master"] = master.detach()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state` gave, or this rank's rows of it; ValueError if it belongs to another
        model."""
        # AdamW has no state before its first step (every update so far was skipped)
        moments = any(key.endswith(".exp_avg") for key in tensors)
        for name, master in zip(self.names, self.master):
            keys = ["step", "exp_avg", "exp_avg_sq"] if moments else []
            keys += ["master"] if self.narrow else []
            missing = [key for key in keys if f"{name}.{key}" not in tensors]
            if missing:
                raise ValueError(f"optimizer state: {name}.{missing[0]} is missing")
            values = {key: tensors[f"{name}.{key}"] for key in keys}
            if any(v.dim() and v.shape != master.shape for v in values.values()):
                raise ValueError(f"optimizer state: {name} has another shape than the model's")
            if self.narrow:
                master.copy_(values.pop("master"))
            # A fused AdamW wants everything beside its parameter, the step count included.
            if moments:
                values = {k: v.to(master.device, copy=True) for k, v in values.items()}
                self.adam.state[master] = values
