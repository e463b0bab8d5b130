"""
Sampling as RL does it (P prompts x 8 solutions that end at different times) beside
transformers.generate, and beside what the machine could do.

    python benchmarks/generate.py                            # all three cases; eleven minutes
    python benchmarks/generate.py --cases embedded --runs 1  # a quick look

    embedded   the shipped model on its arithmetic problems, solutions as long as they come
    skewed     a Qwen2 of 90M parameters (16 layers of 640, V = 32,000) with random weights;
               solutions of 64 tokens on average and at most 256: few are long, most are short
    equal      the same model; all solutions have 64 tokens, the best case for a static batch

Both sides have the same weights and prompts, hold the same number of rows at a time (--rows) and
run on one thread in one process: transformers, then ours, then transformers again.  transformers
at its best: static batches, KV cache, scaled_dot_product_attention, logits of the last position
only, multinomial draws from the whole vocabulary with nothing sorted.  Ours returns log-probs and
reads z_c besides.  On the random model both sides end their rows at given lengths, the same ones;
neither is told them in advance.

Only tokens of solutions count, up to the stop token: no prompt, no padding, no z_c.  The limit is
the rate of nothing but the model's matrix products at that batch (`matrix_rate`): the arithmetic
that the solutions take (`arithmetic`) could not be done faster.

Seconds are the process's own (CPU time), so that other work on the machine does not enter;
medians over runs.  The last line is one JSON object.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # found without being installed

from nanolaser import load_pretrained, sampler  # noqa: E402
from nanolaser.checkpoint import config_to_hf  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.model import CausalLM, ModelConfig  # noqa: E402
from nanolaser.problems import made_up_problems  # noqa: E402
from nanolaser.tiny.__main__ import init_weights  # noqa: E402

# times transformers' useful tokens a second; share of the matrix products' rate
GOALS = {"embedded": (4.0, 0.45), "skewed": (5.0, 0.70), "equal": (1.8, 0.70)}
MEAN, LONGEST = 64, 256  # tokens of a solution of the random model
PROMPT = 64  # tokens of a prompt of the random model


@dataclass
class Options:
    """Measure the sampler."""

    cases: tuple[str, ...] = option(tuple(GOALS), "which", choices=tuple(GOALS))
    problems: int = option(16, "P", min=1)
    group_size: int = option(8, "solutions of each", min=1)
    rows: int = option(32, "solutions sampled at the same time", min=1)
    runs: int = option(3, "of each side, alternating", min=1)


# ---------------------------------------------------------------------------------------------
# solutions of given lengths


class NoText:
    """What the sampler asks of a tokenizer, for a model that knows no text."""

    stop_ids, z_c_id = (0,), 1

    def __init__(self, size: int):
        self.size = size


@contextmanager
def forced(lengths: list[int], stop_ids: tuple[int, ...]):
    """Within it `sampler.generate` ends rollout i with a stop token at lengths[i] tokens, and
    nowhere else.  The model computes and draws as ever: only what was drawn is replaced."""
    stop, other = stop_ids[0], max(stop_ids) + 1
    ends, stops, last = torch.tensor(lengths), torch.tensor(stop_ids), None
    uniforms, sample_next = sampler.uniforms, sampler.sample_next

    def told(seed, streams, steps):
        nonlocal last
        last = steps + 1 == ends[streams]  # (R,): is the token to be drawn the one to stop at?
        return uniforms(seed, streams, steps)

    def replaced(*logits_and_more):
        tokens, logprobs = sample_next(*logits_and_more)
        there = tokens.device
        tokens = torch.where(torch.isin(tokens, stops.to(there)), other, tokens)
        return torch.where(last.to(there), stop, tokens), logprobs

    sampler.uniforms, sampler.sample_next = told, replaced
    try:
        yield
    finally:
        sampler.uniforms, sampler.sample_next = uniforms, sample_next


def skewed_lengths(count: int, mean: int, longest: int) -> list[int]:
    """`count` lengths with that mean: exponentially distributed, cut off at `longest`, shuffled.

    They are the distribution's own quantiles, the last one the longest: nothing is left to luck.
    """
    below = torch.arange(0.5, count) / count  # share of shorter ones
    quantiles = -torch.log1p(-below.double())

    def scaled(scale: float) -> list[int]:
        cut = (scale * quantiles).round().clamp(1, longest).long()
        return [*cut.tolist()[:-1], longest]

    low, high = 0.0, 10.0 * mean  # the cut takes from the mean: look for the scale that has it
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(scaled(middle)) < mean * count else (low, middle)
    lengths = scaled(high)
    random.Random(0).shuffle(lengths)
    return lengths


# ---------------------------------------------------------------------------------------------
# the work


@dataclass
class Work:
    """A case: what both sides get."""

    model: CausalLM
    tokenizer: object
    prompts: list[list[int]]
    max_new_tokens: int
    lengths: list[int] | None  # of the solutions, prompt by prompt; None: as they come


def embedded(o: Options) -> Work:
    """The shipped model; as many tokens as in its training at most."""
    model, tokenizer = load_pretrained("tiny", device="cpu", dtype="float32")
    prompts = [tokenizer.encode_prompt(p.problem) for p in made_up_problems(o.problems, 0)]
    return Work(model, tokenizer, prompts, 96, None)


def random_90m(o: Options, lengths: list[int]) -> Work:
    """90M random parameters and prompts of one length each of its own tokens."""
    config = ModelConfig("qwen2", 32_000, 640, 1728, 16, 10, 2, 64, tie_word_embeddings=True,
                         attention_bias=True)  # fmt: skip
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 32_000, (o.problems, PROMPT), generator=g).tolist()
    model = init_weights(CausalLM(config), 0)
    return Work(model, NoText(32_000), prompts, max(lengths), lengths)


def prepare(case: str, o: Options) -> Work:
    """The work of a case."""
    count = o.problems * o.group_size
    if case == "embedded":
        return embedded(o)
    return random_90m(o, skewed_lengths(count, MEAN, LONGEST) if case == "skewed" else [64] * count)


# ---------------------------------------------------------------------------------------------
# the two sides: each takes the work and a seed, and returns the lengths of the solutions


def ours(work: Work, o: Options, seed: int) -> list[int]:
    """The sampler, as train.py calls it."""
    how = dict(n=o.group_size, max_new_tokens=work.max_new_tokens, max_rows=o.rows, seed=seed)
    if work.lengths is None:
        rollouts = sampler.generate(work.model, work.tokenizer, work.prompts, **how)
    else:
        with forced(work.lengths, work.tokenizer.stop_ids):
            rollouts = sampler.generate(work.model, work.tokenizer, work.prompts, **how)
    return [len(r.response_tokens) for r in rollouts]


class Peer:
    """transformers' model with our model's weights, and its generate."""

    def __init__(self, work: Work):
        import transformers

        transformers.logging.set_verbosity_error()
        self.criteria, self.base = transformers.StoppingCriteriaList, transformers.StoppingCriteria
        config = transformers.AutoConfig.for_model(**config_to_hf(work.model.config))
        config._attn_implementation = "sdpa"
        self.model = transformers.AutoModelForCausalLM.from_config(config).eval()
        missing, extra = self.model.load_state_dict(work.model.state_dict(), strict=False)
        assert set(missing) <= {"lm_head.weight"} and not extra, (missing, extra)
        self.model.tie_weights()
        self.pad = 0 if work.lengths is not None else work.tokenizer.stop_ids[0]
        # nothing but what we say, whatever the checkpoint advises
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=self.pad,
            eos_token_id=None if work.lengths else list(work.tokenizer.stop_ids), use_cache=True,
            max_new_tokens=work.max_new_tokens, num_return_sequences=1,
        )  # fmt: skip

    def __call__(self, work: Work, o: Options, seed: int) -> list[int]:
        torch.manual_seed(seed)
        rows = [x for x in work.prompts for _ in range(o.group_size)]
        lengths: list[int] = []
        for start in range(0, len(rows), o.rows):
            batch = rows[start : start + o.rows]
            T = max(map(len, batch))
            tokens = torch.tensor([[self.pad] * (T - len(x)) + x for x in batch])  # padded left
            mask = torch.tensor([[0] * (T - len(x)) + [1] * len(x) for x in batch])
            wanted = work.lengths and torch.tensor(work.lengths[start : start + o.rows])
            out = self.model.generate(
                tokens, attention_mask=mask, stopping_criteria=self.at(wanted, T)
            )[:, T:]  # (B, longest)
            if wanted is not None:
                assert out.shape[1] == wanted.max()
                lengths += wanted.tolist()
                continue
            ends = torch.isin(out, torch.tensor(work.tokenizer.stop_ids))
            first = torch.where(ends.any(1), ends.int().argmax(1) + 1, out.shape[1])
            lengths += first.tolist()
        return lengths

    def at(self, wanted, T: int):
        """A criterion by which row b ends after wanted[b] tokens; None where it ends by itself."""
        if wanted is None:
            return None

        class Reached(self.base):
            def __call__(self, tokens, scores, **_):
                return tokens.shape[1] - T >= wanted

        return self.criteria([Reached()])


# ---------------------------------------------------------------------------------------------
# the limit


def matrices(model: CausalLM) -> list[torch.Tensor]:
    """Every matrix that a token is multiplied with, the output matrix last."""
    in_layers = [p for p in model.model.layers.parameters() if p.dim() == 2]
    return [*in_layers, model.lm_head_weight]


def arithmetic(work: Work, o: Options, lengths: list[int]) -> int:
    """Floating-point operations of these solutions if nothing is computed twice: every prompt
    once, every token of a solution once, z_c's position among the logits."""
    *layers, head = (p.numel() for p in matrices(work.model))
    c = work.model.config
    fed = sum(map(len, work.prompts)) + sum(lengths)
    read = sum(lengths) + len(lengths)
    # pairs of a token and one that it looks at: prompts, then what each solution adds
    p = [len(x) for x in work.prompts for _ in range(o.group_size)]
    pairs = sum(len(x) ** 2 // 2 for x in work.prompts)
    pairs += sum(n * before + n * n // 2 for n, before in zip(lengths, p))
    attention = 2 * 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs
    return 2 * (sum(layers) * fed + head * read) + attention


@torch.no_grad()
def matrix_rate(model: CausalLM, rows: int, seconds: float = 0.5) -> float:
    """Floating-point operations a second of the model's own matrices times `rows` vectors, one
    matrix after the other as in a step of the sampler."""
    weights = matrices(model)
    x = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in weights}
    done, began = 0, time.process_time()
    while (spent := time.process_time() - began) < seconds:
        for w in weights:
            F.linear(x[w.shape[1]], w)
        done += sum(2 * rows * w.numel() for w in weights)
    return done / spent


# ---------------------------------------------------------------------------------------------


def run(case: str, o: Options) -> dict:
    """Alternating runs of both sides; prints and returns their medians."""
    work = prepare(case, o)
    sides = {"transformers": Peer(work), "nanolaser": ours}
    taken: dict[str, list] = {name: [] for name in sides}
    rates, counts = [], []
    matrix_rate(work.model, o.rows)  # warm
    for seed in range(o.runs):
        rates.append(matrix_rate(work.model, o.rows))
        for name, side in sides.items():
            began = time.process_time()
            lengths = side(work, o, seed)
            spent = time.process_time() - began
            taken[name].append((spent, sum(lengths), arithmetic(work, o, lengths)))
        counts += lengths
    count, rate = o.problems * o.group_size, statistics.median(rates)
    print(f"\n{case}: {o.problems} prompts x {o.group_size}, {o.rows} rows at a time; solutions of "
          f"{sum(counts) / len(counts):.0f} tokens, at most {max(counts)}")
    print(f"{'':<14}{'seconds':>9}{'tokens':>8}{'tokens/s':>10}{'GFLOP/s':>9}{'of limit':>10}")
    result = {"solutions": count, "rows": o.rows, "matrix_gflops": rate / 1e9}
    for name, runs in taken.items():
        spent, tokens = (statistics.median(x) for x in list(zip(*runs))[:2])
        speed = statistics.median(n / s for s, n, _ in runs)
        flops = statistics.median(f / s for s, _, f in runs)
        result[name] = {"seconds": spent, "tokens": tokens, "tokens_per_second": speed,
                        "gflops": flops / 1e9, "of_limit": flops / rate}
        print(f"{name:<14}{spent:9.2f}{tokens:8.0f}{speed:10.0f}{flops / 1e9:9.1f}"
              f"{flops / rate:10.0%}", flush=True)
    print(f"{'matrices only':<14}{'':27}{rate / 1e9:9.1f}")
    # run by run, so that a slow minute of the machine is in both numbers or in none
    result["speedup"] = statistics.median(
        (n / s) / (m / t)
        for (t, m, _), (s, n, _) in zip(taken["transformers"], taken["nanolaser"])
    )
    goals = {"speedup": GOALS[case][0], "of_limit": GOALS[case][1]}
    found = {"speedup": result["speedup"], "of_limit": result["nanolaser"]["of_limit"]}
    met = {k: "met" if found[k] >= goal else "MISSED" for k, goal in goals.items()}
    print(f"{found['speedup']:.2f} times transformers' tokens a second; goal "
          f"{goals['speedup']:g}: {met['speedup']}")
    print(f"{found['of_limit']:.0%} of the limit; aim {goals['of_limit']:.0%}: {met['of_limit']}")
    return result


def main() -> int:
    """The cases, then the JSON line."""
    o, _ = parse_args(Options)
    torch.set_num_threads(1)
    results = {case: run(case, o) for case in o.cases}
    print(json.dumps({"benchmark": "generate", "goals": GOALS, **results}))
    return 0


if __name__ == "__main__":
    main_guard(main)
