"""
Ask a model to solve a problem, and how sure it is of each solution.

    python sample.py "(14+25)*2-9=?"                  # one solution, as it is written
    python sample.py --vote "(14+25)*2-9=?"           # several, and what they decide together
    python sample.py --adaptive --n 64 "..."          # stop as soon as the decision is settled
    python sample.py --until 0.5 --n 64 "..."         # stop at the first solution it believes
    python sample.py --n 8 --json - < problem.txt     # rollout rows, one JSON object a line

r_s, printed with every solution, is the model's own estimate of being right: about 0 for wrong
and 1 for right, read from one token after the end of the solution.  The votes:

    majority   every solution that ends in an answer has one vote
    weighted   every solution votes with its r_s, clipped to [0, 1]

Answers that are equal as mathematics (1/2 and 0.5) are one answer.  A solution that was cut off
has no end and so no r_s; it weighs nothing.  --adaptive draws a few at a time, and stops where
those that are left can hardly change the weighted vote (--risk); --until X draws one after another:
where r_s can be trusted, a single good solution settles it, whatever the others say.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tqdm import tqdm

from nanolaser import metrics
from nanolaser.checker import is_equivalent
from nanolaser.cli import (
    Progress, apply_preset, main_guard, option, parse_args, standard_input,
)  # fmt: skip
from nanolaser.files import to_jsonl
from nanolaser.judge import SamplingOptions, check_prompts, open_model
from nanolaser.problems import Problem
from nanolaser.report import percent, shorten, table
from nanolaser.reward import judged_rows
from nanolaser.rollout import Rollout
from nanolaser.sampler import generate


@dataclass
class Options(SamplingOptions):
    """One problem, several solutions."""

    problem: str | None = option(None, "the problem; - reads it from standard input",
                                 group="problem")
    gold: str | None = option(None, "its answer, if you know it: the checker then says which "
                                    "solutions are right", group="problem")
    n: int | None = option(None, "solutions; the most there may be, with --adaptive",
                           group="solutions", min=1,
                           shown="1, 8 with --vote, 32 with --adaptive")
    vote: bool = option(False, "let the solutions decide together", group="vote")
    adaptive: bool = option(False, "vote, and stop when the decision is settled", group="vote")
    batch: int = option(4, "solutions between two looks of --adaptive", group="vote", min=1)
    risk: float = option(0.05, "probability of another decision at which --adaptive stops",
                         group="vote", min=0, max=1)
    until: float | None = option(None, "--adaptive, one at a time, up to the first solution with a "
                                       "higher r_s, which is the answer", group="vote")
    json: bool = option(False, "print rollout rows, one JSON object a line (the vote, if asked "
                               "for, is the last line)", group="output")


def main() -> int:
    """Read the problem, sample, print, vote."""
    o, given = parse_args(Options, description=__doc__.split("\n\n")[0], positional="problem")
    if o.until is not None:  # a way of being adaptive: draw, look, stop
        o = apply_preset(o, given, dict(adaptive=True, batch=1))
    # A benchmark of one problem, so that what follows is what evaluate.py does.
    problem = Problem(id="0", problem=read_problem(o.problem), answer=o.gold)
    # --adaptive is a vote, too: --n is its budget, of which it mostly leaves a part unused.
    vote = o.vote or o.adaptive
    n = o.n or (32 if o.adaptive else 8 if vote else 1)  # a vote needs voters
    model, tokenizer = open_model(o)
    check_prompts(model, tokenizer, [problem.problem])

    rows = draw(model, tokenizer, problem, n, o)
    decision = decide(rows, n, o) if vote else None
    if o.json:  # programs get rows, at the end: half of an answer is of no use to them
        print(to_jsonl(rows + [{"vote": decision}] * vote), end="")
    elif vote:
        print_vote(rows, decision)
    elif n > 1:
        print(f"{count(n)}; --vote lets them decide together")
    return 0


def read_problem(text: str | None) -> str:
    """The problem's text, from the command line or standard input; ValueError if there is none."""
    if text is None:
        raise ValueError('no problem given: python sample.py "(14+25)*2-9=?", or - to read one')
    # Bytes that are no text become U+FFFD: a stray one in a page of text must not stop a reader.
    text = (standard_input().decode("utf-8", "replace") if text == "-" else text).strip()
    if not text:
        raise ValueError("the problem is empty")
    return text


# ---------------------------------------------------------------------------------------------
# drawing solutions


