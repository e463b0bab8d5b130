"""
Nine ways to know whether an answer is right, judged on the same solutions.

    python benchmarks/scores.py                    # three runs of 6 min each, 5 min of scoring
    python benchmarks/scores.py --runs FOLDER      # laser-seed0, grpo-seed0, sft-seed0 there
    python benchmarks/scores.py --no-two-token     # without the run that only this row needs
    python benchmarks/scores.py --text             # the page and its picture anew, in seconds

trained for it     r_s             LaSeR: beta_v (log pi(z_c) - c_ref), learned during RL
                   two tokens      sigmoid(z_H - z_L) of two reserved tokens, as CREDO's; here
                                   learned during RL by train.py --self-reward-loss sft; no c_ref
fitted afterwards  linear probe    on the last hidden state of a plain GRPO model, at the stop token
                   BCE head        a hidden layer of 64 on the same state
asked              P(yes)          a second prompt, ok?, and the probability of y against n
for nothing        mean log-prob   over the solution's tokens
                   self-certainty  mean KL(uniform || pi) over tokens (Kang et al. 2025)
                   lowest group    DeepConf: the least sure group of 8 tokens (Fu et al. 2025)
by others          share of votes  how many of the 8 solutions have this answer

Who is asked?  A score that belongs to the writer (P(yes), log-prob, ...) is read from whoever wrote
the solution; r_s, the two tokens and the probes are read from their own model, whoever wrote it.
So both LaSeR's and GRPO's solutions are judged: on the first r_s is at home, on the second the
probes are.

Everything measured goes into docs/scores.json; docs/scores.md and docs/pictures/scores.svg are made
of that alone, and a test compares.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nanolaser import metrics, report, svg  # noqa: E402
from nanolaser.checker import is_equivalent  # noqa: E402
from nanolaser.checkpoint import load_pretrained  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.files import finite, read_json, write_atomic  # noqa: E402
from nanolaser.judge import confidences, judgement_prompt, p_yes, tokens_of  # noqa: E402
from nanolaser.problems import load_problems  # noqa: E402
from nanolaser.packing import cut_by_tokens, pad  # noqa: E402
from nanolaser.reward import judged_rows, self_reward  # noqa: E402
from nanolaser.sampler import generate  # noqa: E402
from nanolaser.scoring import read_last  # noqa: E402

SETS = {"held-out": "arithmetic", "hard": "arithmetic-hard"}
WRITERS = {"laser": "LaSeR", "grpo": "GRPO"}
# Name -> is it a probability as it is?  The others have an order, and that is all.
METHODS = {"r_s": True, "two tokens": True, "linear probe": True, "BCE head": True,
           "P(yes)": True, "mean log-prob": False, "self-certainty": False,
           "lowest group": False, "share of votes": True}  # fmt: skip
# How train.py makes each model.
RUNS = {"laser": [], "grpo": ["--algorithm", "grpo"],
        "sft": ["--self-reward-loss", "sft"]}  # fmt: skip


@dataclass
class Options:
    """Train what is missing, score, write."""

    runs: str = option("runs/scores", "folder of the runs; those that are missing are made")
    seed: int = option(0, "of the runs", min=0)
    steps: int | None = option(None, "of each run, for a trial", min=9, shown="train.py's")
    two_token: bool = option(True, "the run that learns two tokens")
    problems: int = option(400, "problems of each set", min=2)
    solved: int = option(50, "further problems, to fit thresholds and calibration on", min=2)
    probe_problems: int = option(1000, "training problems that the probes are fitted on", min=2)
    n: int = option(8, "solutions of each problem", min=2)
    draws: int = option(500, "draws behind each interval", min=2)
    docs: str = option("docs", "where scores.json, scores.md and pictures/scores.svg go")
    text: bool = option(False, "write the page from scores.json alone")


# ---------------------------------------------------------------------------------------------
# models and solutions


def model_of(kind: str, o: Options) -> tuple:
    """(model, tokenizer) of a run, trained now if it is not there yet."""
    folder = Path(o.runs) / f"{kind}-seed{o.seed}"
    if not (folder / "summary.json").exists():
        few = [] if o.steps is None else ["--steps", o.steps, "--eval-problems", 20,
                                          "--reasoning-warmup", o.steps // 9,
                                          "--self-reward-warmup", o.steps // 6]  # fmt: skip
        how = (["--resume", folder] if (folder / "config.json").exists() else
               ["--seed", o.seed, "--out", folder, *RUNS[kind], *few])  # fmt: skip
        print(f"training {folder}", flush=True)
        command = [sys.executable, ROOT / "train.py", *how]
        if subprocess.run([*map(str, command)], stdout=subprocess.DEVNULL).returncode:
            raise ValueError(f"{' '.join(map(str, command))} failed")
    return load_pretrained(folder)


def solve(model, tokenizer, problems: list, o: Options) -> tuple[list[dict], float]:
    """Rows of n solutions of each problem, with their token ids, and the seconds a solution took.
    One that was cut off has no end at which anything could be read, and is left out."""
    start = time.perf_counter()
    rollouts = generate(model, tokenizer, [p.problem for p in problems], n=o.n, max_new_tokens=96,
                        seed=o.seed + 7_000_000)  # fmt: skip
    seconds = (time.perf_counter() - start) / len(rollouts)
    rows = judged_rows(rollouts, problems, tokenizer, token_ids=True)
    return [row for row in rows if row["finished"]], seconds


@torch.no_grad()
def last_states(model, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """(N, C): the hidden states from which r_s would be read, at the stop tokens."""
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    states = torch.empty(len(rows), model.config.hidden_size)
    for batch in cut_by_tokens([len(row) for row in rows], 16_384):
        tokens, lengths = pad([rows[i] for i in batch], model.device)
        states[batch] = model(tokens)[torch.arange(len(batch)), lengths - 1].float().cpu()
    return states


# ---------------------------------------------------------------------------------------------
# probes


def fit(network: torch.nn.Module, x: Tensor, y: Tensor, decay: float) -> Callable[[Tensor], Tensor]:
    """Train a network (N, C) -> (N, 1) to tell y (N,) by cross-entropy; returns x -> probability.

    A tenth of the rows, the last ones and so other problems, says when to stop: after 20 epochs
    without a better loss there.  A baseline that was stopped too early would flatter r_s.
    """
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, most = (x - mean) / std, len(x) * 9 // 10
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=decay)
    loss_of = lambda rows: torch.nn.functional.binary_cross_entropy_with_logits(  # noqa: E731
        network(x[rows])[:, 0], y[rows])
    best, kept, since = math.inf, {}, 0
    shuffled = torch.Generator().manual_seed(0)
    while since < 20:
        for batch in torch.randperm(most, generator=shuffled).split(256):
            optimizer.zero_grad()
            loss_of(batch).backward()
            optimizer.step()
        with torch.no_grad():
            loss = loss_of(slice(most, None)).item()
        since += 1
        if loss < best:
            best, since = loss, 0
            kept = {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(kept)
    return torch.no_grad()(lambda x: network((x - mean) / std)[:, 0].sigmoid())


def probes(model, tokenizer, o: Options) -> dict[str, Callable[[Tensor], Tensor]]:
    """The two probes, fitted on a model's own solutions of problems that RL may learn from."""
    rows, _ = solve(model, tokenizer, load_problems("arithmetic", "train", o.probe_problems), o)
    x = last_states(model, *zip(*(tokens_of(tokenizer, row) for row in rows)))
    y = torch.tensor([row["r_v"] for row in rows])
    C = x.shape[1]
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(C, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    return {"linear probe": fit(torch.nn.Linear(C, 1), x, y, 0.01),
            "BCE head": fit(head, x, y, 0.1)}


# ---------------------------------------------------------------------------------------------
# scores


def all_scores(rows: list[dict], writer: str, models: dict, heads: dict, o: Options) -> dict:
    """{method: (N scores, extra tokens a solution, milliseconds a solution)}."""
    model, tokenizer = models[writer]
    prompts, responses = zip(*(tokens_of(tokenizer, row) for row in rows))
    found: dict[str, tuple] = {}

    def measure(names: Sequence[str], tokens: float, read: Callable[[], list]) -> None:
        start = time.perf_counter()
        columns = read()
        spent = 1000 * (time.perf_counter() - start) / len(rows)
        found.update({name: (x, tokens, spent) for name, x in zip(names, columns)})

    def r_s() -> list:
        m, t = models["laser"]
        logp_zc = read_last(m, prompts, responses, [t.z_c_id])[:, 0].tolist()
        return [[self_reward(x, t) for x in logp_zc]]

    def two_tokens() -> list:
        m, t = models["sft"]
        high, low = read_last(m, prompts, responses, [t.z_c_id, t.unused_special_ids()[0]]).T
        return [(high - low).sigmoid().tolist()]

    def by_words() -> list:
        return [confidences(model, prompts, responses, tokenizer.size)[name]
                for name in ("mean-logprob", "self-certainty", "lowest-group")]

    # The stop token has to pass the model for what is read after it: one token.
    measure(["r_s"], 1, r_s)
    if "sft" in models:
        measure(["two tokens"], 1, two_tokens)
    for name, head in heads.items():
        states = lambda: last_states(models["grpo"][0], prompts, responses)  # noqa: E731
        measure([name], 1, lambda: [head(states()).tolist()])
    # Of the judgement's prompt, what is not the solution itself, which is cached.
    asked = [len(judgement_prompt(tokenizer, row)) for row in rows]
    extra = np.mean([a - len(p) - len(r) for a, p, r in zip(asked, prompts, responses)]) + 1
    measure(["P(yes)"], float(extra), lambda: [p_yes(model, tokenizer, rows)])
    measure(["mean log-prob", "self-certainty", "lowest group"], 0, by_words)
    measure(["share of votes"], float(np.mean([len(r) for r in responses])) * (o.n - 1),
            lambda: [metrics.vote_share(rows, is_equivalent)])
    return found


def quality(right: np.ndarray, score: np.ndarray, problem: np.ndarray, solved: np.ndarray,
            probability: bool, draws: int) -> dict[str, Any]:
    """What one method's scores are worth: (N,) each, of which `solved` are for fitting alone."""
    known, asked = solved, ~solved
    r, s, p = right[asked], score[asked], problem[asked]
    where = [np.flatnonzero(p == x) for x in np.unique(p)]

    def interval(statistic: Callable) -> list:
        def of(problems: np.ndarray, _) -> float | None:
            rows = [where[i] for i in problems]
            owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
            return statistic(np.concatenate(rows), owner)
        return list(metrics.bootstrap(of, len(where), draws=draws))

    found = {"auroc": interval(lambda i, _: metrics.auroc(r[i], s[i])),
             # A problem drawn twice is two problems: pairs never cross them.
             "auroc_within": interval(lambda i, owner: metrics.auroc_within(r[i], s[i], owner)),
             **metrics.risk_coverage(r, s)}
    # 1. As a probability, as it comes; and after two numbers (Platt) fitted on the solved problems.
    found |= {"ece": metrics.ece(r, s) if probability else None,
              "brier": metrics.brier(r, s) if probability else None}
    platt = fit_line(score[known], right[known])
    found |= {"ece_fitted": metrics.ece(r, platt(s)), "brier_fitted": metrics.brier(r, platt(s))}
    # 2. As a verdict: at 0.5, and at the threshold that is best on the solved problems.
    threshold = metrics.fit_threshold(right[known], score[known])
    return found | {"f1": metrics.verification_f1(r, s).f1 if probability else None,
                    "threshold": threshold,
                    "f1_fitted": metrics.verification_f1(r, s, threshold).f1}


def fit_line(score: np.ndarray, right: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """score -> sigmoid(a score + b), the a and b of the least cross-entropy on (N,) of each."""
    mean, std = score.mean(), score.std() + 1e-9
    x = torch.tensor((score - mean) / std)
    ab = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([ab], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        z = ab[0] * x + ab[1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(z, torch.tensor(right) * 1.0)
        # A hair of a pull to 0: scores that part right from wrong perfectly would have no best a.
        value = value + 1e-4 * ab.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    a, b = ab.tolist()
    return lambda s: 1 / (1 + np.exp(-(a * (s - mean) / std + b)))


def measure_all(o: Options) -> dict:
    """Everything that the page and the picture say."""
    models = {kind: model_of(kind, o) for kind in RUNS if kind != "sft" or o.two_token}
    heads = probes(*models["grpo"], o)
    record: dict[str, Any] = {"seed": o.seed, "problems": o.problems, "n": o.n, "solved": o.solved,
                              "probe_problems": o.probe_problems,
                              "threads": torch.get_num_threads(), "sets": {}}
    for writer in WRITERS:
        for where, data in SETS.items():
            problems = load_problems(data, "test", o.problems + o.solved)
            rows, seconds = solve(*models[writer], problems, o)
            print(f"{WRITERS[writer]}, {where}: {len(rows)} solutions", flush=True)
            right = np.array([row["r_v"] for row in rows]) > 0.5
            problem = np.array([row["prompt_id"] for row in rows])
            solved = problem >= o.problems
            entry = {"solutions": int((~solved).sum()), "accuracy": float(right[~solved].mean()),
                     "finished": len(rows) / (len(problems) * o.n),
                     "milliseconds_to_sample": 1000 * seconds, "methods": {}}
            for name, (x, tokens, spent) in all_scores(rows, writer, models, heads, o).items():
                if name == "share of votes":  # the others have to be sampled first
                    spent += 1000 * seconds * (o.n - 1)
                entry["methods"][name] = {"tokens": tokens, "milliseconds": spent} | quality(
                    right, np.array(x), problem, solved, METHODS[name], o.draws)
            record["sets"][f"{writer}, {where}"] = entry
    return record


# ---------------------------------------------------------------------------------------------
# the page and the picture


def page(record: dict) -> str:
    """docs/scores.md."""
    parts = [f"""# Nine ways to know whether an answer is right

Made by `python benchmarks/scores.py` from `scores.json`; nothing here is typed by hand. One seed
({record["seed"]}) of the embedded run, {record["problems"]} held-out problems x {record["n"]}
solutions of arithmetic, and as many of the longest problems alone ("hard"). In brackets, 95 % of
the draws of problems. Only solutions that came to an end are judged.

![AUROC and accuracy at coverage](pictures/scores.svg)

- **r_s** and **two tokens** were learned during RL, each in a run of its own: r_s by LaSeR, two
  tokens (`sigmoid(z_H - z_L)`, needs no `c_ref`) by `--self-reward-loss sft`.
- **Linear probe** and **BCE head** were fitted afterwards, on the last hidden states of a plain
  GRPO model over {record["probe_problems"]} training problems x {record["n"]} solutions.
- **P(yes)** asks the writer `ok?` and compares the probabilities of `y` and `n`. The embedded
  model was trained on such judgements before RL, as few models are: a strong baseline.
- **Mean log-prob**, **self-certainty** and **lowest group** (DeepConf, groups of 8 tokens) come
  with the sampling. **Share of votes** needs the other {record["n"] - 1} solutions.
- AUROC asks whether a right solution scores above a wrong one, "within" only among solutions of
  one problem. AURC is the area under the share of errors over coverage (less is better), then the
  accuracy of the 50, 80 and 90 % most believed. `tokens` and `ms` are what a solution costs beyond
  its own sampling, ms measured in batches on {record["threads"]} thread(s) after the fact.
"""]
    parts.append(overview(record))
    for key, entry in record["sets"].items():
        writer, where = key.split(", ")
        own = "at home: r_s" if writer == "laser" else "at home: the probes"
        parts.append(f"\n## {WRITERS[writer]}'s solutions, {where} ({own})\n\n{entry['solutions']} "
                     f"solutions, {report.percent(entry['accuracy'])} % of them right, "
                     f"{report.percent(entry['finished'])} % came to an end; "
                     f"{entry['milliseconds_to_sample']:.0f} ms to sample one.\n")
        parts.append(order_table(entry))
        parts.append(verdict_table(entry, record["solved"]))
    return "".join(parts)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as GitHub shows it."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def order_table(entry: dict) -> str:
    """How well the scores order the solutions, and what they cost."""
    def three(x: list) -> str:
        return f"{x[0]:.3f}" + ("" if x[1] is None else f" [{x[1]:.3f}, {x[2]:.3f}]")

    rows: list[list[str]] = []
    for name in METHODS:
        m = entry["methods"].get(name)
        rows.append([name, *["not trained"] * 2, *["-"] * 6] if m is None else
                    [name, three(m["auroc"]), three(m["auroc_within"]), f"{m['aurc']:.3f}",
                     *(report.percent(m[f"accuracy_at_{c}"]) for c in (50, 80, 90)),
                     f"{m['tokens']:.0f}", f"{m['milliseconds']:.1f}"])  # fmt: skip
    return markdown(("", "AUROC", "within", "AURC", "acc. at 50 %", "80 %", "90 %", "tokens", "ms"),
                    rows)


def verdict_table(entry: dict, solved: int) -> str:
    """The scores as probabilities and as verdicts, as they come and fitted."""
    said = ("\nAs a probability and as a verdict; fitted: with two numbers for the calibration, "
            f"and one for the threshold, from {solved} other solved problems.\n")
    rows = []
    for name, m in entry["methods"].items():
        rows.append([name, *(report.decimal(m[k]) for k in
                             ("ece", "ece_fitted", "brier", "brier_fitted")),
                     report.percent(m["f1"]), report.percent(m["f1_fitted"]),
                     f"{m['threshold']:.3f}"])
    return said + markdown(("", "ECE", "fitted", "Brier", "fitted", "F1 at 0.5", "fitted", "at"),
                           rows)


def overview(record: dict) -> str:
    """Every way on every set, and what that says, in words that follow from the numbers."""
    sets = {key: entry["methods"] for key, entry in record["sets"].items()}

    def pair(m: dict | None) -> str:
        return f"{m['auroc'][0]:.3f} / {m['auroc_within'][0]:.3f}" if m else "not trained"

    names = [key.replace("laser", "LaSeR").replace("grpo", "GRPO") for key in sets]
    table = markdown(("AUROC / within problems", *names),
                     [[name, *(pair(m.get(name)) for m in sets.values())] for name in METHODS])
    lines = []
    for name, (key, m) in zip(names, sets.items()):
        best = {k: max(m, key=lambda x: m[x][k][0]) for k in ("auroc", "auroc_within")}
        ahead = [x for x in m if m[x]["auroc"][0] > m["r_s"]["auroc"][0]]
        lines.append(
            f"- {name}: highest AUROC {best['auroc']}, within problems {best['auroc_within']}; "
            f"above r_s by AUROC: {', '.join(ahead) or 'none'}. F1 of r_s: "
            f"{report.percent(m['r_s']['f1'])} at 0.5, {report.percent(m['r_s']['f1_fitted'])} at "
            f"{m['r_s']['threshold']:.2f}, fitted on {record['solved']} solved problems.\n")
    return f"\n## All of it\n{table}\n" + "".join(lines)


def picture(record: dict) -> str:
    """docs/pictures/scores.svg: how well each way orders solutions, and what trusting it brings."""
    entry = record["sets"]["laser, held-out"]
    found = entry["methods"]
    names = sorted(found, key=lambda name: found[name]["auroc"][0])
    # 1. A row a method.  Full and hollow dots, and names at the ends: no legend, no colour needed.
    rows, full, hollow = [], [], []
    for y, name in enumerate(names):
        overall, within = found[name]["auroc"][0], found[name]["auroc_within"][0]
        rows.append(svg.mark([[(within, y), (overall, y)], [(1, y)]], "#222", name, stroke_width=1))
        full.append((overall, y))
        hollow.append((within, y))
    dots = (svg.dots(full, "#222", 10), svg.dots(hollow, "#222", 10), svg.dots(hollow, "#fff", 7))
    left = svg.panel(
        "AUROC of two solutions: \u25cf any, \u25cb of one problem", "the right one scores higher",
        "", [*rows, *dots],
        x_range=(min(min(full), min(hollow))[0] - 0.02, 1), y_range=(-0.6, len(names) - 0.4),
        y_ticks={-0.6: ""},
    )  # fmt: skip
    # 2. The further right, the fewer solutions are trusted, and the more the ways differ.
    lines = []
    for i, name in enumerate(names):
        kept = {0: entry["accuracy"], 10: found[name]["accuracy_at_90"],
                20: found[name]["accuracy_at_80"], 50: found[name]["accuracy_at_50"]}
        points = [(x, 100 * accuracy) for x, accuracy in kept.items()]
        ours = name == "r_s"
        lines.append(svg.mark([points], "#222" if ours else "#888", name,
                              stroke_width=3 if ours else 1.2))
    right = svg.panel("Right among the most believed, %", "share that is believed", "", lines,
                      x_ticks={0: "100 %", 10: "90 %", 20: "80 %", 50: "50 %"})
    return svg.picture([left, right])


def main() -> None:
    """Measure, or not; then write the page."""
    o, _ = parse_args(Options, description=__doc__.split("\n\n")[0])
    data = Path(o.docs) / "scores.json"
    if not o.text:
        data.parent.mkdir(parents=True, exist_ok=True)
        record = rounded(finite(measure_all(o)))
        write_atomic(data, json.dumps(record, indent=1) + "\n")
    record = read_json(data)
    write_atomic(Path(o.docs) / "scores.md", page(record))
    path = Path(o.docs) / "pictures" / "scores.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, picture(record))
    first = record["sets"]["laser, held-out"]
    print(f"page {o.docs}/scores.md\n{order_table(first)}{verdict_table(first, record['solved'])}")
    print(json.dumps({name: m["auroc"] for name, m in first["methods"].items()}))


def rounded(value: Any) -> Any:
    """Numbers to five digits: the intervals are far wider."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main_guard(main)
