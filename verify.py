"""
How sure is the model that a given solution is right?

    python verify.py --problem "2+3=?" --solution $'2+3=5\\n\\\\boxed{5}' --gold 5
    python verify.py --input solutions.jsonl --output scored.jsonl
    python verify.py ... --fit-threshold solved.jsonl     # right means: above what is best on these

One forward pass over problem and solution, and one number from it: r_s = beta_v (log pi(z_c) -
c_ref), read at the token that ends the solution.  The verdict is "right" where r_s > 0.5, or above
the threshold fitted on solved problems.  With a gold answer, what the rule-based checker says of
the \\boxed{} answer, and why.

--input takes one JSON object a line, whoever sampled it:

    problem (or question)    response (or solution)    optional: gold, finished,
    or messages, as OpenAI's API has them              prompt_token_ids, response_token_ids

A model's own tokens are not always the ones its tokenizer would make of the text it wrote, and r_s
belongs to tokens.  So rows that carry token ids are scored on exactly those, and get exactly the
sampler's number; a text is tokenised once, in the model's prompt, and the end token is put after
it.  Ids that do not spell the text beside them are another model's, and the text is scored.

A row that cannot be read is reported by its line and left out; the others are done all the same,
and the exit code is then 1.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nanolaser import metrics
from nanolaser.cli import (
    ModelOptions, Progress, main_guard, option, parse_args, standard_input, warn,
)  # fmt: skip
from nanolaser.files import to_jsonl, write_atomic
from nanolaser.judge import fitted_threshold, open_model, score_rows
from nanolaser.problems import read_solutions
from nanolaser.report import verification_table


@dataclass
class Options(ModelOptions):
    """One solution, or a file of them."""

    problem: str | None = option(None, "the problem", group="one solution")
    solution: str | None = option(None, "its solution; - reads it from standard input",
                                  group="one solution")
    gold: str | None = option(None, "the right answer, for the checker", group="one solution")
    input: str | None = option(None, "solutions, a JSON object a line; - is standard input",
                               group="many solutions", metavar="FILE")
    output: str | None = option(None, "where to write them with their scores; - is standard output",
                                group="many solutions", metavar="FILE")
    batch_tokens: int = option(16_384, "tokens in one forward pass", group="many solutions", min=1)
    fit_threshold: str | None = option(None, "solved problems, rows with r_s and r_v: right means "
                                       "r_s above the threshold that has the best F1 on them",
                                       group="verdict", metavar="FILE", shown="r_s > 0.5")

    def __post_init__(self):
        # Half of a question is refused before a model is loaded for it.
        one, many = (self.problem, self.solution), (self.input, self.output)
        if one == many == (None, None):
            raise ValueError("nothing to verify: give --problem and --solution, or --input and "
                             "--output")
        whole, other = (many, (*one, self.gold)) if many != (None, None) else (one, many)
        if None in whole or any(x is not None for x in other):
            raise ValueError("--problem, --solution (and --gold) belong together, and so do "
                             "--input and --output: give one of the two pairs, and not both")


def main() -> int:
    """One solution to the terminal, or a file of them into a file."""
    o, _ = parse_args(Options, description=__doc__.split("\n\n")[0])
    # Before the model is loaded: a bad file of solved problems is found out at once.
    threshold = fitted_threshold(o.fit_threshold)
    return (verify_one if o.input is None else verify_file)(o, threshold)


def verify_one(o: Options, threshold: float) -> int:
    """Print r_s, the verdict and, with a gold answer, what the checker says and why."""
    solution = o.solution if o.solution != "-" else standard_input().decode("utf-8", "replace")
    model, tokenizer = open_model(o)
    # A file of one row: there is one way to score a solution.
    row = {"problem": o.problem, "response": solution, "gold": o.gold}
    row = score_rows(model, tokenizer, [row], threshold)[0]
    if row["logp_zc"] is None:
        return 1  # too long, as has been said
    #     r_s       0.871   (log pi(<|reserved_0|>) -22.630 nats, c_ref -31.340, beta_v 0.1)
    #     verdict   right   (right means r_s > 0.5)
    if row["r_s"] is not None:
        print(f"r_s       {row['r_s']:.3f}   (log pi({tokenizer.z_c}) {row['logp_zc']:.3f} nats, "
              f"c_ref {tokenizer.c_ref:.3f}, beta_v {tokenizer.beta_v:g})")
        print(f"verdict   {row['verdict']}   (right means r_s > {threshold:.3g})")
    else:
        print(f"log pi({tokenizer.z_c})   {row['logp_zc']:.3f} nats   (without c_ref no r_s)")
    #     answer    5
    #     checker   right   (the same text)
    answer = row["answer"]
    print(f"answer    {'none: the solution has no boxed answer' if answer is None else answer}")
    if o.gold is not None:
        print(f"checker   {'right' if row['r_v'] else 'wrong'}   ({row['checker']})")
    return 0


def verify_file(o: Options, threshold: float) -> int:
    """Score every readable row of --input into --output; 1 if some could not be read."""
    # 1. Read.  What is wrong with a row is said with its line, and the others go on: somebody else
    #    wrote the file, and one bad line among thousands is theirs to mend later.
    bad: list[tuple[int, str]] = []
    data = standard_input() if o.input == "-" else None
    read = read_solutions(o.input, data=data, on_damage=lambda *what: bad.append(what))
    rows = [row for _, row in read]
    for line, reason in bad:
        warn(f"{o.input}, line {line}: {reason}; left out")
    if not rows:
        raise ValueError(f"{o.input}: " + ("no row can be read" if bad else "no rows in it"))
    if o.output != "-":
        check_output(o.output)  # found out now, not after an hour of scoring
    # 2. Score.  All that is for people goes to stderr: standard output may be the data.
    model, tokenizer = open_model(o)
    with Progress("scored", len(rows), "solution") as progress:
        rows = score_rows(model, tokenizer, rows, threshold, o.batch_tokens, progress.update)
    # 3. Write, at the end and at once: whoever sees the file sees all of it.
    #    Whatever the rows had beside problem and response is still in them.
    if o.output == "-":
        sys.stdout.write(to_jsonl(rows))
    else:
        write_atomic(o.output, to_jsonl(rows))
    report(rows, len(bad), threshold)
    return 1 if bad else 0


def check_output(name: str) -> None:
    """ValueError if nothing could be written there."""
    # A new file is made beside the one it replaces; what is no file (a pipe) is written to.
    # A link counts as what it leads to.
    path = Path(name)
    place = path if path.exists() and not path.is_file() else Path(os.path.realpath(path)).parent
    why = ("is a folder" if path.is_dir() else "no such folder" if not place.exists() else
           None if os.access(place, os.W_OK) else f"{place} cannot be written to")  # fmt: skip
    if why:
        raise ValueError(f"--output {name}: {why}")


def report(rows: list[dict], bad: int, threshold: float) -> None:
    """A summary on stderr; with gold answers, how good the verdicts were."""
    # To stderr, as --output - has the rows themselves on standard output.
    said = Counter(row["verdict"] for row in rows)
    lines = f"; {bad} lines left out" if bad else ""
    print(f"{len(rows)} solutions: {said['right']} believed right, {said['wrong']} wrong, "
          f"{said[None]} without r_s{lines}", file=sys.stderr)
    # How good were the verdicts?  Only where somebody knows what is right.
    # Solutions of one problem belong together (AUROC within).  Its text tells, not its prompt_id:
    # rows of several files may share a number.
    gold = [row | {"prompt_id": None, "problem": str([row["problem"], row.get("prompt_token_ids")])}
            for row in rows if row["r_v"] is not None]  # fmt: skip
    if gold:
        entry = {f"{len(gold)} with gold": metrics.verification(gold, threshold)}
        print(verification_table(entry), file=sys.stderr)


if __name__ == "__main__":
    main_guard(main)
