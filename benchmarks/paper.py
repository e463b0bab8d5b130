"""
The paper at nano scale: every question that it and its reviewers asked, and that two CPU cores can
answer, asked by one command.

    python benchmarks/paper.py --jobs 2          # everything: hours; stopped, it goes on from there
    python benchmarks/paper.py --begin collect   # what is finished so far -> docs/paper.json
    python benchmarks/paper.py --begin report    # docs/paper.json -> docs/paper.md and pictures
    python benchmarks/paper.py --steps 18 --problems 40 --seeds 2 --runs trial --docs trial

Three stages, each from the files of the one before alone:

    run       every command of `tasks` whose file is not there yet, in order of value
    collect   the numbers of all that is finished, with intervals: small enough for git
    report    text, tables, verdicts and pictures (benchmarks/paper_text.py): seconds

A run is one of VARIANTS with one seed, trained by train.py from its command line and evaluated by
evaluate.py on 400 held-out problems of 2 to 5 operations and on 400 of 5 operations, eight
solutions each at temperature 1.  Two kinds of verifier judge them: r_s, and the model asked in
words, which is what the paper compares with.  GRPO has no r_s, so asking is the only fair way to
hear what it knows; the base model is asked too, and so is LaSeR's.

Intervals hold 95 % of the draws of problems and of seeds, crossed: all seeds are asked the same
problems, so a draw takes the same problems from each of its seeds.  Differences are paired: both
sides see the same draw, and with one seed both met the same problems in the same order.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import paper_text  # noqa: E402
from nanolaser import metrics, report  # noqa: E402
from nanolaser.checker import is_equivalent  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.files import read_json, read_jsonl, run_of, write_atomic  # noqa: E402

SETS = {"held-out": "arithmetic", "hard": "arithmetic-hard"}  # name here -> evaluate.py's
MAIN = {"laser": [], "grpo": ["--algorithm", "grpo"]}
# Each differs from LaSeR's defaults in the options that stand here, and in nothing else.
ABLATIONS = {
    "tau 1": ["--tau", 1],
    "tau 0": ["--tau", 0],
    "bce": ["--self-reward-loss", "bce"],
    "sft": ["--self-reward-loss", "sft"],
    "no class weights": ["--no-class-weights"],
    "no warm-ups": ["--reasoning-warmup", 0, "--self-reward-warmup", 0],
    "exact reference": ["--c-ref", "exact"],
    "tau 0.5": ["--tau", 0.5],
}
# What came after GRPO, as switches of the same run; not the paper's, but everybody's question.
SWITCHES = {
    "no std": ["--no-advantage-std"],
    "sequence mean": ["--aggregate", "sequence"],
    "constant divisor": ["--aggregate", "constant"],
    "refill": ["--refill", 1],
    "truncated masked": ["--truncated", "mask"],
    "clip high": ["--clip-high", 0.28, "--updates-per-batch", 2],
    "LoRA rank 8": ["--lora-rank", 8],
}
VARIANTS = MAIN | ABLATIONS | SWITCHES
FEW = 3  # seeds of an ablation; the two that everything is compared with have more
METRICS = ("accuracy", "f1", "auroc", "auroc_within", "ece", "majority_vote@8",
           "weighted_vote@8", "best_of@8", "pass_at@8")  # fmt: skip
MANY = 32  # solutions a problem for the curve of votes
SOLVED = 50  # problems with known answers on which a user would fit the threshold
CURVE = ("reward", "r_s_correct", "r_s_wrong", "verification_f1", "response_tokens", "entropy",
         "self_reward_loss")  # fmt: skip


@dataclass
class Options:
    """Run, collect, report."""

    runs: str = option("runs/paper", "folder of the runs and of their results")
    docs: str = option("docs", "where paper.json, paper.md and pictures/ are written")
    begin: str = option("run", "the first of the three stages that is done",
                        choices=("run", "collect", "report"))
    seeds: int = option(5, f"of LaSeR and GRPO; of every other variant {FEW} at most", min=1)
    only: tuple[str, ...] = option((), "variants to run", choices=tuple(VARIANTS), shown="all")
    jobs: int = option(1, "processes at a time; with several, each has one thread", min=1)
    steps: int | None = option(None, "of each run, for a trial; its warm-ups shrink along", min=1,
                               shown="train.py's")
    problems: int = option(400, "problems of each set", min=2)
    draws: int = option(300, "draws behind each interval", min=1)


# ---------------------------------------------------------------------------------------------
# 1. the runs


@dataclass
class Task:
    """One command, the file that says it is done, and the files that must be there before."""

    name: str
    makes: Path
    command: Callable[[], list]  # asked when it starts: a run that was interrupted is resumed
    needs: list[Path] = field(default_factory=list)


def tasks(o: Options) -> Iterator[Task]:
    """Everything to be done, the most valuable first.  No list of what was done is kept: a list can
    be wrong, the files are what is needed."""
    few = range(min(FEW, o.seeds))
    order = [(v, s) for s in few for v in MAIN]
    order += [(v, s) for s in few for v in ABLATIONS]  # a first seed of everything, then a second
    order += [(v, s) for s in range(FEW, o.seeds) for v in MAIN]
    order += [(v, s) for s in few for v in SWITCHES]
    for variant, seed in order:
        if not o.only or variant in o.only:
            yield from one_run(variant, seed, o)
        if variant == "grpo":  # what needs LaSeR's run alone is cheap, and done right after it
            yield from readings(seed, o)


def folder(o: Options, variant: str, seed: int) -> Path:
    """runs/paper/tau-0.5-seed2"""
    return Path(o.runs).resolve() / f"{variant.replace(' ', '-')}-seed{seed}"


def one_run(variant: str, seed: int, o: Options) -> Iterator[Task]:
    """Train, evaluate."""
    run = folder(o, variant, seed)
    few = [] if o.steps is None else ["--steps", o.steps, "--reasoning-warmup", o.steps // 9,
                                      "--self-reward-warmup", o.steps // 6]  # fmt: skip

    def train() -> list:
        # A folder without a summary is a run that was interrupted.
        if (run / "config.json").exists():
            return ["train.py", "--resume", run]
        # In between, and at the end, train.py need not evaluate what evaluate.py will.
        return ["train.py", "--seed", seed, "--out", run, "--eval-problems", 100, *few,
                *VARIANTS[variant]]  # fmt: skip

    asked = ["--generative"] if variant in MAIN else []
    asked += ["--log-ratio", "tiny"] if variant == "laser" else []
    yield Task(f"train {run.name}", run / "summary.json", train)
    yield evaluation(run.name, run, run / "results", [run / "summary.json"], asked, seed, o)


def evaluation(name: str, model, to: Path, needs: list[Path], more: list, seed: int, o: Options,
               n: int = 8) -> Task:  # fmt: skip
    """evaluate.py on both sets."""
    command = ["evaluate.py", "--model", model, "--seed", seed, "--data", ",".join(SETS.values()),
               "--max-problems", o.problems, "--max-new-tokens", 96, "--n", n, "--output", to,
               *more]  # fmt: skip
    return Task(f"evaluate {name}", to / "results.json", lambda: command, needs)


def readings(seed: int, o: Options) -> Iterator[Task]:
    """What is asked of one seed's finished LaSeR run: many solutions for the votes, the untouched
    model on the texts of its training, and its neighbour's solutions under its own eyes."""
    run, last = folder(o, "laser", seed), folder(o, "laser", seed - 1)
    done = run / "results" / "results.json"
    if seed == 0:
        base = evaluation("base", "tiny", folder(o, "base", 0) / "results", [done],
                          ["--generative"], seed, o)  # fmt: skip
        # Its r_s, untrained, is measured from where LaSeR's started: a picture shows both.
        asked = base.command
        base.command = lambda: [*asked(), "--c-ref", read_json(run / "summary.json")["c_ref"]]
        yield base
    yield evaluation(f"{run.name} x {MANY}", run, run / "many", [done], [], seed, o, MANY)
    yield reading("tiny", run / "samples.jsonl", run / "reference.jsonl", [done])
    # In a circle of whoever is there: 1 reads 0, 0 reads 1, 2 reads 1, 1 reads 2, ...
    if seed:
        solutions = [x / "results" / "samples.jsonl" for x in (last, run)]
        needs = [done, last / "results" / "results.json"]
        yield reading(run, solutions[0], run / f"reads-{last.name}.jsonl", needs)
        yield reading(last, solutions[1], last / f"reads-{run.name}.jsonl", needs)