def draw(model, tokenizer, problem: Problem, n: int, o: Options) -> list[dict]:
    """Rollout rows of n solutions; fewer with --adaptive, where no more are needed.  People see
    each of them when it is there."""
    # One solution is shown token by token, several as they end, which they do in any order.
    # A vote's solutions are one line each; otherwise people want to read them.
    alone = n == 1 and not (o.vote or o.adaptive or o.json)
    streamer, shown, rows = tokenizer.streamer(), 0, []

    def stream(live: list[Rollout]) -> None:
        nonlocal shown
        # the streamer holds a character back until its last byte is there
        print("".join(map(streamer.put, live[0].response_tokens[shown:])), end="", flush=True)
        shown = len(live[0].response_tokens)

    def finish(rollout: Rollout) -> None:
        progress.update()
        if o.json:  # all rows at the end, with their tokens
            return
        row = judged_rows([rollout], [problem], tokenizer)[0]
        if alone:
            text = f"{streamer.end()}\n\n{describe(row)}"
        elif o.vote or o.adaptive:  # a line each: the table below is what counts
            text = f"{progress.done:4d}  {describe(row)}"
        else:
            head = f"--- solution {progress.done} of {n}"
            text = f"{head}\n{row['response']}\n\n{describe(row)}\n"
        tqdm.write(text)  # a print that leaves a bar on the terminal whole

    with Progress("sampled", n, "solution", shown=not alone) as progress:
        # One round is all that a plain vote takes; --adaptive looks after each.
        while len(rows) < n and not settled(rows, n, o):
            new = generate(
                model, tokenizer, [problem.problem],
                n=min(n - len(rows), o.batch if o.adaptive else n), **o.how(model),
                # Solution i draws from random stream i, in whichever call it is sampled: so the
                # budget that --adaptive leaves unused is all that tells it from a plain vote.
                streams=[len(rows)], on_finish=finish, on_step=stream if alone else progress.step,
            )
            # Tokens go along for programs: verify.py then scores exactly what was sampled.
            rows += judged_rows(new, [problem], tokenizer, token_ids=o.json)
    return rows


def settled(rows: list[dict], n: int, o: Options) -> bool:
    """Whether the solutions so far decide, so that those left of n need not be drawn."""
    if o.until is not None:
        return believed(rows, o.until) is not None
    if not rows or not o.adaptive:
        return False
    # The question is not how sure the winner is, but whether those left can still make another
    # answer win.
    classes = metrics.answer_classes([row["answer"] for row in rows], is_equivalent)
    return metrics.vote_change_probability(classes, weights(rows), n - len(rows)) <= o.risk


def believed(rows: list[dict], until: float) -> dict | None:
    """The first solution whose r_s is above `until`."""
    # It needs an answer as well: "I am right" about nothing is no decision.
    return next((row for row in rows if row["answer"] and (row["r_s"] or 0) > until), None)


def describe(row: dict) -> str:
    """One solution in one line: r_s and what it says, the answer, the length."""
    #     r_s  0.871, says right   answer 69   (24 tokens)   checker: right
    if not row["finished"]:
        belief = "cut off, no r_s"
    elif row["r_s"] is None:
        belief = f"log pi(z_c) {row['logp_zc']:.2f}, no c_ref, no r_s"
    else:
        belief = f"r_s {row['r_s']:6.3f}, says {'right' if row['r_s'] > 0.5 else 'wrong'}"
    # A long answer is cut here; --json has all of it.
    answer = "no boxed answer" if row["answer"] is None else f"answer {shorten(row['answer'], 60)}"
    checked = "" if row["r_v"] is None else f"   checker: {'right' if row['r_v'] else 'wrong'}"
    return f"{belief}   {answer}   ({count(row['response_tokens'], 'token')}){checked}"


