"""
Problems and their gold answers: benchmark and training files, and the arithmetic made up here.

    load_problems("gsm8k", split="train")        # by alias, from the Hugging Face hub
    load_problems("my-problems.jsonl")           # a file: JSONL, or Parquet, or CSV
    load_problems("arithmetic", max_problems=8)  # generated: what the embedded model is trained on

A row of a file is one problem.  It holds `problem` or `question`, and `answer` or `final_answer`
(text or a number; GSM8K's "... #### 42" is understood), and if it likes `id`, `solution`, `level`
and `subject`.  What is wrong with a row is said with the file's name and the line, for in a file
of a hundred thousand rows "invalid JSON" alone is no help.

Nothing here imports the model or even torch: reading problems is instant.
"""

from __future__ import annotations

import csv
import difflib
import fnmatch
import io
import itertools
import json
import math
import random
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# alias -> (dataset on the hub, {split: its files}).  A benchmark with one split gives that split
# whatever was asked for: people disagree on whether the AIME is called train or test.
DATASETS: dict[str, tuple[str, dict[str, str]]] = {
    "deepmath": ("zwhe99/DeepMath-103K", {"train": "data/train-*.parquet"}),
    "gsm8k": (
        "openai/gsm8k",
        {"train": "main/train-*.parquet", "test": "main/test-*.parquet"},
    ),
    "math500": ("HuggingFaceH4/MATH-500", {"test": "test.jsonl"}),
    "aime24": ("HuggingFaceH4/aime_2024", {"train": "data/train-*.parquet"}),
    "aime25": ("math-ai/aime25", {"test": "test.jsonl"}),
    "amc23": ("math-ai/amc23", {"test": "*test*.parquet"}),
    # English, text only, open-ended, competition mathematics: the part the paper uses
    "olympiadbench": ("Hothan/OlympiadBench", {"train": "*OE_TO_maths_en_COMP*.parquet"}),
    "gpqa": ("Idavidrein/gpqa", {"train": "gpqa_diamond.csv"}),  # gated: accept its terms first
}

# Generated: how many operations a problem has.  The hard ones are the longest of these.
ARITHMETIC = {"arithmetic": (2, 3, 4, 5), "arithmetic-hard": (5,)}

# What a field of Problem may be called in a row, the best name first.
FIELDS = {
    "problem": ("problem", "question", "Question"),
    "answer": ("answer", "final_answer"),
    "id": ("id", "unique_id", "Record ID"),
    "solution": ("solution",),
    "level": ("level", "difficulty"),
    "subject": ("subject", "topic", "Subdomain"),
}
RIGHT, WRONG = "Correct Answer", "Incorrect Answer "  # GPQA's choices: one right, three wrong


@dataclass(frozen=True)
class Problem:
    """A problem and its gold answer."""

    id: str  # unique within what was loaded
    problem: str
    answer: str
    level: str | None = None
    subject: str | None = None
    solution: str | None = None


def load_problems(
    name: str,
    split: str = "test",
    max_problems: int | None = None,
    seed: int = 0,
    parses: Callable[[str], bool] | None = None,
) -> list[Problem]:
    """The problems of an alias, of a file, or `arithmetic`; the first `max_problems` of them.

    `seed` orders the choices of multiple-choice problems, and makes up the arithmetic.  `parses`
    (checker.parses) is asked about every gold answer; how many it cannot read is said on stderr,
    for a solution to such a problem can never be found right.  ValueError, FileNotFoundError or
    OSError, one line, for a name or a row that makes no sense.
    """
    if max_problems is not None and max_problems < 1:
        raise ValueError(f"max_problems is {max_problems}, but has to be at least 1")
    if name in ARITHMETIC:
        return arithmetic_problems(max_problems or 1000, seed, split, ARITHMETIC[name])
    files = _files(name, split)
    problems: list[Problem] = []
    notes = _Notes(name)
    rows = (row for file in files for row in _rows(file))
    for number, where, row in itertools.islice(rows, max_problems):
        # Rows without an id are named by where they are: line of the file, place in the benchmark.
        hub = name.lower() in DATASETS
        default_id = f"{name.lower()}-{len(problems) + 1}" if hub else f"{files[0].stem}-{number}"
        problem = _problem(row, where, default_id, seed, notes)
        problems.append(replace(problem, id=notes.unique(problem.id)))
    if not problems:
        raise ValueError(f"{name}: there is not one problem in it")
    notes.tell(problems, parses)
    return problems


