"""
The two rewards of a solution that is there: r_v, what the checker says of the boxed answer, and r_s
on the scale that its model was trained on.  A function of the user's own may take the checker's
place, --reward my_reward.py:function.

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
from collections.abc import Callable, Sequence
from pathlib import Path

from . import laser
from .checker import extract_answer, is_equivalent


def judge(
    rollouts: list, problems: Sequence, tokenizer, gate: str | None = None, reward=None
) -> None:
    """Fill in text, answer and r_v of rollouts, whose prompt_id is a place in `problems`; `gate`:
    see `boxed_answer`; `reward`, from `load_reward`, takes the checker's place."""
    # In a group many solutions end in the same answer: each distinct one is judged once.
    verdicts: dict[tuple[str, str], tuple[bool | None, str | None]] = {}
    for r in rollouts:
        problem = problems[r.prompt_id]
        r.problem, r.gold = problem.problem, problem.answer
        r.response = tokenizer.decode(r.response_tokens)
        answer, r.checker_error = _without_raising(boxed_answer, r.response, gate)
        # A model that repeats the instruction leaves its \boxed{} empty: that is no answer, and
        # must not win a vote.
        r.answer = answer or None
        # Without a gold answer (sample.py) there is no verdict, only an answer to vote with.
        if r.gold is None or reward is not None:
            continue
        pair = r.answer, r.gold
        if r.answer is not None and pair not in verdicts:
            verdicts[pair] = _without_raising(is_equivalent, *pair)
        correct, error = verdicts.get(pair, (False, r.checker_error))
        r.r_v, r.checker_error = float(bool(correct)), error
    # All solutions at once: a reward may be a model of its own, and batches are cheaper.
    if reward is not None and rollouts:
        texts = zip(*((r.problem, r.response, r.gold) for r in rollouts))
        for r, r_v in zip(rollouts, reward(*texts)):
            r.r_v = r_v


def judged_rows(
    rollouts: list, problems: Sequence, tokenizer, token_ids: bool = False, reward=None
) -> list[dict]:
    """Rollouts as rows with answer, r_v and r_s, for those who only use a model."""
    judge(rollouts, problems, tokenizer, reward=reward)
    for r in rollouts:
        r.r_s = self_reward(r.logp_zc, tokenizer)
    return [r.row(token_ids) for r in rollouts]


def self_reward(logp_zc: float | None, tokenizer) -> float | None:
    """r_s of a log pi(z_c) in nats, on the scale that this model was trained on; None where there
    is no log pi(z_c), or no c_ref yet."""
    if logp_zc is None or tokenizer.c_ref is None:
        return None
    return laser.self_reward(
        logp_zc, tokenizer.c_ref, tokenizer.beta_v, tokenizer.self_reward_loss
    )


def boxed_answer(response: str, gate: str | None) -> str | None:
    """The answer in a response's box, or None where the gate is shut.

    The gates of the paper's training reward (reward_score/__init__.py of the released code):
        "box"   \\boxed{ stands in it exactly once
        "tags"  for prompts that ask for <think> and <answer>: </think>, <answer> and </answer> once
                each, in this order, with a box in the answer
        None    for evaluation: any text, its last box
    """
    if gate == "box":
        return extract_answer(response, strict=True)
    if gate == "tags":
        once = all(response.count(tag) == 1 for tag in ("</think>", "<answer>", "</answer>"))
        inside = response.partition("</think>")[2].partition("<answer>")[2]
        box = inside.partition("\\boxed{")[2]
        if not (once and "}" in box and response.endswith("</answer>")):
            return None
    return extract_answer(response.partition("</answer>")[0])


def _without_raising(function, *arguments):
    """(What the function returns, None), or (None, what it raised)."""
    # The checker promises not to raise, and is fuzzed.  But one degenerate text among millions must
    # cost one reward, not a training run of days.
    try:
        return function(*arguments), None
    except Exception as error:  # noqa: BLE001
        return None, f"{type(error).__name__}: {error}"[:200]


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
        """function(*arguments); ValueError with file, line and problem if it raises anything."""
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
