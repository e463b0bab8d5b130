"""
A training run around its loop: what happens before the first step, at a checkpoint, after the last.

    new_options a new run's options: those typed, the model's presets, the defaults
    choose      which run: a new one, or one to be resumed; alike on all ranks
    prepare     model, tokenizer, data, optimizer; a new run's folder last, when nothing can fail
    begin       c_ref and the first evaluation        take_up   or: what a checkpoint says
    save        a checkpoint                          finish    last evaluation, summary, picture

The loop itself, and the step it repeats, are in train.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import grpo, log, metrics, report, scoring
from .checker import is_equivalent, parses
from .checkpoint import EMBEDDED, find_checkpoint, load_pretrained, load_state, save_pretrained
from .cli import Progress, apply_preset, check_options, paper_defaults, warn
from .files import RunFolder, peak_memory_bytes
from .judge import check_prompts
from .lora import Lora, fingerprint
from .model import CausalLM
from .problems import Problem, ProblemStream, train_and_test
from .reward import judged_rows, load_reward
from .scale.distributed import World, local
from .scale.optimizer import Optimizer
from .scale.plan import settle
from .tokenizer import Tokenizer


class Stop:
    """SIGTERM and Ctrl-C: a step in progress is finished and ends in a checkpoint; while there is
    none, before the first and after the last, nothing can be lost and the end is at once."""

    def __init__(self, world: World):
        self.world = world
        # Python calls `heard` between any two lines of the step: it only leaves a note, which the
        # loop reads where everything is whole.
        self.signal, self.in_step, self.how_to_resume = 0, False, ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.heard)

    def heard(self, number, _frame):
        """The first one is a request; the second one means it."""
        # Of many ranks nobody may leave a step, where the others wait for it.  And a second one
        # says nothing new there: torchrun passes on what a terminal has sent to all already.  (It
        # also sends one when a rank has died; the next exchange with that one then says so.)
        alone = self.world.size == 1
        # os.write, not print: it may be a print that was interrupted.
        if not self.in_step or (self.signal and alone):
            if self.world.may_speak():
                os.write(2, f"\nstopped{self.how_to_resume}\n".encode())
            raise SystemExit(128 + number)
        if alone:
            os.write(2, b"\nstopping after this step, with a checkpoint; once more stops now, "
                        b"without\n")  # fmt: skip
        self.signal = number

    def agreed(self) -> int:
        """The signal that any rank has heard, 0 if none: all ranks stop after the same step."""
        # A signal may reach one rank before its step ends and the next one after: without this
        # exchange one would save while the others wait for it in the next step.
        return max(self.world.gather([int(self.signal)]))


@dataclass
class Run:
    """Everything that a run consists of, as one of its processes sees it."""

    o: Any  # train.py's Options
    model: CausalLM
    tokenizer: Tokenizer
    optimizer: Optimizer
    stream: ProblemStream  # the problems of each step
    test: list[Problem]  # those to evaluate on
    folder: RunFolder
    stop: Stop  # has somebody pressed Ctrl-C?
    world: World  # the processes of this run; ALONE is usual
    began: float  # of time.perf_counter(), less what a resumed run had cost before
    reference: CausalLM | None = None  # the model before training, with --c-ref exact
    end_live: Callable[[], None] = lambda: None  # curves elsewhere, see log.mirror


# ---------------------------------------------------------------------------------------------
# which run

# fmt: off
# Where the paper's scripts differ from that of Qwen2.5-7B.  Open-Reasoner-Zero has been through RL
# already, so it needs no reasoning warm-up; it was trained to answer within <answer> tags.
PRESETS = {
    "orz-7b": dict(reasoning_warmup=0, template="r1"),
    "octothinker-3b": dict(z_c="<|reserved_special_token_0|>"),
    # the second embedded model: measured in docs/easy-to-check.md
    "tiny-subset-sum": dict(data="subset-sum", steps=600, alpha=0.5, lr=4e-4, grad_clip=1.0),
}
# A complete run that takes minutes on any model: as little as possible of everything.
TRIAL = dict(
    steps=3, problems_per_step=2, group_size=4, max_new_tokens=128, reasoning_warmup=1,
    self_reward_warmup=1, lr_warmup=0, c_ref_pairs=8, eval_problems=4, eval_n=2, eval_every=2,
    save_every=3, max_rows=16,
)
# fmt: on


def new_options(o, given):
    """A new run's options: the user's word first, then the model's preset, then the defaults."""
    if o.model != "tiny":
        paper = {} if o.model in EMBEDDED else paper_defaults(type(o))
        o = apply_preset(o, given, paper | PRESETS.get(o.model.lower(), {}))
    if o.eval_data is None:  # the paper trains on DeepMath and evaluates on MATH-500
        same = o.data.lower() != "deepmath"
        o = dataclasses.replace(o, eval_data=o.data if same else "math500")
    if o.algorithm == "grpo":  # without these two LaSeR is nothing else
        o = dataclasses.replace(o, alpha=0.0, tau=0.0)
    if o.lora_rank and "lr" not in given:
        # B begins at zero and has far to go.  For large models others found ten times the rate of
        # full training; at that the embedded run falls apart after 60 steps, at three it does not.
        o = dataclasses.replace(o, lr=(3 if o.model in EMBEDDED else 10) * o.lr)
    if not o.lora_rank and given & {"lora_alpha", "lora_targets"}:
        raise ValueError("--lora-alpha and --lora-targets are of adapters: name their --lora-rank")
    if o.alpha == 0 and o.tau:
        # An untrained readout is noise, and noise must not enter the advantage.
        if "tau" in given:
            raise ValueError(f"--tau {o.tau:g} with --alpha 0: r_s is never trained; leave one out")
        print("--alpha 0: r_s is not trained, so it gets no share in the advantage (--tau 0)")
        o = dataclasses.replace(o, tau=0.0)
    if o.c_ref == "exact" and o.self_reward_loss != "mse":
        raise ValueError(f"--c-ref exact with --self-reward-loss {o.self_reward_loss}: its score "
                         "is pi(z_c) itself, and there is no c_ref in it")  # fmt: skip
    if o.trial:  # never more of anything than was asked for
        smaller = {k: min(v, getattr(o, k)) for k, v in TRIAL.items()}
        smaller["out"] = o.out or f"runs/{short_name(o)}-trial"
        o = dataclasses.replace(o, **smaller)
    return o


