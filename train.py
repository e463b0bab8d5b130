"""
Train a language model to solve problems AND to know when it is right: LaSeR on top of GRPO.

    python train.py                                   # the embedded model, minutes on a CPU
    python train.py --algorithm grpo                  # the baseline: no self-reward
    python train.py --model qwen2.5-7b --data deepmath
    python train.py --model MODEL --data FILE --trial # the same run in miniature: does it all work?
    torchrun --nproc-per-node 8 train.py ...          # the same run on 8 GPUs

Each step, from top to bottom in `train_step` below:

    1. sample     group_size solutions y of each problem x; after each end, log pi(z_c | x, y)
    2. check      r_v in {0, 1}: does the rule-based checker accept the boxed answer?
    3. reward     r_s = beta_v (log pi(z_c) - c_ref): what the model itself thinks of y
    4. compare    advantages within each group: A = (1 - tau) A_v + tau A_s
    5. update     one AdamW step on  policy loss + alpha * class-weighted mean (r_s - r_v)^2

Three phases: plain GRPO (reasoning), then the loss on r_s as well (self-reward), then r_s in the
advantage too (integrated).  alpha = tau = 0, or --algorithm grpo, is plain GRPO throughout.

Where this departs from the released code, to follow the paper (PAPER = arXiv 2510.14943):
*  the mixed advantage reads z_c of its own row, by position; a truncated row counts as r_s = 0
*  log pi(z_c) is taken at temperature 1, whatever the sampling temperature
*  sums are divided by the counts of the whole batch, so micro-batches change nothing
*  the loss on r_s is divided by N_c + N_i, the solutions that have an end

A reader of the method may stop after `train_step`.  What surrounds the loop (c_ref, evaluations,
checkpoints, resuming) is in nanolaser/run.py.
"""

from __future__ import annotations

import functools
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from nanolaser import grpo, laser, log, scoring
from nanolaser.cli import is_terminal, main_guard, option, parse_args, warn
from nanolaser.reward import judge, load_reward
from nanolaser.rollout import Rollout
from nanolaser.run import Run, begin, choose, evaluate, finish, new_options, prepare, save, take_up
from nanolaser.scale.distributed import join
from nanolaser.scale.plan import plan_for

# ---------------------------------------------------------------------------------------------
# options: each is one line of --help

# The first value is the embedded model's default, `paper` that of every other model: the settings
# of the paper's Qwen2.5-7B script (two epochs of DeepMath-103K).
what, sampling, self_rewarding, updating, output = (
    functools.partial(option, group=group)
    for group in ("what", "sampling", "self-reward", "update", "output")
)


