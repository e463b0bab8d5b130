"""
LoRA (arXiv 2106.09685): every linear layer stays as it is, and beside it a small correction learns.

    y = W x + scale * B (A x)          W (out, in) is frozen; A (R, in) and B (out, R) learn

R is a handful, so of a 7B model some 40 million numbers have a gradient, AdamW's moments and fp32
masters: 0.8 GB where full training has 120.  B begins at zero, and the model with it unchanged.

r_s is log pi(z_c) after the end: hidden state times z_c's row of the output matrix.  The adapters
move the hidden state; the row is to move as well, though the matrix is frozen.  So it gets a
correction of its own, `z_c_row` (1, C): an adapter of rank 1 whose B is the one-hot of z_c.  That
is one row of a matrix which may be tied to the embedding: no matter, z_c stands in no text.

Two forms of one model, which differ in rounding alone:

    apart    W x + scale * B (A x), with gradients: the update
    merged   one product with W + scale * B A: sampling, and checkpoints, which anybody can load
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from .model import CausalLM
from .scale.distributed import ALONE, World, local

# Where a checkpoint has them, in PEFT's format.  A folder of its own: transformers takes an
# adapter_config.json beside the merged weights for adapters that are still to be added.
ADAPTER = Path("adapter/adapter_model.safetensors")


@dataclass(frozen=True)
class Lora:
    """Which adapters a model gets."""

    rank: int  # R
    alpha: float  # the correction is scaled by alpha / R
    targets: str = "all"  # linear layers of a decoder layer, or those of "attention" alone
    z_c_id: int = 0  # whose row of the output matrix learns
    seed: int = 0  # of A
    base: str = ""  # the model that is adapted
    saved: Path | None = None  # the checkpoint whose adapters are gone on with; None: new ones


class AdaptedLinear(nn.Linear):
    """A linear layer that is frozen, and its adapter."""

    def __init__(self, frozen: nn.Linear, lora: Lora):
        # Made on the device meta, where it costs nothing, for its weight is there already.
        out, inside = frozen.weight.shape
        super().__init__(inside, out, frozen.bias is not None, device="meta")
        self.weight, self.bias = frozen.weight, frozen.bias
        self.lora_A = nn.Parameter(frozen.weight.new_empty(lora.rank, inside))
        self.lora_B = nn.Parameter(frozen.weight.new_empty(out, lora.rank))
        self.scale = lora.alpha / lora.rank
        self.merged, self.frozen = False, None  # frozen: W as it was, while it is merged

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        y = super().forward(x)
        if self.merged:
            return y
        return y + F.linear(F.linear(x, self.lora_A) * self.scale, self.lora_B)  # by (..., R)


def attach(model: CausalLM, lora: Lora) -> None:
    """Freeze a model and give it adapters, without numbers as yet: `fill` has them."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        for block in [layer.self_attn] + [layer.mlp] * (lora.targets == "all"):
            for name, part in list(block.named_children()):
                if isinstance(part, nn.Linear):
                    setattr(block, name, AdaptedLinear(part, lora))
    model.z_c_row = nn.Parameter(model.lm_head_weight.new_empty(1, model.config.hidden_size))
    model.lora = lora

    def write_row(model, *_):
        """Before each forward pass (where sharded weights are whole): the row as it is by now."""
        with torch.no_grad():
            z_c = lora.z_c_id
            model.lm_head_weight[z_c : z_c + 1] = model.z_c_frozen + model.z_c_row

    model.register_forward_pre_hook(write_row)


def is_adapter(name: str) -> bool:
    """Is a parameter of this name an adapter's, and not the model's own?"""
    return name.endswith((".lora_A", ".lora_B")) or name == "z_c_row"


