"""
What the one token is good for: a task whose solutions are hard to find and easy to check.

    python benchmarks/easy_to_check.py                   # three runs, half an hour on one core
    python benchmarks/easy_to_check.py --report          # docs/easy-to-check.json -> page, picture
    python benchmarks/easy_to_check.py --steps 9 --problems 20 --runs runs/trial --docs runs/trial

Subset sums (nanolaser/tiny/subset_sum.py): "50 from a7 b10 c14 d16 e17 f18", which make 50?  The
second embedded model is trained with LaSeR over seeds, and solves 400 held-out problems 32 times
each at temperature 1; so does the model that it starts from, which is asked in words as well.

How much sampling is a right answer worth?  Three ways to spend it, on the same solutions:

    majority    k solutions, the most frequent answer
    best        k solutions, the one with the highest r_s
    stopping    one after another until one has r_s > 0.5, at most k: `sample.py --until 0.5`
                (none by then: the one with the highest r_s)

Finished results lie in docs/easy-to-check.json; the page and its picture are made from that file
alone.  Stopped, the same command goes on where it was.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nanolaser import metrics, report, svg  # noqa: E402
from nanolaser.checker import is_equivalent  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.files import read_json, read_jsonl, write_atomic  # noqa: E402

BELIEVED = 0.5  # r_s above it says "right", here as everywhere
EDGES = np.linspace(-0.25, 1.25, 31)  # of the histogram's bars; what lies beyond is in the last
ORDERS = 50  # in which each problem's solutions are gone through
METRICS = {
    "one solution": "accuracy", "majority of 8": "majority_vote@8",
    "weighted of 8": "weighted_vote@8", "best of 8": "best_of@8", "any of 8": "pass_at@8",
    "F1": "f1", "AUROC": "auroc", "within problem": "auroc_within",
}  # fmt: skip


@dataclass
class Options:
    """Train over seeds, evaluate, write the page."""

    runs: str = option("runs/easy", "folder of the runs and of their results")
    docs: str = option("docs", "folder of the page, its numbers and its picture")
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of the runs", min=0)
    steps: int = option(600, "of each run", min=9)
    problems: int = option(400, "held-out problems", min=2)
    draws: int = option(500, "draws behind each interval", min=1)
    report: bool = option(False, "only write the page again, from the numbers")


# ---------------------------------------------------------------------------------------------
# the runs


def run(script: str, *arguments) -> None:
    """A script of this project, as a process of its own; ValueError if it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError(f"{' '.join(command[1:])} failed")


