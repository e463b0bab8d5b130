"""
How sure is the model that a given solution is right?

    python verify.py --problem "2+3=?" --solution $'2+3=5\\n\\\\boxed{5}' --gold 5
    python verify.py --input solutions.jsonl --output scored.jsonl

One forward pass over problem and solution, and one number from it: r_s = beta_v (log pi(z_c) -
c_ref), read at the token that ends the solution.  The verdict is "right" where r_s > 0.5.  With a
gold answer, what the rule-based checker says of the \\boxed{} answer, and why.

--input takes one JSON object a line (what sample.py --json and evaluate.py write):

    problem (or question)    response (or solution)    optional: gold, finished,
    prompt_token_ids, response_token_ids

Tokens or text?  A model's own tokens are not always the ones its tokenizer would make of the text
it wrote, and r_s belongs to tokens.  Rows that carry token ids are therefore scored on exactly
those, and get exactly the sampler's number.  A text is tokenised once, in the model's prompt, and
the model's end token is put after it: for the same text that can give a slightly other r_s.  Ids
of another tokenizer (they do not spell the text that comes with them) are not used: so one model
can verify another's solutions.

A row that cannot be read is reported by its line and left out; the others are done all the same,
and the exit code is then 1.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nanolaser import metrics
from nanolaser.checker import explain, extract_answer, is_equivalent
from nanolaser.cli import ModelOptions, is_terminal, main_guard, option, parse_args
from nanolaser.judge import open_model, r_s, warn
from nanolaser.report import verification_table
from nanolaser.files import finite, write_atomic
from nanolaser.sampler import score


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

    def __post_init__(self):
        # Half of a question is refused before a model is loaded for it.
        one = self.problem is not None or self.solution is not None
        if one and (self.input is not None or self.output is not None):
            raise ValueError("give --problem and --solution, or --input and --output, not both")
        if not one and (self.input is None or self.output is None):
            both = "--problem and --solution, or --input and --output"
            missing = "--output" if self.input is not None else both
            raise ValueError(f"nothing to verify: give {missing}")
        if one and (self.problem is None or self.solution is None):
            raise ValueError("--problem and --solution belong together: one of them is missing")
        if not one and self.gold is not None:
            raise ValueError("--gold belongs to --solution; in a file each row has its own gold")


def main() -> int:
    """One solution to the terminal, or a file of them into a file."""
    o, _ = parse_args(Options, description=__doc__.split("\n\n")[0])
    return verify_one(o) if o.input is None else verify_file(o)


# ---------------------------------------------------------------------------------------------
# one solution


def verify_one(o: Options) -> int:
    """Print r_s, the verdict and, with a gold answer, what the checker says and why."""
    solution = sys.stdin.read() if o.solution == "-" else o.solution
    row = {"problem": o.problem, "response": solution}
    if o.gold is not None:
        row["gold"] = o.gold
    check_row(row)
    model, tokenizer = open_model(o)
    row = score_rows(model, tokenizer, [row], o.batch_tokens)[0]
    if row["logp_zc"] is None:
        return 1  # too long, as has been said
    if row["r_s"] is not None:
        print(f"r_s       {row['r_s']:.3f}   (log pi({tokenizer.z_c}) {row['logp_zc']:.3f} nats, "
              f"c_ref {tokenizer.c_ref:.3f}, beta_v {tokenizer.beta_v:g})")
        print(f"verdict   {row['verdict']}   (right means r_s > 0.5)")
    else:
        print(f"log pi({tokenizer.z_c})   {row['logp_zc']:.3f} nats   (without c_ref no r_s)")
    answer = row["answer"]
    print(f"answer    {'none: the solution has no boxed answer' if answer is None else answer}")
    if o.gold is not None:
        print(f"checker   {'right' if row['r_v'] else 'wrong'}   ({row['checker']})")
    return 0


# ---------------------------------------------------------------------------------------------
# a file of solutions


def verify_file(o: Options) -> int:
    """Score every readable row of --input into --output; 1 if some could not be read."""
    rows, bad = read_rows(o.input)
    for line, reason in bad:
        warn(f"{o.input}, line {line}: {reason}; left out")
    if not rows:
        raise ValueError(f"{o.input}: " + ("no row can be read" if bad else "no rows in it"))
    # Found out now, not after an hour of scoring.
    folder = Path(o.output).absolute().parent
    if o.output != "-" and not os.access(folder, os.W_OK):
        reason = "the folder cannot be written to" if folder.is_dir() else "no such folder"
        raise ValueError(f"--output {o.output}: {reason}")
    model, tokenizer = open_model(o)
    # stderr, all that is for people: standard output may be the data
    with tqdm(total=len(rows), unit="solution", disable=not is_terminal()) as bar:
        scored = score_rows(model, tokenizer, rows, o.batch_tokens, bar.update)
    # At the end and at once: whoever sees the file sees all of it.
    text = "".join(json.dumps(finite(row)) + "\n" for row in scored)
    if o.output == "-":
        sys.stdout.write(text)
    else:
        write_atomic(o.output, text)
    report(scored, len(bad), o)
    return 1 if bad else 0


def read_rows(name: str) -> tuple[list[dict], list[tuple[int, str]]]:
    """The rows of a file, and (line, reason) for each one that cannot be read."""
    # Bytes, decoded line by line: one broken character must not cost the whole file.
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    rows, bad = [], []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            check_row(row)
            rows.append(row)
        except (ValueError, RecursionError) as error:
            # json says "line 1", which is not the line of the file: our own words instead
            text = str(error)
            bad.append((number, "not JSON" if isinstance(error, json.JSONDecodeError) else text))
    return rows, bad


def check_row(row: dict) -> None:
    """Give a row its usual names, in place; ValueError if something is missing or of a wrong
    kind."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    # Benchmarks say question; people say solution where rollout rows say response.  Where there
    # are token ids, the text is not needed.
    for name, other in (("problem", "question"), ("response", "solution")):
        if row.get(name) is None and row.get(other) is not None:
            row[name] = row[other]
        ids = row.get(TOKENS[name])
        if ids is not None:
            good = isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)
            if not good:
                raise ValueError(f"{TOKENS[name]} must be a list of token ids")
        elif row.get(name) is None:
            raise ValueError(f"no {name}")
        if row.get(name) is not None and not isinstance(row[name], str):
            raise ValueError(f"{name} must be text")
    gold = row.get("gold")
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float, type(None))):
        raise ValueError("gold must be text or a number")


