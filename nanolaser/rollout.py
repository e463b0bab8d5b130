"""
The one noun of this project: a rollout, one sampled solution, from first token to line in the log.

    sampler    fills in the tokens, their log-probs, and log pi(z_c) after the end
    judge      decodes them once, extracts the boxed answer, and asks the checker:  r_v (reward.py)
    train.py   computes r_s and the advantages from lists of rollouts, then learns from the tokens
    row        what samples.jsonl, evaluate.py and sample.py write

Token ids go from the sampler to the update as they were drawn.  Text is made for the checker and
for people, and never encoded again: that would not give the same tokens back.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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

    # from `judge`, r_s and advantage from train.py
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
