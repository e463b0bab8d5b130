"""
One whole training step (sample, reward, update) beside TRL's GRPOTrainer, and LaSeR's beside our
own plain GRPO.

    python benchmarks/grpo_step.py                    # all cases; about 20 minutes
    python benchmarks/grpo_step.py --case embedded --steps 5

Both sides train the same weights on the same problems with the same reward, group size, token
limits, temperature, AdamW and gradient clipping, in one process on one thread: TRL's step, then
ours, then TRL's next.  The reward is a hash of the solution's text, between 0 and 1: no two
solutions of a group have the same, so every row has an advantage and is computed on both sides.
(In a real run ours leaves out what has none; here that would be half of it.)  TRL at its fastest
here: float32, no reference model, one optimizer step a batch (hence no pass for old log-probs), no
activation checkpointing, no logging, the whole batch at once; it samples with
transformers.generate.

    embedded   the shipped model on its arithmetic problems, answers as long as they come
    random     a Qwen2 of 90M parameters (16 layers of 640, V = 32,000) with random weights: its
               answers never end by themselves and all have the full length, which is the best
               case for a static batch
    gsm8k      the same model, lengths as a run on GSM8K has them: prompts of 100 to 130 tokens,
               answers of 64 on average, most shorter, the longest 256; given to both sides

Seconds are the process's own (CPU time), so that other work on the machine does not enter;
medians over steps, the first one left out; `wall` is by the clock.  The last line is one JSON
object.  Without TRL
(pip install trl==1.16.0) our side runs alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
import types
import warnings
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # found without being installed

import train  # noqa: E402
from benchmarks.generate import forced, skewed_lengths  # noqa: E402
from nanolaser import grpo, load_pretrained  # noqa: E402
from nanolaser.checkpoint import save_pretrained  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.model import CausalLM, ModelConfig  # noqa: E402
from nanolaser.problems import Problem, made_up_problems  # noqa: E402
from nanolaser.scale.distributed import ALONE  # noqa: E402
from nanolaser.tiny.__main__ import init_weights  # noqa: E402
from nanolaser.tokenizer import Tokenizer  # noqa: E402

GOALS = {"embedded": 2.2, "random": 2.8, "gsm8k": 3.0, "laser_share": 0.03}
# per case: problems, new tokens at most
SIZES = {"embedded": (16, 96), "random": (2, 64), "gsm8k": (4, 256)}
LR = 1e-6  # the two sides should stay the same model: lengths would drift apart otherwise


@dataclass
class Options:
    """Measure whole training steps."""

    case: str = option("all", "which model and lengths", choices=("all", *SIZES))
    steps: int = option(4, "measured, after one that is not", min=1)
    group_size: int = option(8, "G", min=2)


# ---------------------------------------------------------------------------------------------
# the same model for both sides


def write_random_model(folder: Path) -> None:
    """A random Qwen2 of 90M parameters with a tokenizer of bytes, filled up to 32,000 tokens."""
    from tests.conftest import write_tokenizer

    write_tokenizer(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    # ids that no text is ever cut into, but that a random model draws
    specials = {t["id"] for t in tokenizer["added_tokens"]}
    vocabulary |= {f"w{i}": i for i in range(32_000) if i > max(specials)}
    file.write_text(json.dumps(tokenizer))
    config = ModelConfig(
        "qwen2", 32_000, 640, 1728, 16, 10, 2, 64, tie_word_embeddings=True, attention_bias=True,
        eos_token_id=(258,),
    )  # fmt: skip
    save_pretrained(init_weights(CausalLM(config), 0), Tokenizer.from_folder(folder), folder)


def rewards(problems: list[str], responses: list[str], golds: list[str]) -> list[float]:
    """The reward of both sides: a number in [0, 1) that depends on the text alone."""
    return [zlib.crc32(text.encode()) / 2**32 for text in responses]


def problems_of(case: str, seed: int) -> list[Problem]:
    """A batch: arithmetic, or texts of 100 to 130 tokens with their template (a token a byte)."""
    if case != "gsm8k":
        return made_up_problems(SIZES[case][0], seed)
    rng, template = random.Random(seed), 90
    lengths = [rng.randint(100, 130) - template for _ in range(SIZES[case][0])]
    texts = ["".join(rng.choices("abcdefghij klmno", k=n)) for n in lengths]
    return [Problem(str(i), text, "7") for i, text in enumerate(texts)]


def lengths_of(case: str, o: Options) -> list[int] | None:
    """Tokens of each solution, where they are given."""
    problems, longest = SIZES[case]
    return skewed_lengths(problems * o.group_size, 64, longest) if case == "gsm8k" else None


# ---------------------------------------------------------------------------------------------
# our side


class Ours:
    """train.py's own step on a model of its own; laser: with r_s in loss and advantage."""

    def __init__(self, folder: str, case: str, o: Options, laser: bool):
        problems, tokens = SIZES[case]
        settings = dict(
            steps=10**6, problems_per_step=problems, max_new_tokens=tokens, lr=LR, lr_warmup=0,
            reasoning_warmup=0, self_reward_warmup=0, group_size=o.group_size,
            reward=f"{Path(__file__).resolve()}:rewards",
        )  # fmt: skip
        settings |= {} if laser else dict(alpha=0.0, tau=0.0)
        self.options = dataclasses.replace(train.Options(), **settings)
        self.model, self.tokenizer = load_pretrained(folder, device="cpu", dtype="float32")
        self.tokenizer.c_ref = -12.0  # any number: what it costs does not depend on it
        self.optimizer = grpo.Optimizer(self.model, LR, 0.01)
        self.run = SimpleNamespace(
            o=self.options, model=self.model, tokenizer=self.tokenizer, optimizer=self.optimizer,
            stream=SimpleNamespace(), world=ALONE, reference=None,
        )  # fmt: skip
        lengths = lengths_of(case, o)
        given = lambda: forced(lengths, self.tokenizer.stop_ids)  # noqa: E731
        self.lengths = given if lengths else nullcontext

    def step(self, problems: list, number: int) -> dict:
        """One step: its seconds, in all and by phase, its response tokens and its reward."""
        began, wall = time.process_time(), time.perf_counter()
        self.run.stream.at = lambda step, fresh: problems
        with self.lengths():
            m, rollouts = train.train_step(self.run, number)
        return {
            "seconds": time.process_time() - began,
            "wall": time.perf_counter() - wall,
            "tokens": sum(len(r.response_tokens) for r in rollouts),
            "finished": sum(r.finished for r in rollouts),
            "padding": m["padding_share"],
            **{key: m[f"seconds_{key}"] for key in ("rollout", "check", "update")},
            "reward": m["reward"],
        }