def reading(model, solutions: Path, to: Path, needs: list[Path]) -> Task:
    """verify.py: log pi(z_c) of solutions that are there already."""
    command = ["verify.py", "--model", model, "--input", solutions, "--output", to]
    return Task(f"verify {to.parent.name}/{to.stem}", to, lambda: command, needs)


class Clock:
    """How long each kind of command takes on this machine, and how long the rest will."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, list] = read_json(path) if path.exists() else {}

    def took(self, task: Task, seconds: float) -> None:
        """Remember one."""
        self.seconds.setdefault(task.name.split()[0], []).append(round(seconds, 1))
        write_atomic(self.path, json.dumps(self.seconds))

    def left(self, missing: list[Task], running: dict[str, float], jobs: int) -> str:
        """An honest estimate: from what was measured here, or none."""
        total, unknown = 0.0, set()
        for task in missing:
            seen = self.seconds.get(kind := task.name.split()[0])
            if seen:
                # The last few: whatever else the machine has to do, it did lately.
                expected = float(np.mean(seen[-6:]))
                total += max(0.0, expected - running.get(task.name, 0.0))
            else:
                unknown.add(kind)
        blind = f"; not timed yet: {', '.join(sorted(unknown))}" if unknown else ""
        minutes = f"{'at least ' if unknown else ''}{total / jobs / 60:.0f} min"
        return f"{len(missing)} commands left, {minutes}{blind}"


def work(todo: list[Task], o: Options) -> None:
    """Run every task that is missing, `o.jobs` at a time, each one's output in runs/NAME.log.
    ValueError names the log of one that failed."""
    runs = Path(o.runs).resolve()
    runs.mkdir(parents=True, exist_ok=True)
    clock, running = Clock(runs / "times.json"), {}
    # Threads of two processes on two cores wait for each other's: one each is fastest.
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if o.jobs > 1 else {})
    try:
        while missing := [t for t in todo if not t.makes.exists() or t.name in running]:
            ready = [t for t in missing if t.name not in running
                     and all(n.exists() for n in t.needs)]  # fmt: skip
            for task in ready[: o.jobs - len(running)]:
                command, log = task.command(), runs / f"{task.name.replace('/', ' ')}.log"
                elapsed = {name: time.time() - began for name, (*_, began) in running.items()}
                print(f"{time.strftime('%H:%M')} {task.name}; "
                      f"{clock.left(missing, elapsed, o.jobs)}", flush=True)
                with open(log, "a") as file:
                    process = subprocess.Popen(
                        [sys.executable, ROOT / command[0], *map(str, command[1:])],
                        cwd=ROOT, env=environment, stdout=file, stderr=file,
                    )  # fmt: skip
                running[task.name] = process, task, "--resume" in command, time.time()
            if not running:
                raise ValueError(f"{missing[0].name} waits for files that no other command makes: "
                                 f"{missing[0].needs}; is its run left out by --only?")
            time.sleep(0.2)
            for name, (process, task, resumed, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode or not task.makes.exists():
                    raise ValueError(f"{name} failed; the end of {runs}/{name}.log says why")
                if not resumed:  # half a run says nothing about whole ones
                    clock.took(task, time.time() - began)
    finally:
        # Ctrl-C has reached them already, SIGTERM not: either way train.py ends in a checkpoint.
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()


# ---------------------------------------------------------------------------------------------
# 2. the numbers


def rows_of(results: Path, data: str, judge: str = "r_s") -> list[dict]:
    """The solutions of one data set with r_s, or with the judgement in words in its place."""
    key = lambda row: (row["prompt_id"], row["sample"])  # noqa: E731
    mine = lambda name: [  # noqa: E731
        row for _, row in read_jsonl(results / name) if row["dataset"] == data]
    rows = mine("samples.jsonl")
    if judge == "r_s":
        return rows
    said = {key(row): row["score"] for row in mine("judgements.jsonl")}
    # Not asked (cut off) or no clear yes or no: no score, which counts as judged wrong.
    return [row | {"r_s": said.get(key(row)), "r_s_if_ended": None} for row in rows]


class Seeds:
    """One method on one set of problems, over its seeds: metric -> statistic (problems, seeds)."""

    def __init__(self, rows: list[list[dict]], n: int | None = None):
        self.rows = rows
        self.runs = [metrics.statistics(r, is_equivalent, n) for r in rows]
        texts = [list(dict.fromkeys(row["problem"] for row in r)) for r in rows]
        assert all(t == texts[0] for t in texts), "seeds were evaluated on different problems"
        self.problems = texts[0]

    def mean(self, metric: str) -> Callable:
        """The mean over the seeds drawn, of the problems drawn; None if a seed has no number."""
        def statistic(problems: np.ndarray, seeds: np.ndarray) -> float | None:
            values = {s: self.runs[s][metric](problems) for s in set(seeds.tolist())}
            picked = [values[s] for s in seeds]
            return None if None in picked else float(np.mean(picked))
        return statistic

    def interval(self, metric: str, draws: int) -> list:
        """[mean, low, high, each seed's]."""
        all_problems = np.arange(len(self.problems))
        each = [run[metric](all_problems) for run in self.runs]
        x = metrics.bootstrap(self.mean(metric), len(self.problems), len(self.runs), draws)
        return rounded([*x, each])

    def minus(self, metric: str, other: Seeds, its: str, draws: int) -> list:
        """[difference to another method (or metric) on the same problems and seeds, low, high]."""
        assert self.problems == other.problems, "different problems: nothing to pair"
        a, b = self.mean(metric), other.mean(its)
        # As many seeds as both have: seed 3 of one has no partner in a method of three.
        count = min(len(self.runs), len(other.runs))
        return rounded(list(metrics.bootstrap(lambda p, s: metrics.minus(a(p, s), b(p, s)),
                                              len(self.problems), count, draws)))


def rounded(value):
    """Four digits: more is noise, and would make the file ten times as long."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(x) for x in value]
    return round(float(value), 4) if isinstance(value, (float, np.floating)) else value


def collect(o: Options) -> dict:
    """All numbers of what is finished: what docs/paper.json holds."""
    finished = {v: [s for s in range(o.seeds)
                    if (folder(o, v, s) / "results" / "results.json").exists()] for v in VARIANTS}
    finished = {v: seeds for v, seeds in finished.items() if seeds}
    if not {"laser", "grpo"} <= finished.keys():
        raise ValueError(f"{o.runs} holds no finished pair of LaSeR and GRPO: nothing to compare")
    steps = {run_of(folder(o, v, s))["steps"] for v, seeds in finished.items() for s in seeds}
    if len(steps) > 1:  # a table of runs that are not alike would be worth nothing
        raise ValueError(f"the runs in {o.runs} have {sorted(steps)} steps: not to be mixed")
    record: dict = {"steps": steps.pop(), "problems": o.problems, "draws": o.draws,
                    "seeds": finished, "table": {},
                    "minus laser": {}, "minus words": {}, "rank": {}, "threshold": {}}  # fmt: skip
    for where, data in SETS.items():
        found = methods(o, finished, data)
        laser, words = found["laser"], found["grpo in words"]
        for name, method in found.items():
            print(f"{name}, {where}: {len(method.runs)} seeds", flush=True)
            record["table"].setdefault(name, {})[where] = {
                m: method.interval(m, o.draws) for m in METRICS}
            if name in ABLATIONS | SWITCHES or method is words:
                # GRPO has no r_s; its judgement in words is compared below, the other way round.
                same = ("accuracy",) if method is words else METRICS[:5]
                record["minus laser"].setdefault(name.removesuffix(" in words"), {})[where] = {
                    m: method.minus(m, laser, m, o.draws) for m in same}
        record["minus words"][where] = {m: laser.minus(m, words, m, o.draws) for m in METRICS[1:5]}
        record["rank"][where] = rounded(
            list(np.mean([metrics.right_by_rank(r) for r in laser.rows], axis=0)))
        record["threshold"][where] = rounded(refitted(laser.rows))
    return record | {
        "votes": votes(o, finished["laser"]), "curves": curves(o, finished),
        "c_ref": c_ref(o, finished["laser"]), "transfer": transfer(o),
        "length": lengths(o, finished["laser"]),
    }  # fmt: skip


def methods(o: Options, finished: dict, data: str) -> dict[str, Seeds]:
    """Everything that judges solutions of one data set, by the name of its row."""
    found = {}
    for variant, seeds in finished.items():
        results = [folder(o, variant, s) / "results" for s in seeds]
        if variant != "grpo":
            found[variant] = Seeds([rows_of(r, data) for r in results])
        if variant in MAIN:
            found[f"{variant} in words"] = Seeds([rows_of(r, data, "words") for r in results])
    base = folder(o, "base", 0) / "results"
    if (base / "results.json").exists():
        found["base in words"] = Seeds([rows_of(base, data, "words")])
    return found


def refitted(seeds: list[list[dict]], draws: int = 100) -> dict:
    """F1 with the threshold 0.5, and with one fitted on SOLVED problems of the same set; both on
    the others."""
    # The mean over many choices of the fifty: one choice is luck.
    rng, before, after, chosen = np.random.default_rng(0), [], [], []
    for rows in seeds:
        right = np.array([row["r_v"] for row in rows]) > 0.5
        score = np.array([np.nan if row["r_s"] is None else row["r_s"] for row in rows], float)
        problem = np.array([row["prompt_id"] for row in rows])
        for _ in range(draws):
            solved = np.isin(problem, rng.permutation(problem.max() + 1)[:SOLVED])
            # The F1 changes at scores alone; a grid of a hundredth is finer than 400 can tell.
            grid = np.arange(0.05, 1.0, 0.01)
            f1 = [metrics.verification_f1(right[solved], score[solved], t).f1 or 0.0 for t in grid]
            best = grid[np.flatnonzero(np.array(f1) == max(f1))].mean()
            others = right[~solved], score[~solved]
            before.append(metrics.verification_f1(*others, 0.5).f1)
            after.append(metrics.verification_f1(*others, best).f1)
            chosen.append(best)
    if None in before + after:
        return {}
    return {"0.5": np.mean(before), "fitted": np.mean(after),
            "threshold": [np.mean(chosen), np.std(chosen)]}  # fmt: skip


def votes(o: Options, seeds: list[int]) -> dict:
    """Accuracy of the votes of k solutions, mean over seeds, and weighted - majority with its
    interval."""
    there = [folder(o, "laser", s) / "many" for s in seeds]
    there = [x for x in there if (x / "results.json").exists()]
    table: dict = {}
    for where, data in SETS.items() if there else ():
        rows = [rows_of(x, data) for x in there]
        tables = [metrics.vote_tables(r, is_equivalent) for r in rows]
        per_problem = {m: {k: np.stack([t[m][k] for t in tables]) for k in tables[0][m]}
                       for m in metrics.METHODS}  # (seeds, P) each
        entry = {m: {str(k): float(x.mean()) for k, x in ks.items()}
                 for m, ks in per_problem.items()}
        change = {}
        for k, weighted in per_problem["weighted_vote"].items():
            gain = weighted - per_problem["majority_vote"][k]
            change[str(k)] = list(metrics.bootstrap(
                lambda p, s, gain=gain: float(gain[np.ix_(s, p)].mean()), gain.shape[1],
                len(gain), o.draws))
        table[where] = rounded(entry | {"weighted - majority": change, "seeds": len(rows)})
    return table


def curves(o: Options, finished: dict) -> dict:
    """The course of training, mean over seeds of ten steps at a time."""
    table = {}
    for variant in ("laser", "grpo", "tau 0", "tau 0.5", "tau 1", "sft", "bce"):
        logs = [[row for _, row in read_jsonl(folder(o, variant, s) / "metrics.jsonl")]
                for s in finished.get(variant, ())]
        width = max(1, max((len(log) for log in logs), default=0) // 36)
        points = []
        for i in range(0, min((len(log) for log in logs), default=0), width):
            part = [row for log in logs for row in log[i : i + width]]
            values = {k: [row[k] for row in part if row.get(k) is not None] for k in CURVE}
            points.append({"step": part[0]["step"] + width // 2, "phase": part[0]["phase"]} |
                          {k: rounded(float(np.mean(v))) if v else None
                           for k, v in values.items()})  # fmt: skip
        if points:
            table[variant] = points
    return table


def c_ref(o: Options, seeds: list[int]) -> dict:
    """c_ref as each run measured it, and log pi_ref(z_c) of the texts of training as they change:
    a constant is as good as the reference model where neither mean nor spread moves."""
    measured, drift = [], {}
    for seed in seeds:
        summary = read_json(folder(o, "laser", seed) / "summary.json")
        measured.append([summary["c_ref"], summary["c_ref_std"]])
        path = folder(o, "laser", seed) / "reference.jsonl"
        for _, row in read_jsonl(path) if path.exists() else ():
            if row["logp_zc"] is not None and row["finished"]:
                drift.setdefault(row["step"], []).append(row["logp_zc"])
    sixth = max(1, (max(drift, default=0) + 5) // 6)
    table = []
    for first in range(1, max(drift, default=0) + 1, sixth):
        values = np.array([x for s in range(first, first + sixth) for x in drift.get(s, ())])
        if len(values) > 1:
            table.append([first, values.mean(), values.std(ddof=1), len(values)])
    return rounded({"measured": measured, "over training": table})


def transfer(o: Options) -> dict:
    """Who reads whose solutions: "reader of writer" -> quality of its r_s there."""
    table = {}
    for path in sorted(Path(o.runs).resolve().glob("laser-seed*/reads-*.jsonl")):
        reader, writer = path.parent.name, path.stem.removeprefix("reads-")
        own = path.parent.parent / writer / "results" / "samples.jsonl"
        for where, data in SETS.items():
            for name, file in ((f"{reader} of {writer}", path), (f"{writer} of {writer}", own)):
                rows = [row for _, row in read_jsonl(file) if row["dataset"] == data]
                quality = metrics.verification(rows)
                table.setdefault(where, {})[name] = {
                    k: rounded(quality[k]) for k in ("f1", "auroc", "auroc_within")}
    return table


def lengths(o: Options, seeds: list[int]) -> dict:
    """How far r_s, and the sum of log ratios over the whole solution, follow the length."""
    table: dict = {}
    for where, data in SETS.items():
        for seed in seeds:
            entry = read_json(folder(o, "laser", seed) / "results" / "results.json")[data]
            for judge, key in (("r_s", "verification"), ("log ratio", "log_ratio")):
                for m in ("spearman_length", "auroc", "auroc_within"):
                    place = table.setdefault(where, {}).setdefault(judge, {}).setdefault(m, [])
                    place.append(entry.get(key, {}).get(m))
    return rounded(table)


# ---------------------------------------------------------------------------------------------


def main() -> None:
    """The three stages."""
    o, _ = parse_args(Options, description=__doc__.split("\n\n")[0])
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    docs = Path(o.docs)
    if o.begin == "run":
        work(list(tasks(o)), o)
    if o.begin != "report":
        docs.mkdir(parents=True, exist_ok=True)
        write_atomic(docs / "paper.json", paper_text.dumps(collect(o)))
        # This one shows every solution, which is too much for the JSON.
        kinds = {"before": folder(o, "base", 0), "after": folder(o, "laser", 0)}
        if all((x / "results" / "results.json").exists() for x in kinds.values()):
            (docs / "pictures").mkdir(exist_ok=True)
            print(report.save(docs / "pictures" / "r_s.svg", report.histograms({
                name: rows_of(x / "results", "arithmetic") for name, x in kinds.items()})))
    for said in paper_text.write(docs):
        print(said)


if __name__ == "__main__":
    main_guard(main)
