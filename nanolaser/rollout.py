"""
The one noun of this project: a rollout, one sampled solution, from its first token to its line in
the log.

    sampler    fills in the tokens, their log-probs, and log pi(z_c) after the end
    judge      decodes them once, extracts the boxed answer, and asks the checker:  r_v
    train.py   computes r_s and the advantages from lists of rollouts, then learns from the tokens
    row        what samples.jsonl, evaluate.py and sample.py write

Token ids go from the sampler to the update as they were drawn.  Text is made for the checker and
for people, and never encoded again: that would not give the same tokens back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from . import laser
from .checker import extract_answer, is_equivalent


@dataclass
class Rollout:
    """One sampled solution y of a problem x."""

    # from the sampler
    prompt_id: int  # index of its problem among those given
    prompt_tokens: list[int]
    response_tokens: list[int] = field(default_factory=list)  # the stop token included
    logprobs: list[float] = field(default_factory=list)  # nats, one a response token, as drawn
    logp_zc: float | None = None  # nats, at temperature 1; None: truncated, there is no end
    logp_ref: float | None = None  # likewise of the model before training: --c-ref exact alone
    finished: bool = False  # ended with a stop token
    sample_id: int = 0  # which of its problem's solutions it is

    # from `judge`
    problem: str = ""
    gold: str | None = None  # the reference answer; None: nobody knows
    response: str = ""  # the text of response_tokens
    answer: str | None = None  # what stands in its box; None: no answer
    r_v: float | None = None  # verified reward, 0 or 1 (of --reward: in between); None: no gold
    r_s: float | None = None  # self-reward, about 0 to 1; None where there is no logp_zc or c_ref
    checker_error: str | None = None  # what the checker raised, if it did
    advantage: float | None = None  # in training: how much better than the others of its group

    def row(self, token_ids: bool = False) -> dict:
        """This rollout as one JSON row, of text; `token_ids` adds the tokens themselves."""
        names = "problem gold response answer r_v r_s logp_zc finished".split()
        row = {name: getattr(self, name) for name in names}
        row |= {"response_tokens": len(self.response_tokens), "prompt_id": self.prompt_id}
        rare = ("logp_ref", "checker_error", "advantage")
        row |= {name: getattr(self, name) for name in rare if getattr(self, name) is not None}
        if token_ids:
            row["prompt_token_ids"] = self.prompt_tokens
            row["response_token_ids"] = self.response_tokens
        return row


def judge(
    rollouts: list[Rollout], problems: Sequence, tokenizer, gate: str | None = None, reward=None
) -> None:
    """Fill in text, answer and r_v of rollouts, whose prompt_id is a place in `problems`; `gate`:
    see `boxed_answer`; `reward`, the user's own (see reward.py), takes the checker's place."""
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


# ---------------------------------------------------------------------------------------------
# for those who only use a model


def judged_rows(
    rollouts: list[Rollout], problems: Sequence, tokenizer, token_ids: bool = False, reward=None
) -> list[dict]:
    """Rollouts as rows with answer, r_v and r_s."""
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