# fmt: off
@dataclass
class Options:
    """Train with LaSeR or GRPO."""

    # A model and problems in, a folder of results out.
    model: str = what("tiny", "tiny or tiny-subset-sum (embedded), an alias, a hub id or a folder")
    data: str = what("arithmetic", "arithmetic, subset-sum, an alias, or a .jsonl file",
        paper="deepmath")
    eval_data: str | None = what(None, "problems to evaluate on, named likewise: never trained on",
        shown="the test split of --data, else a part of it; math500 for deepmath")
    algorithm: str = what("laser", "grpo: alpha = tau = 0, the baseline", choices=("laser", "grpo"))
    out: str | None = what(None, "the run's folder (runs/MODEL-ALGORITHM if not given)")
    resume: str | None = what(None, "go on with the run in this folder", metavar="DIR")
    plan: bool = what(False, "print what memory and time this run needs, and exit")
    template: str | None = what(None, "chat template: a .jinja file, or r1, which asks for <think> "
        "and <answer> tags", shown="the model's own")
    thinking: bool | None = what(None, "think before answering, where the template knows that",
        shown="as the template has it")
    reward: str | None = what(None, "r_v by a function of your own, in evaluations too: see "
        "docs/own-reward.md", metavar="FILE.py:FUNCTION", shown="the checker")
    trial: bool = what(False, "this run in miniature: three steps, one of each phase")
    seed: int = what(0, "of problems and sampling", min=0)
    device: str = what("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    # auto: bfloat16 on a GPU, unless the model is stored in float32, as the embedded one is
    dtype: str = what("auto", "of the forward pass", choices=("auto", "float32", "bfloat16"))

    # A step's batch: P problems x G solutions each, all from the model as it is now.
    steps: int = sampling(360, "batches to sample and learn from", min=1, paper=1600)
    problems_per_step: int = sampling(16, "P", min=1, paper=128)
    # one solution has nothing to be compared with: its group's advantage would be 0 / 0
    group_size: int = sampling(8, "G, solutions per problem", min=2)
    max_new_tokens: int = sampling(96, "longest solution", min=1, paper=8192)
    max_prompt_tokens: int = sampling(2048, "longer problems are left out", min=1)
    # no top-p here: the policy gradient is that of the distribution that was sampled from
    temperature: float = sampling(1.0, "of the policy; z_c is read at 1", above=0)
    # DAPO's dynamic sampling; r_s still learns from all: right and wrong are what it tells apart
    refill: int = sampling(0, "times that fresh problems are sampled in place of groups whose "
        "rewards are all equal; only the loss on r_s learns from those then", min=0, max=100)
    max_rows: int = sampling(256, "solutions sampled at the same time", min=1)
    kv_cache_gb: float | None = sampling(None, "GB the KV cache may take", above=0,
        shown="what the plan leaves")

    # LaSeR's own: from log pi(z_c) to r_s, what r_s is trained with, when it gets a say.
    alpha: float = self_rewarding(0.25, "weight of the loss on r_s", min=0, max=1000, paper=0.1)
    beta_v: float = self_rewarding(0.1, "scale of r_s", above=0)
    tau: float = self_rewarding(
        0.1, "share of r_s in the advantage; 1: r_s is the only reward", min=0, max=1)
    # normalising a group whose r_s hardly differs would make a signal out of noise
    min_std: float = self_rewarding(0.1, "groups whose r_s varies less keep tau = 0", min=0, max=1)
    c_ref: float | str = self_rewarding("auto", "nats; auto: the model's own, else measured first; "
        "estimate: measured first; exact: log pi_ref(z_c) of each solution by a frozen second "
        "model (evaluations and checkpoints have the measured mean)",
        words=("auto", "estimate", "exact"))
    c_ref_pairs: int = self_rewarding(300, "solutions that c_ref is the mean over", min=1)
    z_c: str | None = self_rewarding(None, "readout token", metavar="TOKEN", shown="by model")
    # r_s is read off what the model knows, so it has to know something first; and what r_s says
    # is noise until it has been trained
    reasoning_warmup: int = self_rewarding(40, "steps of plain GRPO", min=0, paper=200)
    self_reward_warmup: int = self_rewarding(
        60, "steps of learning r_s before it enters the advantage", min=0, paper=200)
    self_reward_loss: str = self_rewarding("mse", "on r_s", choices=("mse", "bce", "sft"))
    class_weights: bool = self_rewarding(True, "right and wrong weigh the same in that loss")

    # How a batch changes the weights.  A million of them bear 600 times the step of 7 billion.
    lr: float = updating(6e-4, "peak learning rate of AdamW; for adapters 10 times it, embedded 3",
        above=0, paper=1e-6)
    lr_warmup: int = updating(5, "steps of rising learning rate", min=0, paper=0)
    lr_final: float = updating(0.1, "last learning rate / peak", min=0, max=1, paper=1.0)
    weight_decay: float = updating(0.01, "of AdamW", min=0, max=10)
    # The loss on r_s begins with ten times the policy's gradient, and AdamW divides both by one
    # second moment that forgets nothing in so short a run: the policy would crawl (docs/log.md).
    grad_clip: float = updating(0.2, "largest gradient norm", above=0, max=1e9, paper=1.0)
    # What other trainers do differently in the same places; the defaults are the paper's.
    advantage_std: bool = updating(True, "divide advantages by the group's std (off: Dr. GRPO)")
    aggregate: str = updating("token", "the policy loss is a mean over all tokens, a mean over "
        "solutions of theirs, or a sum over tokens / (solutions * --max-new-tokens)",
        choices=("token", "sequence", "constant"))
    truncated: str = updating("keep", "solutions cut off: learned from like others, left out of "
        "the policy loss, or r_v = 0 whatever their box says", choices=("keep", "mask", "zero"))
    # uneven in DAPO, 0.2 and 0.28: what is improbable may rise further
    clip_low: float = updating(0.2, "PPO's clip below 1; idle at one update a batch", min=0, max=1)
    clip_high: float = updating(0.2, "and above it; likewise", min=0, max=100)
    # the weights stay, and a correction of rank R beside each linear layer learns
    lora_rank: int = updating(0, "R of LoRA's adapters; 0: all weights learn", min=0, max=1024)
    lora_alpha: float | None = updating(
        None, "scale of the adapters, times R", above=0, max=1e6, shown="twice the rank")
    lora_targets: str = updating("all", "linear layers adapted", choices=("all", "attention"))
    # one update a batch, as in the paper: the policy that learns is the one that sampled
    updates_per_batch: int = updating(1, "optimizer steps on each batch", min=1)
    micro_batch_tokens: int = updating(2048, "tokens a forward pass", min=1, paper=16384)
    # a third more arithmetic; activations then no longer grow with the number of layers
    gradient_checkpointing: bool = updating(False, "recompute activations in the backward pass")
    # 12 bytes a weight that a GPU need not hold; the arithmetic is the same
    offload_optimizer: bool = updating(False, "AdamW's state in host memory, stepped there")

    # What is measured and kept on the way.
    eval_every: int = output(120, "steps between evaluations", min=1, paper=20)
    eval_problems: int = output(400, "held-out problems (in between, a quarter)", min=1, paper=500)
    eval_n: int = output(8, "solutions per held-out problem", min=1, paper=2)
    log: str | None = output(None, "live curves: metrics.jsonl and evals.jsonl as they are written",
        choices=("tensorboard", "trackio", "wandb"))
    save_every: int = output(120, "steps between checkpoints", min=1, paper=50)

    def sampling(self) -> dict:
        """How this run samples, in training and in evaluation alike."""
        names = ("max_new_tokens", "temperature", "max_rows", "kv_cache_gb")
        return {name: getattr(self, name) for name in names}


# fmt: on

# ---------------------------------------------------------------------------------------------
# one step: the algorithm


def train_step(run: Run, step: int) -> tuple[dict, list[Rollout]]:
    """Sample, check, reward, compare, update; returns (metrics of the step, its rollouts)."""
    o, tokenizer = run.o, run.tokenizer
    # First it learns to solve, then to judge as well, then from its own judgement as well.
    phase = laser.phase(step, o.reasoning_warmup, o.self_reward_warmup)

    # 1. Sample and 2. check: the rollouts of the whole batch, r_v and log pi(z_c) with each.
    rollouts, seconds = sample_and_check(run, step)
    start = time.perf_counter()

    # 3. Reward.  r_s, from log pi(z_c) as the sampler has read it.  The loss in 5. reads it anew,
    #    with a gradient; the largest difference of the two is logged as zc_gap.
    names = ("r_v", "logp_zc", "finished")
    r_v, logp_zc, finished = (grpo.stack(rollouts, name, o.group_size) for name in names)  # (P, G)
    # c_ref stands for what the untouched model would say after each of them: nearly the same
    # everywhere, so one number will do.  (--c-ref exact asks that model itself.)
    c_ref = torch.full_like(logp_zc, tokenizer.c_ref)  # (P, G)
    if run.reference is not None:
        c_ref = grpo.stack(rollouts, "logp_ref", o.group_size)
    # A truncated solution has no end, where nothing could be read: nan in tensors, None in the log.
    r_s = laser.self_reward(logp_zc, c_ref, tokenizer.beta_v, o.self_reward_loss)

    # 4. Compare within each group.  r_s has a say only once it has learned to speak: until then A
    #    is that of GRPO.  7 right of 8: 0.35 for each of these, -2.47 for the wrong one.
    r_v, tau = r_v.float(), o.tau if phase == "integrated" else 0.0
    advantages = laser.mixed_advantages(r_v, r_s.float(), finished, tau, o.min_std, o.advantage_std)
    weights = laser.class_weights(r_v, finished, o.class_weights)  # (P, G)
    for r, score, advantage in zip(rollouts, r_s.flatten().tolist(), advantages.flatten().tolist()):
        r.r_s, r.advantage = score if r.finished else None, advantage

    #    Which solutions the policy learns from, and what a token of each weighs: by default all,
    #    and the same, so that these weights are 1.
    counted = finished if o.truncated == "mask" else torch.ones_like(finished)
    if o.refill:
        counted = counted & laser.informative(r_v)[:, None]
    lengths = torch.tensor([len(r.response_tokens) for r in rollouts]).view_as(finished)
    advantages = advantages * laser.token_weights(lengths, counted, o.aggregate, o.max_new_tokens)

    # 5. Update: policy loss + alpha * weighted (r_s - r_v)^2, over the whole batch, once.  In the
    #    first phase alpha is 0: log pi(z_c) is read and logged, and nothing pulls at it.
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, o)
    loss = grpo.Loss(
        alpha=o.alpha if phase != "reasoning" else 0.0, beta_v=tokenizer.beta_v,
        c_ref=c_ref.flatten(), z_c_id=tokenizer.z_c_id, kind=o.self_reward_loss,
        z_wrong_id=tokenizer.unused_special_ids()[0] if o.self_reward_loss == "sft" else 0,
        temperature=o.temperature, clip_low=o.clip_low, clip_high=o.clip_high,
    )  # fmt: skip
    learned = grpo.update(
        run.model, run.optimizer, rollouts, advantages, weights, loss, o.micro_batch_tokens,
        o.grad_clip, o.updates_per_batch,
    )  # fmt: skip
    seconds["seconds_update"] = time.perf_counter() - start

    # What a line of metrics.jsonl says.
    m = {"step": step, "phase": phase, **log.statistics(rollouts, o.group_size), **learned}
    if o.refill:
        m["refilled_groups"] = len(r_v) - o.problems_per_step
    m |= seconds | {"tokens_per_second": lengths.sum().item() / seconds["seconds_rollout"]}
    return m | {"lr": learning_rate(step, o)}, rollouts


