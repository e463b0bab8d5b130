"""
A reward of the user's own in the checker's place: --reward my_reward.py:function.

    def function(problem, response, answer): ...       # texts -> a number in [0, 1]
    def function(problems, responses, answers): ...    # lists of texts -> as many numbers

What it returns is r_v, in training and in evaluation alike; right is r_v > 0.5.  Only the file that
the command line names is executed: none from a checkpoint, from a data set or, when a run is
resumed, from its config.json (see run.reopen).
"""

from __future__ import annotations

import functools
import inspect
import numbers
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


@functools.cache  # a file is executed once
def load_reward(name: str | None) -> Callable[..., list[float]] | None:
    """The function behind FILE.py:FUNCTION, as one of lists (problems, responses, answers) to as
    many r_v; None for None.  ValueError for what is wrong with the file, or later with a reward."""
    if name is None:
        return None
    file, _, attribute = name.rpartition(":")
    path = Path(file).expanduser().absolute()
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"--reward {name}: give it as FILE.py:FUNCTION, a file that is there")

    def ask(problem: str, function, *arguments):
        # Whatever the user's code raises becomes one line: where in their file, and for which
        # problem.  A traceback through this project would hide just that.
        try:
            return function(*arguments)
        except Exception as error:  # (a SyntaxError alone knows its line itself)
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f.lineno for f in frames if f.filename == str(path)]
            line, what = (lines or [getattr(error, "lineno", 1)])[-1], type(error).__name__
            raise ValueError(f"{file}:{line}: {what}: {error}{problem}") from None

    # Executed here, before a model is loaded: what is wrong with it is known now.
    sys.path.append(str(path.parent))  # it may import what lies beside it
    function = ask("", runpy.run_path, str(path)).get(attribute)
    # Called once in thought: three texts have to fit, or it is refused before the first step.
    try:
        arguments = inspect.signature(function)
        arguments.bind("problem", "response", "answer")
    except (TypeError, ValueError):
        raise ValueError(f"--reward {name}: in {file} there is no function {attribute} of three "
                         "arguments (problem, response, answer)") from None  # fmt: skip
    # The name says how it wants to be called: one solution at a time, or all of a batch at once,
    # which is cheaper where the reward is a model.
    batched = next(iter(arguments.parameters)) == "problems"
    line = getattr(getattr(function, "__code__", None), "co_firstlineno", 1)

    def rewards(*lists: list) -> list[float]:
        """Lists of problems, responses and gold answers -> their r_v, checked."""
        # Every complaint names a problem, so that the user can try that one alone.
        rows = list(zip(*lists))
        said = [f", for {problem!r:.200}" for problem, *_ in rows]
        if batched:
            values = ask(said[0], function, *map(list, lists))
            if not hasattr(values, "__len__") or len(values) != len(rows):
                raise ValueError(f"{file}:{line}: {len(rows)} rewards are due, not {values!r:.80}")
        else:
            values = [ask(problem, function, *row) for problem, row in zip(said, rows)]
        for value, problem in zip(values, said):
            # Refused, not clipped: what was not meant would be learned for days.  (nan is not >= 0)
            if not isinstance(value, numbers.Real) or not 0 <= value <= 1:
                raise ValueError(f"{file}:{line}: {value!r:.80} is no number in [0, 1]{problem}")
        return [float(value) for value in values]

    return rewards
