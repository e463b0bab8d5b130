"""
Problems and their gold answers: benchmarks, files, and what is made up on the spot.

    load_problems("gsm8k", split="train")        # by alias, from the Hugging Face hub
    load_problems("my-problems.jsonl")           # a file: JSONL, or Parquet, or CSV
    load_problems("arithmetic", max_problems=8)  # generated: what the embedded model is trained on
    ProblemStream(problems, 128, seed=0).at(7)   # what step 7 of a training run learns from

A row of a file is one problem: `problem` or `question`, `answer` or `final_answer` (text or a
number; GSM8K's "... #### 42" is understood), and if it likes `id`, `solution`, `level`, `subject`,
and `options` for a multiple choice whose answer is a letter.  What is wrong with a row is said with
the file's name and the line: of a hundred thousand rows "invalid JSON" alone is no help.

Nothing here imports the model or even torch: reading problems is instant.
"""

from __future__ import annotations

import csv
import fnmatch
import functools
import io
import itertools
import math
import random
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .cli import near
from .files import fetch, read_jsonl
from .tiny import arithmetic, subset_sum

# alias -> (dataset on the hub, {split: its files}).  A benchmark with one split gives that split
# whatever was asked for: people disagree on whether the AIME is called train or test.
DATASETS: dict[str, tuple[str, dict[str, str]]] = {
    "deepmath": ("zwhe99/DeepMath-103K", {"train": "data/train-*.parquet"}),
    "gsm8k": ("openai/gsm8k", {s: f"main/{s}-*.parquet" for s in ("train", "test")}),
    "math500": ("HuggingFaceH4/MATH-500", {"test": "test.jsonl"}),
    "aime24": ("HuggingFaceH4/aime_2024", {"train": "data/train-*.parquet"}),
    "aime25": ("math-ai/aime25", {"test": "test.jsonl"}),
    "amc23": ("math-ai/amc23", {"test": "*test*.parquet"}),
    # English, text only, open-ended, competition mathematics: the part the paper uses
    "olympiadbench": ("Hothan/OlympiadBench", {"train": "*OE_TO_maths_en_COMP*.parquet"}),
    # General reasoning, for which the paper trains on WebInstruct-verified.
    "webinstruct-verified": ("TIGER-Lab/WebInstruct-verified",
                             {s: f"*{s}*.parquet" for s in ("train", "test")}),
    "mmlu-pro": ("TIGER-Lab/MMLU-Pro", {"test": "data/test-*.parquet"}),
    "gpqa": ("Idavidrein/gpqa", {"train": "gpqa_diamond.csv"}),  # gated: accept its terms first
}

# Made up on the spot: name -> endless (text, answer, level) of a (seed, split).  `operations` is
# how many a problem has; the hard ones are the longest of these.
MADE_UP: dict[str, Callable[[int, str], Iterator[tuple[str, str, int]]]] = {
    "arithmetic": functools.partial(arithmetic.made_up, operations=(2, 3, 4, 5)),
    "arithmetic-hard": functools.partial(arithmetic.made_up, operations=(5,)),
    "subset-sum": subset_sum.made_up,
}

SUFFIXES = (".jsonl", ".csv", ".parquet")  # of files of problems

# What a field of Problem may be called in a row, the best name first.
FIELDS = {
    "problem": ("problem", "question", "Question"),
    "answer": ("answer", "final_answer"),
    "id": ("id", "unique_id", "question_id", "Record ID"),
    "solution": ("solution",),
    "level": ("level", "difficulty"),
    "subject": ("subject", "topic", "category", "Subdomain"),
}
# Two ways of writing down a multiple choice: MMLU-Pro has its choices in order, and the right
# one's letter as the answer; GPQA names one right and three wrong ones, in no order.
OPTIONS, RIGHT, WRONG = "options", "Correct Answer", "Incorrect Answer "
LETTERS = list(string.ascii_uppercase)


