"""
What a training run will need, before a single weight is loaded: bytes and seconds, from the
model's shape alone.

    python train.py --model qwen2.5-7b --plan          # on the machine at hand
    python -m nanolaser.scale.plan --gpus 8 --model orz-7b # on H100s that need not be there

A step has three phases, and memory must suffice for the largest, not for their sum:

    sample   weights, optimizer state, KV cache, logits of one token a row
    update   weights, optimizer state, gradients, activations of one micro-batch, log-prob blocks
    step     weights, optimizer state, gradients, and for a bf16 model their fp32 copy

Each formula below counts what the code of model.py, sampler.py, readout.py and grpo.py keeps
alive at that phase's worst moment; benchmarks/memory.py compares the sum with measured peaks.
The letters are model.py's (B T C H K D L V), and besides them

    n parameters   e bytes of a weight   N tokens of a micro-batch   R rows sampled at a time
    S KV slots of a row   W ranks (each holds 1/W of weights, gradients and optimizer: FSDP2)

What the formulas leave out (small tensors, a GPU's fragments) is why FILL leaves a tenth free.
On a CPU one thing is measured and not derived: how much freed memory malloc keeps, see HEAP.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from ..checkpoint import ALIASES, auto_dtype, find_checkpoint, load_config
from ..cli import main_guard, option, parse_args
from ..cache import KVCache
from ..model import ModelConfig
from ..readout import BLOCK_LOGITS, CHUNK_VOCAB

GIB = 2**30
FILL = 0.9  # a plan may fill this share of what there is
EASY_ROWS = 16  # fewer rows at a time leave a GPU idle: rather pay for another setting
PHASES = ("sample", "update", "step")

# glibc serves blocks below 32 MiB from a heap in which freed ones leave holes: peaks measured on
# models of 10M to 135M parameters were 1.16 to 1.51 times the bytes alive, in the mean 1.33.  With
# MALLOC_MMAP_THRESHOLD_=1048576 in the environment they go back at once (then 1.0, but slower).
HEAP, HEAP_BLOCK = 0.33, 32 * 2**20

# ---------------------------------------------------------------------------------------------
# shapes of published checkpoints (their config.json), so that a plan needs no download


def _qwen(C, I, L, H, K, V, tied, theta=1e6, positions=32_768) -> ModelConfig:  # noqa: E741
    """A Qwen2.5 shape; what all of them share is filled in."""
    return ModelConfig(
        "qwen2", V, C, I, L, H, K, C // H, 1e-6, theta, None, positions, tied,
        attention_bias=True, eos_token_id=(151_643,), bos_token_id=151_643,
    )  # fmt: skip


def _llama3(C, I, L, H, K, D, tied, factor) -> ModelConfig:  # noqa: E741
    """A Llama 3.1 or 3.2 shape: long context by rescaled rotary frequencies."""
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return ModelConfig(
        "llama", 128_256, C, I, L, H, K, D, 1e-5, 500_000.0, scaling, 131_072, tied,
        eos_token_id=(128_001,), bos_token_id=128_000,
    )  # fmt: skip


def _smollm2(C, I, L, H, K, theta, std) -> ModelConfig:  # noqa: E741
    """A SmolLM2 shape."""
    return ModelConfig(
        "llama", 49_152, C, I, L, H, K, C // H, 1e-5, theta, None, 8192, True,
        initializer_range=std, eos_token_id=(0,), bos_token_id=0,
    )  # fmt: skip


SHAPES: dict[str, ModelConfig] = {
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 1e5, 1 / 24),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, 1e5, 0.02),
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 14, 2, 151_936, True),
    "tinyllama-1.1b": ModelConfig(
        "llama", 32_000, 2048, 5632, 22, 32, 4, 64, 1e-5, eos_token_id=(2,), bos_token_id=1
    ),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 8, 64, True, 32.0),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12, 2, 151_936, True, positions=131_072),
    "qwen2.5-math-1.5b": _qwen(1536, 8960, 28, 12, 2, 151_936, True, 1e4, 4096),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, 1.3e5, 0.02),
    "qwen2.5-3b": _qwen(2048, 11_008, 36, 16, 2, 151_936, True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 8, 128, True, 32.0),
    "qwen2.5-7b": _qwen(3584, 18_944, 28, 28, 4, 152_064, False, positions=131_072),
    "qwen2.5-math-7b": _qwen(3584, 18_944, 28, 28, 4, 152_064, False, 1e4, 4096),
    "llama-3.1-8b": _llama3(4096, 14_336, 32, 32, 8, 128, False, 8.0),
}
# trained further, shaped as before
_TUNED = ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
SHAPES |= {f"{alias}-instruct": SHAPES[alias] for alias in _TUNED}
SHAPES |= {"orz-7b": SHAPES["qwen2.5-7b"], "octothinker-3b": SHAPES["llama-3.2-3b"]}


def layer_parameters(c: ModelConfig) -> int:
    """How many parameters one decoder layer has."""
    C, I = c.hidden_size, c.intermediate_size  # noqa: E741
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    biases = c.attention_bias * (q + 2 * kv) + c.attention_output_bias * C
    biases += c.mlp_bias * (2 * I + C)
    return 2 * C * (q + kv) + 3 * C * I + 2 * C + biases


def parameters(c: ModelConfig) -> int:
    """How many parameters the whole model has; tied embeddings count once."""
    embeddings = (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size
    return c.num_hidden_layers * layer_parameters(c) + embeddings + c.hidden_size


# ---------------------------------------------------------------------------------------------
# what is to be done, and how


@dataclass(frozen=True)
class Workload:
    """One step of the run: how many rollouts, how long.  Lengths in tokens."""

    problems: int = 128  # of one step, over all ranks
    group_size: int = 8
    prompt_tokens: int = 2048  # the longest prompt
    max_new_tokens: int = 8192
    steps: int = 800
    # Mean lengths matter for the time only.  They are guesses until a run has been seen: memory
    # must suffice for the longest rollout anyway.
    mean_prompt_tokens: int = 150
    mean_new_tokens: int | None = None  # None: half of max_new_tokens
    evaluated: int = 0  # solutions to held-out problems, in all evaluations of the run together

    @property
    def longest(self) -> int:
        """Tokens of the longest row that can occur."""
        return self.prompt_tokens + self.max_new_tokens

    def share(self, world: int) -> int:
        """Rollouts of the rank that has the most."""
        return -(-self.problems // world) * self.group_size


@dataclass(frozen=True)
class Settings:
    """What the plan may choose; each costs time where it saves memory."""

    micro_batch_tokens: int = 16_384
    gradient_checkpointing: bool = False  # a third more arithmetic in the update
    offload_optimizer: bool = False  # fp32 masters and moments in host memory, stepped there
    max_rows: int = 256  # solutions sampled at a time


SWITCHES = ("gradient_checkpointing", "offload_optimizer")

def micro_batch(s: Settings, work: Workload, world: int = 1) -> int:
    """Padded tokens N of the largest micro-batch: a row is never cut, and a step with fewer
    rollouts than it could hold fills it less."""
    return min(max(s.micro_batch_tokens, work.longest), work.share(world) * work.longest)


# ---------------------------------------------------------------------------------------------
# bytes


def kv_bytes(c: ModelConfig, dtype: torch.dtype, rows: int, tokens: int) -> int:
    """Bytes of a KV cache of `rows` rows with room for `tokens` each, in whole blocks."""
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
    # gate, silu(gate), up and their product
    return norms + attention + 4 * c.intermediate_size * e


def activation_bytes(c: ModelConfig, dtype: torch.dtype, tokens: int, checkpointing: bool) -> int:
    """Bytes kept between forward and backward for a micro-batch of `tokens` padded tokens.

    With checkpointing only each layer's input is kept; see `backward_bytes` for the rest.
    """
    e, C = dtype.itemsize, c.hidden_size
    per_layer = C * e if checkpointing else layer_activation_bytes(c, dtype)
    # around the layers: token ids, the final norm, and the hidden states picked for the readout
    around = 8 + (4 + 2 * e) * C + 4 + C * e
    return tokens * (c.num_hidden_layers * per_layer + around)


def logprob_bytes(c: ModelConfig, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of readout.py's blocks for `tokens` read hidden states: none of them is (N, V)."""
    C, V = c.hidden_size, c.vocab_size
    rows = min(tokens, max(1, BLOCK_LOGITS // V))
    # a block of logits, three times its hidden states, and the gradient of all hidden states
    block = (rows * (V + 3 * C) + tokens * C) * 4
    # bf16: the output matrix's gradient is summed in fp32, and pieces of it widened, old and new
    return block + ((V + 2 * min(CHUNK_VOCAB, V)) * C * 4 if dtype.itemsize < 4 else 0)


def backward_bytes(c: ModelConfig, dtype: torch.dtype, tokens: int, checkpointing: bool) -> int:
    """Bytes of the gradients that flow through one layer, and, with checkpointing, of the
    activations computed anew for it."""
    e = dtype.itemsize
    flowing = tokens * max(2 * c.intermediate_size * e, 16 * c.hidden_size)
    return flowing + (tokens * layer_activation_bytes(c, dtype) if checkpointing else 0)


def logit_bytes(c: ModelConfig, rows: int) -> int:
    """Bytes of drawing one token for each of R rows, at the worst moment of `sampler.draw`."""
    return rows * c.vocab_size * 3 * 4  # logits, probabilities and CDF, in fp32


def head_bytes(c: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the fp32 copy of a bf16 output matrix that the sampler makes for its logits."""
    return c.vocab_size * c.hidden_size * 4 if dtype.itemsize < 4 else 0


def prefill_bytes(c: ModelConfig, dtype: torch.dtype, rows: int, work: Workload) -> int:
    """Bytes of reading the prompts of R rows beside the KV cache, each distinct one once."""
    e, T = dtype.itemsize, work.prompt_tokens
    prompts = -(-rows // work.group_size) + 1  # a group may be cut by the batch's border
    # a layer's keys and values, fanned out to the rows
    copied = kv_bytes(c, dtype, rows, T) // c.num_hidden_layers
    computed = prompts * T * e * (3 * c.intermediate_size + 4 * c.hidden_size)
    return max(copied, computed)


def device_bytes_by_phase(
    c: ModelConfig, dtype: torch.dtype, s: Settings, work: Workload, world: int, device: str
) -> dict[str, tuple[int, int, int]]:
    """What lies on one rank's device: {what: (bytes while sampling, updating, stepping)}."""
    n, e, narrow = parameters(c), dtype.itemsize, dtype.itemsize < 4
    shard = lambda per_weight: per_weight * n // world  # noqa: E731
    away = s.offload_optimizer and device != "cpu"  # a CPU has only the one memory
    # two moments, and masters where they are not the weights themselves
    state = 0 if away else shard(12 if narrow or s.offload_optimizer else 8)
    R = min(s.max_rows, work.share(world))
    N = micro_batch(s, work, world)
    kv = kv_bytes(c, dtype, R, work.longest)
    # the cache grows layer by layer: one of them is there twice
    growth = kv // c.num_hidden_layers
    logits = logit_bytes(c, R)
    beside = max(growth, prefill_bytes(c, dtype, R, work)) - logits
    kept = activation_bytes(c, dtype, N, s.gradient_checkpointing)
    # of each row the response is read, and the token after its end
    readout = logprob_bytes(c, dtype, N * (work.max_new_tokens + 1) // work.longest)
    # last of all comes the gradient of the embedding, dense; the activations are gone by then
    embedding = (2 if c.tie_word_embeddings else 1) * c.vocab_size * c.hidden_size * e - kept
    through = max(backward_bytes(c, dtype, N, s.gradient_checkpointing), embedding) - readout
    table = {
        "weights": (shard(e),) * 3,
        "optimizer state": (state,) * 3,
        "gradients": (0, shard(e), shard(e)),
        "fp32 copy of gradients": (0, 0, shard(4) if narrow and not away else 0),
        "KV cache": (kv, 0, 0),
        "fp32 output matrix": (head_bytes(c, dtype), 0, 0),
        "logits of a token a row": (logits, 0, 0),
        "activations": (0, kept, 0),
        "log-prob blocks": (0, readout, 0),
        # what prefill or backward needs over the logits and blocks, which are gone at that moment
        "prefill / backward, beyond": (max(beside, 0), max(through, 0), 0),
    }
    if world > 1:
        # sampling: a gathered copy; update: the embeddings and two layers (one computing, one
        # on its way) gathered, with their gradients before they are scattered
        edges = (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size
        gathered = 2 * e * (2 * layer_parameters(c) + edges)
        table["gathered weights"] = (n * e, gathered, 0)
    return table


def heap_bytes(
    c: ModelConfig, dtype: torch.dtype, tokens: int, rows: dict[str, tuple[int, int, int]]
) -> tuple[int, int, int]:
    """Bytes that a CPU's malloc keeps beside `rows`, in each phase: those of freed small blocks."""
    if int(os.environ.get("MALLOC_MMAP_THRESHOLD_", HEAP_BLOCK)) < HEAP_BLOCK:
        return (0, 0, 0)
    wide = c.intermediate_size * dtype.itemsize
    of_weights = ("weights", "optimizer state", "gradients", "fp32 copy of gradients")
    small = {True: c.hidden_size * wide < HEAP_BLOCK, False: tokens * wide < HEAP_BLOCK}
    held = [sizes for what, sizes in rows.items() if small[what in of_weights]]
    return tuple(int(HEAP * sum(sizes[phase] for sizes in held)) for phase in range(len(PHASES)))


def host_bytes_needed(c: ModelConfig, dtype: torch.dtype, s: Settings, world: int) -> int:
    """Bytes of host memory for each rank of a GPU run: offloaded masters, moments and gradients,
    all in fp32, and what Python and torch take."""
    offloaded = 16 * parameters(c) // world if s.offload_optimizer else 0
    return offloaded + 3 * GIB


def runtime_bytes(device: str) -> int:
    """Bytes that are taken before anything of ours is there: Python and torch, resident in this
    process and about 75 MiB of what they load on first use; on a GPU the CUDA context and the
    matrix library's workspace."""
    return resident_bytes() + 75 * 2**20 if device == "cpu" else 3 * GIB // 2


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
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        # MemAvailable counts the page cache, which gives way, as free
        facts = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(facts["MemAvailable"].split()[0]) * 1024 + resident_bytes()
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


@dataclass(frozen=True)
class Rates:
    """How fast things go: operations and bytes per second, and where the numbers are from."""

    flops: float  # of matrix products in the compute dtype
    memory: float  # bytes/s of the device's memory
    host_memory: float  # bytes/s of the host's, for an optimizer stepped there
    host_link: float  # bytes/s between host and device
    peer_link: float  # bytes/s between ranks
    layer_seconds: float  # the least a layer takes, however little it computes
    source: str


H100 = Rates(
    0.4 * 989e12, 0.6 * 3.35e12, 100e9, 40e9, 200e9, 40 * 6e-6,
    "H100 SXM: 40 % of the published 989 TFLOP/s and 60 % of 3.35 TB/s; assumed: 100 GB/s of host "
    "memory, 40 GB/s to the host, 200 GB/s between GPUs, 40 kernels of 6 us in a layer",
)  # fmt: skip


def measure_rates(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Rates:
    """Matrix product, memory and launch rates of the device at hand, in under a second."""
    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    big = torch.empty(2**24 if device == "cpu" else 2**28, device=device)
    small = torch.randn(64, 64, device=device)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None

    def seconds(operation, budget: float = 0.15) -> float:
        operation(), sync()  # once for what is set up on first use
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < budget or not count:
            operation(), sync()
            count += 1
        return (time.perf_counter() - start) / count

    flops = 2 * size**3 / seconds(lambda: a @ a)
    memory = 4 * big.numel() / seconds(lambda: big.fill_(1.0))
    launch = seconds(lambda: small.add_(1.0), 0.02)
    gpu = device == "cuda"
    return Rates(
        flops, memory, 100e9 if gpu else memory, 40e9 if gpu else memory, 200e9 if gpu else memory,
        40 * launch, f"measured here: {flops / 1e9:,.0f} GFLOP/s, {memory / 1e9:,.0f} GB/s",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# seconds


def seconds_by_phase(
    c: ModelConfig, dtype: torch.dtype, s: Settings, work: Workload, world: int, rates: Rates
) -> tuple[float, float, float]:
    """Seconds of one step on each rank: sampling, updating, stepping.  An estimate: it knows
    neither padding nor the spread of the lengths."""
    n, e, L = parameters(c), dtype.itemsize, c.num_hidden_layers
    # the input embedding is looked up, not multiplied; tied, the same matrix is the output's
    active = n - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    heads = 4 * L * c.num_attention_heads * c.head_dim  # attention: flops for each pair of tokens
    prompt, new = work.mean_prompt_tokens, work.mean_new_tokens or work.max_new_tokens // 2
    rollouts, length = work.share(world), prompt + new

    # Sampling: turns of R tokens each; the last ones, with rows running out, are not fewer than
    # what the longest row has beyond the mean.  A turn reads all weights and all keys and values.
    R = min(s.max_rows, rollouts)
    turns = rollouts * new / R + (work.max_new_tokens - new)
    context = prompt + new / 2
    read = n * e + kv_bytes(c, dtype, R, int(context))
    turn = max(R * (2 * active + heads * context) / rates.flops, read / rates.memory)
    prefill = rollouts / work.group_size * prompt * 2 * active / rates.flops
    sample = prefill + turns * (turn + L * rates.layer_seconds)

    # Updating: forward 2, backward 4 operations a weight and token, the forward once more with
    # checkpointing; log-probs are always computed twice.  A causal row has T^2 / 2 pairs.
    passes = 4 if s.gradient_checkpointing else 3
    head = c.vocab_size * c.hidden_size
    tokens = rollouts * length
    work_done = tokens * (2 * passes * (active - head) + 8 * head + passes * heads * length / 2)
    batches = max(1, tokens / max(s.micro_batch_tokens, length))
    traffic = (passes + 1) * n * e  # each micro-batch reads all weights and adds to all gradients
    gathering = 3 * n * e / rates.peer_link if world > 1 else 0  # two gathers, one scatter
    update = work_done / rates.flops + batches * (
        traffic / rates.memory + gathering + passes * L * rates.layer_seconds
    )
    sample += n * e / rates.peer_link if world > 1 else 0

    # Stepping: gradient, two moments and master read, the latter three and the weight written.
    step = 30 * n / world / (rates.host_memory if s.offload_optimizer else rates.memory)
    if s.offload_optimizer:
        step += 2 * n * e / world / rates.host_link
    return sample, update, step


# ---------------------------------------------------------------------------------------------
# the plan


@dataclass(frozen=True)
class Plan:
    """What a run would need with the settings chosen for it, and whether there is as much."""

    name: str
    config: ModelConfig
    dtype: torch.dtype
    device: str  # "cpu" or "cuda"
    world: int
    work: Workload
    settings: Settings
    rows: dict[str, tuple[int, int, int]] = field(repr=False)  # {what: bytes in each phase}
    device_bytes: int  # what there is for each rank
    host_needed: int  # bytes of host memory for each rank of a GPU run
    host_bytes: int | None
    seconds: tuple[float, float, float]  # of one step, by phase
    source: str  # where the rates are from

    @property
    def totals(self) -> tuple[int, int, int]:
        """Bytes on the device in each phase."""
        return tuple(map(sum, zip(*self.rows.values())))

    @property
    def peak_bytes(self) -> int:
        """Bytes on the device in the phase that needs most."""
        return max(self.totals)

    @property
    def kv_cache_bytes(self) -> int:
        """The sampler's budget: what the KV cache may grow to, in bytes."""
        spare = int(FILL * self.device_bytes) - self.totals[0]
        return self.rows["KV cache"][0] + max(0, spare)

    @property
    def fits(self) -> bool:
        """Is there as much memory, with a tenth to spare?"""
        host = self.host_bytes is None or self.host_needed <= FILL * self.host_bytes
        return self.peak_bytes <= FILL * self.device_bytes and host

    def table(self) -> str:
        """The plan as text, at most 100 columns wide."""
        s, w, c = self.settings, self.work, self.config
        unit, label = (GIB, "GiB") if self.peak_bytes > 4 * GIB else (2**20, "MiB")
        digits = 1 if unit == GIB else 0
        show = lambda x: f"{x / unit:>10,.{digits}f}" if x else f"{'-':>10}"  # noqa: E731
        ranks = f"each of {self.world} ranks on {self.device}" if self.world > 1 else self.device
        on = lambda x: "on" if x else "off"  # noqa: E731
        lines = [
            f"{self.name}: {parameters(c):,} parameters, {str(self.dtype)[6:]}, {ranks}",
            f"  {w.problems} problems x {w.group_size} solutions a step; at most "
            f"{w.prompt_tokens:,} + {w.max_new_tokens:,} tokens each",
            f"  micro-batch {s.micro_batch_tokens:,} tokens, {s.max_rows} rows sampled at a time, "
            f"gradient checkpointing {on(s.gradient_checkpointing)},",
            f"  optimizer in {'host' if s.offload_optimizer else 'device'} memory",
            "",
            f"  {label + ' on the device':<28}" + "".join(f"{p:>10}" for p in PHASES),
        ]
        for name, sizes in self.rows.items():
            if any(sizes):
                lines.append(f"  {name:<28}" + "".join(map(show, sizes)))
        lines.append(f"  {'together':<28}" + "".join(map(show, self.totals)))
        lines.append(f"  {'there is':<28}" + show(self.device_bytes) + f"   {self._verdict()}")
        if self.device != "cpu":
            there = f"{self.host_bytes / GIB:,.0f}" if self.host_bytes is not None else "unknown"
            lines.append(f"  host memory: {self.host_needed / GIB:,.0f} GiB a rank of {there}")
        spent = "".join(f"{_span(x):>10}" for x in self.seconds)
        lines += ["", f"  {'time of a step, about':<28}{spent}"]
        span = _span(sum(self.seconds) * w.steps)
        new = w.mean_new_tokens or w.max_new_tokens // 2
        lines.append(f"  {w.steps} steps: {span}, if solutions have {new:,} tokens on average")
        if w.evaluated:  # sampled like those of a step, and no more
            span = _span(self.seconds[0] * w.evaluated / (w.problems * w.group_size))
            lines.append(f"  evaluations: {span} more, for {w.evaluated:,} solutions")
        return "\n".join(lines + _wrap(f"rates: {self.source}"))

    def _verdict(self) -> str:
        """In words: does it fit?"""
        spare = f"a plan may fill {FILL:.0%}"
        return f"fits ({spare})" if self.fits else f"DOES NOT FIT ({spare})"


def _span(seconds: float) -> str:
    """A time in the largest unit of which it holds two, or in seconds."""
    for unit, size in (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.{int(seconds < 100 * size)}f} {unit}"
    return f"{seconds:.{int(seconds >= 1) or 2}f} s"


def _wrap(text: str, width: int = 96) -> list[str]:
    """Indented lines of at most `width` characters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "  ") + word
    return lines


def plan(
    config: ModelConfig,
    *,
    device_bytes: int,
    host_bytes: int | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "model",
    device: str = "cpu",
    world: int = 1,
    work: Workload = Workload(),
    wanted: Settings = Settings(),
    choose: bool = True,
    rates: Rates | None = None,
    runtime: int | None = None,
) -> Plan:
    """The cheapest settings with which a run fits, or the most frugal ones if none does.

    device_bytes and host_bytes are what there is for each rank; `wanted` is what would be taken
    if memory were no matter, and is taken as it is without `choose`.  `runtime`: bytes taken by
    Python, torch and CUDA (None: `runtime_bytes`).  The choice depends on bytes alone, never on
    measured rates, so that the same machine makes the same choice again.
    """
    runtime = runtime_bytes(device) if runtime is None else runtime
    rates = rates or (H100 if device == "cuda" else measure_rates(device, dtype))

    def with_settings(s: Settings) -> Plan:
        """The plan of this run with these settings, whether it fits or not."""
        rows = device_bytes_by_phase(config, dtype, s, work, world, device)
        if device == "cpu":
            N = micro_batch(s, work, world)
            rows["freed, kept by malloc"] = heap_bytes(config, dtype, N, rows)
        rows["Python, torch" if device == "cpu" else "CUDA context"] = (runtime,) * 3
        host = 0 if device == "cpu" else host_bytes_needed(config, dtype, s, world)
        seconds = seconds_by_phase(config, dtype, s, work, world, rates)
        return Plan(
            name, config, dtype, device, world, work, s, rows, device_bytes, host,
            None if device == "cpu" else host_bytes, seconds, rates.source,
        )  # fmt: skip

    if not choose:
        return with_settings(wanted)
    for s in _candidates(wanted, work, world, device):
        p = with_settings(s)
        if p.fits:
            return p
    return p


def _candidates(wanted: Settings, work: Workload, world: int, device: str):
    """Settings to try, in order of the time they cost; the last one is the most frugal."""
    sizes = [wanted.micro_batch_tokens]
    while sizes[-1] // 2 >= work.longest:  # a row is never cut: below that nothing is saved
        sizes.append(sizes[-1] // 2)
    most = min(wanted.max_rows, work.share(world))
    rows = [wanted.max_rows] + [r for r in range(most - 1, 0, -1) if r % 4 == 0 or r < 8]
    offload = (False, True) if device != "cpu" else (False,)  # a CPU has only the one memory
    checkpointing = (True,) if wanted.gradient_checkpointing else (False, True)
    # First with enough rows to be worth it, by recomputing and offloading; then with fewer.
    for enough in (True, False):
        for off in (True,) if wanted.offload_optimizer else offload:
            for again in checkpointing:
                for size in sizes:
                    for r in rows:
                        if (r >= min(EASY_ROWS, most)) == enough:
                            yield Settings(size, again, off, r)


def largest_alias_that_fits(
    *, device_bytes: int, host_bytes: int | None = None, **options
) -> Plan | None:
    """The plan of the largest model of SHAPES that fits (the options are those of `plan`), or
    None if none does."""
    by_size = sorted(SHAPES, key=lambda alias: parameters(SHAPES[alias]), reverse=True)
    for alias in by_size:
        p = plan(
            SHAPES[alias], device_bytes=device_bytes, host_bytes=host_bytes, **options, name=alias
        )
        if p.fits:
            return p
    return None


# ---------------------------------------------------------------------------------------------
# for the scripts


def default_kv_cache_gb(device: torch.device) -> float:
    """GB (1e9 bytes) of KV cache where there is no plan and the model is loaded: half of what is
    free on its device, the other half being for everything else."""
    taken = resident_bytes() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    return (available_bytes(device) - taken) / 2e9


def known_config(model: str) -> ModelConfig | None:
    """The shape behind --model: `tiny` or a local folder, else an alias of SHAPES or its hub id;
    None for what only a download could tell."""
    folder = _local_folder(model)
    if folder is not None:
        return load_config(folder)
    aliases = {hub_id.lower(): alias for alias, hub_id in ALIASES.items()}
    return SHAPES.get(aliases.get(model.lower(), model.lower()))


def _local_folder(model: str) -> Path | None:
    """The checkpoint folder of `tiny` or of a local name; None for what lies on the hub."""
    local = model == "tiny" or Path(model).expanduser().is_dir()
    return find_checkpoint(model) if local else None


def plan_for(options, rates: Rates | None = None) -> Plan:
    """The plan of a run with train.py's options on this machine; ValueError if the shape of
    --model is not known.  Under torchrun: of one of its ranks.  None as rates: measured now."""
    config = known_config(options.model)
    if config is None:
        raise ValueError(
            f"--plan: the shape of {options.model!r} is not known without a download; "
            f"known are {', '.join(sorted(SHAPES))}, their hub ids, and local folders"
        )
    device, dtype = options.device, options.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = auto_dtype(_local_folder(options.model), device)
    dtype = getattr(torch, dtype)
    world, local = (int(os.environ.get(x, 1)) for x in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    host = available_bytes("cpu") // local  # the ranks of a machine share its memory
    # the embedded problems are one line each; other data may go up to the limit
    prompt = 64 if options.data == "arithmetic" else options.max_prompt_tokens
    # all held-out problems before and after, a quarter of them in between
    between = (options.steps - 1) // options.eval_every
    evaluated = int(options.eval_problems * options.eval_n * (2 + between / 4))
    work = Workload(
        options.problems_per_step, options.group_size, prompt, options.max_new_tokens,
        options.steps, min(prompt, 150), evaluated=evaluated,
    )  # fmt: skip
    wanted = {name: getattr(options, name, None) for name in ("micro_batch_tokens", "max_rows")}
    wanted |= {name: bool(getattr(options, name, False)) for name in SWITCHES}
    return plan(
        config,
        device_bytes=available_bytes(device) if device == "cuda" else host,
        host_bytes=host,
        dtype=dtype,
        name=options.model,
        device=device,
        world=world,
        work=work,
        wanted=Settings(**wanted),
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
        known = {f.name for f in fields(options)}
        if "kv_cache_gb" in known and options.kv_cache_gb is None:
            options = replace(options, kv_cache_gb=p.kv_cache_bytes / 1e9)
        chosen = {k: v for k, v in asdict(p.settings).items() if k in known}
        changed = {k: v for k, v in chosen.items() if v != getattr(options, k)}
        if changed and os.environ.get("RANK", "0") == "0":
            said = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in changed.items())
            print(f"to fit into memory: {said}")
        return replace(options, **chosen)
    print(plan_for(options).table(), file=sys.stderr)
    other = largest_alias_that_fits(
        device_bytes=p.device_bytes, host_bytes=p.host_bytes, dtype=p.dtype, device=p.device,
        world=p.world, work=p.work, wanted=p.settings, rates=H100,
    )  # fmt: skip
    hint = "no known model fits" if other is None else f"the largest that fits is {other.name}"
    raise ValueError(
        f"{p.name} does not fit on this machine: training needs {p.peak_bytes / GIB:.1f} GiB of "
        f"{p.device} memory, and there are {p.device_bytes / GIB:.1f} (the plan is above); with "
        f"these options {hint}; a smaller --max-new-tokens or --max-prompt-tokens needs less"
    )


@dataclass
class Options:
    """Plan a run of the paper's size on H100s: computed, not measured; no GPU needed."""

    model: str = option("qwen2.5-7b", "an alias or a folder with a config.json")
    gpus: int = option(1, "of one node", min=1)
    device_gb: float = option(80, "memory of a GPU, in GB", above=0)
    host_gb: float = option(1000, "memory of the node, in GB", above=0)
    problems_per_step: int = option(128, "P", min=1)
    group_size: int = option(8, "G", min=2)
    max_prompt_tokens: int = option(2048, "longest prompt", min=1)
    max_new_tokens: int = option(8192, "longest solution", min=1)
    micro_batch_tokens: int = option(16_384, "wanted tokens per forward pass", min=1)


def main() -> int:
    """Print the plan of --model on --gpus H100s."""
    o, _ = parse_args(Options)
    config = known_config(o.model)
    if config is None:
        known = ", ".join(sorted(SHAPES))
        raise ValueError(f"--model {o.model}: known are {known}, their hub ids, and local folders")
    work = Workload(o.problems_per_step, o.group_size, o.max_prompt_tokens, o.max_new_tokens)
    p = plan(
        config, device_bytes=int(o.device_gb * 1e9), host_bytes=int(o.host_gb * 1e9 / o.gpus),
        dtype=torch.bfloat16, name=o.model, device="cuda", world=o.gpus, work=work,
        wanted=Settings(o.micro_batch_tokens), rates=H100,
    )  # fmt: skip
    print(p.table())
    return 0 if p.fits else 1


if __name__ == "__main__":
    main_guard(main)
