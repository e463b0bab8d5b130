"""
What a training run says: the numbers of a step (metrics.jsonl), a line about it, a vote to look at,
a word when nothing is learned, and live curves elsewhere.
"""

from __future__ import annotations

import importlib
import textwrap
from collections import Counter
from collections.abc import Callable

import torch

from . import laser, metrics
from .checker import is_equivalent
from .cli import warn
from .files import RunFolder
from .report import shorten, table
from .rollout import Rollout


def statistics(rollouts: list[Rollout], group_size: int) -> dict:
    """What the rollouts of one step say, under the names of metrics.jsonl; None where undefined."""
    # None, not nan or 0, where there is nothing to take a mean of: JSON knows no nan, and 0 would
    # be a value of r_s.
    mean = lambda x: sum(x) / len(x) if x else None  # noqa: E731
    # r_s is None where a solution was cut off: it has no end to read it at.
    right = [r.r_s for r in rollouts if r.r_s is not None and r.r_v > 0.5]
    wrong = [r.r_s for r in rollouts if r.r_s is not None and r.r_v <= 0.5]
    r_v = torch.tensor([r.r_v for r in rollouts]).view(-1, group_size)  # (P, G)
    # With --c-ref exact: log pi_ref(z_c) after what the policy writes by now.  How constant is it?
    exact = [r.logp_ref for r in rollouts if r.logp_ref is not None]
    spread = torch.tensor(exact).std(correction=0).item() if exact else None
    return {
        "reward": mean([r.r_v for r in rollouts]),
        "reward_std": r_v.std(1).mean().item(),
        "r_s_correct": mean(right),
        "r_s_wrong": mean(wrong),
        # how well r_s > 0.5 knows right from wrong; on samples of the policy that it is trained on
        "verification_f1": metrics.verification_f1(
            [r.r_v > 0.5 for r in rollouts], [r.r_s for r in rollouts]
        ).f1,
        # what a run that goes wrong shows first: longer and longer, cut off, without a box
        "response_tokens": mean([len(r.response_tokens) for r in rollouts]),
        "finished_share": mean([float(r.finished) for r in rollouts]),
        "boxed_share": mean([float(r.answer is not None) for r in rollouts]),
        # no advantage in any of their solutions: all right, or all wrong
        "zero_std_groups": int((~laser.informative(r_v)).sum()),
        "checker_errors": sum(bool(r.checker_error) for r in rollouts),
        **({"c_ref": mean(exact), "c_ref_std": spread} if exact else {}),
    }


def update_statistics(parts: list[list[float]], alpha: float, M: int, N: int) -> dict:
    """What one update says, from a row of sums of each micro-batch of each rank (grpo.statistics,
    then two sizes); M response tokens, N finished rollouts."""
    # Entropy, KL and the gaps are of what was computed, the tokens of rollouts with an advantage
    # and z_c of those with a weight; None if there were none.
    columns = list(zip(*parts))
    policy, self_reward, clipped, kl, entropy, tokens, ends = map(sum, columns[:7])
    gap, zc_gap = map(max, columns[7:9])
    padded, real = map(sum, columns[9:])
    policy, self_reward = policy / M, self_reward / N
    return {
        "loss": policy + alpha * self_reward,
        "policy_loss": policy,
        "self_reward_loss": self_reward,
        "clip_fraction": clipped / M,
        "approx_kl": kl / tokens if tokens else None,
        "entropy": entropy / tokens if tokens else None,
        "sampler_gap": gap if tokens else None,
        "zc_gap": zc_gap if ends else None,
        "padding_share": 1 - real / padded if padded else 0.0,
    }


# What a newcomer has to know to read the lines of a phase.
PHASES = {
    "reasoning": "plain GRPO learns to solve.  r_s is only read: near 0 for every solution, so "
    "that none is judged right, and F1 is 0.",
    "self-reward": "r_s is trained as well.  It first rises for right and wrong alike; F1 waits "
    "until they part, the right ones above 0.5.",
    "integrated": "r_s, which can tell them apart by now, also has a share of {tau:g} in the "
    "advantage.",
}
# Columns of a step's line: title, width, key in metrics.jsonl, format.  They fit into 79.
COLUMNS = (
    ("step", 7, "step", "d"), ("reward", 8, "reward", ".2f"),
    ("r_s right", 11, "r_s_correct", ".2f"), ("wrong", 7, "r_s_wrong", ".2f"),
    ("F1", 6, "verification_f1", ".2f"),
    ("loss", 8, "policy_loss", "+.3f"), ("of r_s", 8, "self_reward_loss", ".3f"),
    ("grad", 7, "grad_norm", ".2f"), ("tokens", 8, "response_tokens", ".1f"),
    ("s", 7, "seconds", ".2f"),
)  # fmt: skip


