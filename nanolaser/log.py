"""
What a training run says: the numbers of a step, a line about it, a word when nothing is learned.

    statistics   rollouts of a step -> the keys of metrics.jsonl that speak of them
    step_line    metrics of a step -> one aligned line
    eval_line    an evaluation -> one line
    Watch        notices when there is nothing to learn from, and says the likely cause
    doubts       what is odd about a run's options, before it starts
"""

from __future__ import annotations

import torch

from . import laser, metrics
from .rollout import Rollout


def statistics(rollouts: list[Rollout], group_size: int) -> dict:
    """What the rollouts of one step say, under the names of metrics.jsonl; None where undefined."""
    mean = lambda x: sum(x) / len(x) if x else None  # noqa: E731
    right = [r.r_s for r in rollouts if r.r_s is not None and r.r_v > 0.5]
    wrong = [r.r_s for r in rollouts if r.r_s is not None and r.r_v <= 0.5]
    groups = [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
    r_v = torch.tensor([[r.r_v for r in group] for group in groups])  # (P, G)
    errors = [r.checker_error for r in rollouts if r.checker_error]
    exact = [r.logp_ref for r in rollouts if r.logp_ref is not None]
    spread = torch.tensor(exact).std(correction=0).item() if exact else None
    return {
        "reward": mean([r.r_v for r in rollouts]),
        "reward_std": r_v.std(1).mean().item(),
        "r_s_correct": mean(right),
        "r_s_wrong": mean(wrong),
        "verification_f1": metrics.verification_f1(
            [r.r_v > 0.5 for r in rollouts], [r.r_s for r in rollouts]
        ).f1,
        "response_tokens": mean([len(r.response_tokens) for r in rollouts]),
        "finished_share": mean([float(r.finished) for r in rollouts]),
        "boxed_share": mean([float(r.answer is not None) for r in rollouts]),
        # no advantage in any of their solutions: all right, or all wrong
        "zero_std_groups": int((~laser.informative(r_v)).sum()),
        "checker_errors": len(errors),
        # with --c-ref exact: how constant it would be
        **({"c_ref": mean(exact), "c_ref_std": spread} if exact else {}),
    }


def step_line(m: dict, total: int) -> str:
    """One step on one aligned line."""
    show = lambda x, form="5.2f": "    -" if x is None else f"{x:{form}}"  # noqa: E731
    seconds = m["seconds_rollout"] + m["seconds_check"] + m["seconds_update"]
    return (
        f"{m['step']:5d}/{total} {m['phase']:<11} reward {m['reward']:.2f}  "
        f"r_s right {show(m['r_s_correct'])} wrong {show(m['r_s_wrong'])}  "
        f"F1 {show(m['verification_f1'])}  "
        f"loss {show(m['policy_loss'], '+.3f')} {show(m['self_reward_loss'], '.3f')}  "
        f"grad {show(m['grad_norm'])}  "
        f"tokens {m['response_tokens']:5.1f}  {seconds:.2f} s"
    )


def eval_line(step: int, e: dict) -> str:
    """One evaluation on one line, in per cent."""
    v, k = e["verification"], str(e["n"])
    show = lambda x: "  -  " if x is None else f"{100 * x:5.1f}"  # noqa: E731
    return (
        f"eval {step:5d}  accuracy {show(e['accuracy'])} +-{100 * (e['accuracy_stderr'] or 0):.1f}"
        f"  F1 {show(v['f1'])}  AUROC {show(v['auroc'])} (within {show(v['auroc_within'])})  "
        f"vote@{k} {show(e['majority_vote'][k])}  weighted {show(e['weighted_vote'][k])}"
    )


class Watch:
    """Notices when there is nothing to learn from, and says the likely cause."""

    PATIENCE = 20  # steps

    def __init__(self):
        self.degenerate = self.unboxed = self.truncated = 0

    def look(self, m: dict, problems: int) -> list[str]:
        """Warnings after this step's metrics: none, or one for each thing that has gone on for
        another PATIENCE steps."""
        count = lambda n, bad: n + 1 if bad else 0  # noqa: E731
        groups = problems + m.get("refilled_groups", 0)
        self.degenerate = count(self.degenerate, m["zero_std_groups"] == groups)
        self.unboxed = count(self.unboxed, m["boxed_share"] == 0)
        self.truncated = count(self.truncated, m["finished_share"] == 0)
        due = lambda n: n and n % self.PATIENCE == 0  # noqa: E731
        said = []
        if due(self.truncated):
            said.append(
                f"every solution of {self.truncated} steps was cut off: raise --max-new-tokens"
            )
        elif due(self.unboxed):
            said.append(
                f"no solution of {self.unboxed} steps had a \\boxed{{}} answer: does this model "
                "know the format?  Look at samples.jsonl"
            )
        elif due(self.degenerate):
            if m["reward"] in (0.0, 1.0):
                which = "right: harder" if m["reward"] else "wrong: easier"
                cause = f"now all {which} --data, or a larger --group-size"
            else:
                cause = "no problem is of medium difficulty: other --data, a larger --group-size"
            cut = 1 - m["finished_share"]
            if cut > 0.5:
                cause = f"{cut:.0%} were cut off: raise --max-new-tokens"
            said.append(
                f"for {self.degenerate} steps every group was all right or all wrong, so there is "
                f"nothing to compare; {cause}"
            )
        return said


def doubts(o, positions: int) -> list[str]:
    """What is odd about a run's options, yet no reason to refuse them; `positions` is how long the
    texts were that the model was trained on, in tokens."""
    said = []
    if o.max_new_tokens > positions:
        said.append(
            f"--max-new-tokens {o.max_new_tokens} is more than the {positions} tokens of text that "
            f"{o.model} was trained on: beyond them it writes nonsense"
        )
    # The paper's warm-ups are for 800 steps: in a short trial nothing else might ever happen.
    if o.alpha and o.steps <= o.reasoning_warmup:
        said.append(
            f"r_s is never trained: --reasoning-warmup {o.reasoning_warmup} leaves none of "
            f"{o.steps} steps for it"
        )
    return said