@dataclass(frozen=True)
class Problem:
    """A problem and its gold answer."""

    id: str  # unique within what was loaded
    problem: str
    answer: str | None  # None: nobody knows it (sample.py may be asked such a thing)
    level: str | None = None
    subject: str | None = None
    solution: str | None = None


def load_problems(
    name: str, split: str = "test", max_problems: int | None = None, seed: int = 0,
    parses: Callable[[str], bool] | None = None,
) -> list[Problem]:  # fmt: skip
    """The problems of an alias, of a file, or made up; the first `max_problems` of them.  `seed`
    orders GPQA's choices, and makes up what is made up; `parses` (checker.parses) is asked about
    every gold answer.  ValueError or OSError, one line, for a name or a row without sense."""
    if max_problems is not None and max_problems < 1:
        raise ValueError(f"max_problems is {max_problems}, but has to be at least 1")
    if name in MADE_UP:
        return made_up_problems(max_problems or 1000, seed, split, name)
    files, hub = _files(name, split), name.lower() in DATASETS
    problems: dict[str, Problem] = {}  # by id
    # What is odd about the rows but no reason to stop: counted, and said once at the end.
    notes: Counter[str] = Counter()
    # Lazily: of a hundred thousand rows the first ten cost ten.
    rows = ((number, f"{file}:{number}", row) for file in files for number, row in _rows(file))
    for number, where, row in itertools.islice(rows, max_problems):
        # Rows without an id are named by where they are: line of the file, place in the benchmark.
        default_id = f"{name.lower()}-{len(problems) + 1}" if hub else f"{files[0].stem}-{number}"
        problem = _problem(row, where, default_id, seed, notes)
        # Answers are grouped by problem: two problems under one id, x, would vote as one.  So the
        # second is called x#2, the third x#3.
        fresh, count = problem.id, 1
        while fresh in problems:
            count += 1
            fresh = f"{problem.id}#{count}"
        notes["problems have an id that occurred before; #2, #3 was added"] += fresh != problem.id
        problems[fresh] = replace(problem, id=fresh)
    if not problems:
        raise ValueError(f"{name}: there is not one problem in it")
    # A solution to a problem whose gold answer the checker cannot read is never found right.
    unread = [p for p in problems.values() if parses is not None and not parses(p.answer)]
    if unread:
        notes[f"of {len(problems)} gold answers cannot be read by the checker (first: "
              f"{unread[0].id}: {unread[0].answer[:60]!r}); only a literal match counts"
              ] = len(unread)  # fmt: skip
    for note, count in notes.items():
        if count:
            print(f"warning: {name}: {count} {note}", file=sys.stderr)
    return list(problems.values())


def train_and_test(
    data: str, eval_data: str, count: int | None, parses: Callable[[str], bool] | None = None
) -> tuple[list[Problem], list[Problem]]:
    """The problems to train on and at most `count` (None: all) to evaluate on; no text is in both.
    Where they are made up while training, the first list is empty.  ValueError if nothing is left
    to train on."""
    # Where both names are the same: a benchmark with two splits gives its test split; of all else
    # every n-th problem is held out, at most a fifth (rounded up).
    if data in MADE_UP:
        # The splits share no problem: which one it is in, its text decides (tiny/arithmetic.py).
        return [], load_problems(eval_data, "test", count, parses=parses)
    train = load_problems(data, "train", parses=parses)
    if data == eval_data and not has_test_split(data):
        # Neither drawn nor the first ones: they are the same for every seed, and easy and hard
        # alike where a file is sorted.  Of 1000 problems 400 are asked for: every fifth, 200; 30
        # are: every 34th, 30.
        test = train[:: max(5, math.ceil(len(train) / (count or len(train))))]
    else:
        test = load_problems(eval_data, "test", count, parses=parses)
    # By text, not by place: a problem may be in a file twice, or in two files.
    evaluated = {problem.problem for problem in test}
    train = [problem for problem in train if problem.problem not in evaluated]
    if not train:
        raise ValueError(f"{data}: nothing to train on is left beside the problems to evaluate on")
    return train, test