def train_and_test(
    data: str, eval_data: str, count: int, parses: Callable[[str], bool] | None = None
) -> tuple[list[Problem], list[Problem]]:
    """The problems to train on and at most `count` to evaluate on; no text is in both.

    Where both names are the same: a benchmark with two splits gives its test split; of a file, or
    of a benchmark with one split, every n-th problem is held out, at most a fifth (rounded up).
    Arithmetic is made up while training, so its first list is empty.  Errors: those of
    load_problems, and ValueError if nothing is left to train on.
    """
    if data in ARITHMETIC:
        return [], load_problems(eval_data, "test", count, parses=parses)
    train = load_problems(data, "train", parses=parses)
    _, splits = DATASETS.get(data.lower(), ("", {}))
    if data == eval_data and len(splits) < 2:
        # Neither drawn nor the first ones: they are the same for every seed, and easy and hard
        # alike where a file is sorted.
        test = train[:: max(5, math.ceil(len(train) / count))]
    else:
        test = load_problems(eval_data, "test", count, parses=parses)
    # By text, not by place: a problem may be in a file twice, or in two files.
    evaluated = {problem.problem for problem in test}
    train = [problem for problem in train if problem.problem not in evaluated]
    if not train:
        raise ValueError(f"{data}: nothing to train on is left beside the problems to evaluate on")
    return train, test


class _Notes:
    """What is odd about the rows but no reason to stop: counted, and said once at the end."""

    def __init__(self, name: str):
        self.name, self.broken, self.renamed, self.ids = name, 0, 0, set()

    def unique(self, identifier: str) -> str:
        """The id, or one derived from it if it was given to an earlier problem."""
        # Answers are grouped by problem: two problems under one id would vote as one.
        fresh, count = identifier, 1
        while fresh in self.ids:
            count += 1
            fresh = f"{identifier}#{count}"
        self.renamed += fresh != identifier
        self.ids.add(fresh)
        return fresh

    def tell(self, problems: list[Problem], parses: Callable[[str], bool] | None) -> None:
        """Print what was noted, one line each, on stderr."""
        unread = [p for p in problems if parses is not None and not parses(p.answer)]
        if unread:
            self.say(
                f"{len(unread)} of {len(problems)} gold answers cannot be read by the checker "
                f"(first: {unread[0].id}: {unread[0].answer[:60]!r}); only a literal match counts"
            )
        if self.renamed:
            self.say(f"{self.renamed} problems have an id that occurred before; #2, #3 was added")
        if self.broken:
            self.say(f"{self.broken} texts held NUL or half characters; U+FFFD stands for them")

    def say(self, note: str) -> None:
        print(f"warning: {self.name}: {note}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# from a row to a problem


def _problem(row: dict[str, Any], where: str, default_id: str, seed: int, notes: _Notes) -> Problem:
    """The problem of a row; ValueError names `where` (file:line) and the field that is wrong."""
    values = {}
    for field, names in FIELDS.items():
        # the first name that has a value: a row may carry answer: null beside final_answer
        present = [n for n in names if row.get(n) is not None]
        values[field] = _text(row[present[0]], f"{where}: {present[0]}", notes) if present else None
    identifier = values.pop("id") or default_id
    if row.get(RIGHT) is not None:
        values |= _multiple_choice(row, where, values["problem"], f"{seed} {identifier}", notes)
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


def _text(value: Any, where: str, notes: _Notes) -> str:
    """A field as clean text: numbers as they are written, several answers joined by commas."""
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(v, where, notes) for v in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} is neither text nor a number: {str(value)[:60]}")
    text = str(value)
    # JSON can write half of a UTF-16 pair, which is no character and cannot be encoded again,
    # and NUL, which ends the text for everything written in C.  One row must not end a run.
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    clean = clean.replace("\0", "\ufffd")
    notes.broken += clean != text
    return clean.strip()


def _multiple_choice(
    row: dict, where: str, question: str | None, seed: str, notes: _Notes
) -> dict[str, str]:
    """Question and choices as one problem, whose answer is a letter."""
    wrong = [row[k] for k in sorted(row) if k.startswith(WRONG) and row[k] is not None]
    choices = [_text(c, where, notes) for c in (row[RIGHT], *wrong)]
    right = choices[0]
    # Seeded by the problem and not by its place: the letter does not depend on which other
    # problems were read, and every model is asked the same.
    random.Random(seed).shuffle(choices)
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    lines = [f"{letter}) {choice}" for letter, choice in zip(letters, choices)]
    task = "Which choice is right?  Give its letter."
    return {
        "problem": "\n".join([f"{question or ''}\n", *lines, "", task]),
        "answer": letters[choices.index(right)],
    }


# ---------------------------------------------------------------------------------------------
# from a name to rows


def _files(name: str, split: str) -> list[Path]:
    """The files behind a name: one on disk, or those of a hub dataset's split."""
    if name.lower() in DATASETS:
        return _hub_files(name.lower(), split)
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in READERS)[:5])
        raise ValueError(f"{name} is a folder; name a file in it ({inside or 'none fits'})")
    if path.suffix or "/" in name:
        raise FileNotFoundError(f"no such data file: {name}")
    known = [*ARITHMETIC, *DATASETS]
    alike = difflib.get_close_matches(name.lower(), known, n=3)
    hint = f"did you mean {' or '.join(alike)}?" if alike else f"known: {', '.join(known)}"
    raise ValueError(f"{name!r} is neither a data file nor an alias; {hint}")


