"""
What a GPU makes of it: one command for one card of 80 GB, under ten minutes, nothing downloaded.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --tiny      # the same code on a toy, to see that it runs

Random weights in the shapes of Qwen2.5-0.5B, 1.5B and 7B, made on the device, in bfloat16.  Parts,
each of which may fail without ending the others:

    sample   tokens/s at 32, 128 and 256 rows and about 1,000 tokens of text, beside transformers
             in the same process (static KV cache, greedy, no log-probs), and vLLM where installed;
             and what limits: bytes of weights and KV cache read a turn, operations of the matrices
    update   seconds of one micro-batch after another, and its share of the matrices' rate
    step     sample + update + AdamW, seconds, and the peak of memory beside the plan's

Rates of the card are measured first: products of bf16 matrices, and copies.  A table, then one
JSON line.  Never run on a GPU so far: see docs/gpu.md.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # found without being installed

from benchmarks.generate import NoText, forced  # noqa: E402
from nanolaser import grpo, sampler  # noqa: E402
from nanolaser.checkpoint import config_to_hf  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.model import CausalLM  # noqa: E402
from nanolaser.scale import plan as planning  # noqa: E402
from nanolaser.scale.optimizer import Optimizer  # noqa: E402

MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
PARTS = ("sample", "update", "step")


@dataclass
class Options:
    """Measure sampling and training on a GPU."""

    models: tuple[str, ...] = option(MODELS, "shapes", choices=MODELS)
    parts: tuple[str, ...] = option(PARTS, "what is measured", choices=PARTS)
    rows: tuple[int, ...] = option(
        (32, 128, 256), "sampled at the same time", choices=(4, 32, 128, 256))
    prompt: int = option(500, "tokens of a prompt", min=2)
    turns: int = option(500, "tokens of a solution", min=2)
    device: str = option("cuda", "where", choices=("cuda", "cpu"))
    tiny: bool = option(False, "a toy in place of the models")


def wait(o: Options) -> None:
    """Until the device has done all that it was given."""
    if o.device == "cuda":
        torch.cuda.synchronize()


def seconds(o: Options, work) -> float:
    """By the clock, of the second of two runs."""
    for _ in range(2):
        wait(o)
        began = time.perf_counter()
        work()
        wait(o)
    return time.perf_counter() - began


def rates(o: Options) -> tuple[float, float]:
    """(operations/s of bf16 matrices, bytes/s of memory, read and written) of this device."""
    n = 256 if o.tiny else 8192
    a = torch.randn(n, n, device=o.device).bfloat16()
    big = torch.empty(n * n * 16, device=o.device, dtype=torch.int8)
    other = torch.empty_like(big)
    products = seconds(o, lambda: [a @ a for _ in range(10)]) / 10
    copies = seconds(o, lambda: [other.copy_(big) for _ in range(10)]) / 10
    return 2 * n**3 / products, 2 * big.nbytes / copies


def make(name: str, o: Options) -> CausalLM:
    """Random weights of a shape, made on the device in bfloat16."""
    config = planning.SHAPES[name]
    if o.tiny:
        config = dataclasses.replace(config, vocab_size=600, hidden_size=64, num_hidden_layers=2,
                                     intermediate_size=96, head_dim=16, num_attention_heads=4,
                                     num_key_value_heads=2)  # fmt: skip
    with torch.device("meta"):
        model = CausalLM(config).to(torch.bfloat16)
    model.to_empty(device=o.device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0) if name.endswith("norm.weight") else p.normal_(0.0, 0.02)
    return model


# ---------------------------------------------------------------------------------------------
# the parts: each returns its numbers


def prompts_of(model: CausalLM, count: int, o: Options) -> list[list[int]]:
    """Prompts of one length, all different."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size - 2, (count, o.prompt), generator=g).tolist()


def sampled(model: CausalLM, problems: int, group: int, rows: int, o: Options) -> list:
    """Rollouts that all have the full length."""
    tokenizer = NoText(model.config.vocab_size)
    with forced([o.turns] * problems * group, tokenizer.stop_ids):
        return sampler.generate(model, tokenizer, prompts_of(model, problems, o), n=group,
                                max_new_tokens=o.turns, max_rows=rows)  # fmt: skip