def train_and_evaluate(o: Options) -> None:
    """All runs and evaluations whose files are not there yet."""
    how = ["--data", "subset-sum", "--max-problems", o.problems, "--n", 32, "--max-new-tokens", 96]
    for seed in o.seeds:
        folder = Path(o.runs).resolve() / f"laser-{seed}"
        if not (folder / "summary.json").exists():
            # A folder without a summary is a run that was interrupted.
            new = ["--model", "tiny-subset-sum", "--seed", seed, "--steps", o.steps,
                   "--eval-problems", 100, "--out", folder]  # fmt: skip
            if o.steps < 100:  # a trial: its warm-ups shrink along
                new += ["--reasoning-warmup", o.steps // 9, "--self-reward-warmup", o.steps // 6]
            begun = (folder / "config.json").exists()
            run("train.py", *(["--resume", folder] if begun else new))
        results = folder / "results"
        if not (results / "results.json").exists():
            run("evaluate.py", "--model", folder, "--seed", seed, *how, "--output", results)
    base = Path(o.runs).resolve() / "base"
    if not (base / "results.json").exists():
        c_ref = read_json(Path(o.runs) / f"laser-{o.seeds[0]}" / "summary.json")["c_ref"]
        run("evaluate.py", "--model", "tiny-subset-sum", "--c-ref", c_ref, "--generative", *how,
            "--output", base)


# ---------------------------------------------------------------------------------------------
# the numbers


def read(folder: Path, name: str = "samples.jsonl") -> list[dict]:
    """The rows of one file of an evaluation."""
    return [row for _, row in read_jsonl(folder / name)]


def in_words(folder: Path) -> list[dict]:
    """The solutions with the judgement in words in the place of r_s."""
    key = lambda row: (row["prompt_id"], row["sample"])  # noqa: E731
    said = {key(row): row["score"] for row in read(folder, "judgements.jsonl")}
    return [row | {"r_s": said.get(key(row)), "r_s_if_ended": None} for row in read(folder)]


def last_line(rows: list[dict]) -> list[dict]:
    """The solutions with what anybody can see in the place of r_s: is nothing left?"""
    nothing = lambda row: float("=0\n\\boxed{" in row["response"])  # noqa: E731
    return [row | {"r_s": nothing(row)} for row in rows]


def intervals(seeds: list[list[dict]], draws: int) -> dict[str, list[float]]:
    """Metric -> [mean over the seeds, lowest and highest of 95 % of draws of problems and seeds,
    then every seed's own number]."""
    eight = [[row for row in rows if row["sample"] < 8] for rows in seeds]
    of = [metrics.statistics(rows, is_equivalent) for rows in eight]
    count = len({row["problem"] for row in eight[0]})
    found = {}
    for name, metric in METRICS.items():
        def statistic(problems, seeds, metric=metric) -> float | None:
            values = [of[i][metric](problems) for i in seeds]
            return None if None in values else float(np.mean(values))

        each = [one[metric](np.arange(count)) for one in of]
        found[name] = [*metrics.bootstrap(statistic, count, len(of), draws), *each]
    return found


def spending(rows: list[dict]) -> dict[str, list[list[float]]]:
    """Way of spending -> [tokens a problem, accuracy] for k = 1, 2, 4 .. 32 solutions at most."""
    problems: dict[int, list[dict]] = {}
    for row in rows:
        problems.setdefault(row["prompt_id"], []).append(row)
    votes = metrics.vote_tables(rows, is_equivalent)
    mean = float(np.mean([row["response_tokens"] for row in rows]))
    # One token more for each r_s: z_c is read in a step of its own.
    curves = {
        "majority": [[k * mean, float(x.mean())] for k, x in votes["majority_vote"].items()],
        "best": [[k * (mean + 1), float(x.mean())] for k, x in votes["best_of"].items()],
        "any": [[k * mean, float(x.mean())] for k, x in votes["pass_at"].items()],
        "stopping": [],
    }
    # In which order solutions come is luck, so each problem's are gone through in many orders.
    rng = np.random.default_rng(0)
    right, score, tokens = (
        np.array([[float(row[name] or 0) for row in problem] for problem in problems.values()])
        for name in ("r_v", "r_s", "response_tokens"))  # (P, n) each
    for k in votes["majority_vote"]:
        spent, hits = [], []
        for _ in range(ORDERS):
            order = rng.permuted(np.tile(np.arange(score.shape[1]), (len(score), 1)), axis=1)[:, :k]
            r, s, t = (np.take_along_axis(x, order, 1) for x in (right, score, tokens))  # (P, k)
            believed = s > BELIEVED
            some = believed.any(1)
            first = np.where(some, believed.argmax(1), s.argmax(1))
            drawn = np.where(some, believed.argmax(1) + 1, k)
            spent.append(((t + 1) * (np.arange(k) < drawn[:, None])).sum(1).mean())
            hits.append(np.take_along_axis(r, first[:, None], 1).mean())
        curves["stopping"].append([float(np.mean(spent)), float(np.mean(hits))])
    return curves


def collect(o: Options) -> dict:
    """Everything that the page says, from the files of the runs."""
    runs = Path(o.runs)
    after = [read(runs / f"laser-{seed}" / "results") for seed in o.seeds]
    base = runs / "base"
    each = [spending(rows) for rows in after]
    bins = lambda right: np.histogram(  # noqa: E731
        np.clip([r["r_s"] for rows in after for r in rows if r["r_s"] is not None
                 and bool(r["r_v"]) == right], EDGES[0], EDGES[-1]), EDGES)[0].tolist()
    return {
        "seeds": o.seeds, "steps": o.steps, "problems": o.problems,
        "minutes": [read_json(runs / f"laser-{s}" / "summary.json")["seconds"] / 60
                    for s in o.seeds],
        "table": {"before RL, asked in words": intervals([in_words(base)], o.draws),
                  "before RL, r_s": intervals([read(base)], o.draws),
                  "after RL, r_s": intervals(after, o.draws),
                  "after RL, by the last line": intervals(list(map(last_line, after)), o.draws)},
        "curves": {way: np.mean([c[way] for c in each], axis=0).tolist() for way in each[0]},
        "histogram": {"right": bins(True), "wrong": bins(False)},
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------
# the page


def equal_accuracy(curves: dict) -> tuple[float, float, float]:
    """(accuracy of the majority of 32, its tokens a problem, those that stopping needs for it)."""
    tokens, accuracy = curves["majority"][-1]
    cost, reached = np.array(curves["stopping"]).T
    # Between two measured points accuracy grows with the logarithm of the tokens.
    return accuracy, tokens, float(2 ** np.interp(accuracy, reached, np.log2(cost)))


def page(found: dict) -> str:
    """docs/easy-to-check.md."""
    percent = report.percent
    cell = lambda x: f"{percent(x[0])} [{percent(x[1])}, {percent(x[2])}]"  # noqa: E731
    grid = lambda head, rows: "\n".join(  # noqa: E731
        "| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])
    table = grid(["", *METRICS], [[name, *map(cell, row.values())]
                                  for name, row in found["table"].items()])  # fmt: skip
    each = grid(["seed", *METRICS], [
        [str(seed), *(percent(x[i]) for x in found["table"]["after RL, r_s"].values())]
        for i, seed in enumerate(found["seeds"], start=3)])  # fmt: skip
    ways = {"majority": "majority of k", "best": "best of k by r_s",
            "stopping": "stop at the first believed", "any": "any of k is right"}
    spent = grid(["k", *(f"{w}: tokens, accuracy" for w in ways.values())], [
        [str(2 ** i), *(f"{found['curves'][way][i][0]:.0f}, "
                        f"{percent(found['curves'][way][i][1])}" for way in ways)]
        for i in range(len(found["curves"]["majority"]))])  # fmt: skip
    accuracy, tokens, enough = equal_accuracy(found["curves"])
    minutes = ", ".join(f"{m:.1f}" for m in found["minutes"])
    mean = {name: x[0] for name, x in found["table"]["after RL, r_s"].items()}
    gain, above = (percent(mean["best of 8"] - mean[other])
                   for other in ("one solution", "majority of 8"))
    at_most = found["curves"]["stopping"][-1]
    return PAGE.format(
        table=table, each=each, spent=spent, accuracy=percent(accuracy),
        tokens=f"{tokens:.0f}", enough=f"{enough:.0f}", times=f"{tokens / enough:.0f}",
        gain=gain, above=above, mean=f"{at_most[0]:.0f}", most=percent(at_most[1]),
        minutes=minutes, typical=f"{np.median(found['minutes']):.0f}",
        **{k: found[k] for k in ("steps", "problems")},
        seeds=", ".join(map(str, found["seeds"])))  # fmt: skip


def picture(found: dict) -> str:
    """Where r_s of right and of wrong solutions lies, and what that buys, as SVG."""
    marks = []
    for name, colour, dash in (("wrong", "#888888", svg.DASH), ("right", "#1a1a1a", "")):
        counts = np.array(found["histogram"][name]) / sum(found["histogram"][name])
        # The outline of the bars: each edge twice, at the height on its left and on its right.
        outline = list(zip(np.repeat(EDGES, 2), 100 * np.array([0, *np.repeat(counts, 2), 0])))
        marks.append(svg.mark([outline], colour, fill=colour, fill_opacity=0.2,
                              stroke_dasharray=dash))  # fmt: skip
    left = svg.panel("r_s of its own solutions", "r_s of right and of wrong (dashed) solutions",
                     "share of them, %", marks)  # fmt: skip
    styles = {"any": ("any of k right", "#999999", "1 4"),
              "best": ("best of k by r_s", "#555555", "8 3 2 3"),
              "majority": ("majority of k", "#777777", svg.DASH),
              "stopping": ("first believed", "#000000", "")}  # fmt: skip
    marks = []
    for way, (name, colour, dash) in styles.items():
        points = [(math.log2(tokens), 100 * right) for tokens, right in found["curves"][way]]
        marks.append(svg.mark([points], colour, name, stroke_dasharray=dash))
        marks.append(svg.dots(points, colour, 5))
    ticks = {math.log2(t): str(t) for t in (32, 64, 128, 256, 512, 1024, 2048)}
    last = max(x for m in marks for line in m["lines"] for x, _ in line)
    ticks = {x: t for x, t in ticks.items() if x <= last}
    right = svg.panel("What it is worth: k = 1, 2, 4 .. 32", "tokens per problem",
                      "problems solved, %", marks, x_ticks=ticks)  # fmt: skip
    return svg.picture([left, right])


def main() -> None:
    """Three runs, one page."""
    o, _ = parse_args(Options, description=__doc__.split("\n\n")[0])
    docs = Path(o.docs)
    if not o.report:
        train_and_evaluate(o)
        found = json.loads(json.dumps(collect(o)), parse_float=lambda x: round(float(x), 4))
        write_atomic(docs / "easy-to-check.json", json.dumps(found, indent=None) + "\n")
    found = read_json(docs / "easy-to-check.json")
    write_atomic(docs / "easy-to-check.md", page(found))
    print(page(found))
    (docs / "pictures").mkdir(exist_ok=True)
    print(report.save(docs / "pictures" / "second.svg", picture(found)))


PAGE = """\
# Hard to find, easy to check

In the embedded model's arithmetic, what is left wrong after RL is what the model cannot see, so its
r_s gains little there. The promise of a self-reward is largest where a solution is hard to find and
easy to check. Subset sum is the textbook example, and the second embedded model's task: which of
these numbers make 50?

```
50 from a7 b10 c14 d16 e17 f18        50-f18=32                50-d16=34
                                      32-e17=15                34-b10=24
                                      15-c14=1                 24-e17=7
                                      \\boxed{{f,e,c}}            7-a7=0
                                                               \\boxed{{d,b,e,a}}
```

A solution is one try: numbers are picked, subtracted one after another, and what is left says
whether the try was right. Which numbers to pick the model cannot see; that nothing is left it can.

```
python train.py --model tiny-subset-sum      # about {typical} minutes
python sample.py --model runs/tiny-subset-sum-laser --until 0.5 "34 from a7 b9 c10 d11 e13 f20"
```

`--until 0.5` draws one solution after another and stops at the first that the model believes (on
one thread; other threads round otherwise, and write other solutions):

```
   1  r_s  0.015, says wrong   answer d,f   (25 tokens)
   2  r_s  0.015, says wrong   answer d,f   (25 tokens)
   3  r_s  0.713, says right   answer e,d,c   (37 tokens)
...
believed  e,d,c   3 of 32 solutions drawn, 29 saved
```

![r_s of right and wrong solutions; problems solved against tokens](pictures/second.svg)

*  **The best of eight by r_s** is right {gain} points more often than one solution, and {above}
   more than the majority of the eight: where most tries are wrong, the most frequent one means
   little.
*  **Tokens**: the majority of 32 solutions solves {accuracy} % of the problems and takes {tokens}
   tokens a problem; stopping at the first solution with r_s > 0.5 gets there with {enough}, {times}
   times fewer. With as many solutions as it likes, up to 32, it solves {most} % with {mean}.
*  **It can run ahead of a perfect checker** that is shown k solutions at once ("any of k"), because
   it stops when it has seen enough.
*  **What RL does not bring**: one solution is right about twice as often as before, but any of
   eight is not. And the best of 32 by r_s is hardly better than that of 16: among so many tries
   there is one that is wrong and believed.

## The numbers

{problems} held-out problems, the first 8 of 32 solutions each at temperature 1, {steps} steps of
RL, seeds {seeds}; per cent, in brackets the 95 % interval over problems and seeds. F1 and AUROC ask
whether the score knows right from wrong solutions, "within problem" among those of one problem
alone.

{table}

Each seed after RL:

{each}

What sampling costs and brings after RL, mean over the seeds. "Any" is what a perfect checker would
make of the k solutions; a token for r_s is counted with each solution that is scored.

{spent}

`python benchmarks/easy_to_check.py` makes all of it anew (training took {minutes} minutes on one
shared core), `python benchmarks/easy_to_check.py --report` this page and its picture from
`easy-to-check.json`.

## What it is not

The last line of a solution says nearly everything, and r_s has to learn little more than to read
whether it ends in `=0`. (A little more it does learn: the last row of the first table is that rule
alone, which is fooled by a wrong difference, by a letter used twice, and by a number that is not
its letter's.) This is not a hard verification problem; it is what a readout of one token can be
worth where verification is not the hard part.

The base model was trained by supervised learning on tries that are mostly wrong and on checks in
words (`python -m nanolaser.tiny --task subset-sum`); r_s, like everywhere, was learned in RL alone.
The rule-based checker compares with the one solution that each problem has;
`--reward nanolaser/tiny/subset_sum.py:reward` adds up instead, needs no gold answer, and gives the
same verdicts.
"""

if __name__ == "__main__":
    main_guard(main)
