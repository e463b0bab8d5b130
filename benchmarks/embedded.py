"""
The README's table: the embedded run with LaSeR and with plain GRPO, over seeds.

    python benchmarks/embedded.py                      # six runs, about an hour
    python benchmarks/embedded.py --jobs 2             # two at a time, one thread each: two cores
    python benchmarks/embedded.py --runs runs/table    # what is finished there is not repeated
    python benchmarks/embedded.py --steps 18 --problems 40 --runs runs/trial    # in miniature

Two kinds of verifier judge the same solutions: r_s, and the model asked in words, which is what the
paper compares with.  GRPO has no r_s, so asking is the only fair way to hear what it knows; the
base model is asked too, and so is LaSeR's.

Every number comes from files that evaluate.py wrote: 400 held-out problems x 8 solutions at
temperature 1 (the problems on which train.py evaluates), and 400 of the longest alone, hard enough
for votes to differ.  Intervals hold 95 % of a thousand draws of problems and of seeds; where two
methods are compared, both see the same draw.  Prints markdown, then every seed, and last one JSON
line.  Stopped (Ctrl-C, SIGTERM), the same command goes on where it was.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nanolaser import metrics, report  # noqa: E402
from nanolaser.checker import is_equivalent  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.files import read_json, read_jsonl, run_of  # noqa: E402

SETS = {"held-out": "arithmetic", "hard": "arithmetic-hard"}  # name here -> evaluate.py's
# Rows of the tables: which model, and who judges its solutions.
JUDGES = (("base", "words"), ("grpo", "words"), ("laser", "words"), ("laser", "r_s"))
NAMES = {"base": "base", "grpo": "GRPO", "laser": "LaSeR"}
KNOWS = {"F1": "f1", "AUROC": "auroc", "within problem": "auroc_within", "ECE": "ece"}
VOTES = {"random pick": "accuracy", "majority@8": "majority_vote@8",
         "weighted@8": "weighted_vote@8", "best of 8": "best_of@8", "any of 8": "pass_at@8"}


@dataclass
class Options:
    """Train over seeds, evaluate, compare."""

    runs: str = option("runs/table", "folder of the runs and of their results")
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of the runs", min=0)
    jobs: int = option(1, "processes at a time; with several, each has one thread", min=1)
    steps: int | None = option(None, "of each run, for a trial; its warm-ups shrink along", min=1,
                               shown="train.py's")
    problems: int = option(400, "problems of each set", min=2)
    draws: int = option(1000, "draws behind each interval", min=1)


# ---------------------------------------------------------------------------------------------
# the runs


def next_command(name: str, o: Options) -> list | None:
    """What is to be done next for a model (grpo-0, laser-0, base-0), as the files on disk say; None
    when everything is there."""
    # No list of what was done is kept: a list can be wrong, the files are what is needed.
    kind, seed = name.split("-")
    folder = Path(o.runs).resolve() / name
    if kind == "base":
        # Its r_s, untrained, is measured from where LaSeR's started: the picture shows both.
        summary = folder.with_name(f"laser-{seed}") / "summary.json"
        model, more = "tiny", ["--c-ref", read_json(summary)["c_ref"]]
    else:
        if not (folder / "summary.json").exists():
            # A folder without a summary is a run that was interrupted.
            if (folder / "config.json").exists():
                return ["train.py", "--resume", folder]
            few = [] if o.steps is None else [
                "--steps", o.steps, "--reasoning-warmup", o.steps // 9,
                "--self-reward-warmup", o.steps // 6,
            ]  # fmt: skip
            return ["train.py", "--algorithm", kind, "--seed", seed, "--out", folder,
                    "--eval-problems", o.problems, *few]  # fmt: skip
        model, more = folder, []
    if (folder / "results" / "results.json").exists():
        return None
    return ["evaluate.py", "--model", model, "--seed", seed, "--data", ",".join(SETS.values()),
            "--max-problems", o.problems, "--max-new-tokens", 96, "--generative",
            "--output", folder / "results", *more]  # fmt: skip


def work(names: list[str], o: Options) -> None:
    """Run every command that is missing, `o.jobs` at a time; each model's output goes to NAME.log.
    ValueError names the log of one that failed."""
    # Threads of two processes on two cores wait for each other's: one each is fastest.
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if o.jobs > 1 else {})
    waiting, running = list(names), {}
    try:
        while waiting or running:
            for name in waiting[: o.jobs - len(running)]:
                waiting.remove(name)
                command = next_command(name, o)
                if command:
                    log = Path(o.runs) / f"{name}.log"
                    print(f"{name}: {' '.join(map(str, command))}   (> {log})", flush=True)
                    with open(log, "a") as file:
                        process = subprocess.Popen(
                            [sys.executable, ROOT / command[0], *map(str, command[1:])],
                            cwd=ROOT, env=environment, stdout=file, stderr=file,
                        )  # fmt: skip
                    running[name] = process, command
            time.sleep(0.2)
            for name, (process, command) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode or next_command(name, o) == command:
                    raise ValueError(f"{name} failed; the end of {o.runs}/{name}.log says why")
                waiting.insert(0, name)  # its next command first: a model is finished early
    finally:
        # Ctrl-C has reached them already, SIGTERM not: either way train.py ends in a checkpoint.
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


# ---------------------------------------------------------------------------------------------
# the numbers


def rows_of(folder: Path, data: str, judge: str) -> list[dict]:
    """The solutions of one data set with r_s, or with the judgement in words in its place."""
    key = lambda row: (row["prompt_id"], row["sample"])  # noqa: E731
    mine = lambda name: [  # noqa: E731
        row for _, row in read_jsonl(folder / name) if row["dataset"] == data]
    rows = mine("samples.jsonl")
    if judge == "r_s":
        return rows
    said = {key(row): row["score"] for row in mine("judgements.jsonl")}
    # Not asked (cut off) or no clear yes or no: no score, which counts as judged wrong.
    return [row | {"r_s": said.get(key(row)), "r_s_if_ended": None} for row in rows]


class Seeds:
    """One method on one set of problems, over its seeds: metric -> statistic (problems, seeds)."""

    def __init__(self, rows: list[list[dict]], seeds: tuple[int, ...]):
        self.rows, self.seeds = rows, seeds
        self.runs = [metrics.statistics(r, is_equivalent) for r in rows]
        texts = [list(dict.fromkeys(row["problem"] for row in r)) for r in rows]
        assert all(t == texts[0] for t in texts), "seeds were evaluated on different problems"
        self.problems = texts[0]

    def each(self, metric: str) -> list[float | None]:
        """The number of every seed."""
        return [run[metric](np.arange(len(self.problems))) for run in self.runs]

    def mean(self, metric: str) -> Callable:
        """The mean over the seeds drawn, of the problems drawn; None if a seed has no number."""
        # Crossed, not nested: all seeds are asked the same problems, so a draw takes the same
        # problems from each of its seeds.
        def statistic(problems: np.ndarray, seeds: np.ndarray) -> float | None:
            values = {s: self.runs[s][metric](problems) for s in set(seeds.tolist())}
            picked = [values[s] for s in seeds]
            return None if None in picked else float(np.mean(picked))
        return statistic

    def interval(self, metric: str, draws: int) -> metrics.Interval:
        """The mean and its 95 % interval."""
        return metrics.bootstrap(self.mean(metric), len(self.problems), len(self.runs), draws)

    def minus(self, metric: str, other: Seeds, its: str, draws: int) -> metrics.Interval:
        """The difference to another method (or metric) on the same problems and seeds."""
        assert self.problems == other.problems, "different problems: nothing to pair"
        a, b = self.mean(metric), other.mean(its)
        return metrics.bootstrap(lambda p, s: metrics.minus(a(p, s), b(p, s)),
                                 len(self.problems), len(self.runs), draws)


def cell(x: metrics.Interval) -> str:
    """79.8 [77.1, 82.4], in per cent."""
    interval = "" if x.low is None else f" [{100 * x.low:.1f}, {100 * x.high:.1f}]"
    return report.percent(x.value) + interval


def markdown(corner: str, columns: list[str], rows: list[list[str]]) -> str:
    """A table as the README has it."""
    lines = [[corner, *columns], ["---"] * (1 + len(columns)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def differences(found: dict, draws: int) -> dict[str, dict[str, metrics.Interval]]:
    """What the tables are read for: set of problems -> what is compared -> B - A, paired."""
    # Seeds are paired, too: with one seed both methods meet the same problems in the same order.
    table: dict[str, dict] = {}
    for where in SETS:
        laser, words, grpo = (found[where, *who] for who in
                              (("laser", "r_s"), ("laser", "words"), ("grpo", "words")))
        table[where] = {
            "accuracy: LaSeR - GRPO": laser.minus("accuracy", grpo, "accuracy", draws),
            "F1: LaSeR's r_s - GRPO in words": laser.minus("f1", grpo, "f1", draws),
            "AUROC: LaSeR's r_s - GRPO in words": laser.minus("auroc", grpo, "auroc", draws),
            "within problem: the same": laser.minus("auroc_within", grpo, "auroc_within", draws),
            "F1: LaSeR's r_s - LaSeR in words": laser.minus("f1", words, "f1", draws),
            "LaSeR: weighted - majority": laser.minus("weighted_vote@8", laser,
                                                      "majority_vote@8", draws),
            "LaSeR: best of 8 - random pick": laser.minus("best_of@8", laser, "accuracy", draws),
            "weighted: LaSeR - GRPO in words": laser.minus("weighted_vote@8", grpo,
                                                           "weighted_vote@8", draws),
        }
    return table


def show(found: dict, o: Options) -> dict:
    """Print the tables; returns all their numbers."""
    record: dict = {}
    for title, metric in (("Who knows which solutions are right?", KNOWS),
                          ("What are 8 solutions worth?", VOTES)):
        rows = []
        for (where, kind, judge), method in found.items():
            name = f"{NAMES[kind]} {'in words' if judge == 'words' else 'r_s'}, {where}"
            numbers = {k: method.interval(m, o.draws) for k, m in metric.items()}
            rows.append([name, *map(cell, numbers.values())])
            record.setdefault(name, {}).update(
                {k: {"interval": x, "seeds": method.each(metric[k])} for k, x in numbers.items()})
        print(f"\n{title}\n\n" + markdown("", [*metric], rows))
    ranks = {where: np.mean([metrics.right_by_rank(r) for r in found[where, "laser", "r_s"].rows],
                            axis=0).tolist() for where in SETS}
    record["right by rank of r_s"] = ranks
    print("\nRight solutions of LaSeR by the rank of their r_s among the 8 of a problem\n")
    rows = [[where, *map(report.percent, ranks[where])] for where in SETS]
    print(markdown("", [str(i + 1) for i in range(len(ranks["hard"]))], rows))
    changes = record["differences"] = differences(found, o.draws)
    rows = [[name, *(cell(changes[where][name]) for where in SETS)] for name in changes["hard"]]
    print("\nDifferences, paired; one whose interval holds 0 is none\n")
    print(markdown("", [*SETS], rows))
    print("\neach seed:")
    for name, columns in record.items():
        for column, x in columns.items() if "seeds" in str(columns) else ():
            print(f"  {name:28s} {column:15s} " + "  ".join(map(report.percent, x["seeds"])))
    return record


def main() -> None:
    """Six runs, four tables."""
    o, _ = parse_args(Options, description=__doc__.split("\n\n")[0])
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    runs = Path(o.runs)
    runs.mkdir(parents=True, exist_ok=True)
    # 1. Train and evaluate; the base model last, for its r_s needs the c_ref that LaSeR measured.
    trained = [f"{kind}-{seed}" for seed in o.seeds for kind in ("laser", "grpo")]
    work(trained, o)
    work([f"base-{seed}" for seed in o.seeds], o)

    # 2. A table of runs that are not alike would be worth nothing.
    steps = {run_of(runs / name)["steps"] for name in trained}
    if len(steps) > 1 or (o.steps and steps != {o.steps}):
        raise ValueError(f"the runs in {runs} have {sorted(steps)} steps: not to be mixed")
    # 3. Numbers, tables, and the README's picture.
    found = {
        (where, kind, judge): Seeds(
            [rows_of(runs / f"{kind}-{s}" / "results", data, judge) for s in o.seeds], o.seeds)
        for where, data in SETS.items() for kind, judge in JUDGES
    }  # fmt: skip
    print(f"\n{steps.pop()} steps, seeds {', '.join(map(str, o.seeds))}; {o.problems} problems x 8"
          " solutions; per cent, [95 % interval over problems and seeds]")
    record = show(found, o)
    before, after = (rows_of(runs / f"{kind}-{o.seeds[0]}" / "results", "arithmetic", "r_s")
                     for kind in ("base", "laser"))
    print("\n" + report.save(
        runs / "r_s.svg", report.histograms({"before": before, "after": after})))
    costs = [read_json(runs / name / "summary.json") for name in trained]
    record["cost"] = [[c["seconds"], c["peak_memory_bytes"]] for c in costs]
    for name, cost in zip(trained, costs):
        print(f"{name}: {cost['seconds'] / 60:.1f} min, "
              f"{cost['peak_memory_bytes'] / 2**20:.0f} MiB")
    print(json.dumps(record))


if __name__ == "__main__":
    main_guard(main)