def sample(model: CausalLM, card: tuple[float, float], o: Options) -> dict:
    """Tokens/s by the number of rows, and the shares of what limits them."""
    flops, bandwidth = card
    c, found = model.config, {}
    weights = sum(p.numel() for p in model.parameters())
    for rows in o.rows:
        problems = max(1, rows // 8)
        spent = seconds(o, lambda: sampled(model, problems, rows // problems, rows, o))
        tokens = rows * o.turns
        # every turn reads all weights, and all keys and values so far
        kv = planning.kv_bytes(c, torch.bfloat16, rows, o.prompt + o.turns // 2)
        read = o.turns * (2 * weights + kv)
        found[rows] = {
            "tokens/s": tokens / spent, "of bandwidth": read / spent / bandwidth,
            "of products": 2 * weights * (tokens + problems * o.prompt) / spent / flops,
        }  # fmt: skip
        for peer, tokens_per_second in (("transformers", transformers), ("vllm", vllm)):
            if importlib.util.find_spec(peer):
                found[rows][peer] = guarded(peer, lambda: tokens_per_second(model, rows, o))
    return found


def transformers(model: CausalLM, rows: int, o: Options) -> float:
    """Tokens/s of transformers.generate with these weights."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    config = hf.AutoConfig.for_model(**config_to_hf(model.config))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        peer = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    peer.load_state_dict(model.state_dict(), strict=False, assign=True)
    peer.tie_weights()
    with torch.device(o.device):  # its frequencies are no parameters: made, not loaded
        peer.model.rotary_emb = type(peer.model.rotary_emb)(config)
    ids = torch.tensor(prompts_of(model, rows, o), device=o.device)
    how = hf.GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=o.turns, min_new_tokens=o.turns, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    work = lambda: peer.generate(ids, generation_config=how)  # noqa: E731
    return rows * o.turns / seconds(o, work)


def vllm(model: CausalLM, rows: int, o: Options) -> float:
    """Tokens/s of vLLM with dummy weights of the same shape."""
    import tempfile

    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_to_hf(model.config)))
        engine = LLM(folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
                     max_num_seqs=rows, gpu_memory_utilization=0.4)  # fmt: skip
        how = SamplingParams(max_tokens=o.turns, ignore_eos=True, detokenize=False)
        ids = [{"prompt_token_ids": x} for x in prompts_of(model, rows, o)]
        return rows * o.turns / seconds(o, lambda: engine.generate(ids, how, use_tqdm=False))


def learn(model: CausalLM, rollouts: list, settings, optimizer=None) -> dict:
    """An update from random verdicts, in which every row has an advantage."""
    for i, r in enumerate(rollouts):
        r.r_v = float(i % 2)
    advantages = torch.tensor([-1.0, 1.0]).repeat(len(rollouts) // 2)
    weights = torch.tensor([float(r.finished) for r in rollouts])
    model.gradient_checkpointing = settings.gradient_checkpointing
    loss = grpo.Loss(alpha=0.1, c_ref=-12.0, z_c_id=1)
    size = settings.micro_batch_tokens
    if optimizer is None:
        return grpo.accumulate_gradients(model, rollouts, advantages, weights, loss, size)
    return grpo.update(model, optimizer, rollouts, advantages, weights, loss, size, 1.0)


def planned(model: CausalLM, problems: int, o: Options) -> planning.Plan:
    """The plan of a step of 8 solutions a problem."""
    work = planning.Workload(problems, 8, o.prompt, o.turns, max_rows=problems * 8)
    there = planning.available_bytes(o.device)
    host = planning.available_bytes("cpu")
    return planning.plan(model.config, device_bytes=there, host_bytes=host, work=work,
                         dtype=torch.bfloat16, device=o.device)  # fmt: skip


def update(model: CausalLM, card: tuple[float, float], o: Options) -> dict:
    """Forward and backward passes over 4 groups of 8."""
    rollouts, settings = sampled(model, 4, 8, 32, o), planned(model, 4, o).settings
    spent = seconds(o, lambda: learn(model, rollouts, settings))
    for p in model.parameters():
        p.grad = None
    weights = sum(p.numel() for p in model.parameters())
    tokens = sum(len(r.response_tokens) for r in rollouts) + 4 * o.prompt
    passes = 4 if settings.gradient_checkpointing else 3
    return {"seconds": spent, "of products": passes * 2 * weights * tokens / spent / card[0]}


def step(model: CausalLM, card: tuple[float, float], o: Options) -> dict:
    """A whole step of 16 groups of 8: seconds by phase, and the peak beside the plan's."""
    plan = planned(model, 16, o)
    optimizer = Optimizer(model, 1e-6, 0.0, plan.settings.offload_optimizer)
    clock, rollouts = [time.perf_counter()], []
    for _ in range(2):  # from the second step on there is optimizer state
        if o.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock = [time.perf_counter()]
        rollouts = sampled(model, 16, 8, min(plan.rows, 128), o)
        clock.append(time.perf_counter())
        learn(model, rollouts, plan.settings, optimizer)
        wait(o)
        clock.append(time.perf_counter())
    peak = torch.cuda.max_memory_allocated() if o.device == "cuda" else 0
    return {
        "sample": clock[1] - clock[0], "update": clock[2] - clock[1], "peak GiB": peak / 2**30,
        "plan GiB": plan.peak_bytes / 2**30, **dataclasses.asdict(plan.settings),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------


def guarded(what: str, work):
    """The result of a part; a line and None if it fails."""
    try:
        return work()
    except Exception as error:
        print(f"{what} failed: {type(error).__name__}: {str(error).splitlines()[:1]}")
        return None


def show(values: dict) -> str:
    """Numbers on a line."""
    number = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)  # noqa: E731
    return "  ".join(f"{key} {number(value)}" for key, value in values.items())


def main() -> int:
    """Every part of every model, then the JSON line."""
    o, _ = parse_args(Options)
    if o.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here; --device cpu --tiny shows that the code runs")
    card = rates(o)
    name = torch.cuda.get_device_name() if o.device == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}: {card[0] / 1e12:.4g} TFLOP/s, "
          f"{card[1] / 1e9:.4g} GB/s")  # fmt: skip
    results = {}
    for shape in o.models:
        results[shape] = {}
        for part in o.parts:
            work = {"sample": sample, "update": update, "step": step}[part]
            found = guarded(f"{shape} {part}", lambda: work(make(shape, o), card, o))
            results[shape][part] = found
            for key, values in (found or {}).items() if part == "sample" else [("", found or {})]:
                print(f"{shape:<14}{part:<8}{key!s:>4}  {show(values)}", flush=True)
            if o.device == "cuda":
                torch.cuda.empty_cache()
    print(json.dumps({"benchmark": "gpu", "card": name, "torch": torch.__version__,
                      "flops": card[0], "bandwidth": card[1], **results}))  # fmt: skip
    return 0


if __name__ == "__main__":
    main_guard(main)
