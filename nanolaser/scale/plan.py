"""
What a training run will need, before a single weight is loaded: bytes, and a rough idea of seconds,
from the model's shape alone.

    python train.py --model qwen2.5-7b --plan               # on the machine at hand
    python -m nanolaser.scale.plan --gpus 8 --model orz-7b  # on H100s that need not be there
    python -m nanolaser.scale.plan --cards 16,24,80         # which models fit which cards

A step has three phases, and memory must suffice for the largest, not for their sum:

    sample   weights, optimizer state, KV cache, logits of one token a row
    update   weights, optimizer state, gradients, activations of one micro-batch, log-prob blocks
    step     weights, optimizer state, gradients in fp32

Worked example, Qwen2.5-7B on one GPU of 80 GB: n = 7.6e9 weights in bf16 (2 bytes each) are 15 GB,
their gradients 15 more.  AdamW's fp32 masters, two moments and gradients are 4 * 4 * n = 122 GB:
those must go to the host's memory (offload_optimizer).  Of 80 GB a plan may fill 72, so 42 are left
for activations.  A layer keeps 225 kB a token, 28 layers and a micro-batch of 16,384 tokens 103 GB:
too much, so they are computed again in the backward pass (gradient_checkpointing), and 4 remain.
With LoRA of rank 16 instead, 40 million numbers learn: 0.7 GB of masters, moments and gradients.

Letters are model.py's (B T C H K D L V), and besides them I width of the MLP, n parameters,
e bytes of a weight, N tokens of a micro-batch, R rows sampled at a time.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ..cache import KVCache
from ..checkpoint import ALIASES, EMBEDDED, auto_dtype, find_checkpoint, load_config
from ..cli import main_guard, option, parse_args, speaks
from ..model import ModelConfig
from ..packing import ATTENDED
from ..problems import MADE_UP
from ..readout import BLOCK_LOGITS, CHUNK_VOCAB
from .optimizer import SUMMED_IN_BF16

GIB = 2**30
PHASES = ("sample", "update", "step")
# The formulas count the tensors that are alive at a phase's worst moment, to a few per cent
# (tests/test_plan.py has torch count them).  Resident memory is more: a GPU's fragments, and on a
# CPU the C library's heap, which keeps freed blocks of less than 32 MB for later.  It is why a
# tenth stays free, and that is not always enough: of a model of 50 million weights in fp32 with
# gradient checkpointing (benchmarks/memory.py) 1,248 MiB are planned, and 1,420 to 1,470 measured.
# With the same code, but a heap that gives everything back (MALLOC_MMAP_THRESHOLD_=131072 in the
# environment), it is 1,207: no tensor is missing in the plan.
FILL = 0.9
EASY_ROWS = 16  # fewer rows at a time leave a GPU idle: rather pay for another setting

# ---------------------------------------------------------------------------------------------
# shapes of published checkpoints, so that a plan needs no download

# alias: family, vocabulary V, hidden C, MLP, layers L, heads H, key-value heads K, head D, tied
_SIZES = {
    "smollm2-135m": ("llama", 49_152, 576, 1536, 30, 9, 3, 64, True),
    "smollm2-360m": ("llama", 49_152, 960, 2560, 32, 15, 5, 64, True),
    "smollm2-1.7b": ("llama", 49_152, 2048, 8192, 24, 32, 32, 64, True),
    "tinyllama-1.1b": ("llama", 32_000, 2048, 5632, 22, 32, 4, 64, False),
    "llama-3.2-1b": ("llama", 128_256, 2048, 8192, 16, 32, 8, 64, True),
    "llama-3.2-3b": ("llama", 128_256, 3072, 8192, 28, 24, 8, 128, True),
    "llama-3.1-8b": ("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, False),
    "qwen2.5-0.5b": ("qwen2", 151_936, 896, 4864, 24, 14, 2, 64, True),
    "qwen2.5-1.5b": ("qwen2", 151_936, 1536, 8960, 28, 12, 2, 128, True),
    "qwen2.5-3b": ("qwen2", 151_936, 2048, 11_008, 36, 16, 2, 128, True),
    "qwen2.5-7b": ("qwen2", 152_064, 3584, 18_944, 28, 28, 4, 128, False),
    "qwen3-0.6b": ("qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, True),
    "qwen3-1.7b": ("qwen3", 151_936, 2048, 6144, 28, 16, 8, 128, True),
    "qwen3-4b": ("qwen3", 151_936, 2560, 9728, 36, 32, 8, 128, True),
    "qwen3-8b": ("qwen3", 151_936, 4096, 12_288, 36, 32, 8, 128, False),
}
# Trained further, shaped as before: -instruct, -base and these.
_LIKE = {"qwen2.5-math-1.5b": "qwen2.5-1.5b", "qwen2.5-math-7b": "qwen2.5-7b",
         "orz-7b": "qwen2.5-7b", "octothinker-3b": "llama-3.2-3b"}  # fmt: skip


def _shape(alias: str) -> ModelConfig:
    """The sizes of a model, and nothing else of its config: enough to plan, not to run it."""
    alias = _LIKE.get(alias, alias.removesuffix("-instruct").removesuffix("-base"))
    *sizes, tied = _SIZES[alias]
    return ModelConfig(*sizes, tie_word_embeddings=tied, attention_bias=sizes[0] == "qwen2",
                       qk_norm=sizes[0] == "qwen3")  # fmt: skip


SHAPES: dict[str, ModelConfig] = {alias: _shape(alias) for alias in ALIASES}


def linear_layers(c: ModelConfig, targets: str = "all") -> list[tuple[int, int]]:
    """(in, out) of the linear layers of a decoder layer: q, k, v and o of its attention and, unless
    `targets` is "attention", gate, up and down of its MLP."""
    C, I = c.hidden_size, c.intermediate_size  # noqa: E741
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return [(C, q), (C, kv), (C, kv), (q, C), *[(C, I), (C, I), (I, C)] * (targets == "all")]


def layer_parameters(c: ModelConfig) -> int:
    """How many parameters one decoder layer has."""
    layers = linear_layers(c)
    q, k, v, o, *mlp = (out for _, out in layers)
    biases = c.attention_bias * (q + k + v) + c.attention_output_bias * o + c.mlp_bias * sum(mlp)
    # two norms, and Qwen3's of a head's query and key
    norms = 2 * c.hidden_size + 2 * c.qk_norm * c.head_dim
    return sum(i * o for i, o in layers) + norms + biases


def embedding_parameters(c: ModelConfig) -> int:
    """How many the embedding and the output matrix have; tied, they count once."""
    return (2 - c.tie_word_embeddings) * c.vocab_size * c.hidden_size


def parameters(c: ModelConfig) -> int:
    """How many the whole model has."""
    return c.num_hidden_layers * layer_parameters(c) + embedding_parameters(c) + c.hidden_size


def adapter_parameters(c: ModelConfig, rank: int, targets: str = "all") -> int:
    """How many LoRA's adapters have, the row of z_c included; 0 without."""
    a_and_b = rank * sum(i + o for i, o in linear_layers(c, targets))
    return c.num_hidden_layers * a_and_b + c.hidden_size if rank else 0