def has_test_split(name: str) -> bool:
    """Whether training on this data set leaves a split of it alone: arithmetic, GSM8K."""
    return name in MADE_UP or len(DATASETS.get(name.lower(), ("", ()))[1]) > 1


def made_up_problems(count: int, seed: int, split: str = "train", name: str = "arithmetic"
                     ) -> list[Problem]:
    """`count` random problems of the split (train, test); the same seed gives the same ones."""
    drawn = itertools.islice(MADE_UP[name](seed, split), count)
    return [Problem(id=f"{split}-{seed}-{i}", problem=text, answer=answer, level=str(level))
            for i, (text, answer, level) in enumerate(drawn)]


class ProblemStream:
    """The problems of each step: once through all of them in an epoch, each epoch in an order of
    its own; without any, those of the name `made_up`.  ValueError without either."""

    # All is a function of (seed, step): nothing to save, and nothing to get wrong, when a run is
    # resumed.
    def __init__(self, problems: list[Problem], problems_per_step: int, seed: int,
                 made_up: str | None = None):
        if not problems and made_up not in MADE_UP:
            raise ValueError("there is no problem to learn from")
        self.problems, self.made_up = problems, None if problems else made_up
        self.problems_per_step, self.seed = problems_per_step, seed
        self._epoch, self._order = -1, []  # the order that was asked for last

    def at(self, step: int, more: int = 0) -> list[Problem]:
        """The problems of one step, counted from 1, and `more` fresh ones after them."""
        P, seed = self.problems_per_step, self.seed * 1_000_003 + step
        if self.made_up:
            # No two steps of a run share a seed, and neither do two runs of up to a million steps.
            return made_up_problems(P + more, seed, name=self.made_up)
        # 10 problems, 4 a step: step 3 takes the last 2 of epoch 0 and the first 2 of epoch 1.
        places = range((step - 1) * P, step * P)
        # Fresh ones are any others: taken from the epoch, they would move every later step.
        fresh = random.Random(seed).choices(self.problems, k=more)
        return [self._problem(place) for place in places] + fresh

    def for_c_ref(self, count: int) -> list[Problem]:
        """`count` problems that differ, or as many as there are: those that c_ref is measured on,
        before the first step."""
        if self.made_up:
            # Twice as many as asked for, since short ones repeat now and then.
            drawn = made_up_problems(2 * count, self.seed * 1_000_003, name=self.made_up)
        else:
            drawn = [self._problem(place) for place in range(len(self.problems))]
        distinct: dict[str, Problem] = {}
        for problem in drawn:
            distinct.setdefault(problem.problem, problem)
        return list(distinct.values())[:count]

    def _problem(self, place: int) -> Problem:
        """The problem at a place of the endless sequence epoch 0, epoch 1, ..."""
        epoch, place = divmod(place, len(self.problems))
        if epoch != self._epoch:
            # From the pair (seed, epoch), and not from seed + epoch: seed 1 would else see in
            # epoch 0 what seed 0 sees in epoch 1, and the two runs would be no repetition of the
            # experiment but the same one, shifted.
            self._epoch, self._order = epoch, list(range(len(self.problems)))
            random.Random(f"epoch {epoch} of seed {self.seed}").shuffle(self._order)
        return self.problems[self._order[place]]


# ---------------------------------------------------------------------------------------------
# from a row to a problem