def sample_and_check(run: Run, step: int) -> tuple[list[Rollout], dict[str, float]]:
    """The first two parts of a step: (rollouts of all ranks with their r_v, seconds of each)."""
    o, tokenizer, world, start = run.o, run.tokenizer, run.world, time.perf_counter()
    gate = "tags" if tokenizer.asks_for_tags else "box"
    rollouts, fresh, checking = [], 0, 0.0
    for _ in range(1 + o.refill):
        # 1. Sample.  G solutions of P problems, later of the `fresh` ones from `first` on; every
        #    rank samples its share.  The seed depends on the step alone: a resumed run draws alike.
        problems, first = run.stream.at(step, fresh), len(rollouts) // o.group_size
        how = {"seed": o.seed * 1_000_003 + step, **o.sampling()}
        mine = grpo.sample(run.model, tokenizer, problems, o.group_size, world, first, **how)
        if run.reference is not None:  # the ablation: what the model said of them before training
            scoring.reference(run.reference, tokenizer.z_c_id, mine, world)

        # 2. Check.  r_v = 1 where the boxed answer equals the gold answer.  Then the ranks exchange
        #    rollouts: from here on each has the whole batch.
        sampled = time.perf_counter()
        judge(mine, problems, tokenizer, gate, load_reward(o.reward))
        for r in mine:
            if o.truncated == "zero" and not r.finished:
                r.r_v = 0.0
        rollouts += grpo.of_all_ranks(mine, world)
        checking += time.perf_counter() - sampled

        # With --refill, a fresh problem for each group whose rewards are all equal, until P groups
        # have something to compare.  16 groups, 5 of them equal: 5 more; 1 of these equal: 1 more.
        r_v = grpo.stack(rollouts, "r_v", o.group_size)
        fresh = int((~laser.informative(r_v)).sum())
        if len(r_v) == o.problems_per_step + fresh:
            break
    sampling = time.perf_counter() - start - checking
    return rollouts, {"seconds_rollout": sampling, "seconds_check": checking}