def phase_lines(phase: str, step: int, o) -> str:
    """What begins at this step, and the columns of the lines that follow."""
    # Said where it happens, not in a manual: whoever looks at a run for the first time asks at once
    # why F1 is 0, and the columns are far above by the time that a phase ends.
    said = PHASES[phase].format(tau=o.tau)
    if o.alpha == 0:
        said = "plain GRPO, as in every phase: r_s is only read, never trained."
    elif phase == "integrated" and o.tau == 0:
        said = "--tau 0: r_s is trained on, and has no share in the advantage."
    said = textwrap.fill(f"{phase}, from step {step}: {said}", 79)
    return f"\n{said}\n" + "".join(f"{title:>{width}}" for title, width, *_ in COLUMNS)


def step_line(m: dict) -> str:
    """One step on one line, under the columns of `phase_lines`."""
    seconds = m["seconds_rollout"] + m["seconds_check"] + m["seconds_update"]
    # Through the keys that metrics.jsonl has: what is on the screen can be looked up there.
    values = [(m | {"seconds": seconds})[key] for _, _, key, _ in COLUMNS]
    # None where a batch has no wrong solution, or no right one.
    cells = ["-" if x is None else f"{x:{form}}" for x, (*_, form) in zip(values, COLUMNS)]
    return "".join(f"{cell:>{width}}" for cell, (_, width, *_) in zip(cells, COLUMNS))


def eval_line(step: int, e: dict) -> str:
    """One evaluation of held-out problems on one line, in per cent."""
    v, k = e["verification"], str(e["n"])
    show = lambda x: "  -  " if x is None else f"{100 * x:5.1f}"  # noqa: E731
    return (
        f"eval {step:4d}  right {show(e['accuracy'])} +-{100 * (e['accuracy_stderr'] or 0):.1f}"
        f"  F1 {show(v['f1'])}  AUROC {show(v['auroc'])}"
        f"  vote@{k} {show(e['majority_vote'][k])}  by r_s {show(e['weighted_vote'][k])}"
    )