def _problem(row: dict, where: str, default_id: str, seed: int, notes: Counter) -> Problem:
    """The problem of a row; ValueError names `where` (file:line) and the field that is wrong."""
    # 1. The fields, whatever the row calls them.
    values = {}
    for field, names in FIELDS.items():
        # the first name that has a value: a row may carry answer: null beside final_answer
        present = [n for n in names if row.get(n) is not None]
        values[field] = _text(row[present[0]], f"{where}: {present[0]}", notes) if present else None
    identifier = values.pop("id") or default_id
    # 2. A multiple choice becomes a problem whose answer is a letter.
    if row.get(RIGHT) is not None:
        wrong = [row[k] for k in sorted(row) if k.startswith(WRONG) and row[k] is not None]
        choices = [_text(c, where, notes) for c in (row[RIGHT], *wrong)]
        right = choices[0]
        # Seeded by the problem and not by its place: the letter does not depend on which other
        # problems were read, and every model is asked the same.
        random.Random(f"{seed} {identifier}").shuffle(choices)
        values["answer"] = LETTERS[choices.index(right)]
        values["problem"] = _multiple_choice(values["problem"], choices)
    elif row.get(OPTIONS) is not None:
        # As they stand: they may refer to each other ("both A and C").
        listed = row[OPTIONS] if isinstance(row[OPTIONS], list) else []
        choices = [_text(c, f"{where}: {OPTIONS}", notes) for c in listed]
        if values["answer"] not in LETTERS[: len(choices)]:
            raise ValueError(f"{where}: the answer {values['answer']!r} is not the letter of one "
                             f"of {len(choices)} {OPTIONS}")  # fmt: skip
        values["problem"] = _multiple_choice(values["problem"], choices)
    # 3. Without a text or a gold answer nothing can be asked, or judged.
    for field in ("problem", "answer"):
        if not values[field]:
            names = " or ".join(FIELDS[field][:2])
            raise ValueError(f"{where}: the row has no {names} (it has: {', '.join(row)[:200]})")
    if "####" in values["answer"]:
        # GSM8K: the worked solution, then #### and the number
        solution, _, answer = values["answer"].rpartition("####")
        values |= {"answer": answer.strip(), "solution": values["solution"] or solution.strip()}
        if not values["answer"]:
            raise ValueError(f"{where}: nothing follows #### in the answer")
    return Problem(id=identifier, **values)


def _multiple_choice(question: str | None, choices: list[str]) -> str:
    """Question and choices as one problem, whose answer is a letter."""
    lines = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices)]
    task = "Which choice is right?  Give its letter."
    return "\n".join([f"{question or ''}\n", *lines, "", task])


def _text(value: Any, where: str, notes: Counter) -> str:
    """A field as clean text: numbers as they are written, several answers joined by commas."""
    # OlympiadBench's final_answer is a list, of one answer mostly.
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(v, where, notes) for v in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} is neither text nor a number: {str(value)[:60]}")
    text = str(value)
    # JSON can write half of a UTF-16 pair, which is no character and cannot be encoded again,
    # and NUL, which ends the text for everything written in C.  One row must not end a run.
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    clean = clean.replace("\0", "\ufffd")
    notes["texts held NUL or half characters; U+FFFD stands for them"] += clean != text
    return clean.strip()


# ---------------------------------------------------------------------------------------------
# solutions that somebody has sampled


def read_solutions(name: str, **how: Any) -> Iterator[tuple[int, dict]]:
    """(line, row) of the solutions in a JSONL file: `problem` or `question` and `response` or
    `solution`, or `messages` as OpenAI's API has them, or token ids; `gold` is the reference
    answer, where there is one.  All else that a row holds stays in it.  `how` is read_jsonl's, its
    `on_damage` included; without that, ValueError "FILE:LINE ..." for a row without sense."""
    on_damage = how.get("on_damage")
    for number, row in read_jsonl(name, **how):
        try:
            yield number, _solution(row)
        except ValueError as error:
            if on_damage is None:
                raise ValueError(f"{name}:{number}: {error}") from None
            on_damage(number, str(error))


# Which key holds the tokens of which text.
TOKENS = {"problem": "prompt_token_ids", "response": "response_token_ids"}


