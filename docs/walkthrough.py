"""
Every number of docs/walkthrough.md: one problem, its eight solutions, and one whole step.

    python docs/walkthrough.py            # prints them, section by section; seconds
    python docs/walkthrough.py --write    # puts them into walkthrough.md, where they belong
    python docs/walkthrough.py --pictures runs/tiny-laser results/tiny-laser    # the run's pictures

The step is that of tests/plain.py, the method in textbook operations, on the embedded model.  It
computes in float64, on one thread, and draws its random numbers from a hash: another machine rounds
in the sixteenth digit, and what is printed here are the first few.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nanolaser import (  # noqa: E402
    extract_answer,
    is_equivalent,
    load_pretrained,
    metrics,
    report,
    svg,
)
from nanolaser.files import read_jsonl  # noqa: E402
from tests import plain  # noqa: E402

PROBLEM, GOLD, SEED = "(14+25)*2-9=?", "69", 1
MORE = 30  # further steps on the same eight solutions, at the end
o = plain.Settings(group_size=8)


def section(name: str) -> None:
    print(f"\n== {name}")


def row(*cells, widths=(3, 5, 8, 8, 8, 8, 8, 8)) -> None:
    """Cells to the right of columns; a number that is no int has two decimals, None is "-"."""
    shown = ["-" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells]
    print("".join(f"{cell:>{width}}" for cell, width in zip(shown, widths)).rstrip())


def numbers(name: str, values, form: str = "7.2f") -> None:
    print(f"{name:16s}" + "".join(f"{x:{form}}" for x in values))


def main() -> None:
    """The whole walk."""
    torch.set_num_threads(1)
    model, tokenizer = load_pretrained("tiny", device="cpu", dtype="float32")
    w, config = dict(model.named_parameters()), model.config

    group = sampled(w, config, tokenizer)
    rewarded(group, tokenizer)
    compared(group, "advantages")
    state: dict = {}
    updated(w, config, tokenizer, group, state)
    repeated(w, config, tokenizer, group, state)


def sampled(w, config, tokenizer) -> list[plain.Solution]:
    """1. Sample, and 2. check."""
    section("prompt")
    x = tokenizer.encode_prompt(PROBLEM)
    print("text   ", repr(tokenizer.decode(x)))
    print("tokens ", *x)

    group = [plain.sample(w, config, tokenizer, x, j, SEED, o.max_new_tokens, o.temperature)
             for j in range(o.group_size)]  # fmt: skip
    section("solutions")
    row("#", "r_v", "tokens", "log pi", "answer", "    solution")
    for j, s in enumerate(group):
        answer = extract_answer(tokenizer.decode(s.y))
        s.r_v = float(is_equivalent(answer, GOLD))
        text = "    " + " ".join(tokenizer.decode(s.y).split())
        row(j, int(s.r_v), len(s.y), sum(s.logprobs), answer, text)

    section("tokens of solution 7")
    s = group[7]
    shown = [tokenizer.decode([t]).replace("\n", "newline") or "the end" for t in s.y]
    for first in range(0, len(s.y), 7):
        part = slice(first, first + 7)
        print("".join(f"{t:>10s}" for t in shown[part]))
        print("".join(f"{x:10.2f}" for x in s.logprobs[part]))
    print(f"\n{len(s.x)} tokens of prompt, {len(s.y)} of response; after the last one:")
    print(f"log pi({tokenizer.z_c}) = {s.logp_zc:.3f}")
    return group


def rewarded(group, tokenizer) -> None:
    """3. Reward."""
    section("r_s")
    o.c_ref = statistics.mean(s.logp_zc for s in group)
    for s in group:
        s.r_s = o.beta_v * (s.logp_zc - o.c_ref)
    print(f"c_ref = {o.c_ref:.3f} nats, beta_v = {o.beta_v}")
    numbers("log pi(z_c)", [s.logp_zc for s in group])
    numbers("r_s", [s.r_s for s in group], "7.3f")
    numbers("r_v", [s.r_v for s in group], "7.0f")


def compared(group, name: str) -> None:
    """4. Compare: A_v, A_s and what becomes of them."""
    section(name)
    for kind, values in (("v", [s.r_v for s in group]), ("s", clipped(group))):
        print(f"r_{kind}: mean {statistics.mean(values):.4f}, std {statistics.stdev(values):.4f}")
        numbers(f"A_{kind}", plain.normalised(values))
    plain.advantages(group, o.tau, o.min_std)
    print(f"std of r_s {'>' if statistics.stdev(clipped(group)) > o.min_std else '<='} {o.min_std}")
    numbers("A", [s.advantage for s in group])


def clipped(group) -> list[float]:
    """What of r_s enters the advantage."""
    return [min(max(s.r_s, 0.0), 1.0) for s in group]


def updated(w, config, tokenizer, group, state) -> None:
    """5. Update."""
    section("loss")
    plain.class_weights(group)
    n_c = sum(s.r_v > 0.5 for s in group)
    print(f"N_c = {n_c} right, N_i = {len(group) - n_c} wrong")
    numbers("weight", [s.weight for s in group])
    numbers("(r_s - r_v)^2", [(s.r_s - s.r_v) ** 2 for s in group])
    policy, own, norm = gradients(w, config, tokenizer, group)
    print(f"M = {sum(len(s.y) for s in group)} tokens")
    print(f"policy loss       {policy:8.4f}")
    print(f"self-reward loss  {own:8.4f}")
    print(f"loss              {policy + o.alpha * own:8.4f}   = policy + {o.alpha} * self-reward")
    print(f"gradient norm     {norm:8.4f}   clipped to {o.grad_clip}")

    section("after one step")
    before = [(sum(s.logprobs), s.r_s) for s in group]
    plain.adamw(w, state, o.lr, o.weight_decay)
    measure(w, config, tokenizer, group)
    row("#", "r_v", "A", "log pi", "then", "r_s", "then")
    for j, (s, (logp, r_s)) in enumerate(zip(group, before)):
        row(j, int(s.r_v), s.advantage, logp, sum(s.logprobs), r_s, s.r_s)


def repeated(w, config, tokenizer, group, state) -> None:
    """The loss on r_s again and again, until r_s speaks; then the advantages once more."""
    section("after more steps on r_s")
    widths = (4, 9, *[7] * 7, 9)
    row("step", "r_s", *[""] * 7, "loss", widths=widths)
    for s in group:
        s.advantage = 0.0  # these solutions are no longer those of the model: no policy gradient
    for step in range(1, MORE + 1):
        _, own, _ = gradients(w, config, tokenizer, group)
        plain.adamw(w, state, o.lr, o.weight_decay)
        measure(w, config, tokenizer, group)
        if step % 10 == 0:
            row(step, *(s.r_s for s in group), own, widths=widths)
    row("r_v", *(int(s.r_v) for s in group), widths=widths)

    compared(group, "advantages then")


def gradients(w, config, tokenizer, group) -> tuple[float, float, float]:
    """(policy loss, self-reward loss, norm of the gradient), the gradient clipped, in .grad."""
    for p in w.values():
        p.grad = None
    policy, own = plain.loss(w, config, group, tokenizer.z_c_id, o)
    (policy + o.alpha * own).backward()
    norm = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in w.values()))
    for p in w.values():
        p.grad *= min(1.0, o.grad_clip / norm)
    return policy.item(), own.item(), norm


@torch.no_grad()
def measure(w, config, tokenizer, group) -> None:
    """log pi and r_s of the same solutions, under the weights as they are now."""
    for s in group:
        logprobs, logp_zc = plain.read(w, config, s, tokenizer.z_c_id, o.temperature)
        s.logprobs, s.logp_zc = logprobs.tolist(), logp_zc.item()
        s.r_s = o.beta_v * (s.logp_zc - o.c_ref)


# ---------------------------------------------------------------------------------------------
# into the page

BLOCK = re.compile(r"```\n(== .*?)\n```", re.S)


def sections(text: str) -> list[str]:
    """The sections of what was printed, each with its name."""
    return [part.rstrip() for part in re.split(r"\n(?=== )", text) if part.startswith("== ")]


def write(page: Path, printed: str) -> None:
    """Put each section into the block of the page that begins with its name."""
    named = {part.split("\n")[0]: part for part in sections(printed)}
    fill = lambda block: f"```\n{named[block[1].splitlines()[0]]}\n```"  # noqa: E731
    page.write_text(BLOCK.sub(fill, page.read_text("utf-8")), "utf-8")


def pictures(run: str, results: str, folder: Path = ROOT / "docs" / "pictures") -> None:
    """A training run and the evaluation of its model, in pictures for the page."""
    steps, evals, samples = report.read_run(run)
    print(report.save(folder / "phases.svg", report.curves({"": (steps, evals)})))
    kinds = report.by_phase(steps, samples)
    ends = {phase: kinds[phase] for phase in ("reasoning", "integrated")}
    print(report.save(folder / "self-reward.svg", report.histograms(ends)))
    rows = [row for _, row in read_jsonl(Path(results) / "samples.jsonl")]
    votes = metrics.vote_tables(rows, is_equivalent)
    panels = [report.reliability_panel(*report.scored(rows)[:2]), report.votes_panel(votes)]
    print(report.save(folder / "votes.svg", svg.picture(panels)))


if __name__ == "__main__":
    output = io.StringIO()
    if sys.argv[1:2] == ["--pictures"] and len(sys.argv) == 4:
        pictures(*sys.argv[2:])
    elif sys.argv[1:] == ["--write"]:
        with contextlib.redirect_stdout(output):
            main()
        write(Path(__file__).with_suffix(".md"), output.getvalue())
    elif sys.argv[1:]:
        sys.exit("python docs/walkthrough.py [--write | --pictures RUN RESULTS]")
    else:
        main()