def _hub_files(alias: str, split: str) -> list[Path]:
    """Download (or find in the cache) the files of one split of a benchmark."""
    from .files import fetch  # here: files on disk need no hub

    repository, splits = DATASETS[alias]
    if len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise ValueError(f"{alias} has no split {split!r}, only {', '.join(splits)}")
    folder = fetch(repository, [splits[split]], kind="dataset")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = [folder / n for n in names if fnmatch.fnmatch(n, splits[split])]
    if not files:
        raise ValueError(
            f"{alias}: {repository} has no file {splits[split]} (any more, or in the cache); "
            "download it by hand and name the file"
        )
    return files


def _rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, "file:line", row) of every row, in order, read as they are asked for."""
    reader = READERS.get(path.suffix.lower(), _read_jsonl)
    for number, row in reader(path):
        yield number, f"{path}:{number}", row


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """One JSON object a line; empty lines are skipped."""
    # Bytes, split at newlines only: text mode would also split at characters such as U+2028,
    # which may stand unescaped inside a JSON string.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _json_row(line, f"{path}:{number}")


def _json_row(line: bytes, where: str) -> dict:
    """The JSON object of a line; ValueError says what is wrong with it."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    try:
        # Numbers stay as they are written: an answer 0.10 or one of 5,000 digits is a text to be
        # compared exactly, not a float.
        row = json.loads(
            line.decode("utf-8-sig"), parse_int=str, parse_float=str, parse_constant=refuse
        )
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply to be a problem") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text (byte {error.start + 1})") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); one object a line is expected") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object; one problem a line is expected")
    return row


def _read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows of a CSV file with a header line; the number is that of the row's last line."""
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
        known = {name for names in FIELDS.values() for name in names}
        useful = lambda n: n in known or n.startswith((RIGHT, WRONG))  # noqa: E731
        columns = [n for n in file.schema_arrow.names if useful(n)]
        batches: Iterable = file.iter_batches(batch_size=1000, columns=columns)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(rows, start=1)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from None


READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


# ---------------------------------------------------------------------------------------------
# arithmetic: the problems of the embedded model, such as (14+25)*2-9=?
#
# An expression is a number, or a tuple (operator, left, right).  All values on the way lie in
# 0..999 and a product has one factor below 10: steps that a model of a million parameters can do
# in one go, so that what it gets wrong is how it got there, not that a step was beyond it.

OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
LARGEST = 999  # of any value on the way
OPERAND = 30  # largest number in a problem


def arithmetic_value(expression) -> int:
    """The value of an expression (a number, or a tuple of operator, left, right)."""
    if isinstance(expression, int):
        return expression
    operator, left, right = expression
    return OPERATORS[operator](arithmetic_value(left), arithmetic_value(right))


def arithmetic_text(expression) -> str:
    """The expression as one writes it, with no parenthesis more than needed."""
    if isinstance(expression, int):
        return str(expression)
    operator, left, right = expression
    weak = lambda e: not isinstance(e, int) and e[0] in "+-"  # noqa: E731
    wrap = lambda e, on: f"({arithmetic_text(e)})" if on else arithmetic_text(e)  # noqa: E731
    # a-(b+c) and a*(b*c) keep theirs: operators of one rank are read from the left
    tight = not isinstance(right, int) and (weak(right) or operator == "*")
    return wrap(left, operator == "*" and weak(left)) + operator + wrap(right, tight)


def arithmetic_expression(rng: random.Random, operations: int):
    """A random expression of so many operations whose values all stay in bounds."""
    while True:
        try:
            return _grow(rng, operations)
        except OverflowError:
            continue  # some value out of bounds: draw a new one


def _grow(rng: random.Random, operations: int):
    if operations == 0:
        return rng.randint(1, OPERAND)
    # leaning to the left, as people write sums: 3+4*5-6 more often than deep brackets
    on_left = rng.choice((0, operations - 1, operations - 1, rng.randint(0, operations - 1)))
    left, right = _grow(rng, on_left), _grow(rng, operations - 1 - on_left)
    operator, a, b = rng.choice("+-*"), arithmetic_value(left), arithmetic_value(right)
    value = OPERATORS[operator](a, b)
    if not 0 <= value <= LARGEST or (operator == "*" and min(a, b) > 9):
        raise OverflowError
    return operator, left, right


def is_held_out(text: str) -> bool:
    """Every eighth expression, by a checksum of its text, belongs to the test split: no training,
    of the embedded model or on it, ever sees one."""
    return zlib.crc32(text.encode()) % 8 == 0


def arithmetic_problems(
    count: int,
    seed: int,
    split: str = "train",
    operations: tuple[int, ...] = ARITHMETIC["arithmetic"],
) -> list[Problem]:
    """`count` random problems of the split (train, test); the same seed gives the same ones."""
    rng = random.Random(f"{split} {seed}")
    problems: list[Problem] = []
    while len(problems) < count:
        n = rng.choice(operations)
        expression = arithmetic_expression(rng, n)
        text = arithmetic_text(expression)
        if is_held_out(text) == (split == "test"):
            problems.append(
                Problem(
                    id=f"{split}-{seed}-{len(problems)}",
                    problem=text + "=?",
                    answer=str(arithmetic_value(expression)),
                    level=str(n),
                )
            )
    return problems