# Which key holds the tokens of which text.
TOKENS = {"problem": "prompt_token_ids", "response": "response_token_ids"}
# Problem and solution may be this many times as long as the texts that the model was trained on:
# a model can be sampled beyond its positions, and then r_s is read as it was sampled.
TOO_LONG = 4


def report(rows: list[dict], bad: int, o: Options) -> None:
    """A summary on stderr; with gold answers, how good the verdicts were."""
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    said = {v: sum(row["verdict"] == v for row in rows) for v in ("right", "wrong", None)}
    say(f"{len(rows)} solutions: {said['right']} believed right, {said['wrong']} wrong, "
        f"{said[None]} without r_s" + (f"; {bad} lines left out" if bad else ""))
    foreign = sum(row["tokens_from"] == "text" and "response_token_ids" in row for row in rows)
    if foreign:
        say(f"{foreign} rows carry another tokenizer's ids: their text was used")
    differ = sum(row.get("text_tokens_differ", False) for row in rows)
    if differ:
        say(f"{differ} texts would be cut into other tokens than they were sampled as; their "
            "token ids were used")
    checked = [row for row in rows if row["r_v"] is not None]
    if checked:
        # Solutions of one problem belong together (AUROC within): its text tells, for rows of
        # several files may have the same prompt_id.
        known = [
            dict(row, prompt_id=None, problem=str([row.get("problem"), row.get(TOKENS["problem"])]))
            for row in checked
        ]
        say(verification_table({f"{len(checked)} with gold": metrics.verification(known)}))


# ---------------------------------------------------------------------------------------------
# what both do