def _solution(row: dict) -> dict:
    """A row under the names of rollout rows; ValueError if something is missing or of a wrong
    kind."""
    row = dict(row) | (_conversation(row["messages"]) if "messages" in row else {})
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
    # In a rollout row `answer` is what the model said.  A row of a benchmark, with a solution
    # added, has no `gold` and no verdict: there it is the reference.
    if not {"gold", "r_v"} & set(row):
        row["gold"] = next((row[k] for k in FIELDS["answer"] if row.get(k) is not None), None)
    gold = row.get("gold")
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float, type(None))):
        raise ValueError("gold must be text or a number")
    row["gold"] = None if gold is None else str(gold).rpartition("####")[2].strip()  # as GSM8K's
    return row


def _conversation(messages: Any) -> dict:
    """{problem, response} of [{"role": "user", "content": ...}, {"role": "assistant", ...}]."""
    try:
        # The instruction of a system message belongs to the prompt, not to the problem.
        asked, said = (m for m in messages if m["role"] != "system")
        if (asked["role"], said["role"]) == ("user", "assistant"):
            # A content may come in parts: [{"type": "text", "text": ...}]
            problem, response = (
                c if isinstance(c, str) else "".join(part["text"] for part in c)
                for c in (asked["content"], said["content"]))
            return {"problem": problem, "response": response}
    except (TypeError, KeyError, ValueError):  # of two turns in texts, anything may be missing
        pass
    raise ValueError("messages must be one question of the user and one answer of the assistant, "
                     "in text") from None


# ---------------------------------------------------------------------------------------------
# from a name to rows


def _files(name: str, split: str) -> list[Path]:
    """The files behind a name: one on disk, or those of a hub dataset's split."""
    # An alias, then a file, and then the question what else may have been meant.
    if name.lower() in DATASETS:
        return _hub_files(name.lower(), split)
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)[:5])
        raise ValueError(f"{name} is a folder; name a file in it ({inside or 'none fits'})")
    if path.suffix or "/" in name:
        raise FileNotFoundError(f"no such data file: {name}")
    known = [*MADE_UP, *DATASETS]
    hint = near(name.lower(), known, f"known: {', '.join(known)}")
    raise ValueError(f"{name!r} is neither a data file nor an alias; {hint}")


def _hub_files(alias: str, split: str) -> list[Path]:
    """Download (or find in the cache) the files of one split of a benchmark."""
    repository, splits = DATASETS[alias]
    if len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise ValueError(f"{alias} has no split {split!r}, only {', '.join(splits)}")
    folder = fetch(repository, [splits[split]], kind="dataset")
    # The cache may hold files of another split, which somebody asked for earlier.
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = [folder / n for n in names if fnmatch.fnmatch(n, splits[split])]
    if not files:
        raise ValueError(f"{alias}: {repository} has no file {splits[split]} (any more, or in the "
                         "cache); download it by hand and name the file")
    return files


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of every row, in order, read as they are asked for."""
    reader = {".csv": _read_csv, ".parquet": _read_parquet}.get(path.suffix.lower())
    # JSON's numbers as they are written: an answer 0.10, or one of 5,000 digits, is a text to be
    # compared exactly, not a float.
    return reader(path) if reader else read_jsonl(path, parse_int=str, parse_float=str)


def _read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows of a CSV file with a header line; the number is that of the row's last line."""
    # A cell may hold newlines: it is the reader that knows where a row ends.
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        for row in reader:
            yield reader.line_num, {k: v for k, v in row.items() if k is not None and v != ""}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows of a Parquet file, counted from 1, only the columns that are of use."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet files need pyarrow (pip install pyarrow)") from None
    try:
        file = parquet.ParquetFile(path)
        # DeepMath carries three long solutions a row: most of a gigabyte nobody here reads.
        known = {OPTIONS, *itertools.chain(*FIELDS.values())}
        useful = lambda n: n in known or n.startswith((RIGHT, WRONG))  # noqa: E731
        columns = [n for n in file.schema_arrow.names if useful(n)]
        batches = file.iter_batches(batch_size=1000, columns=columns)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from None
