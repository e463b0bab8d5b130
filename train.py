"""
Train a language model to solve problems AND to know when it is right: LaSeR on top of GRPO.

    python train.py                                   # the embedded model, minutes on a CPU
    python train.py --algorithm grpo                  # the baseline: no self-reward
    python train.py --model qwen2.5-7b --data deepmath
    torchrun --nproc-per-node 8 train.py ...          # the same run on 8 GPUs

Each step, from top to bottom in `train_step` below:

    1. sample     group_size solutions y of each problem x; after each end, log pi(z_c | x, y)
    2. check      r_v in {0, 1}: does the rule-based checker accept the boxed answer?
    3. reward     r_s = beta_v (log pi(z_c) - c_ref): what the model itself thinks of y
    4. compare    advantages within each group: A = (1 - tau) A_v + tau A_s
    5. update     one AdamW step on  policy loss + alpha * class-weighted mean (r_s - r_v)^2

Three phases: plain GRPO first (reasoning), then the loss on r_s (self-reward), then r_s in the
advantage as well (integrated).  alpha = tau = 0, or --algorithm grpo, is plain GRPO throughout.

Where this departs from the released code, to follow the paper (PAPER = arXiv 2510.14943):
*  the mixed advantage reads z_c of its own row, by position; a truncated row counts as r_s = 0
*  log pi(z_c) is taken at temperature 1, whatever the sampling temperature
*  sums are divided by the counts of the whole batch, so micro-batches change nothing
*  the loss on r_s is divided by N_c + N_i, the solutions that have an end
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from nanolaser import grpo, laser, metrics, plots
from nanolaser.checker import is_equivalent, parses
from nanolaser.checkpoint import find_checkpoint, load_pretrained, load_state, save_pretrained
from nanolaser.cli import apply_preset, main_guard, option, parse_args
from nanolaser.scale.distributed import ALONE, World, join, local
from nanolaser.scale.plan import plan_for, settle
from nanolaser.model import CausalLM
from nanolaser.problems import ARITHMETIC, Problem, arithmetic_problems, train_and_test
from nanolaser.files import RunFolder, finite, is_terminal, peak_memory_bytes
from nanolaser.sampler import check_prompts
from nanolaser.tokenizer import Tokenizer


# One helper a heading of --help; each option below is one line: default, meaning, limits.
what, sampling, self_rewarding, updating, output = (
    functools.partial(option, group=group)
    for group in ("what", "sampling", "self-reward", "update", "output")
)
by_model = functools.partial(dict, default=None, by_model=True)  # the default is in PRESETS


# fmt: off
@dataclass
class Options:
    """Train with LaSeR or GRPO; defaults that depend on the model are in PRESETS."""

    model: str = what("tiny", "tiny (embedded), an alias, a hub id or a folder")
    data: str | None = what(help="arithmetic, an alias, or a .jsonl file", **by_model())
    eval_data: str | None = what(None, "problems to evaluate on, named likewise: never trained on",
        shown="the test split of --data, else a part of it; math500 for deepmath")
    algorithm: str = what("laser", "grpo: alpha = tau = 0, the baseline", choices=("laser", "grpo"))
    out: str | None = what(None, "the run's folder (runs/MODEL-ALGORITHM if not given)")
    resume: str | None = what(None, "go on with the run in this folder", metavar="DIR")
    plan: bool = what(False, "print what memory and time this run needs, and exit")
    seed: int = what(0, "of problems and sampling")
    device: str = what("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    # auto: bfloat16 on a GPU, unless the model is stored in float32, as the embedded one is
    dtype: str = what("auto", "of the forward pass", choices=("auto", "float32", "bfloat16"))

    steps: int | None = sampling(help="batches to sample and learn from", min=1, **by_model())
    problems_per_step: int | None = sampling(help="P", min=1, **by_model())
    # one solution has nothing to be compared with: its group's advantage would be 0 / 0
    group_size: int = sampling(8, "G, solutions per problem", min=2)
    max_new_tokens: int | None = sampling(help="longest solution", min=1, **by_model())
    max_prompt_tokens: int = sampling(2048, "longer problems are left out", min=1)
    # no top-p here: the policy gradient is that of the distribution that was sampled from
    temperature: float = sampling(1.0, "of the policy; z_c is read at 1", above=0)
    max_rows: int = sampling(256, "solutions sampled at the same time", min=1)
    kv_cache_gb: float | None = sampling(
        None, "GB the KV cache may take", above=0, shown="what the plan leaves")

    alpha: float | None = self_rewarding(help="weight of the loss on r_s", min=0, **by_model())
    beta_v: float = self_rewarding(0.1, "scale of r_s", above=0)
    tau: float = self_rewarding(0.1, "share of r_s in the advantage", min=0, max=1)
    # normalising a group whose r_s hardly differs would make a signal out of noise
    min_std: float = self_rewarding(0.1, "groups whose r_s varies less keep tau = 0", min=0)
    c_ref: float | str = self_rewarding("auto", "nats; auto: measured first", words=("auto",))
    z_c: str | None = self_rewarding(None, "readout token (else by model)", metavar="TOKEN")
    reasoning_warmup: int | None = self_rewarding(help="steps of plain GRPO", min=0, **by_model())
    self_reward_warmup: int | None = self_rewarding(
        help="steps of learning r_s before it enters the advantage", min=0, **by_model())
    self_reward_loss: str = self_rewarding("mse", "on r_s", choices=("mse", "bce", "sft"))

    lr: float | None = updating(help="peak learning rate of AdamW", above=0, **by_model())
    lr_warmup: int | None = updating(help="steps of rising learning rate", min=0, **by_model())
    lr_final: float | None = updating(help="last learning rate / peak", min=0, max=1, **by_model())
    weight_decay: float = updating(0.01, "of AdamW", min=0)
    grad_clip: float = updating(1.0, "largest gradient norm", above=0)
    # one update a batch, as in the paper: the policy that learns is the one that sampled
    updates_per_batch: int = updating(1, "optimizer steps on each batch", min=1)
    micro_batch_tokens: int | None = updating(help="tokens a forward pass", min=1, **by_model())
    # a third more arithmetic; activations then no longer grow with the number of layers
    gradient_checkpointing: bool = updating(False, "recompute activations in the backward pass")
    # 12 bytes a weight that a GPU need not hold; the arithmetic is the same
    offload_optimizer: bool = updating(False, "AdamW's state in host memory, stepped there")

    eval_every: int | None = output(help="steps between evaluations", min=1, **by_model())
    eval_problems: int = output(400, "held-out problems (in between, a quarter of them)", min=1)
    eval_n: int | None = output(help="solutions per held-out problem", min=1, **by_model())
    save_every: int | None = output(help="steps between checkpoints", min=1, **by_model())

    def sampling(self) -> dict:
        """How this run samples, in training and in evaluation alike."""
        names = ("max_new_tokens", "temperature", "max_rows", "kv_cache_gb")
        return {name: getattr(self, name) for name in names}


# The embedded model learns in minutes; the paper's settings are those of its Qwen2.5-7B script.
PRESETS = {
    "tiny": dict(
        data="arithmetic", steps=360, problems_per_step=16, max_new_tokens=96,
        lr=4e-4, lr_warmup=5, lr_final=0.1, alpha=0.5, reasoning_warmup=40,
        self_reward_warmup=60, micro_batch_tokens=2048, eval_every=120, eval_n=8, save_every=120,
    ),
    "paper": dict(
        data="deepmath", steps=800, problems_per_step=128, max_new_tokens=8192,
        lr=1e-6, lr_warmup=0, lr_final=1.0, alpha=0.1, reasoning_warmup=200,
        self_reward_warmup=200, micro_batch_tokens=16384, eval_every=20, eval_n=2, save_every=50,
    ),
}
# fmt: on

MAX_SKIPPED = 5  # non-finite updates in a row after which the run stops
C_REF_PAIRS = 300  # solutions that c_ref is the mean over, as in the paper
FEW_ENDED = 30  # solutions below which c_ref is said to be uncertain


# ---------------------------------------------------------------------------------------------
# one step: the algorithm


def train_step(model, tokenizer, optimizer, problems, o: Options, step: int, world: World = ALONE):
    """Sample, check, reward, compare, update; returns (metrics of the step, rollout rows)."""
    start = time.perf_counter()
    phase = laser.phase(step, o.reasoning_warmup, o.self_reward_warmup)

    # 1. Sample.  The seed depends on the step alone: a resumed run draws what it would have drawn.
    how = {"seed": o.seed * 1_000_003 + step, **o.sampling()}
    mine = grpo.sample(model, tokenizer, problems, o.group_size, world, **how)
    rollouts = grpo.of_all_ranks(mine, world)
    sampled = time.perf_counter()

    # 2. and 3.  r_v from the checker, r_s from the model's own readout.
    rows = grpo.check(mine, problems, tokenizer, strict=True)
    rows = world.gather(rows, by="prompt_id")
    checked = time.perf_counter()

    # 4. Compare within each group.  r_s has a say only once it has learned to speak.
    tau = o.tau if phase == "integrated" else 0.0
    batch = grpo.make_batch(rollouts, rows, o.group_size, tau, o.min_std)

    # 5. Update.
    loss = grpo.Loss(
        alpha=o.alpha if phase != "reasoning" else 0.0,
        beta_v=o.beta_v,
        c_ref=tokenizer.c_ref,
        z_c_id=tokenizer.z_c_id,
        temperature=o.temperature,
        kind=o.self_reward_loss,
    )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, o)
    sums, grad_norm, skipped = grpo.update(
        model, optimizer, batch, loss, o.micro_batch_tokens, o.grad_clip, o.updates_per_batch
    )
    done = time.perf_counter()

    seconds = {
        "seconds_rollout": sampled - start,
        "seconds_check": checked - sampled,
        "seconds_update": done - checked,
        "tokens_per_second": batch.tokens / (sampled - start),
    }
    stats = grpo.statistics(rows, o.group_size)
    losses = {
        "loss": sums.policy_loss + loss.alpha * sums.self_reward_loss,
        "policy_loss": sums.policy_loss,
        "self_reward_loss": sums.self_reward_loss,
        "clip_fraction": sums.clip_fraction,
        "approx_kl": sums.approx_kl,
        "entropy": sums.entropy,
        "grad_norm": grad_norm,
        "sampler_gap": sums.sampler_gap,
        "padding_share": 1 - sums.real_tokens / sums.padded_tokens,
        "skipped_updates": skipped,
        "lr": learning_rate(step, o),
    }
    # NaN becomes None: it is no JSON, and the log of a run that goes wrong is the one that is read
    return finite({"step": step, "phase": phase, **stats, **losses, **seconds}), rows


def learning_rate(step: int, o: Options) -> float:
    """Linear up over lr_warmup steps, then linear down to lr * lr_final at the last step."""
    warm = min(1.0, step / o.lr_warmup) if o.lr_warmup else 1.0
    return o.lr * warm * (1 - (1 - o.lr_final) * step / o.steps)


# ---------------------------------------------------------------------------------------------
# what surrounds it: problems, evaluation, checkpoints


def find_c_ref(model, tokenizer, problems, o: Options, world: World = ALONE) -> None:
    """Estimate c_ref on the untouched model, and say how steady it is."""
    # 300 solutions: as long as a step or two, so somebody who watches should see it move
    with tqdm(desc="c_ref", unit="solution", leave=False, disable=not is_terminal()) as bar:
        how = {"seed": o.seed, "on_finish": lambda _: bar.update(), **o.sampling()}
        mean, std, count, others = grpo.estimate_c_ref(
            model, tokenizer, problems, C_REF_PAIRS, world, **how
        )
    tokenizer.c_ref, tokenizer.c_ref_std = mean, std
    print(f"c_ref = {mean:.2f} nats, spread {std:.2f} ({tokenizer.z_c}; {count} solutions ended)")
    # Cut off in a trial with short solutions, most of the 300 say nothing.
    if count < FEW_ENDED:
        print(
            f"warning: that is few; c_ref may well be off by {2 * std / count**0.5:.1f} nats "
            f"(--max-new-tokens {o.max_new_tokens} cut off the others)"
        )
    # r_s = 1 stands for log pi(z_c) = c_ref + 1 / beta_v, and that is below 0.
    room = -1 / o.beta_v
    if mean > room:
        least = math.ceil(-100 / mean) / 100
        print(f"warning: r_s cannot reach 1 from there; --beta-v has to be at least {least}")
    # The spread is noise in r_s before anything is learned: beta_v * std of a scale of 0 to 1.
    if std > 0.2 / o.beta_v:
        better = [f"{t} ({m:.1f} +- {s:.2f})" for t, m, s in others if s < std and m < room]
        print(
            f"warning: that is a wide spread for --beta-v {o.beta_v}; "
            f"steadier tokens for --z-c: {', '.join(better[:3]) or 'none'}"
        )


def doubts(o: Options, positions: int) -> list[str]:
    """What is odd about a run's options, yet no reason to refuse them; `positions` is how long the
    texts were that the model was trained on, in tokens."""
    said = []
    if o.max_new_tokens > positions:
        said.append(
            f"--max-new-tokens {o.max_new_tokens} is more than the {positions} tokens of text that "
            f"{o.model} was trained on: beyond them it writes nonsense"
        )
    # The paper's warm-ups are for 800 steps: in a short trial nothing else might ever happen.
    if o.alpha and o.steps <= o.reasoning_warmup:
        said.append(
            f"r_s is never trained: --reasoning-warmup {o.reasoning_warmup} leaves none of "
            f"{o.steps} steps for it"
        )
    return said


class ProblemStream:
    """The problems of each step, as a function of (seed, step): nothing to save, or to get
    wrong on resume.  `problems` are shuffled anew each epoch; without any, arithmetic is made up
    on the spot."""

    def __init__(self, o: Options, tokenizer, problems: list[Problem], positions: int):
        self.o = o
        most = min(o.max_prompt_tokens, positions)
        length = lambda p: len(tokenizer.encode_prompt(p.problem))  # noqa: E731
        self.problems = [p for p in problems if length(p) <= most]
        if problems and not self.problems:
            raise ValueError(f"{o.data}: no problem has at most {most} tokens")
        if len(self.problems) < len(problems):
            left_out = len(problems) - len(self.problems)
            print(f"{left_out} of {len(problems)} problems have over {most} tokens: left out")

    def at(self, step: int) -> list[Problem]:
        """The problems of one step, counted from 1 (step 0: those that estimate c_ref, where there
        are so many a new one for each solution)."""
        P, total = self.o.problems_per_step, len(self.problems)
        if not total:
            operations = ARITHMETIC[self.o.data]
            return arithmetic_problems(P, self.o.seed * 1_000_003 + step, operations=operations)
        picked = []
        these = range((step - 1) * P, step * P) if step else range(min(C_REF_PAIRS, total))
        for i in these:
            epoch, place = divmod(i, total)
            order = torch.randperm(
                total, generator=torch.Generator().manual_seed(self.o.seed + epoch)
            )
            picked.append(self.problems[order[place]])
        return picked


def evaluate(model, tokenizer, problems, o: Options, label: str, world: World = ALONE) -> dict:
    """Accuracy, self-verification and votes on held-out problems, as in results.json."""
    total = len(world.shard(problems)) * o.eval_n
    with tqdm(total=total, desc=label, leave=False, disable=not is_terminal()) as bar:
        how = {"seed": o.seed, "on_finish": lambda _: bar.update(), **o.sampling()}
        mine = grpo.sample(model, tokenizer, problems, o.eval_n, world, **how)
    rows = world.gather(grpo.check(mine, problems, tokenizer), by="prompt_id")
    return metrics.summarise(rows, is_equivalent)


def describe(step: int, e: dict) -> str:
    """One evaluation on one line, in per cent."""
    v, k = e["verification"], str(e["n"])
    show = lambda x: "  -  " if x is None else f"{100 * x:5.1f}"  # noqa: E731
    return (
        f"eval {step:5d}  accuracy {show(e['accuracy'])} +-{100 * (e['accuracy_stderr'] or 0):.1f}"
        f"  F1 {show(v['f1'])}  AUROC {show(v['auroc'])} (within {show(v['auroc_within'])})  "
        f"vote@{k} {show(e['majority_vote'][k])}  weighted {show(e['weighted_vote'][k])}"
    )


def line(m: dict, total: int) -> str:
    """One step on one aligned line."""
    show = lambda x, form="5.2f": "    -" if x is None else f"{x:{form}}"  # noqa: E731
    seconds = m["seconds_rollout"] + m["seconds_check"] + m["seconds_update"]
    return (
        f"{m['step']:5d}/{total} {m['phase']:<11} reward {m['reward']:.2f}  "
        f"r_s right {show(m['r_s_correct'])} wrong {show(m['r_s_wrong'])}  "
        f"F1 {show(m['verification_f1'])}  "
        f"loss {show(m['policy_loss'], '+.3f')} {show(m['self_reward_loss'], '.3f')}  "
        f"grad {show(m['grad_norm'])}  "
        f"tokens {m['response_tokens']:5.1f}  {seconds:.2f} s"
    )


def save(run: RunFolder, model, tokenizer, optimizer, step: int, world: World = ALONE) -> None:
    """Write the checkpoint of a step, whole, and only then point `latest` at it."""
    sound = all(local(p).isfinite().all().item() for p in model.parameters())
    if not all(world.gather([sound])):
        # weights that hold NaN never recover: what --resume goes on from must be from before
        tqdm.write(f"warning: weights are not finite after step {step}: no checkpoint of it")
        return
    folder = run.checkpoint(step)
    state = (optimizer.state(), {"step": step})
    save_pretrained(model, tokenizer, folder, state, world=world)
    run.point_latest(step)


class Stop:
    """SIGTERM and Ctrl-C: a step in progress is finished and ends in a checkpoint; while there is
    none, before the first and after the last, nothing can be lost and the end is at once."""

    def __init__(self, world: World = ALONE):
        self.world = world
        self.signal, self.in_step, self.how_to_resume = 0, False, ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.heard)

    def heard(self, number, _frame):
        """The first one is a request; the second one means it."""
        # Of many ranks nobody may leave a step, where the others wait for it.  And a second one
        # says nothing new there: torchrun passes on what a terminal has sent to all already.  (It
        # also sends one when a rank has died; the next exchange with that one then says so.)
        alone = self.world.size == 1
        if not self.in_step or (self.signal and alone):
            if self.world.may_speak():  # not print: it may be a print that was interrupted
                os.write(2, f"\nstopped{self.how_to_resume}\n".encode())
            raise SystemExit(128 + number)
        if alone:
            said = "stopping after this step, with a checkpoint; once more stops now, without"
            os.write(2, f"\n{said}\n".encode())
        self.signal = number

    def agreed(self) -> int:
        """The signal that any rank has heard, 0 if none: all ranks stop after the same step."""
        return max(self.world.gather([int(self.signal)]))


# ---------------------------------------------------------------------------------------------
# the run


def start(o: Options, given) -> tuple[RunFolder | None, Options, Path | None]:
    """Find out what is to be done: (the run's folder if it is to be resumed, its options, the
    checkpoint to go on from)."""
    if o.resume is None:
        tiny = o.model == "tiny"
        o = apply_preset(o, given, PRESETS["tiny" if tiny else "paper"])
        if o.eval_data is None:  # the paper trains on DeepMath and evaluates on MATH-500
            same = o.data.lower() != "deepmath"
            o = dataclasses.replace(o, eval_data=o.data if same else "math500")
        if o.algorithm == "grpo":
            o = dataclasses.replace(o, alpha=0.0, tau=0.0)
        # What cannot fit is refused before gigabytes are downloaded.
        return None, o if o.plan else settle(o), None
    run, saved = RunFolder.reopen(o.resume)
    # A resumed run is the same run: its own options hold, and a contradiction is refused.
    differ = [
        f"--{name.replace('_', '-')} {getattr(o, name)} differs from the run's {saved.get(name)}"
        for name in sorted(given - {"resume", "device", "plan"})
        if getattr(o, name) != saved.get(name)
    ]
    if differ:
        raise ValueError(f"{'; '.join(differ)}; leave it out to resume, or start a new run")
    try:
        saved = Options(**saved)
    except TypeError as error:
        raise ValueError(f"{run.path}/config.json is another version's: {error}") from None
    return run, dataclasses.replace(saved, device=o.device), run.latest()


@dataclass
class Training:
    """Everything that a run consists of, as one of its processes sees it."""

    o: Options
    world: World
    run: RunFolder
    model: CausalLM
    tokenizer: Tokenizer
    optimizer: grpo.Optimizer
    stream: ProblemStream
    test: list[Problem]
    stop: Stop
    began: float  # of time.perf_counter(), less what a resumed run had cost before


def main() -> int:
    """Parse the options, then train: as a process of its own, or as one of torchrun's, which go
    through all this alike."""
    with join() as world:
        with world.first():  # what is wrong with the options is said once
            o, given = parse_args(Options, description=__doc__.split("\n\n")[0])
        run = checkpoint = None
        if world.is_first:
            run, o, checkpoint = start(o, given)
        # The first rank's word holds for all: what fits into memory, which checkpoint is newest.
        told = world.broadcast([dataclasses.asdict(o), str(checkpoint) if checkpoint else None])
        o, checkpoint = Options(**told[0]), told[1] and Path(told[1])
        if o.plan:
            print(plan_for(o).table())
            return 0
        t = prepare(run, o, checkpoint, world)
        first = take_up(t, checkpoint) if checkpoint else begin(t)
        return learn(t, first) or finish(t)


def prepare(run: RunFolder | None, o: Options, checkpoint: Path | None, world: World) -> Training:
    """The model, its tokenizer, the data: everything that can be wrong fails in here, before a
    folder is made for a new run."""
    stop = Stop(world)
    with world.first():  # a machine downloads once
        folder = checkpoint or find_checkpoint(o.model)
        train, test = train_and_test(o.data, o.eval_data, o.eval_problems, parses)
    model, tokenizer = load_pretrained(
        folder, device=world.device(o.device), dtype=o.dtype, z_c=o.z_c, world=world
    )
    model.gradient_checkpointing = o.gradient_checkpointing
    stream = ProblemStream(o, tokenizer, train, model.config.max_position_embeddings)
    if world.is_first:  # it warns
        check_prompts(model, tokenizer, [p.problem for p in test])
    optimizer = grpo.Optimizer(model, o.lr, o.weight_decay, o.offload_optimizer, world)
    if run is None and world.is_first:
        name = f"{o.model.rstrip('/').split('/')[-1]}-{o.algorithm}"
        run = RunFolder.create(o.out, name, dataclasses.asdict(o))
    path = world.broadcast(str(run.path) if run else None)
    run = run or RunFolder.of_first_rank(path)
    stop.how_to_resume = f"; go on with: python train.py --resume {run.path}"

    parameters = sum(p.numel() for p in model.parameters())
    ranks = f" over {world.size} ranks" if world.size > 1 else ""
    print(
        f"{o.model}: {parameters:,} parameters on {model.device} in {model.dtype}{ranks}; "
        f"run {run.path}"
    )
    count = f"{len(stream.problems):,}" if stream.problems else "new"
    others = "others of it" if o.eval_data == o.data else f"of {o.eval_data}"
    print(f"learns from {count} problems of {o.data}, evaluated on {len(test)} {others}")
    for doubt in doubts(o, model.config.max_position_embeddings):
        print(f"warning: {doubt}")
    began = time.perf_counter()
    return Training(o, world, run, model, tokenizer, optimizer, stream, test, stop, began)


def begin(t: Training) -> int:
    """c_ref and the first evaluation: what the untouched model says.  Returns the first step."""
    o, tokenizer = t.o, t.tokenizer
    tokenizer.beta_v = o.beta_v
    print(
        f"before the first step: {len(t.test)} problems x {o.eval_n} solutions to evaluate on"
        f"{f', after {C_REF_PAIRS} for c_ref' if o.c_ref == 'auto' else ''}"
    )
    if o.c_ref == "auto":
        find_c_ref(t.model, tokenizer, t.stream.at(0), o, t.world)
    else:
        tokenizer.c_ref, tokenizer.c_ref_std = float(o.c_ref), None
    before = {"step": 0, **evaluate(t.model, tokenizer, t.test, o, "before", t.world)}
    t.run.cut_back(-1)
    t.run.append("evals.jsonl", [before])
    print(describe(0, before))
    return 1


def take_up(t: Training, checkpoint: Path) -> int:
    """Make the run what it was when the checkpoint was written.  Returns the next step."""
    tensors, meta = load_state(checkpoint / "state", t.world)
    t.optimizer.load_state(tensors)
    t.run.cut_back(meta["step"])
    for m in t.run.read("metrics.jsonl"):  # the summary speaks of the whole run
        t.began -= m["seconds_rollout"] + m["seconds_check"] + m["seconds_update"]
    print(f"resuming after step {meta['step']}")
    return 1 + meta["step"]


def learn(t: Training, first: int) -> int:
    """The loop over steps.  Returns 0 after the last one, else the exit code."""
    o, run, stop = t.o, t.run, t.stop
    watch, skipped_in_a_row = grpo.Watch(), 0
    stop.in_step = True
    bar = tqdm(total=o.steps, initial=first - 1, disable=not is_terminal(), unit="step")
    for step in range(first, o.steps + 1):
        m, rows = train_step(t.model, t.tokenizer, t.optimizer, t.stream.at(step), o, step, t.world)
        run.append("metrics.jsonl", [m])
        run.append("samples.jsonl", [{"step": step, **row} for row in rows[: o.group_size]])
        bar.set_postfix(reward=f"{m['reward']:.2f}", tok_s=f"{m['tokens_per_second']:.0f}")
        bar.update()
        tqdm.write(line(m, o.steps))
        for warning in watch.look(m, o.problems_per_step):
            tqdm.write(f"warning: {warning}")

        skipped_in_a_row = skipped_in_a_row + 1 if m["skipped_updates"] else 0
        if skipped_in_a_row == MAX_SKIPPED:
            run.append("samples.jsonl", [{"step": step, **row} for row in rows[o.group_size :]])
            bar.close()
            if t.world.is_first:  # every rank comes to this point
                print(
                    f"error: {MAX_SKIPPED} updates in a row had non-finite gradients; the last "
                    f"rollouts are in {run.path}/samples.jsonl; try a new run with a lower --lr",
                    file=sys.stderr,
                )
            return 1
        if step % o.eval_every == 0 and step < o.steps:
            some = t.test[: len(t.test) // 4 or 1]
            e = {"step": step, **evaluate(t.model, t.tokenizer, some, o, "eval", t.world)}
            run.append("evals.jsonl", [e])
            tqdm.write(describe(step, e))
        stopping = stop.agreed()  # asked once: it may come between the next two lines
        if step % o.save_every == 0 or step == o.steps or stopping:
            save(run, t.model, t.tokenizer, t.optimizer, step, t.world)
        if stopping:
            bar.close()
            print(f"stopped after step {step}{stop.how_to_resume}")
            return 128 + stopping
    stop.in_step = False
    bar.close()
    return 0


def finish(t: Training) -> int:
    """The last evaluation, the summary of the whole run, the picture.  Returns exit code 0."""
    o, run = t.o, t.run
    after = {"step": o.steps, **evaluate(t.model, t.tokenizer, t.test, o, "after", t.world)}
    if not any(e["step"] == o.steps for e in run.read("evals.jsonl")):  # a kill after this line
        run.append("evals.jsonl", [after])
    before = next((e for e in run.read("evals.jsonl") if e["step"] == 0), None)
    if before is not None:  # only a log that somebody removed does not have it
        print(describe(0, before))
    print(describe(o.steps, after))
    mean_tokens = [m["response_tokens"] for m in run.read("metrics.jsonl")]
    run.write_json(
        "summary.json",
        {
            "before": before,
            "after": after,
            "seconds": time.perf_counter() - t.began,
            "tokens": sum(round(x * o.problems_per_step * o.group_size) for x in mean_tokens),
            "c_ref": t.tokenizer.c_ref,
            "c_ref_std": t.tokenizer.c_ref_std,
            "peak_memory_bytes": peak_memory_bytes(t.model.device),
        },
    )
    if t.world.is_first and plots.available():
        plots.curves(run.path / "curves.png", run.read("metrics.jsonl"), run.read("evals.jsonl"))
    minutes = (time.perf_counter() - t.began) / 60
    print(f"{minutes:.1f} minutes; everything is in {run.path}.  Now try:")
    print(f'  python sample.py --model {run.path} --vote "(14+25)*2-9=?"')
    return 0


if __name__ == "__main__":
    main_guard(main)