def score_rows(model, tokenizer, rows: list[dict], batch_tokens: int, on_scored=None) -> list[dict]:
    """The rows with logp_zc, r_s, verdict, answer and, where there is a gold, r_v and checker."""
    prompts, responses, done = [], [], []
    for row in rows:
        prompt, response, facts = to_tokens(tokenizer, row)
        done.append({**row, **facts})
        prompts.append(prompt)
        responses.append(response)
    # Only what has an end can be read; the others keep None.
    ended = [i for i, row in enumerate(done) if row["finished"]]
    # A row of a megabyte is a mistake, and the cost grows with the square of the length.
    most = TOO_LONG * model.config.max_position_embeddings
    fit = [i for i in ended if len(prompts[i]) + len(responses[i]) <= most]
    if len(fit) < len(ended):
        warn(f"{len(ended) - len(fit)} solutions have over {most} tokens, {TOO_LONG} times what "
             "the model was made for: no r_s")
    ended = fit
    if on_scored is not None:
        on_scored(len(done) - len(ended))
    values = score(
        model, tokenizer.z_c_id, [prompts[i] for i in ended], [responses[i] for i in ended],
        batch_tokens=batch_tokens, on_scored=on_scored,
    )  # fmt: skip
    for i, value in zip(ended, values):
        done[i]["logp_zc"] = value
        done[i]["r_s"] = r_s(tokenizer, value)
        if done[i]["r_s"] is not None:
            done[i]["verdict"] = "right" if done[i]["r_s"] > 0.5 else "wrong"
    return [ask_checker(row) for row in done]


def to_tokens(tokenizer, row: dict) -> tuple[list[int], list[int], dict]:
    """(prompt ids, response ids, what is known of the row before scoring)."""
    prompt, response = row.get(TOKENS["problem"]), row.get(TOKENS["response"])
    facts = {"logp_zc": None, "r_s": None, "verdict": None, "tokens_from": "text"}
    if response is not None and own_tokens(tokenizer, row):
        facts["tokens_from"] = "ids"
        finished = response[-1] in tokenizer.stop_ids
        text = facts["response"] = tokenizer.decode(response)
        again = tokenizer.encode(text) + response[-1:] * finished
        facts["text_tokens_differ"] = again != response
    else:
        # With the ids of its response those of its prompt fall: they are the same model's.
        prompt = prompt if response is None else None
        finished = bool(row.get("finished", True))
        # The end of a solution is where r_s is read: a text has none, so it is given one.
        response = tokenizer.encode(row["response"]) + [tokenizer.stop_ids[0]] * finished
    if prompt is None:
        prompt = tokenizer.encode_prompt(row["problem"])
    elif max(prompt) >= tokenizer.size:
        raise ValueError(f"prompt_token_ids: token {max(prompt)} does not exist in this model")
    facts |= {"finished": finished, "response_tokens": len(response)}
    return prompt, response, facts


def own_tokens(tokenizer, row: dict) -> bool:
    """Are a row's token ids this model's?  ValueError if not and there is no text instead."""
    prompt, response = row.get(TOKENS["problem"]) or [], row[TOKENS["response"]]
    fit = max(prompt + response) < tokenizer.size
    # Solutions of one model scored by another: its ids mean other text here, or none.
    if fit and row.get("response") in (None, tokenizer.decode(response)):
        return True
    if row.get("response") is None or row.get("problem") is None:
        raise ValueError(
            "a row's token ids are another model's (too large, or of another text), and it has no "
            "problem and response as text"
        )
    return False


def ask_checker(row: dict) -> dict:
    """Add the boxed answer and, where there is a gold, r_v and the checker's reason, in place."""
    answer = row["answer"] = extract_answer(row["response"]) or None
    gold, row["r_v"] = row.get("gold"), None
    if gold is not None:
        # Not strict: exactly one box is a rule for training, where a model would exploit more.
        row["r_v"] = float(answer is not None and is_equivalent(answer, str(gold)))
        reason = "no boxed answer" if answer is None else explain(answer, str(gold)).rule
        row["checker"] = reason
    return row


if __name__ == "__main__":
    main_guard(main)