def choose(o, given, world: World) -> tuple[Any, RunFolder | None, Path | None]:
    """(the run's options, its folder if it is to be resumed, the checkpoint to go on from), from
    the options of the command line, of which `given` were typed; ValueError if they contradict."""
    folder = checkpoint = None
    if world.is_first and o.resume is not None:
        folder, o = reopen(o, given)
        checkpoint = folder.latest()
    elif world.is_first and not o.plan:
        o = settle(o)  # what cannot fit is refused before gigabytes are downloaded
    # The first rank's word holds for all: what fits into memory, which checkpoint is newest.
    told = world.broadcast([dataclasses.asdict(o), str(checkpoint) if checkpoint else None])
    return type(o)(**told[0]), folder, told[1] and Path(told[1])


def reopen(o, given) -> tuple[RunFolder, Any]:
    """The folder of a run to be resumed, and its own options: a resumed run is the same run, so a
    contradiction is refused."""
    folder, saved = RunFolder.reopen(o.resume)
    saved = check_options(type(o), saved, f"{folder.path}/config.json")
    # What was typed and differs.  Where to compute and what to show are no part of the run.
    typed = [(name, getattr(o, name), getattr(saved, name))
             for name in sorted(given - {"resume", "device", "plan", "log"})]  # fmt: skip
    differ = "; ".join(f"--{name.replace('_', '-')} {value} differs from the run's {own}"
                       for name, value, own in typed if value != own)  # fmt: skip
    if differ:
        raise ValueError(f"{differ}; leave it out to resume, or start a new run")
    # Code is executed where the command line names it, not because a folder says so.
    if saved.reward and "reward" not in given:
        raise ValueError(f"this run has a reward of its own: repeat --reward {saved.reward}")
    return folder, dataclasses.replace(saved, device=o.device, plan=o.plan, log=o.log or saved.log)


# ---------------------------------------------------------------------------------------------
# before the first step


