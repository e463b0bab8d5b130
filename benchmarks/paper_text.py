"""
docs/paper.json -> docs/paper.md and its pictures, in seconds: `python benchmarks/paper.py --begin
report`.

Every number, and every verdict, is computed from the JSON.  A verdict follows from an interval and
a claim, by the rule of `verdict`, and never from what one would like to read.
"""

from __future__ import annotations

import json
from pathlib import Path

from nanolaser import report
from nanolaser.files import read_json, write_atomic
from nanolaser.metrics import METHODS
from nanolaser.svg import picture

SETS = ("held-out", "hard")
YES, NO, OPEN, MISSING = "reproduces", "does not reproduce", "not decided", "not run yet"
SHOWN = {"accuracy": "accuracy", "f1": "F1", "auroc": "AUROC", "auroc_within": "within problem",
         "ece": "ECE"}  # fmt: skip
VOTED = {"accuracy": "random pick", "majority_vote@8": "majority@8",
         "weighted_vote@8": "weighted@8", "best_of@8": "best of 8", "pass_at@8": "any of 8"}

HEAD = """# The paper at nano scale

```
python benchmarks/paper.py --jobs 2
```

asks every question that the paper (arXiv 2510.14943) and its reviewers asked, and that the
embedded model can answer: {steps} steps on arithmetic, {problems} held-out problems of 2 to 5
operations and {problems} hard ones of 5, eight solutions each at temperature 1. Numbers are per
cent, in brackets the 95 % interval over problems and seeds. This text is made from
[paper.json](paper.json), its verdicts too: a claim **reproduces** if the whole interval is on its
side, **does not** if the whole interval is on the other, and is **not decided** where the interval
holds both. What the paper says is quoted *as reported*, of models of 3 to 7 billion parameters on
competition mathematics; a small model on arithmetic may differ for any reason. Every row says how
many seeds it is the mean of: LaSeR and GRPO have {n} so far. Of one seed the interval holds the
problems alone: another seed of the same run may lie outside.

F1 is the paper's: the harmonic mean of the accuracy on right and on wrong solutions, judged right
at a score above 0.5. "Within problem" is the AUROC over pairs of a right and a wrong solution of
one problem: chance is 50, and no knowledge of which problems are hard helps. "In words" is the
baseline of the paper: the model is asked, in a second prompt, whether the solution is right.
"""

NOT_ASKED = """## What cannot be asked here

*  **Reward models of 7 to 72 billion parameters** as verifiers (F1 75.9 to 78.9 beside LaSeR's
   77.6, as reported): there is none for this model.
*  **Other base models, MATH-500 to AIME, general reasoning** (MMLU-Pro and GPQA, AUROC about 0.6,
   as reported): the embedded model does arithmetic. The paper's own run is `python train.py
   --model qwen2.5-7b --data deepmath`.
*  **Why reasoning improves** where it does: one would have to see it improve first.
*  **Seconds**: [speed.md](speed.md). One r_s costs one readout at the last token, nothing besides.
"""


def dumps(record: dict) -> str:
    """JSON a person can read in a diff: a line for every list of numbers."""
    def lines(value, pad: str) -> str:
        if isinstance(value, dict) and value:
            inner = (f"{pad}  {json.dumps(k)}: {lines(v, pad + '  ')}" for k, v in value.items())
            flat = json.dumps(value)
            return flat if len(flat) <= 150 else "{\n" + ",\n".join(inner) + f"\n{pad}}}"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(f"{pad}  {json.dumps(v)}" for v in value) + f"\n{pad}]"
        return json.dumps(value)
    return lines(record, "") + "\n"


def verdict(change: list | None, claim: str, margin: float = 0.01) -> str:
    """What an interval [value, low, high] says about a claim: "higher", "lower", or "same", within
    +-margin."""
    if change is None or change[1] is None:
        return MISSING
    _, low, high = change
    if claim == "same":
        return YES if -margin <= low and high <= margin else \
            NO if low > margin or high < -margin else OPEN  # fmt: skip
    low, high = (low, high) if claim == "higher" else (-high, -low)
    return YES if low > 0 else NO if high < 0 else OPEN


