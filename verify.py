"""
How sure is the model that a given solution is right?

    python verify.py --problem "2+3=?" --solution $'2+3=5\\n\\\\boxed{5}' --gold 5
    python verify.py --input solutions.jsonl --output scored.jsonl

One forward pass over problem and solution, and one number from it: r_s = beta_v (log pi(z_c) -
c_ref), read at the token that ends the solution.  The verdict is "right" where r_s > 0.5, or
above the threshold that --fit-threshold finds on solved problems.  With a gold answer, what the rule-based checker says of the \\boxed{} answer, and why.

--input takes one JSON object a line (what sample.py --json and evaluate.py write):

    problem (or question)    response (or solution)    optional: gold, finished,
    prompt_token_ids, response_token_ids

Tokens or text?  A model's own tokens are not always the ones its tokenizer would make of the text
it wrote, and r_s belongs to tokens.  Rows that carry token ids are therefore scored on exactly
those, and get exactly the sampler's number.  A text is tokenised once, in the model's prompt, and
the model's end token is put after it: for the same text that can give a slightly other r_s.  Ids
that do not spell the text beside them are another model's, and the text is scored.

A row that cannot be read is reported by its line and left out; the others are done all the same,
and the exit code is then 1.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from nanolaser import metrics
from nanolaser.checker import explain, extract_answer, is_equivalent
from nanolaser.cli import (
    ModelOptions, Progress, main_guard, option, parse_args, standard_input, warn,
)  # fmt: skip
from nanolaser.files import read_jsonl, to_jsonl, write_atomic
from nanolaser.judge import fitted_threshold, open_model
from nanolaser.report import verification_table
from nanolaser.rollout import self_reward
from nanolaser.scoring import score

# Which key holds the tokens of which text.
TOKENS = {"problem": "prompt_token_ids", "response": "response_token_ids"}
# Problem and solution may be this many times as long as the texts that the model was trained on:
# a model can be sampled beyond its positions, and then r_s is read as it was sampled.
TOO_LONG = 4


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
    fit_threshold: str | None = option(None, "solved problems (rows with r_s and r_v): right means "
                                       "r_s above the threshold that has the best F1 on them",
                                       group="verdict", metavar="FILE", shown="r_s > 0.5")
    batch_tokens: int = option(16_384, "tokens in one forward pass", group="many solutions", min=1)

    def __post_init__(self):
        # Half of a question is refused before a model is loaded for it.
        one, many = (self.problem, self.solution), (self.input, self.output)
        if one == many == (None, None):
            raise ValueError("nothing to verify: give --problem and --solution, or --input and "
                             "--output")
        if None not in one and many == (None, None):
            return
        if None not in many and one == (None, None) and self.gold is None:
            return
        raise ValueError("--problem, --solution (and --gold) belong together, and so do --input "
                         "and --output: give one of the two pairs, and not both")


def main() -> int:
    """One solution to the terminal, or a file of them into a file."""
    o, _ = parse_args(Options, description=__doc__.split("\n\n")[0])
    threshold = fitted_threshold(o.fit_threshold)
    return verify_one(o, threshold) if o.input is None else verify_file(o, threshold)


def verify_one(o: Options, threshold: float) -> int:
    """Print r_s, the verdict and, with a gold answer, what the checker says and why."""
    solution = o.solution if o.solution != "-" else standard_input().decode("utf-8", "replace")
    model, tokenizer = open_model(o)
    row = {"problem": o.problem, "response": solution, "gold": o.gold}
    row = score_rows(model, tokenizer, [row], o.batch_tokens, threshold)[0]
    if row["logp_zc"] is None:
        return 1  # too long, as has been said
    if row["r_s"] is not None:
        print(f"r_s       {row['r_s']:.3f}   (log pi({tokenizer.z_c}) {row['logp_zc']:.3f} nats, "
              f"c_ref {tokenizer.c_ref:.3f}, beta_v {tokenizer.beta_v:g})")
        print(f"verdict   {row['verdict']}   (right means r_s > {threshold:.3g})")
    else:
        print(f"log pi({tokenizer.z_c})   {row['logp_zc']:.3f} nats   (without c_ref no r_s)")
    answer = row["answer"]
    print(f"answer    {'none: the solution has no boxed answer' if answer is None else answer}")
    if o.gold is not None:
        print(f"checker   {'right' if row['r_v'] else 'wrong'}   ({row['checker']})")
    return 0


def verify_file(o: Options, threshold: float) -> int:
    """Score every readable row of --input into --output; 1 if some could not be read."""
    rows, bad = read_rows(o.input)
    for line, reason in bad:
        warn(f"{o.input}, line {line}: {reason}; left out")
    if not rows:
        raise ValueError(f"{o.input}: " + ("no row can be read" if bad else "no rows in it"))
    if o.output != "-":
        check_output(o.output)  # found out now, not after an hour of scoring
    model, tokenizer = open_model(o)
    # All that is for people goes to stderr: standard output may be the data.
    with Progress("scored", len(rows), "solution") as progress:
        scored = score_rows(model, tokenizer, rows, o.batch_tokens, threshold, progress.update)
    # At the end and at once: whoever sees the file sees all of it.
    if o.output == "-":
        sys.stdout.write(to_jsonl(scored))
    else:
        write_atomic(o.output, to_jsonl(scored))
    report(scored, len(bad), threshold)
    return 1 if bad else 0


def check_output(name: str) -> None:
    """ValueError if nothing could be written there."""
    # A new file is made beside the one it replaces; what is no file (a pipe) is written to.
    path = Path(name)
    place = path if path.exists() and not path.is_file() else Path(os.path.realpath(path)).parent
    why = ("is a folder" if path.is_dir() else "no such folder" if not place.exists() else
           None if os.access(place, os.W_OK) else f"{place} cannot be written to")  # fmt: skip
    if why:
        raise ValueError(f"--output {name}: {why}")


# ---------------------------------------------------------------------------------------------
# rows in


def read_rows(name: str) -> tuple[list[dict], list[tuple[int, str]]]:
    """The rows of a file, and (line, reason) for each one that cannot be read."""
    rows, bad = [], []
    data = standard_input() if name == "-" else None
    for number, row in read_jsonl(name, data=data, on_damage=lambda *what: bad.append(what)):
        try:
            rows.append(checked(row))
        except ValueError as error:
            bad.append((number, str(error)))
    return rows, sorted(bad)


def checked(row: dict) -> dict:
    """A row under its usual names; ValueError if something is missing or of a wrong kind."""
    row = dict(row)
    for name, other in (("problem", "question"), ("response", "solution")):
        # Benchmarks say question; people say solution where rollout rows say response.
        if row.get(name) is None:
            row[name] = row.get(other)
        text, ids = row[name], row.get(TOKENS[name])
        if ids is not None and not (isinstance(ids, list) and ids and
                                    all(type(i) is int and 0 <= i < 2**31 for i in ids)):
            raise ValueError(f"{TOKENS[name]} must be a list of token ids")
        if text is None and ids is None:  # with token ids, the text is not needed
            raise ValueError(f"no {name}")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{name} must be text")
    gold = row.get("gold")
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float, type(None))):
        raise ValueError("gold must be text or a number")
    return row


# ---------------------------------------------------------------------------------------------
# scores out


def score_rows(model, tokenizer, rows: list[dict], batch_tokens: int, threshold: float,
               on_scored=None) -> list[dict]:
    """The rows with logp_zc, r_s, verdict, answer and, where there is a gold, r_v and checker."""
    tokens = [to_tokens(tokenizer, row) for row in rows]
    done = [{**row, **facts} for row, (_, _, facts) in zip(rows, tokens)]
    # Only what has an end can be read; the others keep None.  A row of a megabyte is a mistake,
    # and the cost grows with the square of the length.
    ended = [i for i, row in enumerate(done) if row["finished"]]
    most = TOO_LONG * model.config.max_position_embeddings
    fit = [i for i in ended if len(tokens[i][0]) + len(tokens[i][1]) <= most]
    if len(fit) < len(ended):
        warn(f"{len(ended) - len(fit)} solutions have over {most} tokens, {TOO_LONG} times what "
             "the model was made for: no r_s")
    prompts, responses = [tokens[i][0] for i in fit], [tokens[i][1] for i in fit]
    values = score(model, tokenizer.z_c_id, prompts, responses, batch_tokens, on_scored)
    for i, value in zip(fit, values):
        done[i]["logp_zc"] = value
        done[i]["r_s"] = self_reward(value, tokenizer)
        if done[i]["r_s"] is not None:
            done[i]["verdict"] = "right" if done[i]["r_s"] > threshold else "wrong"
    return [row | ask_checker(row) for row in done]


def to_tokens(tokenizer, row: dict) -> tuple[list[int], list[int], dict]:
    """(prompt ids, response ids, what is known of the row before scoring)."""
    prompt, response = row.get(TOKENS["problem"]), row.get(TOKENS["response"])
    facts = {"logp_zc": None, "r_s": None, "verdict": None, "tokens_from": "ids"}
    known = response is not None and max([*response, *(prompt or [])]) < tokenizer.size
    if known and row["response"] in (None, tokenizer.decode(response)):
        finished = response[-1] in tokenizer.stop_ids
        facts["response"] = tokenizer.decode(response)
    elif row["response"] is None or row["problem"] is None:
        raise ValueError("a row's token ids are another model's, and it has no problem and "
                         "response as text")
    else:
        # With the ids of its response those of its prompt fall: they are the same model's.
        prompt, facts["tokens_from"] = None, "text"
        finished = bool(row.get("finished", True))
        # The end of a solution is where r_s is read: a text has none, so it is given one.
        response = tokenizer.encode(row["response"]) + [tokenizer.stop_ids[0]] * finished
    prompt = prompt or tokenizer.encode_prompt(row["problem"])
    return prompt, response, facts | {"finished": finished, "response_tokens": len(response)}


def ask_checker(row: dict) -> dict:
    """The boxed answer and, where there is a gold, r_v and the checker's reason."""
    gold, r_v = row.get("gold"), None
    # Not strict: exactly one box is a rule for training, where a model would exploit more.
    try:
        answer = extract_answer(row["response"]) or None
        if gold is None:
            return {"answer": answer, "r_v": None}
        r_v = float(answer is not None and is_equivalent(answer, str(gold)))
        reason = "no boxed answer" if answer is None else explain(answer, str(gold)).rule
    except Exception as error:  # a text that is too much for the checker is one bad row, not all
        answer, r_v = None, None if gold is None else 0.0
        reason = f"the checker failed: {type(error).__name__}"
    return {"answer": answer, "r_v": r_v, "checker": reason}


def report(rows: list[dict], bad: int, threshold: float) -> None:
    """A summary on stderr; with gold answers, how good the verdicts were."""
    said = {v: sum(row["verdict"] == v for row in rows) for v in ("right", "wrong", None)}
    lines = f"; {bad} lines left out" if bad else ""
    print(f"{len(rows)} solutions: {said['right']} believed right, {said['wrong']} wrong, "
          f"{said[None]} without r_s{lines}", file=sys.stderr)
    # Solutions of one problem belong together (AUROC within): its text tells, for rows of several
    # files may have the same prompt_id.
    problem = lambda row: str([row["problem"], row.get(TOKENS["problem"])])  # noqa: E731
    gold = [row | {"prompt_id": None, "problem": problem(row)} for row in rows
            if row["r_v"] is not None]  # fmt: skip
    if gold:
        table = verification_table({f"{len(gold)} with gold": metrics.verification(gold, threshold)})
        print(table, file=sys.stderr)


if __name__ == "__main__":
    main_guard(main)
