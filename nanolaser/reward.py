"""
A reward of the user's own in place of the checker: --reward my_reward.py:function.

    def function(problem, response, answer): ...       # texts -> a number in [0, 1]
    def function(problems, responses, answers): ...    # lists of texts -> a list of numbers

The names of the arguments say which of the two it is.  What it returns is r_v, in training and in
evaluation alike; a solution counts as right where r_v > 0.5.

Only the file that the command line names is ever executed: never one out of a checkpoint, a data
set or, when a run is resumed, its config.json (see run.reopen).
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

Reward = Callable[[Sequence[str], Sequence[str], Sequence[str | None]], list[float]]


def load_reward(name: str) -> Reward:
    """The function that FILE.py:FUNCTION names, as one of lists of problems, responses and gold
    answers to as many r_v; ValueError for what is wrong with the file, or later with a reward."""
    path, attribute = reward_file(name), name.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location("own_reward", path)
    module = sys.modules["own_reward"] = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))  # it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{_where(error, path)}: {_said(error)}") from None
    function = getattr(module, attribute, None)
    try:
        arguments = inspect.signature(function)
        arguments.bind("problem", "response", "answer")
    except (TypeError, ValueError):
        raise ValueError(f"--reward: {attribute} of {path} is no function of three arguments: "
                         "(problem, response, answer), or lists of them") from None  # fmt: skip
    batched = next(iter(arguments.parameters)) == "problems"
    code = getattr(inspect.unwrap(function), "__code__", None)
    line = f"{path}:{code.co_firstlineno if code else attribute}"

    def rewards(problems, responses, answers) -> list[float]:
        rows = list(zip(problems, responses, answers))
        if batched:
            values = _ask(function, path, rows[0][0] if rows else "", *map(list, zip(*rows)))
            if not hasattr(values, "__len__") or len(values) != len(rows):
                raise ValueError(f"{line}: {len(rows)} solutions, but not as many rewards: "
                                 f"{values!r:.80}")  # fmt: skip
        else:
            values = [_ask(function, path, row[0], *row) for row in rows]
        return [_checked(value, line, row[0]) for value, row in zip(values, rows)]

    return rewards


def reward_file(name: str) -> Path:
    """The file of FILE.py:FUNCTION; ValueError or FileNotFoundError where it names none."""
    path = Path(name.rpartition(":")[0]).expanduser()
    if path.suffix != ".py":
        raise ValueError(f"--reward {name}: give it as FILE.py:FUNCTION")
    if not path.is_file():
        raise FileNotFoundError(f"--reward: no such file: {path}")
    return path


def _ask(function, path: Path, problem: str, *arguments):
    """What the user's function returns; ValueError names the line that raised, and the problem."""
    try:
        return function(*arguments)
    except Exception as error:
        raise ValueError(f"{_where(error, path)}: {_said(error)}, for {problem!r:.200}") from None


def _checked(value, line: str, problem: str) -> float:
    """A reward as a float in [0, 1]."""
    # Refused and not clipped: what was not meant would be learned for days.  A NaN fails both.
    try:
        if not isinstance(value, str) and 0 <= float(value) <= 1:
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{line}: a reward must be a number in [0, 1], not {value!r:.80}, "
                     f"for {problem!r:.200}")  # fmt: skip


def _where(error: Exception, path: Path) -> str:
    """FILE:LINE of the user's file, where an exception came out of it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if f.filename == str(path.absolute())]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else 1)  # a SyntaxError knows it
    return f"{path}:{line}"


def _said(error: Exception) -> str:
    """What an exception says, in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