def prepare(o, folder: RunFolder | None, checkpoint: Path | None, world: World) -> Run:
    """The model, its tokenizer, the data: everything that can be wrong fails in here, before a
    folder is made for a new run."""
    # 1. What needs no model: options, data, the user's own code.
    if o.log and importlib.util.find_spec(o.log) is None:
        raise ValueError(f"--log {o.log}: it is not installed (pip install {o.log})")
    load_reward(o.reward)
    stop, reference, lora = Stop(world), None, None
    with world.first():  # a machine downloads once
        start = find_checkpoint(o.model) if not checkpoint or o.c_ref == "exact" else None
        source = checkpoint or start
        train, test = train_and_test(o.data, o.eval_data, o.eval_problems, parses)
    # 2. The model: that of --model, or of the checkpoint; with adapters, and with a frozen second
    #    one, if the options say so.
    if o.lora_rank:
        alpha = o.lora_alpha or 2 * o.lora_rank
        lora = Lora(o.lora_rank, alpha, o.lora_targets, 0, o.seed, o.model, checkpoint)
    how = {"device": world.device(o.device), "dtype": o.dtype, "world": world}
    model, tokenizer = load_pretrained(source, z_c=o.z_c, lora=lora, **how)
    model.gradient_checkpointing = o.gradient_checkpointing
    if o.c_ref == "exact":
        reference = load_pretrained(start, **how)[0].requires_grad_(False)
    if o.template and not checkpoint:  # (a checkpoint of ours has it with it)
        tokenizer.use_template(o.template)
    if o.thinking is not None and not checkpoint:
        tokenizer.set_thinking(o.thinking)
    # 3. The problems whose prompts fit, known only with the tokenizer.
    most = min(o.max_prompt_tokens, model.config.max_position_embeddings)
    short = [p for p in train if len(tokenizer.encode_prompt(p.problem)) <= most]
    if train and not short:
        raise ValueError(f"{o.data}: no problem has at most {most} tokens")
    if len(short) < len(train):
        print(f"{len(train) - len(short)} of {len(train)} problems have over {most} tokens: "
              "left out")  # fmt: skip
    stream = ProblemStream(short, o.problems_per_step, o.seed, o.data)
    if world.is_first:  # it warns
        check_prompts(model, tokenizer, [p.problem for p in test])
    # 4. The folder last: what failed above has left nothing behind.  The first rank makes it, and
    #    tells the others where.
    optimizer = Optimizer(model, o.lr, o.weight_decay, o.offload_optimizer, world)
    if folder is None and world.is_first:
        folder = RunFolder.create(o.out, short_name(o), dataclasses.asdict(o))
    path = world.broadcast(str(folder.path) if folder else None)
    folder = folder or RunFolder(path, first=False)
    stop.how_to_resume = f"; go on with: python train.py --resume {folder.path}"
    stop.how_to_resume += f" --reward {o.reward}" if o.reward else ""
    run = Run(o, model, tokenizer, optimizer, stream, test, folder, stop, world,
              time.perf_counter(), reference)  # fmt: skip
    announce(run, len(short))
    return run


def announce(run: Run, count: int) -> None:
    """What the run is, in two lines; it trains on so many given problems, or on made-up ones."""
    o, parameters = run.o, list(run.model.parameters())
    learning = sum(p.numel() for p in parameters if p.requires_grad)
    adapters = f" ({learning:,} of adapters, which learn)" if o.lora_rank else ""
    ranks = f" over {run.world.size} ranks" if run.world.size > 1 else ""
    print(f"{o.model}: {sum(p.numel() for p in parameters):,} parameters{adapters} on "
          f"{run.model.device} in {run.model.dtype}{ranks}; run {run.folder.path}")  # fmt: skip
    others = "others of it" if o.eval_data == o.data else f"of {o.eval_data}"
    problems = f"{count:,}" if count else "new"
    print(f"learns from {problems} problems of {o.data}, evaluated on {len(run.test)} {others}")
    for doubt in log.doubts(o, run.model.config.max_position_embeddings):
        warn(doubt)


def short_name(o) -> str:
    """What a run's folder is called."""
    return f"{o.model.rstrip('/').split('/')[-1]}-{o.algorithm}"