def vote_lines(rows: list[dict]) -> str:
    """The vote over the solutions to the most contested problem of an evaluation: its second answer
    has more votes than that of any other."""
    groups: dict[int, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    # Where all agree, and where no two do, there is nothing to see.  Counted by text: merging equal
    # answers, the slow part, is for the one problem that is shown.
    votes = lambda group: Counter(row["answer"] for row in group).most_common()  # noqa: E731
    group = max(groups.values(), key=lambda group: [n for _, n in votes(group)][1:2])
    classes = metrics.answer_classes([row["answer"] for row in group], is_equivalent)
    found = metrics.tally(classes, [row["r_s"] for row in group])
    lines = []
    for c in sorted(found, key=lambda c: -c.weight):  # the winner of the weighted vote first
        row = group[c.first]
        lines.append([shorten(row["answer"] or "(none)", 40), str(c.votes), f"{c.weight:.2f}",
                      "right" if (row["r_v"] or 0) > 0.5 else ""])
    problem = f"A vote, on the most contested problem: {shorten(group[0]['problem'], 40)}"
    return problem + "\n" + table(("answer", "votes", "sum of r_s", ""), lines)


class Watch:
    """Notices when there is nothing to learn from, and says the likely cause; and when the model is
    broken."""

    PATIENCE = 20  # steps: a few empty ones in a row are chance
    MAX_SKIPPED = 5  # updates without a finite gradient: one may be a wild batch

    def __init__(self):
        self.steps = [0, 0, 0]  # for how many each of the three signs has been there
        self.skipped = 0  # updates in a row

    def broken(self, m: dict) -> bool:
        """Whether the last MAX_SKIPPED updates were all skipped; each has harmed nothing."""
        if m["skipped_updates"]:
            self.skipped += 1
        elif m["grad_norm"]:  # a batch without any gradient, norm 0, is no sign of health
            self.skipped = 0
        return self.skipped >= self.MAX_SKIPPED

    def look(self, m: dict, problems: int) -> list[str]:
        """After this step's metrics: [] or, every PATIENCE steps that it goes on, a warning."""
        groups, finished = problems + m.get("refilled_groups", 0), m["finished_share"]
        # 1. Why might groups be all right or all wrong?
        cause = "no problem is of medium difficulty: other --data, a larger --group-size"
        if finished < 0.5:
            cause = f"{1 - finished:.0%} were cut off: raise --max-new-tokens"
        elif m["reward"] in (0.0, 1.0):
            which = "right: harder" if m["reward"] else "wrong: easier"
            cause = f"now all {which} --data, or a larger --group-size"
        # 2. Three signs.  Each is the cause of those below it: what is cut off has no box, without
        #    a box all are wrong, and where all are wrong no solution is better than another.  So
        #    one of them is said, the first.
        signs = [
            (finished == 0, "every solution of {n} steps was cut off: raise --max-new-tokens"),
            (m["boxed_share"] == 0, "no solution of {n} steps had a \\boxed{{}} answer: does this "
             "model know the format?  Look at samples.jsonl"),
            (m["zero_std_groups"] == groups, "for {n} steps every group was all right or all "
             f"wrong, so there is nothing to compare; {cause}"),
        ]  # fmt: skip
        self.steps = [n + 1 if there else 0 for n, (there, _) in zip(self.steps, signs)]
        due = [n > 0 and n % self.PATIENCE == 0 for n in self.steps]
        said = [text.format(n=n) for n, now, (_, text) in zip(self.steps, due, signs) if now]
        return said[:1]


def doubts(o, positions: int) -> list[str]:
    """What is odd about a run's options, yet no reason to refuse them; `positions` is how long the
    texts were that the model was trained on, in tokens."""
    said = []
    # Rotary positions go on for ever, what the model has learned of them does not.
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


# ---------------------------------------------------------------------------------------------
# live curves


def mirror(kind: str, folder: RunFolder, options: dict, first: int) -> Callable[[], None]:
    """Send tensorboard, wandb or trackio the numbers of each row of metrics.jsonl and evals.jsonl
    from step `first` on, as metrics/reward, evals/verification/f1 ...; returns what ends that."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: what a resumed run does again is forgotten first.
        writer = SummaryWriter(folder.path / "tensorboard", purge_step=first)

        def send(numbers: dict, step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()  # a kill would cost the last two minutes
    else:
        # Both have wandb's interface, and go on with a run whose name they know: its folder's, and
        # when that was made, since folders of one name are many.
        writer, made = importlib.import_module(kind), (folder.path / "config.json").stat().st_mtime
        name = f"{folder.path.name}-{int(made * 1000):x}"
        more = {"id": name, "dir": str(folder.path)} if kind == "wandb" else {}
        writer.init(project="nanolaser", name=name, config=options, resume="allow", **more)
        send = lambda numbers, step: writer.log(numbers, step=step)  # noqa: E731

    def heard(name: str, rows: list[dict]) -> None:
        try:
            for row in rows if name != "samples.jsonl" else ():
                send(_numbers(row, name.removesuffix(".jsonl")), row["step"])
        except Exception as error:  # no network?  The files of the run have it all.
            folder.on_append = lambda name, rows: None
            warn(f"no more live curves in {kind}: {type(error).__name__}: {error}")

    folder.on_append = heard
    return writer.close if kind == "tensorboard" else writer.finish


def _numbers(row: dict, name: str) -> dict[str, float]:
    """The numbers of a row, also of the tables in it: {"evals/verification/f1": 0.8, ...}."""
    # What is undefined (None), and text, is no number and left out.
    numbers = {}
    for key, value in row.items():
        if isinstance(value, dict):
            numbers |= _numbers(value, f"{name}/{key}")
        elif key != "step" and isinstance(value, (int, float)):
            numbers[f"{name}/{key}"] = value
    return numbers
