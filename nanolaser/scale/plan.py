"""
What a training run will need, before a single weight is loaded: bytes and seconds, from the
model's shape alone.

    python train.py --model qwen2.5-7b --plan               # on the machine at hand
    python -m nanolaser.scale.plan --gpus 8 --model orz-7b  # on H100s that need not be there

A step has three phases, and memory must suffice for the largest, not for their sum:

    sample   weights, optimizer state, KV cache, logits of one token a row
    update   weights, optimizer state, gradients, activations of one micro-batch, log-prob blocks
    step     weights, optimizer state, gradients in fp32

The formulas count what model.py, sampler.py, readout.py and optimizer.py keep alive at a phase's
worst moment; benchmarks/memory.py compares them with measured peaks.  Letters are model.py's (B T
C H K D L V), and besides them

    n parameters   e bytes of a weight   N tokens of a micro-batch   R rows sampled at a time
    W ranks (each holds 1/W of weights, gradients and optimizer: FSDP2)

Worked example, Qwen2.5-7B on one GPU of 80 GB: n = 7.6e9 weights in bf16 (e = 2) are 15 GB, their
gradients 15 more.  AdamW's fp32 masters, two moments and gradients are 4 * 4 * n = 122 GB: those
must go to the host's memory (offload_optimizer).  Of 80 GB a plan may fill 72, so 42 are left for
activations.  A layer keeps 225 kB a token, 28 layers and a micro-batch of 16,384 tokens 103 GB:
too much, so they are computed again in the backward pass (gradient_checkpointing), and 4 remain.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from ..cache import KVCache
from ..checkpoint import ALIASES, auto_dtype, find_checkpoint, load_config
from ..cli import main_guard, option, parse_args
from ..model import ModelConfig
from ..readout import BLOCK_LOGITS, CHUNK_VOCAB
from .optimizer import SUMMED_IN_BF16

GIB = 2**30
PHASES = ("sample", "update", "step")
# What the formulas leave out (small tensors, a GPU's fragments) is why a tenth stays free.
FILL = 0.9
# glibc serves blocks below 32 MiB from a heap in which freed ones leave holes.  Measured on models
# of 10M to 135M parameters, with and without checkpointing, fp32 and bf16: about 1.5 times the
# bytes of the gradients, which come and go with every step.
HEAP_BLOCK, HEAP = 32 * 2**20, 1.5
EASY_ROWS = 16  # fewer rows at a time leave a GPU idle: rather pay for another setting

# ---------------------------------------------------------------------------------------------
# shapes of published checkpoints, so that a plan needs no download


def _shape(V, C, I, L, H, K, D, tied, kind="llama") -> ModelConfig:  # noqa: E741
    """The sizes of a model, and nothing else of its config: enough to plan, not to run it."""
    return ModelConfig(kind, V, C, I, L, H, K, D, tie_word_embeddings=tied,
                       attention_bias=kind == "qwen2", qk_norm=kind == "qwen3")  # fmt: skip


# alias: vocabulary V, hidden C, MLP, layers L, heads H, key-value heads K, head D, tied
SHAPES: dict[str, ModelConfig] = {
    "smollm2-135m": _shape(49_152, 576, 1536, 30, 9, 3, 64, True),
    "smollm2-360m": _shape(49_152, 960, 2560, 32, 15, 5, 64, True),
    "qwen2.5-0.5b": _shape(151_936, 896, 4864, 24, 14, 2, 64, True, "qwen2"),
    "tinyllama-1.1b": _shape(32_000, 2048, 5632, 22, 32, 4, 64, False),
    "llama-3.2-1b": _shape(128_256, 2048, 8192, 16, 32, 8, 64, True),
    "qwen2.5-1.5b": _shape(151_936, 1536, 8960, 28, 12, 2, 128, True, "qwen2"),
    "qwen3-0.6b": _shape(151_936, 1024, 3072, 28, 16, 8, 128, True, "qwen3"),
    "qwen3-1.7b": _shape(151_936, 2048, 6144, 28, 16, 8, 128, True, "qwen3"),
    "qwen3-4b": _shape(151_936, 2560, 9728, 36, 32, 8, 128, True, "qwen3"),
    "qwen3-8b": _shape(151_936, 4096, 12_288, 36, 32, 8, 128, False, "qwen3"),
    "smollm2-1.7b": _shape(49_152, 2048, 8192, 24, 32, 32, 64, True),
    "qwen2.5-3b": _shape(151_936, 2048, 11_008, 36, 16, 2, 128, True, "qwen2"),
    "llama-3.2-3b": _shape(128_256, 3072, 8192, 28, 24, 8, 128, True),
    "qwen2.5-7b": _shape(152_064, 3584, 18_944, 28, 28, 4, 128, False, "qwen2"),
    "llama-3.1-8b": _shape(128_256, 4096, 14_336, 32, 32, 8, 128, False),
}
# Trained further, shaped as before.
for _alias in ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"):
    SHAPES[f"{_alias}-instruct"] = SHAPES[_alias]
for _alias in ("0.6b", "1.7b", "4b", "8b"):
    SHAPES[f"qwen3-{_alias}-base"] = SHAPES[f"qwen3-{_alias}"]
for _alias in ("1.5b", "7b"):
    SHAPES[f"qwen2.5-math-{_alias}"] = SHAPES[f"qwen2.5-{_alias}"]
SHAPES |= {"orz-7b": SHAPES["qwen2.5-7b"], "octothinker-3b": SHAPES["llama-3.2-3b"]}


def layer_parameters(c: ModelConfig) -> int:
    """How many parameters one decoder layer has."""
    C, I = c.hidden_size, c.intermediate_size  # noqa: E741
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    biases = c.attention_bias * (q + 2 * kv) + c.attention_output_bias * C
    biases += c.mlp_bias * (2 * I + C)
    # q and o, k and v; gate, up and down; two norms, and Qwen3's of a head's query and key
    return 2 * C * (q + kv) + 3 * C * I + 2 * C + 2 * c.qk_norm * c.head_dim + biases


def embedding_parameters(c: ModelConfig) -> int:
    """How many the embedding and the output matrix have; tied, they count once."""
    return (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size


def parameters(c: ModelConfig) -> int:
    """How many the whole model has."""
    return c.num_hidden_layers * layer_parameters(c) + embedding_parameters(c) + c.hidden_size


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
    evaluated: int = 0  # solutions to held-out problems, in all evaluations of the run together

    # Mean lengths matter for the time only: memory must suffice for the longest rollout anyway.
    # They are guesses, as long as no run has been seen.
    mean_prompt_tokens = property(lambda self: min(self.prompt_tokens, 150))
    mean_new_tokens = property(lambda self: max(1, self.max_new_tokens // 2))

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
class Rates:
    """How fast a device is."""

    flops: float  # operations/s of matrix products in the compute dtype
    memory: float  # bytes/s
    source: str  # where the numbers are from


H100 = Rates(0.4 * 989e12, 0.6 * 3.35e12, "40 % of an H100's 989 TFLOP/s, 60 % of its 3.35 TB/s")
# Assumed, never measured: bytes/s of the host's memory, to a GPU and between GPUs; and the seconds
# that a layer takes however little it computes, 40 kernels of 6 us.
HOST_MEMORY, HOST_LINK, PEER_LINK, LAYER = 100e9, 40e9, 200e9, 40 * 6e-6


@dataclass(frozen=True)
class Plan:
    """A run on given machines, what it would need there, and whether there is as much."""

    config: ModelConfig
    device_bytes: int  # what there is for each rank
    host_bytes: int  # likewise; of a CPU run the same
    rates: Rates
    dtype: torch.dtype = torch.float32
    name: str = "model"
    device: str = "cpu"  # or "cuda"
    world: int = 1  # ranks
    work: Workload = Workload()
    settings: Settings = Settings()
    models: int = 1  # 2: a frozen reference beside the one that learns
    least_rows: int = 1  # to be sampled at a time, if all are as long as may be

    @cached_property
    def rows(self) -> int:
        """How many of the longest rows are sampled at a time: the KV cache gets what the rest
        leaves while sampling, but holds at least `least_rows`."""
        # What is left without any, divided by what the first one costs and its layer of a cache
        # that grows, see `sampling_bytes`.
        none, one = (sum(x[0] for x in bytes_by_phase(self, rows).values()) for rows in (0, 1))
        L = self.config.num_hidden_layers
        rows = int((FILL * self.device_bytes - none) / (one - none) * L / (L + 1))
        return min(max(rows, self.least_rows), self.work.rows(self.world))

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
        """Bytes of host memory for each rank of a GPU run: offloaded masters, moments and
        gradients, all in fp32, and what Python and torch take."""
        offloaded = 16 * parameters(self.config) // self.world * self.settings.offload_optimizer
        return 0 if self.device == "cpu" else offloaded + 3 * GIB

    @property
    def micro_batch(self) -> int:
        """Padded tokens N of the largest micro-batch: a row is never cut, and a step with fewer
        rollouts than it could hold fills it less."""
        longest = self.work.longest
        most = self.work.share(self.world) * longest
        return min(max(self.settings.micro_batch_tokens, longest), most)

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
        s, w, seconds = self.settings, self.work, seconds_by_phase(self)
        unit, label, digits = (GIB, "GiB", 1) if self.peak_bytes > 4 * GIB else (2**20, "MiB", 0)
        cell = lambda x: f"{x / unit:,.{digits}f}" if x else "-"  # noqa: E731
        line = lambda what, cells: (  # noqa: E731
            f"  {what:<28}" + "".join(f"{x:>10}" for x in cells)
        )
        ranks = f"each of {self.world} ranks on " if self.world > 1 else ""
        lines = [
            f"{self.name}: {parameters(self.config):,} parameters, {str(self.dtype)[6:]}, "
            f"{ranks}{self.device}",
            f"  {w.problems} problems x {w.group_size} solutions a step; at most "
            f"{w.prompt_tokens:,} + {w.max_new_tokens:,} tokens each",
            f"  micro-batch {s.micro_batch_tokens:,} tokens, {self.rows} of the longest rows "
            "sampled at a time,",
            f"  gradient checkpointing {'on' if s.gradient_checkpointing else 'off'}, optimizer in "
            f"{'host' if s.offload_optimizer else 'device'} memory",
            "",
            line(f"{label} on the device", PHASES),
        ]
        for what, sizes in self.bytes.items():
            if any(sizes):
                lines.append(line(what, map(cell, sizes)))
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines += [
            line("together", map(cell, self.totals)),
            line("there is", [cell(self.device_bytes)]) + f"   {verdict} (it may fill {FILL:.0%})",
        ]
        if self.device != "cpu":
            needed, there = self.host_needed / GIB, self.host_bytes / GIB
            lines.append(f"  host memory: {needed:,.0f} GiB a rank of {there:,.0f}")
        lines += [
            "",
            line("time of a step, about", map(span, seconds)),
            f"  {w.steps} steps: {span(sum(seconds) * w.steps)}, if solutions have "
            f"{w.mean_new_tokens:,} tokens on average",
        ]
        if w.evaluated:  # sampled like those of a step, and no more
            more = span(seconds[0] * w.evaluated / (w.problems * w.group_size))
            lines.append(f"  evaluations: {more} more, for {w.evaluated:,} solutions")
        return "\n".join([*lines, f"  rates: {self.rates.source}"])


def span(seconds: float) -> str:
    """A time in the largest unit of which it holds two, or in seconds."""
    for unit, size in (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.{int(seconds < 100 * size)}f} {unit}"
    return f"{seconds:.{1 if seconds >= 1 else 2}f} s"


def plan(config: ModelConfig, wanted: Settings = Settings(), **run) -> Plan:
    """The cheapest settings with which a run fits, or the most frugal ones if none does; `wanted`
    is what would be taken if memory were no matter, `run` the fields of Plan.

    The choice depends on bytes alone, never on measured rates: the same machine makes it again.
    """
    p = Plan(config, **run)
    # In order of the time that they cost: smaller micro-batches are nearly free, but a row is never
    # cut; recomputing is a third more arithmetic; offloading moves all gradients to the host, and
    # steps 7B weights there in seconds instead of milliseconds.  (A CPU has no second memory.)
    sizes = [wanted.micro_batch_tokens]
    while sizes[-1] // 2 >= p.work.longest:
        sizes.append(sizes[-1] // 2)
    again = {wanted.gradient_checkpointing, True}
    away = {wanted.offload_optimizer, wanted.offload_optimizer or p.device != "cpu"}
    # First with enough rows at a time to be worth it, then, if need be, with fewer: reading all
    # weights for the next token costs a GPU as much for one row as for a hundred.
    for least, off, check, size in itertools.product(
        (EASY_ROWS, 1), sorted(away), sorted(again), sizes
    ):
        p = replace(p, settings=Settings(size, check, off), least_rows=least)
        if p.fits:
            return p
    return p


# ---------------------------------------------------------------------------------------------
# bytes


def kv_bytes(c: ModelConfig, dtype: torch.dtype, rows: int, tokens: int) -> int:
    """Bytes of a KV cache of `rows` rows with room for `tokens` each, in whole blocks."""
    # Qwen2.5-7B in bf16: 2 (keys and values) * 28 layers * 4 heads * 128 * 2 bytes = 57 kB a token,
    # 0.6 GB for a row of the paper's 10,240
    slots = -(-tokens // KVCache.BLOCK) * KVCache.BLOCK
    per_slot = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize
    return rows * slots * per_slot


def layer_activation_bytes(c: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one layer keeps for its backward pass, for each token of the micro-batch."""
    e, C = dtype.itemsize, c.hidden_size
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    # a norm keeps its input in fp32, that input normalised, the result (both in the model's
    # dtype), and 1/rms; there are two of them
    norms = 2 * ((4 + 2 * e) * C + 4)
    # rotated q and k, v, the heads' output, and a logsumexp in fp32 for each head
    attention = e * 2 * (H + K) * D + 4 * H
    attention += c.qk_norm * (H + K) * ((4 + e) * D + 4)  # normed before they were rotated
    # gate, silu(gate), up and their product
    return norms + attention + 4 * c.intermediate_size * e


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
    layer = layer_activation_bytes(c, p.dtype)
    # Forward.  With checkpointing a layer's input is all that is kept.  Around the layers: token
    # ids, the final norm, and the hidden states picked for the readout.
    kept = N * (L * (C * e if again else layer) + 8 + (4 + 2 * e) * C + 4 + C * e)
    # Readout of the response tokens, and of the token after the end of each row: a block of
    # logits, never (N, V), three times its hidden states, and the gradient of all hidden states.
    # bf16: the output matrix's gradient is summed in fp32, and pieces of it widened, old and new.
    read = N * (p.work.max_new_tokens + 1) // p.work.longest
    readout = (min(read, max(1, BLOCK_LOGITS // V)) * (V + 3 * C) + read * C) * 4
    readout += (V + 2 * min(CHUNK_VOCAB, V)) * C * 4 if e < 4 else 0
    # Backward: the gradients that flow through one layer, and its activations if computed anew.
    flowing = N * (max(2 * I * e, 16 * C) + (layer if again else 0))
    # Last of all comes the embedding's gradient, dense; the activations are gone by then.
    dense = embedding_parameters(c) * e - kept
    return {"activations": kept, "log-probs, or backward": max(readout, flowing, dense)}


def bytes_by_phase(p: Plan, longest_rows: int) -> dict[str, tuple[int, int, int]]:
    """What lies on one rank's device: {what: (bytes while sampling, updating, stepping)}, with a
    KV cache for so many of the longest rows."""
    c, n, e = p.config, parameters(p.config), p.dtype.itemsize
    shard = lambda per_weight: per_weight * n // p.world  # noqa: E731
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
        "weights": (p.models * shard(e),) * 3,
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
    if p.device == "cpu" and c.hidden_size * c.intermediate_size * e < HEAP_BLOCK:
        table["freed, kept by malloc"] = (int(HEAP * shard(e)),) * 3
    # Python and torch, and about 135 MiB of what they load on first use; on a GPU the CUDA context
    # and the matrix library's workspace
    before = resident_bytes() + 135 * 2**20 if p.device == "cpu" else 3 * GIB // 2
    table["Python, torch" if p.device == "cpu" else "CUDA context"] = (before,) * 3
    return table


# ---------------------------------------------------------------------------------------------
# seconds


def measure_rates(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Rates:
    """Those of the device at hand, measured in under a second."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    big = torch.empty(16 * size * size, device=device)  # no cache holds it

    def seconds(code: str) -> float:
        timer = Timer(code, globals={"a": a, "big": big}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.1).median

    flops, memory = 2 * size**3 / seconds("a @ a"), big.nbytes / seconds("big.fill_(1)")
    return Rates(flops, memory, f"measured: {flops / 1e9:,.0f} GFLOP/s, {memory / 1e9:,.0f} GB/s")


def seconds_by_phase(p: Plan) -> tuple[float, float, float]:
    """Seconds of one step on each rank: sampling, updating, stepping.  An estimate, for solutions
    half as long as they may be: it knows neither padding nor attention."""
    c, s, work, rates, e = p.config, p.settings, p.work, p.rates, p.dtype.itemsize
    n, launches = parameters(c), c.num_hidden_layers * LAYER
    # the input embedding is looked up, not multiplied; tied, the same matrix is the output's
    active = n - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    rollouts, prompt, new = work.share(p.world), work.mean_prompt_tokens, work.mean_new_tokens
    gather = n * e / PEER_LINK if p.world > 1 else 0  # of all weights

    # Sampling: turns of one token a row, each of which reads all weights and all keys and values.
    # In the last ones, for the longest rows, there are few rows: those come on top.
    turns = rollouts * new / p.rows + (work.max_new_tokens - new)
    read = n * e + kv_bytes(c, p.dtype, p.rows, prompt + new // 2)
    turn = max(p.rows * 2 * active / rates.flops, read / rates.memory) + launches
    prefill = rollouts / work.group_size * prompt * 2 * active / rates.flops
    sample = gather + prefill + turns * turn

    # Updating: a pass forward computes 2 operations a weight and token, the one backward as much
    # as two; checkpointing goes forward once more.  For a micro-batch the ranks gather the weights
    # in both directions, and scatter the gradients.
    passes, tokens = (4 if s.gradient_checkpointing else 3), rollouts * (prompt + new)
    batches = max(1, tokens / max(s.micro_batch_tokens, prompt + new))
    update = passes * tokens * 2 * active / rates.flops
    update += batches * (3 * gather + passes * launches)

    # Stepping: gradient, two moments and master are read, the latter three and the weight written.
    step = 30 * n / p.world / (HOST_MEMORY if s.offload_optimizer else rates.memory)
    if s.offload_optimizer:
        # The weights come back once; gradients go, and are added to fp32 sums, several times.
        trips = max(1, batches // SUMMED_IN_BF16)
        step += n / p.world * ((1 + trips) * e / HOST_LINK + trips * (e + 8) / HOST_MEMORY)
    return sample, update, step


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
    groups = Path("/sys/fs/cgroup")
    for limit, used in (  # of a container: version 2, version 1
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
    local = model == "tiny" or Path(model).expanduser().is_dir()
    return find_checkpoint(model) if local else None


def known_config(model: str) -> ModelConfig | None:
    """The shape behind --model: `tiny` or a local folder, else an alias of SHAPES or its hub id;
    None for what only a download could tell."""
    # The config.json of a folder is the truth; SHAPES stand in for what is not here yet.
    if folder := local_folder(model):
        return load_config(folder)
    aliases = {hub_id.lower(): alias for alias, hub_id in ALIASES.items()}
    return SHAPES.get(aliases.get(model.lower(), model.lower()))


def plan_for(options, rates: Rates | None = None) -> Plan:
    """The plan of a run with train.py's options on this machine; under torchrun, of one of its
    ranks.  None as rates: measured now.  ValueError if the shape of --model is not known."""
    # All that is read of the options, here and in `settle`: model, data, device, dtype, steps,
    # problems_per_step, group_size, max_prompt_tokens, max_new_tokens, max_rows, kv_cache_gb,
    # eval_every, eval_problems, eval_n, c_ref, and the three of Settings.
    o = options
    config = known_config(o.model)
    if config is None:
        raise ValueError(
            f"the shape of {o.model!r} is not known without a download; known are "
            f"{', '.join(sorted(SHAPES))}, their hub ids, and local folders"
        )
    # What `auto` will mean when the model is loaded.
    device, dtype = o.device, o.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, auto_dtype(local_folder(o.model), device) if dtype == "auto" else dtype)
    # the embedded problems are one line each; other data may go up to the limit
    prompt = 64 if o.data == "arithmetic" else o.max_prompt_tokens
    # all held-out problems before and after, a quarter of them in between
    evaluated = int(o.eval_problems * o.eval_n * (2 + (o.steps - 1) // o.eval_every / 4))
    # The worst case for memory, the mean for the time: see Workload.
    work = Workload(
        o.problems_per_step, o.group_size, prompt, o.max_new_tokens, o.steps, o.max_rows,
        evaluated,
    )  # fmt: skip
    world, here = (int(os.environ.get(x, 1)) for x in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    host = available_bytes("cpu") // here  # the ranks of a machine share its memory
    return plan(
        config,
        device_bytes=available_bytes(device) if device == "cuda" else host,
        host_bytes=host,
        dtype=dtype,
        name=o.model,
        device=device,
        world=world,
        work=work,
        models=1 + (o.c_ref == "exact"),
        wanted=Settings(**{name: getattr(o, name) for name in asdict(Settings())}),
        rates=rates or measure_rates(device, dtype),
    )


def settle(options):
    """train.py's options with the plan's settings in place of those that would not fit; asked
    before the model is loaded, or even downloaded.

    If nothing fits, the plan is printed to stderr and ValueError says which model would.  A model
    of unknown shape passes as it is.
    """
    if known_config(options.model) is None:
        return options
    p = plan_for(options, rates=H100)  # any rates: bytes decide, and measuring takes a second
    if p.fits:
        chosen = asdict(p.settings)
        changed = {k: v for k, v in chosen.items() if v != getattr(options, k)}
        if changed and os.environ.get("RANK", "0") == "0":
            said = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in changed.items())
            print(f"to fit into memory: {said}")
        if options.kv_cache_gb is None:
            chosen["kv_cache_gb"] = p.kv_cache_bytes / 1e9
        return replace(options, **chosen)
    print(plan_for(options).table(), file=sys.stderr)
    # The same options with every known model, the largest first, until one fits.
    by_size = sorted(SHAPES, key=lambda alias: parameters(SHAPES[alias]), reverse=True)
    fitting = (x for x in by_size if plan_for(replace(options, model=x), rates=H100).fits)
    needs = (p.device, p.peak_bytes, p.device_bytes)
    if p.peak_bytes <= FILL * p.device_bytes:  # the device would do
        needs = ("host", p.host_needed, p.host_bytes)
    raise ValueError(
        f"{p.name} does not fit on this machine: training needs {needs[1] / GIB:.1f} GiB of "
        f"{needs[0]} memory, and there are {needs[2] / GIB:.1f} (the plan is above); with these "
        f"options the largest that fits is {next(fitting, 'none of those known')}; a smaller "
        "--max-new-tokens or --max-prompt-tokens needs less"
    )


@dataclass
class Options:
    """Plan a run of the paper's size on H100s: computed, not measured; no GPU needed."""

    model: str = option("qwen2.5-7b", "an alias or a folder with a config.json")
    gpus: int = option(1, "of one node", min=1)
    device_gb: float = option(80, "memory of a GPU, in GB", above=0)
    host_gb: float = option(1000, "memory of the node, in GB", above=0)
    max_prompt_tokens: int = option(2048, "longest prompt", min=1)
    max_new_tokens: int = option(8192, "longest solution", min=1)


def main() -> int:
    """Print the plan of --model on --gpus H100s."""
    o, _ = parse_args(Options)
    config = known_config(o.model)
    if config is None:
        known = ", ".join(sorted(SHAPES))
        raise ValueError(f"--model {o.model}: known are {known}, their hub ids, and local folders")
    p = plan(
        config, device_bytes=int(o.device_gb * 1e9), host_bytes=int(o.host_gb * 1e9 / o.gpus),
        dtype=torch.bfloat16, name=o.model, device="cuda", world=o.gpus, rates=H100,
        work=Workload(prompt_tokens=o.max_prompt_tokens, max_new_tokens=o.max_new_tokens),
    )  # fmt: skip
    print(p.table())
    return 0 if p.fits else 1


if __name__ == "__main__":
    main_guard(main)