def learning_rate(step: int, o: Options) -> float:
    """Linear up over lr_warmup steps, then linear down to lr * lr_final at the last step."""
    # The embedded run: a fifth of lr in step 1, all of it from step 5 on, 55 % half-way, a tenth
    # at the end.  The paper's is constant.
    warm = min(1.0, step / o.lr_warmup) if o.lr_warmup else 1.0
    return o.lr * warm * (1 - (1 - o.lr_final) * step / o.steps)


# ---------------------------------------------------------------------------------------------
# the loop


def main() -> int:
    """Parse the options, then train: a process of its own, or each of torchrun's alike."""
    with join() as world:
        with world.first():  # what is wrong with the options is said once
            o, given = parse_args(Options, description=__doc__.split("\n\n")[0])
            o = o if o.resume else new_options(o, given)
        o, folder, checkpoint = choose(o, given, world)
        if o.plan:
            print(plan_for(o).table())
            return 0
        # All that can be wrong fails in prepare.  Then the untouched model is measured, c_ref and
        # held-out problems; or a checkpoint says how far the run had come.
        run = prepare(o, folder, checkpoint, world)
        first = take_up(run, checkpoint) if checkpoint else begin(run)
        return loop(run, first) or finish(run)


def loop(run: Run, first: int) -> int:
    """Step after step.  Returns 0 after the last one, else the exit code."""
    o, folder, stop = run.o, run.folder, run.stop
    watch, phase = log.Watch(), None
    stop.in_step = True  # from here on a Ctrl-C waits for the end of its step, and a checkpoint
    bar = tqdm(total=o.steps, initial=first - 1, disable=not is_terminal(), unit="step")
    for step in range(first, o.steps + 1):
        m, rollouts = train_step(run, step)

        # What happened: a line of numbers, one group of solutions, a line for whoever watches.
        folder.append("metrics.jsonl", [m])
        rows = [{"step": step, **r.row()} for r in rollouts]
        folder.append("samples.jsonl", rows[: o.group_size])
        bar.set_postfix(reward=f"{m['reward']:.2f}", tok_s=f"{m['tokens_per_second']:.0f}")
        bar.update()
        new, phase = m["phase"] != phase, m["phase"]
        if new:
            tqdm.write(log.phase_lines(phase, step, o))
        # Every tenth step is enough for the eye, unless steps are slow; metrics.jsonl has them all.
        if new or step % 10 == 0 or step == o.steps or m["seconds_rollout"] > 5:
            tqdm.write(log.step_line(m))
        for text in watch.look(m, o.problems_per_step):
            warn(text)

        if watch.broken(m):
            folder.append("samples.jsonl", rows[o.group_size :])
            bar.close()
            if run.world.is_first:
                print(f"error: {watch.skipped} updates in a row had non-finite gradients; the last "
                      f"rollouts are in {folder.path}/samples.jsonl; try a new run with a lower "
                      "--lr", file=sys.stderr)  # fmt: skip
            return 1
        # Held-out problems, a quarter of them: a trend.  `finish` takes them all.
        if step % o.eval_every == 0 and step < o.steps:
            e = {"step": step, **evaluate(run, run.test[: len(run.test) // 4 or 1], "eval")[0]}
            folder.append("evals.jsonl", [e])
            tqdm.write(log.eval_line(step, e))
        stopping = stop.agreed()  # asked once: it may come between the next two lines
        if step % o.save_every == 0 or step == o.steps or stopping:
            save(run, step)
        if stopping:
            bar.close()
            print(f"stopped after step {step}{stop.how_to_resume}")
            return 128 + stopping
    stop.in_step = False
    bar.close()
    return 0


if __name__ == "__main__":
    main_guard(main)