def begin(run: Run) -> int:
    """c_ref and the first evaluation: what the untouched model says.  Returns the first step."""
    # 1. c_ref: measured, the model's own, or given.  "exact" is measured as well: the checkpoint,
    #    and every evaluation of it, has to do without the reference.
    o, tokenizer = run.o, run.tokenizer
    own = tokenizer.c_ref is not None and tokenizer.self_reward_loss == o.self_reward_loss
    measured = o.c_ref in ("estimate", "exact") or (o.c_ref == "auto" and not own)
    c_ref = f"{o.c_ref_pairs} solutions for c_ref, " if measured else ""
    print(f"before the first step: {c_ref}{len(run.test)} problems x {o.eval_n} evaluated")
    if measured:
        find_c_ref(run)
    elif o.c_ref == "auto":
        # A model that LaSeR has trained is no longer the reference: measured on it, c_ref would be
        # that of a readout which speaks already, and every r_s so far would change its meaning.
        print(f"c_ref = {tokenizer.c_ref:.2f} nats, the one that {o.model} was trained with; "
              "--c-ref estimate measures it anew")  # fmt: skip
    else:
        tokenizer.c_ref, tokenizer.c_ref_std = float(o.c_ref), None
    # The tokenizer carries the scale of r_s: saved with it, every checkpoint can be used at once.
    tokenizer.beta_v, tokenizer.self_reward_loss = o.beta_v, o.self_reward_loss
    # 2. What it can do before it learns.
    before = {"step": 0, **evaluate(run, run.test, "before")[0]}
    run.folder.cut_back(-1)  # of a run that was stopped before its first checkpoint
    begin_live(run, 0)
    run.folder.append("evals.jsonl", [before])
    print(log.eval_line(0, before))
    return 1


def find_c_ref(run: Run) -> None:
    """Estimate c_ref on the untouched model, and say how steady it is."""
    o, tokenizer = run.o, run.tokenizer
    # On problems that it will train on: where c_ref is needed is where it should be right.
    problems = run.stream.for_c_ref(o.c_ref_pairs)
    with Progress("c_ref", o.c_ref_pairs, "solution") as progress:
        how = {"seed": o.seed, **progress.hooks(), **o.sampling()}
        try:
            c = scoring.estimate(run.model, tokenizer, problems, o.c_ref_pairs, run.world, **how)
        except scoring.NothingEnded as error:
            if not o.trial:  # which is there to show all parts working, whatever they say
                raise
            warn(f"{error}; this trial goes on with -20")
            c = scoring.CRef(-20.0, None, 0, [])
    tokenizer.c_ref, tokenizer.c_ref_std = c.mean, c.std
    spread = "" if c.std is None else f", spread {c.std:.2f}"
    print(f"c_ref = {c.mean:.2f} nats{spread} ({tokenizer.z_c}; {c.count} solutions ended)")
    for doubt in scoring.doubts(c, o):
        warn(doubt)


def take_up(run: Run, checkpoint: Path) -> int:
    """Make the run what it was when the checkpoint was written.  Returns the next step."""
    tensors, meta = load_state(checkpoint / "state", run.world)
    if frozen(run) != meta.get("base"):
        raise ValueError(f"{run.o.model} is not the model that this run began with: it has changed")
    run.optimizer.load_state(tensors)
    # Steps after the checkpoint are done again: same seeds, same problems, and on a CPU the same
    # numbers to the last bit.
    run.folder.cut_back(meta["step"])
    for m in run.folder.read("metrics.jsonl"):  # the summary speaks of the whole run
        run.began -= m["seconds_rollout"] + m["seconds_check"] + m["seconds_update"]
    begin_live(run, 1 + meta["step"])
    print(f"resuming after step {meta['step']}")
    return 1 + meta["step"]


def begin_live(run: Run, first: int) -> None:
    """Show the curves from step `first` on elsewhere, if --log says so; one rank does."""
    if run.o.log and run.world.is_first:
        try:
            run.end_live = log.mirror(run.o.log, run.folder, dataclasses.asdict(run.o), first)
        except Exception as error:  # not logged in?  Not a reason to lose a run.
            warn(f"no live curves in {run.o.log}: {type(error).__name__}: {error}")