def cell(x: list | None) -> str:
    """79.8 [77.1, 82.4], in per cent."""
    if x is None or x[0] is None:
        return "-"
    value, low, high = (f"{100 * v + 0.0:.1f}" if v is not None else "-" for v in x[:3])
    return value if low == "-" else f"{value} [{low}, {high}]".replace("-0.0", "0.0")


def table(corner: str, columns: list[str], rows: list[list[str]]) -> str:
    """A table of markdown."""
    lines = [[corner, *columns], ["---"] * (1 + len(columns)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Record:
    """The JSON, with None for whatever is not there yet."""

    def __init__(self, record: dict):
        self.all = record

    def get(self, *keys):
        """A value, by its path."""
        value = self.all
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def seeds(self, name: str) -> str:
        """How many seeds a row is the mean of."""
        return str(len(self.get("seeds", name.removesuffix(" in words")) or [0]))

    def rows(self, names: dict[str, str], columns: dict[str, str]) -> str:
        """A table of some methods on both sets; those that were not run are left out."""
        lines = [[f"{title}, {where}", self.seeds(name),
                  *(cell(self.get("table", name, where, m)) for m in columns)]
                 for where in SETS for name, title in names.items() if self.get("table", name)]
        return table("", ["seeds", *columns.values()], lines)

    def against(self, names: dict[str, str]) -> str:
        """A table of differences to LaSeR on both sets."""
        lines = [[f"{title}, {where}", self.seeds(name),
                  *(cell(self.get("minus laser", name, where, m)) for m in SHOWN)]
                 for where in SETS for name, title in names.items()
                 if self.get("minus laser", name)]
        if not lines:
            return "(not run yet)"
        return table("minus LaSeR", ["seeds", *SHOWN.values()], lines)


def negative(change: list | None) -> list | None:
    """b - a from a - b."""
    if change is None or change[1] is None:
        return None
    return [-change[0], -change[2], -change[1]]


# ---------------------------------------------------------------------------------------------
# the questions, in the paper's order: (short question, the paper's number, ours, verdict)


def questions(r: Record) -> list[tuple[str, str, str, str]]:
    """The table on top."""
    d = lambda variant, m, where="held-out": r.get("minus laser", variant, where, m)  # noqa: E731
    accuracy, words = negative(d("grpo", "accuracy")), r.get("minus words", "held-out", "f1")
    mixing, tau1 = negative(d("tau 0", "accuracy")), d("tau 1", "accuracy")
    # A collapse is more than a loss: ten points at least.
    collapsed = tau1 and [x + 0.1 for x in tau1]
    found = [
        ("LaSeR solves more than GRPO", "+0.5 to +2.0 accuracy", cell(accuracy),
         verdict(accuracy, "higher")),
        ("r_s verifies better than asking (F1)", "49 -> 80", f"{cell(words)} more",
         verdict(words, "higher")),
        ("r_s in the advantage helps (tau 0.1 against 0)", "+0.1 to +1.6 accuracy", cell(mixing),
         verdict(mixing, "higher")),
        ("a constant is as good as the reference model, within a point", "accuracy 45.1 / 45.0",
         cell(d("exact reference", "accuracy")), verdict(d("exact reference", "accuracy"), "same")),
        ("... and for F1", "79.4 / 79.3", cell(d("exact reference", "f1")),
         verdict(d("exact reference", "f1"), "same")),
        ("SFT in place of MSE costs accuracy", "\"clearly interferes\", no number",
         cell(d("sft", "accuracy")), verdict(d("sft", "accuracy"), "lower")),
        ("so does BCE", "no number", cell(d("bce", "accuracy")),
         verdict(d("bce", "accuracy"), "lower")),
        ("r_s as the only reward collapses, by 10 points at least", "after about 60 steps",
         cell(tau1), verdict(collapsed, "lower")),
    ]  # fmt: skip
    for where in SETS:
        gain = r.get("votes", where, "weighted - majority", "32")
        found.append((f"weighting by r_s improves the vote of 32, {where}", "in figures only",
                      cell(gain), verdict(gain, "higher")))
    ece, length = r.get("table", "laser", "held-out", "ece"), r.get("length", "held-out")
    found.append(("r_s is calibrated (ECE at most 10)", "9.0", cell(ece),
                  verdict(ece and [ece[0] - 0.1, ece[1] - 0.1, ece[2] - 0.1], "lower")))
    by = {judge: mean(values.get("spearman_length")) for judge, values in (length or {}).items()}
    found.append(("r_s falls with the length (Spearman below -0.1)", "-0.42", number(by.get("r_s")),
                  MISSING if by.get("r_s") is None else YES if by["r_s"] < -0.1 else NO))
    spread = r.get("c_ref", "measured")
    found.append(("c_ref hardly varies (by less than 0.05 of r_s)", "-23.11 +- 0.04 nats",
                  f"{spread[0][0]:.2f} +- {spread[0][1]:.2f}" if spread else "-",
                  MISSING if not spread else YES if spread[0][1] * 0.1 < 0.05 else NO))
    return found


def mean(values: list | None) -> float | None:
    """The mean of what is there."""
    values = [x for x in values or () if x is not None]
    return sum(values) / len(values) if values else None


def number(value: float | None, digits: int = 2) -> str:
    """A plain number."""
    return "-" if value is None else f"{value:.{digits}f}"


# ---------------------------------------------------------------------------------------------
# the sections


def first_table(r: Record) -> str:
    """Reasoning and verification."""
    known = {"base in words": "base in words", "grpo in words": "GRPO in words",
             "laser in words": "LaSeR in words", "laser": "LaSeR r_s",
             "tau 0": "LaSeR without r_s in the advantage"}  # fmt: skip
    rank = [[w, *map(report.percent, r.get("rank", w) or [])] for w in SETS]
    more = [[w, cell(negative(r.get("minus laser", "grpo", w, "accuracy"))),
             *(cell(r.get("minus words", w, m)) for m in list(SHOWN)[1:])] for w in SETS]
    return f"""## Reasoning and verification

As reported, five sets (accuracy / F1):

| | base | GRPO | LaSeR | without r_s in the advantage |
| --- | --- | --- | --- | --- |
| OctoThinker-3B | 2.0 / 15.7 | 30.8 / 51.0 | 32.8 / 72.5 | |
| Qwen2.5-7B | 14.8 / 32.9 | 41.8 / 49.2 | 42.7 / 79.6 | 41.1 / 79.9 |
| Open-Reasoner-Zero-7B | 44.0 / 43.3 | 45.0 / 38.8 | 45.5 / 77.6 | 45.4 / 76.7 |

Here:

{r.rows(known, SHOWN)}

LaSeR minus GRPO in accuracy; in all else, LaSeR's r_s minus GRPO in words:

{table("", list(SHOWN.values()), more)}

Right solutions of LaSeR by the rank of their r_s among the eight of a problem:

{table("", [str(i + 1) for i in range(8)], rank)}
{why(r)}"""


def why(r: Record) -> str:
    """What is read from the first tables, said only where they say it."""
    said = ""
    f1 = {name: r.get("table", name, "held-out", "f1") for name in ("base in words", "laser")}
    if all(f1.values()) and f1["base in words"][0] > f1["laser"][0]:
        said += """
Before RL asking works better than r_s does after it: the base was trained on verdicts about its own
noisy steps, and RL removes just those errors. What is left wrong after RL is what the model cannot
see, and then asking hardly works.
"""
    if all((shares := r.get("rank", where)) and shares[0] < shares[1] for where in SETS):
        said += """
The most self-assured of eight is right less often than the second: a solution that drops a term has
a shorter chain, looks like an easier problem, and gets a higher r_s than its right siblings. r_s
knows problems better than the solutions of one problem, which is what a vote would need.
"""
    return said


def ablations(r: Record) -> str:
    """Each against LaSeR, with the same seeds and problems."""
    names = {"exact reference": "exact reference", "bce": "BCE", "sft": "SFT",
             "no class weights": "no class weights", "no warm-ups": "no warm-ups",
             "tau 0": "tau 0", "tau 0.5": "tau 0.5", "tau 1": "tau 1"}  # fmt: skip
    return f"""## What each part is worth

As reported: the constant costs nothing (accuracy 45.1 against 45.0, F1 79.4 against 79.3); BCE and
SFT drive pi(z_c) towards 1 and disturb reasoning. Of class weights and warm-ups no ablation was
found; reviewers asked for it.

{r.against(names)}

The rows themselves:

{r.rows({"laser": "LaSeR"} | names, SHOWN)}
"""


def collapse(r: Record) -> str:
    """r_s as the only reward."""
    lines = []
    for variant in ("tau 0", "laser", "tau 0.5", "tau 1"):
        points = r.get("curves", variant)
        if points:
            end = points[-3:]
            of = lambda key, end=end: mean([p[key] for p in end])  # noqa: E731
            best = max(p["reward"] for p in points)
            lines.append([{"laser": "tau 0.1 (LaSeR)"}.get(variant, variant), r.seeds(variant),
                          report.percent(best), report.percent(of("reward")),
                          number(of("r_s_correct")), number(of("r_s_wrong")),
                          number(of("response_tokens"), 0), number(of("entropy"), 3)])
    columns = "seeds, best reward, last reward, r_s right, r_s wrong, tokens, entropy".split(", ")
    return f"""## r_s as the only reward

As reported: with r_s as the only reward training collapses after about 60 steps. Training batches,
the best ten steps and the last thirty:

{table("", columns, lines)}

![reward, r_s, lengths over the steps](pictures/paper-tau.svg)
"""


def vote_section(r: Record) -> str:
    """What many solutions are worth."""
    names = {"base in words": "base in words", "grpo in words": "GRPO in words",
             "laser": "LaSeR r_s"}  # fmt: skip
    blocks = []
    for where in SETS:
        entry = r.get("votes", where)
        if entry:
            rows = [[title, *(report.percent(x) for x in entry[m].values())] for m, title in (
                ("majority_vote", "majority"), ("weighted_vote", "weighted by r_s"),
                ("best_of", "best by r_s"), ("pass_at", "any"))]
            rows.append(["weighted - majority",
                         *(cell(x) for x in entry["weighted - majority"].values())])
            corner = f"{where}, seeds: {entry['seeds']}"
            blocks.append(table(corner, [f"k = {k}" for k in entry["majority_vote"]], rows))
    if blocks:
        blocks.append("![accuracy of votes](pictures/paper-votes.svg)")
    more = "\n\n".join(blocks) or "(not run yet)"
    return f"""## What are many solutions worth?

{r.rows(names, VOTED)}

Votes of k of 32 solutions of LaSeR:

{more}
"""


def readings(r: Record) -> str:
    """Length, c_ref, transfer, threshold."""
    length = [[f"{judge}, {where}", *(number(mean(values.get(m))) for m in values)]
              for where in SETS for judge, values in (r.get("length", where) or {}).items()]
    measured = ", ".join(f"{m:.2f} +- {s:.2f}" for m, s in r.get("c_ref", "measured") or [])
    drift = [[f"from step {first}", f"{m:.2f} +- {s:.2f}", str(n)]
             for first, m, s, n in r.get("c_ref", "over training") or []]
    crossed = [[f"{name}, {where}".replace("laser-seed", "seed "),
                *(report.percent(x) for x in q.values())]
               for where in SETS for name, q in (r.get("transfer", where) or {}).items()]
    fitted = [[where, report.percent(q["0.5"]), report.percent(q["fitted"]),
               f"{q['threshold'][0]:.2f} +- {q['threshold'][1]:.2f}"]
              for where in SETS if (q := r.get("threshold", where))]
    return f"""## Does r_s follow the length?

As reported, the rank correlation of the score with the length is -0.42 on average. Beside it the
sum of log ratios over the whole solution, the implicit reward that r_s takes the place of:

{table("", ["Spearman", "AUROC", "within problem"], length)}

## Is c_ref a constant?

As reported, the untouched model's log pi(z_c) on its own solutions: -23.11 +- 0.04 nats (Qwen2.5),
-24.87 +- 1.18 (OctoThinker). Here, each seed: {measured}. And on the solutions of training as they
change, all seeds together (reviewers asked):

{table("", ["log pi_ref(z_c)", "solutions"], drift)}

## Does one model's r_s read another's solutions?

Reviewers asked. Each model is a run of its own seed; reader of writer, in per cent:

{table("", ["F1", "AUROC", "within problem"], crossed) if crossed else "(not run yet)"}

## Why 0.5?

r_s aims at 0 and 1, but nothing bounds it, and 0.5 is right for the mixture trained on alone. A
user with 50 solved problems fits the threshold on them; F1 on all others, mean over 100 choices of
the 50:

{table("", ["F1 at 0.5", "F1 at the fitted threshold", "threshold"], fitted)}
"""


def switches(r: Record) -> str:
    """What came after GRPO."""
    names = {"no std": "no division by the std (Dr. GRPO)",
             "sequence mean": "mean over sequences (GRPO)",
             "constant divisor": "constant divisor (Dr. GRPO)", "refill": "refill (DAPO)",
             "truncated masked": "truncated ones masked (DAPO)",
             "clip high": "clip-higher, two updates a batch (DAPO)",
             "LoRA rank 8": "adapters of rank 8"}  # fmt: skip
    return f"""## Beyond the paper: DAPO's and Dr. GRPO's switches, and adapters

Each row is LaSeR with one option changed (docs/training.md has the switches, [lora.md](lora.md) the
adapters), against the same seeds of LaSeR. No learning rate was tuned for a row; adapters have
theirs by default.

{r.against(names)}

The rows themselves:

{r.rows({"laser": "LaSeR"} | names, SHOWN)}
"""


def markdown(record: dict) -> str:
    """The whole of docs/paper.md."""
    r = Record(record)
    head = HEAD.format(**record, n=min(len(record["seeds"][v]) for v in ("laser", "grpo")))
    top = table("claim", ["paper, as reported", "here", "verdict"],
                [[q, p, x, f"**{v}**"] for q, p, x, v in questions(r)])
    sections = (first_table, ablations, collapse, vote_section, readings, switches)
    return "\n".join([head, top + "\n", *(section(r) for section in sections), NOT_ASKED])


# ---------------------------------------------------------------------------------------------
# pictures, files


def pictures(record: dict, folder: Path) -> list[str]:
    """Draw them; returns the lines to tell."""
    names = {"tau 0": "tau 0", "laser": "tau 0.1 (LaSeR)", "tau 0.5": "tau 0.5", "tau 1": "tau 1"}
    runs = {title: (record["curves"][v], []) for v, title in names.items() if v in record["curves"]}
    folder.mkdir(parents=True, exist_ok=True)
    said = [report.save(folder / "paper-tau.svg", report.curves(runs))]
    if record["votes"]:
        # One number for each k, where an evaluation has one a problem: hence no error bars.
        panels = [
            report.votes_panel({m: {int(k): [x] for k, x in entry[m].items()} for m in METHODS}, w)
            for w, entry in record["votes"].items()
        ]
        said.append(report.save(folder / "paper-votes.svg", picture(panels)))
    return said


def write(docs: Path) -> list[str]:
    """docs/paper.md and docs/pictures/paper-*.svg from docs/paper.json."""
    record = read_json(docs / "paper.json")
    write_atomic(docs / "paper.md", markdown(record))
    return [f"text {docs / 'paper.md'}", *pictures(record, docs / "pictures")]