# ---------------------------------------------------------------------------------------------
# what is planned


@dataclass(frozen=True)
class Workload:
    """One step of the run: how many rollouts, how long.  Lengths in tokens."""

    problems: int = 128  # of one step, over all ranks
    group_size: int = 8
    prompt_tokens: int = 2048  # the longest prompt
    max_new_tokens: int = 8192
    steps: int = 800
    max_rows: int = 256  # sampled at a time
    lora_rank: int = 0  # 0: all weights learn
    lora_targets: str = "all"

    @property
    def longest(self) -> int:
        """Tokens of the longest row that can occur."""
        return self.prompt_tokens + self.max_new_tokens

    def share(self, world: int) -> int:
        """Rollouts of the rank that has the most."""
        return -(-self.problems // world) * self.group_size

    def rows(self, world: int) -> int:
        """Rollouts R that are sampled at a time, where there is memory for them."""
        return min(self.max_rows, self.share(world))


@dataclass(frozen=True)
class Settings:
    """What the plan may choose; each costs time where it saves memory."""

    micro_batch_tokens: int = 16_384
    gradient_checkpointing: bool = False  # a third more arithmetic in the update
    offload_optimizer: bool = False  # AdamW in host memory, stepped there


@dataclass(frozen=True)
class Plan:
    """A run on given machines, what it would need there, and whether there is as much."""

    config: ModelConfig
    device_bytes: int  # what there is for each rank
    host_bytes: int  # likewise; of a CPU run the same
    dtype: torch.dtype = torch.float32
    name: str = "model"
    device: str = "cpu"  # or "cuda"
    world: int = 1  # ranks: each holds 1 / world of weights, gradients and optimizer (FSDP2)
    work: Workload = Workload()
    settings: Settings = Settings()
    models: int = 1  # 2: a frozen reference beside the one that learns

    @property
    def adapters(self) -> int:
        """How many parameters LoRA adds."""
        return adapter_parameters(self.config, self.work.lora_rank, self.work.lora_targets)

    @property
    def learning(self) -> int:
        """How many parameters have a gradient."""
        return self.adapters or parameters(self.config)

    @cached_property
    def rows(self) -> int:
        """How many of the longest rows are sampled at a time: the KV cache gets what the rest
        leaves, and holds one row at least."""
        # What is left without any, divided by what the first one costs and its layer of a cache
        # that grows (see sampling_bytes).  Shorter rows leave room for more: the sampler's matter.
        none, one = (sum(x[0] for x in bytes_by_phase(self, rows).values()) for rows in (0, 1))
        L = self.config.num_hidden_layers
        rows = int((FILL * self.device_bytes - none) / (one - none) * L / (L + 1))
        return min(max(rows, 1), self.work.rows(self.world))

    @cached_property
    def bytes(self) -> dict[str, tuple[int, int, int]]:
        """What lies on the device of a rank: {what: bytes in each phase}."""
        return bytes_by_phase(self, self.rows)

    @property
    def totals(self) -> tuple[int, int, int]:
        """Bytes on the device in each phase."""
        return tuple(map(sum, zip(*self.bytes.values())))

    @property
    def peak_bytes(self) -> int:
        """Bytes on the device in the phase that needs most."""
        return max(self.totals)

    @property
    def host_needed(self) -> int:
        """Bytes of host memory for each rank of a GPU run."""
        # fp32 masters, moments and gradients if offloaded, the weights beside which adapters learn,
        # and what Python and torch take.  (A CPU run's are on its device.)
        offloaded = 16 * self.learning // self.world * self.settings.offload_optimizer
        return 0 if self.device == "cpu" else offloaded + frozen_copy(self) + 3 * GIB

    @property
    def micro_batch(self) -> int:
        """Padded tokens N of the largest micro-batch."""
        # A row is never cut, and a step with fewer rollouts than it could hold fills it less.
        most = self.work.share(self.world) * self.work.longest
        return min(max(self.settings.micro_batch_tokens, self.work.longest), most)

    @property
    def kv_cache_bytes(self) -> int:
        """The sampler's budget: what the KV cache may grow to, in bytes."""
        spare = int(FILL * self.device_bytes) - self.totals[0]
        return self.bytes["KV cache"][0] + max(0, spare)

    @property
    def fits(self) -> bool:
        """Is there as much memory, with a tenth to spare?"""
        there = (self.device_bytes, self.host_bytes)
        return all(x <= FILL * y for x, y in zip((self.peak_bytes, self.host_needed), there))

    def table(self) -> str:
        """The plan as text, at most 100 columns wide."""
        s, w, (sample, update) = self.settings, self.work, seconds_of_step(self)
        unit, label, digits = (GIB, "GiB", 1) if self.peak_bytes > 4 * GIB else (2**20, "MiB", 0)

        def line(what: str, sizes) -> str:
            cells = (f"{x / unit:,.{digits}f}" if x else "-" for x in sizes)
            return f"  {what:<28}" + "".join(f"{cell:>10}" for cell in cells)

        ranks = f"each of {self.world} ranks on " if self.world > 1 else ""
        lora = f" and {self.adapters:,} of adapters" if w.lora_rank else ""
        fits = f"   {'fits' if self.fits else 'DOES NOT FIT'} (it may fill {FILL:.0%})"
        host = f"  host memory: {self.host_needed / GIB:,.0f} GiB a rank of "
        return "\n".join([
            f"{self.name}: {parameters(self.config):,} parameters{lora}, {str(self.dtype)[6:]}, "
            f"{ranks}{self.device}",
            f"  {w.problems} problems x {w.group_size} solutions a step; at most "
            f"{w.prompt_tokens:,} + {w.max_new_tokens:,} tokens each",
            f"  micro-batch {s.micro_batch_tokens:,} tokens, {self.rows} of the longest rows "
            "sampled at a time,",
            f"  gradient checkpointing {'on' if s.gradient_checkpointing else 'off'}, optimizer in "
            f"{'host' if s.offload_optimizer else 'device'} memory",
            "",
            f"  {label + ' on the device':<28}" + "".join(f"{phase:>10}" for phase in PHASES),
            *(line(what, sizes) for what, sizes in self.bytes.items() if any(sizes)),
            line("together", self.totals),
            line("there is", [self.device_bytes]) + fits,
            *([f"{host}{self.host_bytes / GIB:,.0f}"] if self.device != "cpu" else []),
            "",
            f"  time of a step, about {sample:,.1f} s of sampling and {update:,.1f} s of updating;",
            f"  {w.steps} steps: {(sample + update) * w.steps / 3600:,.1f} hours (from assumed "
            "speeds, for solutions half as long as they may be)",
        ])  # fmt: skip


def plan(config: ModelConfig, wanted: Settings = Settings(), **run) -> Plan:
    """The cheapest settings with which a run fits, or the most frugal ones if none does; `wanted`
    is what would be taken if memory were no matter, `run` the fields of Plan."""
    p = Plan(config, **run)
    # In order of the time that they cost: smaller micro-batches are nearly free, but a row is never
    # cut; recomputing is a third more arithmetic; offloading moves all gradients to the host, and
    # steps 7B weights there in seconds instead of milliseconds.  (A CPU has no second memory.)
    sizes = [wanted.micro_batch_tokens]
    while sizes[-1] // 2 >= p.work.longest:
        sizes.append(sizes[-1] // 2)
    again = sorted({wanted.gradient_checkpointing, True})
    away = sorted({wanted.offload_optimizer, wanted.offload_optimizer or p.device != "cpu"})
    # 16,384 8,192 ..., with recomputing 16,384 8,192 ..., and both once more offloaded.
    plans = [replace(p, settings=Settings(size, check, off))
             for off, check, size in itertools.product(away, again, sizes)]  # fmt: skip
    # The first with enough rows at a time to be worth it, or else with fewer: reading all weights
    # for the next token costs a GPU as much for one row as for a hundred.
    enough = min(EASY_ROWS, p.work.rows(p.world))
    fitting = [p for p in plans if p.fits]
    return next((p for p in fitting if p.rows >= enough), (fitting or plans[-1:])[0])


# ---------------------------------------------------------------------------------------------
# seconds

# Operations/s of matrix products and bytes/s of memory.  A GPU's are assumed, never measured: 40 %
# and 60 % of an H100's.  A core's: two thirds of the 9e10 that fp32 products alone came to on one.
RATES = {"cuda": (4e14, 2e12), "cpu": (6e10, 1e10)}


def seconds_of_step(p: Plan) -> tuple[float, float]:
    """(sampling, updating) of one step: days or weeks?  Not more than that: it knows neither
    attention, nor padding, nor what ranks and host tell each other."""
    n, (flops, memory) = parameters(p.config), RATES[p.device]
    flops *= torch.get_num_threads() if p.device == "cpu" else 1
    rollouts, new = p.work.share(p.world), max(1, p.work.max_new_tokens // 2)  # as a guess
    # Sampling: a turn of one token for every row reads all weights and all keys and values.  There
    # are as many as the tokens want, and some for the longest rows, which end up alone.
    turns = rollouts * new / p.rows + p.work.max_new_tokens - new
    read = n * p.dtype.itemsize + kv_bytes(p.config, p.dtype, p.rows, new)
    sample = turns * max(2 * n * p.rows / flops, read / memory)
    # Updating: 2 operations a weight and token forward, 2 backward to the inputs, 2 to the weights
    # if they learn; checkpointing goes forward once more.
    passes = (2 if p.adapters else 3) + p.settings.gradient_checkpointing
    # AdamW reads gradient, two moments and master, and writes the latter three and the weight; in
    # the host's memory at a tenth of a terabyte a second.
    step = 30 * p.learning / p.world / (1e11 if p.settings.offload_optimizer else memory)
    return sample, passes * 2 * n * rollouts * new / flops + step


# ---------------------------------------------------------------------------------------------
# bytes


def kv_bytes(c: ModelConfig, dtype: torch.dtype, rows: int, tokens: int) -> int:
    """Bytes of a KV cache of `rows` rows with room for `tokens` each, in whole blocks."""
    # Qwen2.5-7B in bf16: 2 (keys and values) * 28 layers * 4 heads * 128 * 2 bytes = 57 kB a token,
    # 0.6 GB for a row of the paper's 10,240
    slots = -(-tokens // KVCache.BLOCK) * KVCache.BLOCK
    per_slot = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize
    return rows * slots * per_slot


def layer_activation_bytes(
    c: ModelConfig, dtype: torch.dtype, lora_rank: int = 0, lora_targets: str = "all"
) -> int:
    """Bytes that one layer keeps for its backward pass, for each token of the micro-batch."""
    e, C, I = dtype.itemsize, c.hidden_size, c.intermediate_size  # noqa: E741
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    # a norm keeps its input in fp32, that input normalised (for the gradient of its weight), the
    # result (both in the model's dtype), and 1/rms; there are two of them
    normalised = 0 if lora_rank else e
    norms = 2 * ((4 + normalised + e) * C + 4)
    # rotated q and k, v, the heads' output, and a logsumexp in fp32 for each head
    attention = e * 2 * (H + K) * D + 4 * H
    attention += c.qk_norm * (H + K) * ((4 + normalised) * D + 4)  # normed before they were rotated
    # gate, silu(gate), up and their product
    mlp = 4 * I * e
    # LoRA: A x of every adapter; a layer that is frozen and has none need not keep its input
    if lora_rank and lora_targets == "attention":
        return norms + attention + mlp + e * (4 * lora_rank - C - I)
    return norms + attention + mlp + e * 7 * lora_rank


def sampling_bytes(p: Plan, longest_rows: int) -> dict[str, int]:
    """What is there only while a rank samples, with a KV cache for so many of the longest rows."""
    c, e, T, R = p.config, p.dtype.itemsize, p.work.prompt_tokens, p.work.rows(p.world)
    C, I, V = c.hidden_size, c.intermediate_size, c.vocab_size  # noqa: E741
    kv = kv_bytes(c, p.dtype, longest_rows, p.work.longest)
    # Three moments that do not meet: one layer of the cache grows, so it is there twice ...
    growing = kv // c.num_hidden_layers
    # ... prompts are read, each distinct one once (a group may be cut by the batch's border), and
    # one layer's keys and values fanned out to the R rows ...
    prompts = -(-R // p.work.group_size) + 1
    copied = kv_bytes(c, p.dtype, R, T) // c.num_hidden_layers
    prefill = max(copied, prompts * T * e * (3 * I + 4 * C))
    # ... a token is drawn for every row: (R, V) logits, probabilities and their sums, in fp32.
    drawing = 3 * R * V * 4
    return {
        "KV cache": kv,
        "fp32 output matrix": V * C * 4 if e < 4 else 0,
        "prefill, or a token a row": max(growing, prefill, drawing),
    }


def updating_bytes(p: Plan) -> dict[str, int]:
    """What is there only while a micro-batch is learned from."""
    c, e, N, again = p.config, p.dtype.itemsize, p.micro_batch, p.settings.gradient_checkpointing
    C, I, L, V = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.vocab_size  # noqa: E741
    lora = p.work.lora_rank > 0
    layer = layer_activation_bytes(c, p.dtype, p.work.lora_rank, p.work.lora_targets)
    # Attention goes over texts, padded and each with a prompt of its own (packing.py): of those
    # there are keys and values, and the heads' output is there once more, put back.
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    layer += e * (H + (ATTENDED - 1) * 2 * K) * D
    # Forward.  With checkpointing a layer's input is all that is kept.  Around the layers: token
    # ids, the final norm, and the hidden states picked for the readout.
    kept = N * (L * (C * e if again else layer) + 8 + (4 + 2 * e) * C + 4 + C * e)
    # Readout of the response tokens, and of the token after the end of each row: a block of
    # logits, never (N, V), three times its hidden states, and the gradient of all hidden states.
    # bf16: pieces of the output matrix are widened, old and new, and its gradient summed in fp32.
    # (Of N tokens: a group's prompt is there once.)
    G, S, new = p.work.group_size, p.work.prompt_tokens, p.work.max_new_tokens
    read = N * G * (new + 1) // (S + G * new)
    readout = (min(read, max(1, BLOCK_LOGITS // V)) * (V + 3 * C) + read * C) * 4
    readout += ((0 if lora else V) + 2 * min(CHUNK_VOCAB, V)) * C * 4 if e < 4 else 0
    # Backward: the gradients that flow through one layer, and its activations if computed anew.
    flowing = N * (max(2 * I * e, 16 * C) + (layer if again else 0))
    # Last of all comes the embedding's gradient, dense; the activations are gone by then.
    dense = 0 if lora else embedding_parameters(c) * e - kept
    return {"activations": kept, "log-probs, or backward": max(readout, flowing, dense)}


def bytes_by_phase(p: Plan, longest_rows: int) -> dict[str, tuple[int, int, int]]:
    """What lies on one rank's device: {what: (bytes while sampling, updating, stepping)}, with a
    KV cache for so many of the longest rows."""
    c, n, e = p.config, parameters(p.config) + p.adapters, p.dtype.itemsize
    shard = lambda per_weight: per_weight * p.learning // p.world  # noqa: E731
    masters = e < 4 or p.settings.offload_optimizer
    # a CPU has only the one memory: to "offload" there saves nothing
    away = p.settings.offload_optimizer and p.device != "cpu"
    # AdamW's two moments, 4 bytes a weight each, and as much for masters where those are not the
    # weights themselves
    state = 0 if away else shard(12 if masters else 8)
    # The gradients of a bf16 model are summed in fp32 (see optimizer.py): from the first
    # SUMMED_IN_BF16 micro-batches on, or, if there are no more, when all are done.
    sums = shard(4) if masters and not away else 0
    many = p.work.share(p.world) * p.work.longest > SUMMED_IN_BF16 * p.micro_batch
    table = {
        "weights": (p.models * (n * e // p.world),) * 3,
        "optimizer state": (state,) * 3,
        "gradients": (0, shard(e), 0 if sums else shard(e)),
        "gradients summed in fp32": (0, sums if many else 0, sums),
    }
    table |= {what: (size, 0, 0) for what, size in sampling_bytes(p, longest_rows).items()}
    table |= {what: (0, size, 0) for what, size in updating_bytes(p).items()}
    if p.world > 1:
        # sampling: a gathered copy; update: the embeddings and two layers (one computing, one
        # on its way) gathered, with their gradients before they are scattered
        gathered = 2 * e * (2 * layer_parameters(c) + embedding_parameters(c))
        table["gathered weights"] = (n * e, gathered, 0)
    # Before the first tensor there is Python and torch, and about 135 MiB of what they load on
    # first use; on a GPU the CUDA context and the matrix library's workspace.
    if p.device == "cpu":
        table["weights, unmerged"] = (frozen_copy(p),) * 3
        table["Python, torch"] = (resident_bytes() + 135 * 2**20,) * 3
    else:
        table["CUDA context"] = (3 * GIB // 2,) * 3
    return table


def frozen_copy(p: Plan) -> int:
    """Bytes of host memory for the adapted layers' weights, which sampling overwrites by merged
    ones: see lora.merged."""
    sizes = sum(i * o for i, o in linear_layers(p.config, p.work.lora_targets))
    copied = p.config.num_hidden_layers * sizes * p.dtype.itemsize // p.world
    return copied if p.work.lora_rank else 0


# ---------------------------------------------------------------------------------------------
# what there is


def resident_bytes() -> int:
    """Bytes of memory this process occupies now; 300 MiB (torch, imported) where unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return 300 * 2**20
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes(device: str | torch.device = "cpu") -> int:
    """Bytes this process could occupy on a device, what it has already included: free GPU
    memory, or free host memory within the limit of the container.  For one process."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    # All memory there is; less, where the system says what others have taken of it.
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        # MemAvailable counts the page cache, which gives way, as free
        facts = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(facts["MemAvailable"].split()[0]) * 1024 + resident_bytes()
    # A container may have less than its machine; cgroups of version 2, and of version 1.
    groups = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left = int((groups / limit).read_text()) - int((groups / used).read_text())
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        free = min(free, left + resident_bytes())
    return free


# ---------------------------------------------------------------------------------------------
# for the scripts


def default_kv_cache_gb(device: torch.device) -> float:
    """GB (1e9 bytes) of KV cache where there is no plan and the model is loaded: half of what is
    free on its device, the other half being for everything else."""
    taken = resident_bytes() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    return (available_bytes(device) - taken) / 2e9


def local_folder(model: str) -> Path | None:
    """The checkpoint folder of `tiny` or of a local name; None for what lies on the hub."""
    local = model in EMBEDDED or Path(model).expanduser().is_dir()
    return find_checkpoint(model) if local else None


def known_config(model: str) -> ModelConfig | None:
    """The shape behind --model: an embedded or a local folder, else an alias of SHAPES or its hub
    id; None for what only a download could tell."""
    # The config.json of a folder is the truth; SHAPES stand in for what is not here yet.
    if folder := local_folder(model):
        return load_config(folder)
    aliases = {hub_id.lower(): alias for alias, hub_id in ALIASES.items()}
    return SHAPES.get(aliases.get(model.lower(), model.lower()))


def _shape_of(model: str) -> ModelConfig:
    """The same; ValueError for what only a download could tell."""
    config = known_config(model)
    if config is None:
        raise ValueError(
            f"the shape of {model!r} is not known without a download; known are "
            f"{', '.join(sorted(SHAPES))}, their hub ids, and local folders"
        )
    return config


def plan_for(options) -> Plan:
    """The plan of a run with train.py's options on this machine; under torchrun, of one of its
    ranks.  ValueError if the shape of --model is not known."""
    o, config = options, _shape_of(options.model)
    # 1. What `auto` will mean when the model is loaded.
    device, dtype = o.device, o.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, auto_dtype(local_folder(o.model), device) if dtype == "auto" else dtype)
    # 2. What is to be done.  Problems that are made up are one line each; other data may go up to
    #    the limit.
    prompt = 64 if o.data in MADE_UP else o.max_prompt_tokens
    work = Workload(
        o.problems_per_step, o.group_size, prompt, o.max_new_tokens, o.steps, o.max_rows,
        o.lora_rank, o.lora_targets,
    )  # fmt: skip
    # 3. What there is for each rank: those of one machine share its memory.
    world, here = (int(os.environ.get(x, 1)) for x in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    host = available_bytes("cpu") // here
    return plan(
        config, Settings(**{name: getattr(o, name) for name in asdict(Settings())}),
        device_bytes=available_bytes(device) if device == "cuda" else host, host_bytes=host,
        dtype=dtype, name=o.model, device=device, world=world, work=work,
        models=1 + (o.c_ref == "exact"),
    )  # fmt: skip


def settle(options):
    """train.py's options with the plan's settings in place of those that would not fit; asked
    before the model is loaded, or even downloaded.

    If nothing fits, the plan is printed to stderr and ValueError says which model would.  A model
    of unknown shape passes as it is.
    """
    if known_config(options.model) is None:
        return options
    p = plan_for(options)
    if p.fits:
        chosen = asdict(p.settings)
        changed = {k: v for k, v in chosen.items() if v != getattr(options, k)}
        if changed and speaks():
            said = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in changed.items())
            print(f"to fit into memory: {said}")
        if options.kv_cache_gb is None:
            chosen["kv_cache_gb"] = p.kv_cache_bytes / 1e9
        return replace(options, **chosen)
    print(p.table(), file=sys.stderr)
    # The same options with every known model, the largest first, until one fits.
    by_size = sorted(SHAPES, key=lambda alias: parameters(SHAPES[alias]), reverse=True)
    fitting = (x for x in by_size if plan_for(replace(options, model=x)).fits)
    where, needed, there = p.device, p.peak_bytes, p.device_bytes
    if p.peak_bytes <= FILL * p.device_bytes:  # the device would do
        where, needed, there = "host", p.host_needed, p.host_bytes
    raise ValueError(
        f"{p.name} does not fit on this machine: training needs {needed / GIB:.1f} GiB of {where} "
        f"memory, and there are {there / GIB:.1f} (the plan is above); with these options the "
        f"largest that fits is {next(fitting, 'none of those known')}; a smaller --max-new-tokens "
        "or --max-prompt-tokens needs less"
    )


# ---------------------------------------------------------------------------------------------
# as a command


@dataclass
class Options:
    """Plan a run of the paper's size on H100s: computed, not measured; no GPU needed."""

    model: str = option("qwen2.5-7b", "an alias or a folder with a config.json")
    gpus: int = option(1, "of one node", min=1)
    device_gb: float = option(80, "memory of a GPU, in GB", above=0)
    host_gb: float = option(1000, "memory of the node, in GB", above=0)
    max_prompt_tokens: int = option(2048, "longest prompt", min=1)
    max_new_tokens: int = option(8192, "longest solution", min=1)
    lora_rank: int = option(0, "R of LoRA's adapters; 0: all weights learn", min=0)
    lora_targets: str = option("all", "linear layers adapted", choices=("all", "attention"))
    cards: tuple[int, ...] = option((), "GB of several GPUs: print which models fit which of them, "
        "all weights learning and with adapters (of rank 16 if no other is given)", min=1)

    def plan(self, config: ModelConfig) -> Plan:
        """That of a model on these GPUs."""
        work = Workload(prompt_tokens=self.max_prompt_tokens, max_new_tokens=self.max_new_tokens,
                        lora_rank=self.lora_rank, lora_targets=self.lora_targets)  # fmt: skip
        return plan(
            config, device_bytes=int(self.device_gb * 1e9), dtype=torch.bfloat16, name=self.model,
            host_bytes=int(self.host_gb * 1e9 / self.gpus), device="cuda", world=self.gpus,
            work=work,
        )  # fmt: skip


def cards_table(o: Options) -> str:
    """Which models fit which cards, as a table in Markdown."""
    ways = {"all": 0, "LoRA": o.lora_rank or 16}
    heads = [f"{gb} GB, {way}" for gb in o.cards for way in ways]
    lines = ["| model | parameters | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for alias in sorted(_SIZES, key=lambda alias: parameters(SHAPES[alias])):
        cells = [f"{parameters(SHAPES[alias]) / 1e9:.1f} B"]
        for gb, rank in itertools.product(o.cards, ways.values()):
            p = replace(o, device_gb=gb, lora_rank=rank).plan(SHAPES[alias])
            there = "offloaded" if p.settings.offload_optimizer else "yes"
            cells.append(there if p.fits else "-")
        lines.append(f"| {alias} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Print the plan of --model on --gpus H100s, or the table of --cards."""
    o, _ = parse_args(Options)
    if o.cards:
        print(cards_table(o))
        return 0
    p = o.plan(_shape_of(o.model))
    print(p.table())
    return 0 if p.fits else 1


if __name__ == "__main__":
    main_guard(main)