@torch.no_grad()
def fill(model: CausalLM, world: World = ALONE) -> None:
    """Give the adapters of a model that has its weights numbers: those that were saved, else those
    to begin with, which change nothing."""
    # Every forward pass overwrites z_c's row of the matrix, so what it was is kept here.
    model.z_c_frozen = world.all_gather(_row(model, world).clone())  # (1, C)
    g, tensors = torch.Generator().manual_seed(model.lora.seed), {}
    shapes = {n: p.shape for n, p in model.named_parameters() if is_adapter(n)}
    if model.lora.saved is None:
        for name, shape in shapes.items():
            # A like a linear layer's weights, B zero: so B A is zero, but not its gradient by B.
            bound = shape[1] ** -0.5 if name.endswith("lora_A") else 0.0
            tensors[name] = torch.empty(shape).uniform_(-bound, bound, generator=g)
    else:
        with safe_open(model.lora.saved / ADAPTER, framework="pt") as file:
            names = {name: f"base_model.model.{name}.weight" for name in shapes}
            names["z_c_row"] = "base_model.model.lm_head.lora_A.weight"
            tensors = {name: file.get_tensor(theirs) for name, theirs in names.items()}
    for name, tensor in tensors.items():
        tensors[name] = world.scatter(tensor, model.device, model.dtype)
    model.load_state_dict(tensors, strict=False, assign=True)


def _row(model: CausalLM, world: World) -> Tensor:
    """z_c's row of the output matrix (1, C), a view, on the rank that holds it, else no row."""
    # 10 rows on 4 ranks are 3 3 3 1: row 7 is row 1 of rank 2, -2 of rank 3, which has none.
    place = model.lora.z_c_id - world.rank * -(-model.config.vocab_size // world.size)
    return local(model.lm_head_weight)[max(0, place) : max(0, place + 1)]


@contextlib.contextmanager
def merged(model: CausalLM, world: World = ALONE) -> Iterator[None]:
    """In here a model's weights are W + scale * B A, and its adapters idle; other models: nothing
    happens.  Afterwards W is, bit for bit, what it was."""
    # To sample takes a forward pass a token, where a small product costs nearly what a large one
    # does: on the embedded model (rank 8, one core) 128 solutions take 0.34 s merged and 0.40 s
    # apart, and merging takes a millisecond.
    parts = [m for m in model.modules() if isinstance(m, AdaptedLinear) and not m.merged]
    with torch.no_grad():
        for m in parts:
            # Subtracting what was added would leave a rounding each time: so W is kept, once, in
            # the host's memory.  W and B are sharded alike, by rows; of A every rank needs all.
            W, A = local(m.weight), world.all_gather(local(m.lora_A))
            m.frozen = W.to("cpu", copy=True) if m.frozen is None else m.frozen
            W.addmm_(local(m.lora_B), A, alpha=m.scale)
            m.merged = True
        if parts:
            _row(model, world).copy_(model.z_c_frozen + world.all_gather(local(model.z_c_row)))
        try:
            yield
        finally:
            for m in parts:
                local(m.weight).copy_(m.frozen)
                m.merged = False


def in_peft(model: CausalLM, world: World = ALONE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The adapters as PEFT has them: its adapter_config.json, and its tensors by name; of a model
    without any both are empty."""
    if model.z_c_row is None:
        return {}, {}
    lora, parts = model.lora, {n for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    # To PEFT the row is an adapter of the output matrix, of rank 1 and scale 1: it is A, and B is
    # the one-hot of z_c.
    one_hot = torch.zeros(model.config.vocab_size, 1, dtype=model.dtype, device=model.device)
    one_hot[lora.z_c_id] = 1
    tensors = {n: p for n, p in model.named_parameters() if is_adapter(n)}
    tensors["lm_head.lora_A"] = tensors.pop("z_c_row")
    tensors["lm_head.lora_B"] = world.local_rows(one_hot)
    tensors = {f"base_model.model.{name}.weight": p for name, p in tensors.items()}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": lora.base,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({n.rsplit(".", 1)[1] for n in parts} | {"lm_head"}),
        "rank_pattern": {"lm_head": 1}, "alpha_pattern": {"lm_head": 1}, "inference_mode": True,
    }  # fmt: skip
    return config, tensors


def fingerprint(model: CausalLM, world: World = ALONE) -> int:
    """Which model the adapters belong to: a number that another one's frozen weights would hardly
    give, the same on all ranks."""
    # A checksum of the first number of every weight: each is on the first rank, however many there
    # are, and no two models agree in all of them.
    firsts = [local(p).flatten()[:1].float().cpu() for n, p in model.named_parameters()
              if not is_adapter(n)]  # fmt: skip
    return world.broadcast(zlib.crc32(torch.cat(firsts).numpy().tobytes()))