# ---------------------------------------------------------------------------------------------
# TRL's side


def timed(generate, now: dict, lengths: list[int] | None, stop: int):
    """transformers' generate, its seconds written to `now`; row b ends after lengths[b] tokens,
    where they are given."""
    import transformers

    wanted = lengths and torch.tensor(lengths)

    class Reached(transformers.StoppingCriteria):
        """Ends row b after wanted[b] tokens."""

        def __call__(self, ids, scores, **_):
            return ids.shape[1] - now["prompt"] >= wanted

    def generated(*args, **kwargs):
        began = time.process_time()
        if lengths:
            now["prompt"] = kwargs["input_ids"].shape[1]
            kwargs["stopping_criteria"] = transformers.StoppingCriteriaList([Reached()])
        result = generate(*args, **kwargs)
        if lengths:  # by a stop token there, and nowhere before it
            own = result[:, now["prompt"] :]  # (B, longest)
            own[own == stop] = 300
            own.scatter_(1, wanted[:, None] - 1, stop)
        now.update(rollout=time.process_time() - began)
        return result

    return generated


def trl_steps(folder: str, case: str, o: Options, batches: list[list], after_each) -> list[dict]:
    """A step of GRPOTrainer on each batch of problems, `after_each(number)` called in between."""
    # GRPOTrainer prints advice, and asks the hub about nothing that is not here
    warnings.filterwarnings("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    problems, tokens = SIZES[case]
    rows, now = [], {}

    def reward(completions: list, completion_ids: list, answer: list, **_) -> list[float]:
        values = rewards([], completions, answer)
        now.update(tokens=sum(map(len, completion_ids)), reward=sum(values) / len(values))
        return values

    class Stopwatch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            now.update(began=time.process_time(), wall=time.perf_counter())

        def on_step_end(self, args, state, control, **_):
            now.update(seconds=time.process_time() - now["began"],
                       wall=time.perf_counter() - now["wall"])  # fmt: skip
            rows.append({k: now[k] for k in ("seconds", "wall", "rollout", "tokens", "reward")})
            after_each(state.global_step)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, lengths = Tokenizer.from_folder(folder), lengths_of(case, o)
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    model.generate = timed(model.generate, now, lengths, peer.eos_token_id)
    data = [{"prompt": ours.prompt_text(p.problem), "answer": p.answer} for b in batches for p in b]
    with tempfile.TemporaryDirectory() as output:
        config = GRPOConfig(
            output_dir=output, max_steps=len(batches), learning_rate=LR, weight_decay=0.01,
            lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=1.0,
            per_device_train_batch_size=problems * o.group_size, num_generations=o.group_size,
            gradient_accumulation_steps=1, max_completion_length=tokens, temperature=1.0, beta=0.0,
            shuffle_dataset=False, gradient_checkpointing=False, bf16=False, use_cpu=True,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, reward, config, datasets.Dataset.from_list(data),
            processing_class=peer, callbacks=[Stopwatch()],
        )  # fmt: skip
        trainer.train()
    return rows


# ---------------------------------------------------------------------------------------------


def run(case: str, folder: str, o: Options, peer: bool) -> dict:
    """Alternating steps of TRL, our GRPO and our LaSeR; prints and returns their medians."""
    problems = SIZES[case][0]
    batches = [problems_of(case, seed) for seed in range(o.steps + 1)]
    sides = {"GRPO": Ours(folder, case, o, False), "LaSeR": Ours(folder, case, o, True)}
    steps: dict[str, list] = {name: [] for name in sides}

    def ours(number: int) -> None:
        # the two of ours change places: neither always finds the other's caches
        for name in list(sides)[:: 1 if number % 2 else -1]:
            steps[name].append(sides[name].step(batches[number - 1], number))

    if peer:
        steps = {"TRL": trl_steps(folder, case, o, batches, ours), **steps}
    else:
        for number in range(1, len(batches) + 1):
            ours(number)
    result = {}
    print(f"\n{case}: {problems} problems x {o.group_size}, at most {SIZES[case][1]} new tokens")
    titles = ("s/step", "wall", "rollout", "update", "tokens", "us/token", "reward")
    heads = zip(titles, (8, 8, 9, 8, 8, 10, 8))
    print(f"{'':<8}" + "".join(f"{head:>{width}}" for head, width in heads))
    for name, rows in steps.items():
        median = {k: statistics.median(r[k] for r in rows[1:]) for k in rows[0]}
        median["per_token"] = statistics.median(r["seconds"] / r["tokens"] for r in rows[1:])
        median.setdefault("update", median["seconds"] - median["rollout"])
        result[name] = median
        print(f"{name:<8}{median['seconds']:8.3f}{median['wall']:8.3f}{median['rollout']:9.3f}"
              f"{median['update']:8.3f}"
              f"{median['tokens']:8.0f}{1e6 * median['per_token']:10.0f}{median['reward']:8.2f}")
    return result | conclude(case, result)


def conclude(case: str, result: dict) -> dict:
    """The two ratios that the goals speak of."""
    plain, laser, found = result["GRPO"], result["LaSeR"], {}
    if "TRL" in result:
        # per token: where lengths come as they come, the two sides' differ by chance
        found["speedup"] = result["TRL"]["per_token"] / plain["per_token"]
        met = "met" if found["speedup"] >= GOALS[case] else "MISSED"
        print(f"{found['speedup']:.2f} times TRL's tokens a second; goal {GOALS[case]:g}: {met}")
    # Our GRPO samples with our sampler, which always reads z_c: one more token for each row that
    # ends.  That belongs to LaSeR's bill, by its share of all tokens that were fed.
    readout = plain["rollout"] * plain["finished"] / (plain["tokens"] + plain["finished"])
    extra = laser["update"] + laser["check"] - plain["update"] - plain["check"]
    found["laser_share"] = (extra + readout) / (plain["seconds"] - readout)
    share, goal = found["laser_share"], GOALS["laser_share"]
    print(f"LaSeR beyond GRPO: {share:.1%} of a step (update {extra:+.3f} s, reading z_c "
          f"{readout:+.3f} s); goal {goal:.0%}: {'met' if share <= goal else 'MISSED'}")
    return found


def main() -> int:
    """The cases, then the JSON line."""
    o, _ = parse_args(Options)
    torch.set_num_threads(1)
    train.time = types.SimpleNamespace(perf_counter=time.process_time)  # its phases in CPU time
    try:
        import trl

        version = trl.__version__
    except ImportError:
        version = None
        print("TRL is not installed (pip install trl==1.16.0): ours only")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder))
        for case in SIZES if o.case == "all" else [o.case]:
            where = str(ROOT / "nanolaser" / "tiny") if case == "embedded" else folder
            results[case] = run(case, where, o, version is not None)
    print(json.dumps({"benchmark": "grpo_step", "goals": GOALS, "trl": version, **results}))
    return 0


if __name__ == "__main__":
    main_guard(main)
