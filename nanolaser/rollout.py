"""
The one noun of the tutorial: a sampled solution, from its first token to its line in the log.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Rollout:
    """One sampled solution: token ids in, token ids out, nothing decoded and re-encoded."""

    prompt_id: int  # index of its problem among the prompts given
    prompt_tokens: list[int]
    response_tokens: list[int] = field(default_factory=list)  # the stop token included
    logprobs: list[float] = field(default_factory=list)  # nats, of what was drawn as it was drawn
    logp_zc: float | None = None  # nats, at temperature 1; None: truncated, there is no end
    finished: bool = False  # ended with a stop token
    sample_id: int = 0  # which of its problem's n solutions it is
