"""
AdamW for a model in bfloat16, for a GPU that is too small, and for many ranks.

A float32 model on one device needs none of it: then this is torch's AdamW and nothing besides.

bfloat16 has 8 bits of mantissa: near 1 its steps are 2^-7 = 0.008 wide, and whatever is smaller
than half a step is rounded away.  So two things are kept in fp32 beside the model:

    master    the weights that AdamW steps; at lr 1e-6 a bf16 weight near 0.02 (steps of 0.0001)
              would never move at all.  The model's weights are rounded from them after each step
    gradient  the sum over micro-batches: the hundredth term of a bf16 sum is about the rounding
              of the 99 before it.  Measured on the embedded model, 1,024 micro-batches, relative
              error of the gradient: .0023 summed in fp32 (bf16's own forward and backward passes),
              .0024 as done here (SUMMED_IN_BF16), .39 summed in bf16

One update, in the order in which grpo.py calls it:

    loss backward, accumulate()    once for each micro-batch
    clip(largest)                  the gradient's norm is known, and is at most `largest`
    step()                         unless that norm is not finite
    zero_grad()
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..model import CausalLM
from .distributed import ALONE, World, local

# Gradients of so many micro-batches are summed in the model's own dtype before the sum is moved
# into fp32.  With the masters on the device moving each would cost as little, but to the host it
# is 15 GB for a 7B model, half a micro-batch's time; and both are to compute the same.
SUMMED_IN_BF16 = 16


class Optimizer:
    """AdamW on fp32 master weights, whatever the model computes in.

    With `offload` masters, gradients and moments lie in host memory and are stepped there, on all
    cores: the device is spared 16 bytes a weight for a trip of the gradients to the host and of
    the weights back.  The arithmetic is the same.
    """

    def __init__(self, model: CausalLM, lr: float, weight_decay: float, offload: bool = False,
                 world: World = ALONE):  # fmt: skip
        # 1. What learns: all parameters, with LoRA the adapters alone.
        self.world = world
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(learning), list(learning.values())
        # Of many ranks a parameter is a DTensor, which stands for the whole.  What is stepped are
        # the plain rows that this rank holds; alone, they are the parameters themselves.  AdamW
        # looks at no two weights together, so ranks have only the gradient's norm to agree upon.
        self.rows = [local(p) for p in self.parameters]
        # 2. Where it is stepped.  Offloaded, everything travels through one buffer, a parameter at
        #    a time: only page-locked memory lets the link run at full speed.  (Not the masters:
        #    torch rounds each page-locked block up to a power of two, for them up to twice the
        #    memory.)
        self.staging = None
        if offload:
            largest, pinned = max(p.numel() for p in self.rows), model.device.type == "cuda"
            self.staging = torch.empty(largest, dtype=model.dtype, pin_memory=pinned)
        # 3. The masters.  A float32 model that is stepped where it lies is its own.
        self.is_bf16, self.master = model.dtype != torch.float32, self.rows
        if self.is_bf16 or offload:
            self.master = [self._to_master(p.detach()).requires_grad_() for p in self.rows]
        self.unmoved = 0  # micro-batches whose gradients are still in the model's own .grad
        self.adam = torch.optim.AdamW(
            self.master, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True
        )

    def _to_master(self, tensor: Tensor) -> Tensor:
        """A copy of a parameter or of its gradient in fp32, on the device where it is stepped."""
        if self.staging is not None:
            tensor = self._staged(tensor).copy_(tensor)
        return tensor.to(torch.float32, copy=True)

    def _staged(self, tensor: Tensor) -> Tensor:
        """The staging buffer in the shape of a parameter."""
        return self.staging[: tensor.numel()].view(tensor.shape)

    @property
    def param_groups(self) -> list[dict]:
        """AdamW's own, to set the learning rate in."""
        return self.adam.param_groups

    @torch.no_grad()
    def accumulate(self) -> None:
        """Called after each micro-batch's backward pass, which has added to the model's .grad: of a
        bf16 model these sums are moved into fp32 before their rounding is seen."""
        # 40 micro-batches: moved after 16 and 32, and the last 8 by `clip`.  A float32 model's
        # .grad is as exact as any other sum, so it stays where it is until then.
        self.unmoved += 1
        if self.is_bf16 and self.unmoved == SUMMED_IN_BF16:
            self._move_gradients()

    def _move_gradients(self) -> None:
        """Add the model's gradients to the masters', and forget them."""
        self.unmoved = 0
        for parameter, master in zip(self.parameters, self.master):
            if parameter.grad is None:  # moved before, and nothing came after
                continue
            grad = self.world.reduce_gradient(parameter.grad)
            parameter.grad = None  # before the copy: at no time are there two of the whole model
            if self.master is self.rows:
                master.grad = grad
            elif master.grad is None:
                master.grad = self._to_master(grad)
            else:
                # fp32 + bf16 is computed in fp32
                master.grad += grad if self.staging is None else self._staged(grad).copy_(grad)

    @torch.no_grad()
    def clip(self, largest: float) -> float:
        """Scale the gradient of the whole batch down to a norm of at most `largest`; the norm it
        had."""
        self._move_gradients()
        # A batch with nothing to learn has left none.  AdamW takes it for a gradient of zero: its
        # moments fade and weights decay as ever, and the step counts.
        for master in self.master:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        # The norm of the whole gradient from those of the ranks' rows: squares are what adds up.
        # Rank 0 holds (2, 3, 6), rank 1 (8, 0, 4): norms 7 and 8.94, the whole has
        # sqrt(49 + 80) = 11.36.  With `largest` 1 EACH rank multiplies by 1 / 11.36; by its own
        # norm each would shrink its rows by another factor, and turn the gradient.
        norm = torch.nn.utils.get_total_norm([master.grad for master in self.master])
        total = math.hypot(*self.world.gather([norm.item()]))
        torch.nn.utils.clip_grads_with_norm_(self.master, largest, norm.fill_(total))
        return total

    @torch.no_grad()
    def step(self) -> None:
        """One AdamW step on the masters; then the model's weights are rounded from them."""
        self._move_gradients()  # nothing is left where clip was called before
        self.adam.step()
        if self.master is self.rows:
            return
        # The only rounding to bf16 in an update, and it does not add up: the masters never see it.
        for rows, master in zip(self.rows, self.master):
            if self.staging is not None:  # rounded before it travels: half the bytes
                master = self._staged(rows).copy_(master)
            rows.copy_(master)

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.unmoved = 0
        for parameter, master in zip(self.parameters, self.master):
            parameter.grad = None  # the next backward pass makes it anew
            if self.staging is None:
                master.grad = None
            elif master.grad is not None:  # to get gigabytes from the system anew is slow
                master.grad.zero_()

    def state(self) -> dict[str, Tensor]:
        """Everything an exact resume needs, as named tensors; of many ranks, this one's rows."""
        # Gradients are not part of it: a checkpoint is written between two updates.
        tensors = {}
        for name, master in zip(self.names, self.master):
            for key, value in self.adam.state[master].items():  # step, exp_avg, exp_avg_sq
                tensors[f"{name}.{key}"] = value
            if self.is_bf16:  # else the checkpoint's own weights are as exact
                tensors[f"{name}.master"] = master.detach()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state` gave, or this rank's rows of it; ValueError if it belongs to another
        model."""
        # AdamW has no state before its first step (every update so far was skipped)
        moments = any(key.endswith(".exp_avg") for key in tensors)
        wanted = ["step", "exp_avg", "exp_avg_sq"] * moments + ["master"] * self.is_bf16
        for name, master in zip(self.names, self.master):
            missing = [key for key in wanted if f"{name}.{key}" not in tensors]
            if missing:
                raise ValueError(f"optimizer state: {name}.{missing[0]} is missing")
            values = {key: tensors[f"{name}.{key}"] for key in wanted}
            if any(v.dim() and v.shape != master.shape for v in values.values()):
                raise ValueError(f"optimizer state: {name} has another shape than the model's")
            if self.is_bf16:
                master.copy_(values.pop("master"))
            # A fused AdamW wants everything beside its parameter, the step count included.
            if moments:
                values = {k: v.to(master.device, copy=True) for k, v in values.items()}
                self.adam.state[master] = values