def count(n: int, noun: str = "solution") -> str:
    """1 solution, 2 solutions."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


# ---------------------------------------------------------------------------------------------
# the vote


def weights(rows: list[dict]) -> list[float | None]:
    """What each solution weighs: its r_s.  Where r_s is unknown for the whole model (no c_ref),
    every solution weighs the same, and the weighted vote is the majority vote."""
    # (Where some are unknown, those were cut off: they weigh nothing.)
    scores = [row["r_s"] for row in rows]
    unknown = all(s is None for s in scores) and any(row["finished"] for row in rows)
    return [float(row["finished"]) for row in rows] if unknown else scores


def decide(rows: list[dict], budget: int, o: Options) -> dict:
    """The vote, ready for JSON: the candidates, both winners and how sure they are."""
    # Answers 5, 5, none, 4 of r_s .9 .7 .8 .2 are classes 0 0 -1 1: 5 has two votes that weigh 1.6.
    answers, scores = [row["answer"] for row in rows], weights(rows)
    classes = metrics.answer_classes(answers, is_equivalent)
    tally = metrics.tally(classes, scores)
    # A class is called by its first member's text: 0.5 and 1/2 are "0.5" if that came first.
    name = {c.answer_class: answers[c.first] for c in tally}
    candidates = [{"answer": name[c.answer_class], "votes": c.votes, "weight": c.weight}
                  for c in tally]
    # "No answer" is a line of the table but cannot win; the heaviest answer stands on top.
    candidates.sort(key=lambda c: (c["answer"] is not None, c["weight"], c["votes"]), reverse=True)
    chance_of_change = functools.partial(metrics.vote_change_probability, classes, scores)
    # The majority stands beside the weighted vote: their difference is what r_s is worth.
    decision = {
        "candidates": candidates,
        "majority": name.get(metrics.majority_vote(classes)),
        "weighted": name.get(metrics.weighted_vote(classes, scores)),
        "solutions": len(rows),
        "by_r_s": any(row["r_s"] is not None for row in rows),
        # How sure?  What would as many solutions again do to the decision?
        "change_probability": chance_of_change(len(rows)),
    }
    if o.until is not None:
        row = believed(rows, o.until)
        decision |= {"believed": row and row["answer"]}
    # And what would those that --adaptive has not drawn have done?
    if o.adaptive:
        left = budget - len(rows)
        decision |= {"budget": budget, "saved": left}
        decision["saved_change_probability"] = chance_of_change(left)
    return decision


def print_vote(rows: list[dict], d: dict) -> None:
    """The table answer / votes / summed r_s, both winners, and how sure they are."""
    #     answer    votes  sum of r_s
    #     69            5        4.31    <- majority, weighted
    lines = []
    for c in d["candidates"]:
        # (a chain of comparisons: None, "no answer", is marked in no line)
        wins = [kind for kind in ("majority", "weighted") if c["answer"] == d[kind] is not None]
        shown = "(no answer)" if c["answer"] is None else shorten(c["answer"], 50)
        arrow = "  <- " + ", ".join(wins) if wins else ""
        lines.append([shown, str(c["votes"]), f"{c['weight']:.2f}", arrow])
    print("\n" + table(("answer", "votes", "sum of r_s" if d["by_r_s"] else "weight", ""), lines))
    # Nobody came to a box: most often because all were cut off before it.
    if d["weighted"] is None:
        cut = sum(not row["finished"] for row in rows)
        print("\nno solution has a boxed answer: there is nothing to vote on")
        if cut:
            print(f"{cut} of {count(len(rows))} cut off: a larger --max-new-tokens may help")
        return
    # The share is of what was given to answers: solutions without one have no part in it.  With
    # nobody believed (total 0) the weighted vote is the majority, see metrics.weighted_vote.
    answered = {c["answer"]: c for c in d["candidates"] if c["answer"] is not None}
    # (a vote without r_s weighs every solution 1: its share is that of the votes)
    total, first = sum(c["weight"] for c in answered.values()), answered[d["weighted"]]
    print(f"\nmajority  {d['majority']}   {answered[d['majority']]['votes']} of {count(len(rows))}")
    share = f"{percent(first['weight'] / total)} % of the weight" if total else "nobody believed"
    print(f"weighted  {d['weighted']}   {share}")
    if not d["by_r_s"]:
        print("(this model has no r_s: every solution weighs the same)")
    # What more solutions could do: near 0 it is settled, near 1/2 it is a toss-up.
    print(f"how sure: {len(rows)} more would change the weighted answer with probability "
          f"{chance(d['change_probability'])}")
    # --until, then --adaptive: what it stopped at, and what that saved.
    spent = f"{len(rows)} of {count(d['budget'])} drawn, {d['saved']} saved" if "saved" in d else ""
    if "believed" in d:
        print(f"believed  {d['believed'] or 'none of them'}   {spent}")
    elif spent:
        why, risk = "the budget is used up", d["saved_change_probability"]
        if d["saved"]:
            change = f"would change it with probability {chance(risk)}"
            why = f"the other {d['saved']} " + (change if risk else "cannot change it")
        print(f"adaptive: {spent}: {why}")


def chance(probability: float) -> str:
    """A probability estimated from 2000 draws: its resolution ends at a thousandth."""
    return "below 0.001" if probability < 0.001 else f"{probability:.3f}"


if __name__ == "__main__":
    main_guard(main)