# ---------------------------------------------------------------------------------------------
# in between


def evaluate(run: Run, problems: list[Problem], label: str) -> tuple[dict, list[dict]]:
    """Accuracy, self-verification and votes on held-out problems, as in results.json; and the rows
    of the solutions."""
    o, world = run.o, run.world
    with Progress(label, len(world.shard(problems)) * o.eval_n, "solution") as progress:
        # One seed for every evaluation: what differs between two of them is the model alone.
        how = {"seed": o.seed, **progress.hooks(), **o.sampling()}
        mine = grpo.sample(run.model, run.tokenizer, problems, o.eval_n, world, **how)
    rows = judged_rows(mine, problems, run.tokenizer, reward=load_reward(o.reward))
    rows = world.gather(rows, by="prompt_id")
    return metrics.summarise(rows, is_equivalent), rows


def save(run: Run, step: int) -> None:
    """Write the checkpoint of a step, whole, and only then point `latest` at it."""
    sound = all(local(p).isfinite().all().item() for p in run.model.parameters())
    if not all(run.world.gather([sound])):
        # weights that hold NaN never recover: what --resume goes on from must be from before
        warn(f"weights are not finite after step {step}: no checkpoint of it")
        return
    state = (run.optimizer.state(), {"step": step, "base": frozen(run)})
    place = run.folder.checkpoint(step)
    save_pretrained(run.model, run.tokenizer, place, state, world=run.world)
    # A kill before this line leaves `latest` at the one before, and that one is whole.
    run.folder.point_latest(step)


def frozen(run: Run) -> int | None:
    """Which weights a resumed run has to find where it began: those that adapters or r_s are
    measured against.  None where the checkpoint has all that it needs."""
    model = run.model if run.reference is None else run.reference
    return fingerprint(model, run.world) if run.o.lora_rank or run.reference else None


# ---------------------------------------------------------------------------------------------
# after the last step


def finish(run: Run) -> int:
    """The last evaluation, the summary of the whole run, its page.  Returns exit code 0."""
    # 1. The same problems as before the first step, and what has become of the answers.
    o, folder = run.o, run.folder
    after, rows = evaluate(run, run.test, "after")
    after = {"step": o.steps, **after}
    if not any(e["step"] == o.steps for e in folder.read("evals.jsonl")):  # a kill after this line
        folder.append("evals.jsonl", [after])
    before = next((e for e in folder.read("evals.jsonl") if e["step"] == 0), None)
    header = (f"{len(run.test)} held-out problems", "before", "after", "change")
    print("\n" + report.table(header, report.before_after(before, after)))
    print("\n" + log.vote_lines(rows) + "\n")
    # 2. The summary, from the logs and not from memory: they hold what earlier parts of a resumed
    #    run did as well.
    tokens = 0
    for m in folder.read("metrics.jsonl"):  # a mean over so many solutions
        groups = o.problems_per_step + m.get("refilled_groups", 0)
        tokens += round(m["response_tokens"] * groups * o.group_size)
    folder.write_json("summary.json", {
        "before": before,
        "after": after,
        "seconds": time.perf_counter() - run.began,
        "tokens": tokens,
        "c_ref": run.tokenizer.c_ref,
        "c_ref_std": run.tokenizer.c_ref_std,
        "peak_memory_bytes": peak_memory_bytes(run.model.device),
    })  # fmt: skip
    if run.world.is_first:
        page = report.page({folder.path.name: folder.path})
        report.save(folder.path / "report.html", page)
    run.end_live()
    # 3. What to do now, with a problem of its own kind, about as long as fits on a line.
    minutes = (time.perf_counter() - run.began) / 60
    print(f"{minutes:.1f} minutes; everything is in {folder.path}.  Now open its report.html, and:")
    example = max((p.problem for p in run.test), key=lambda p: (len(p) <= 60, -abs(len(p) - 40)))
    example = shlex.quote(example) if len(example) <= 200 else '"a problem"'
    name = shlex.quote(str(folder.path))
    print(f"  python sample.py --model {name} --vote {example}")
    print(f"  python evaluate.py --model {name}")
    return 0
