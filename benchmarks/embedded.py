"""
The README's table: the embedded run with LaSeR and with plain GRPO, over seeds.

    python benchmarks/embedded.py                     # six runs, about half an hour on two cores
    python benchmarks/embedded.py --runs runs/table   # finished runs are not repeated

Every number comes from files that train.py and evaluate.py wrote: summary.json (400 held-out
problems x 8 solutions at temperature 1) and results.json (400 of the longest alone, hard enough
for votes to differ).  Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.report import percent, table  # noqa: E402

# name in the table -> where it lies in one data set's results
NUMBERS = {
    "accuracy": ("accuracy",),
    "F1": ("verification", "f1"),
    "AUROC": ("verification", "auroc"),
    "within problem": ("verification", "auroc_within"),
    "ECE": ("verification", "ece"),
    "majority@8": ("majority_vote", "8"),
    "weighted@8": ("weighted_vote", "8"),
}


@dataclass
class Options:
    """Train over seeds, evaluate, compare."""

    runs: str = option("runs/table", "folder of the six runs")
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of the runs")


def finished_run(runs: Path, algorithm: str, seed: int) -> tuple[dict, dict]:
    """(summary, results on hard problems) of one run, made where it is not there yet."""
    out = runs / f"{algorithm}-{seed}"
    if not (out / "summary.json").exists():
        # a folder without a summary is a run that was interrupted
        flags = ["--resume", out] if (out / "checkpoints" / "latest").exists() else [
            "--algorithm", algorithm, "--seed", seed, "--out", out
        ]  # fmt: skip
        call("train.py", *flags)
    results = out / "hard" / "results.json"
    if not results.exists():
        call("evaluate.py", "--model", out, "--data", "arithmetic-hard", "--max-problems", 400,
             "--output", out / "hard")  # fmt: skip
    hard = json.loads(results.read_text())["arithmetic-hard"]
    return json.loads((out / "summary.json").read_text()), hard


def call(script: str, *arguments) -> None:
    """Run one of the scripts as a user would; its output goes to the terminal."""
    subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], check=True, cwd=ROOT)


def pick(entry: dict, path: tuple[str, ...]) -> float:
    """Follow keys into a data set's results."""
    for key in path:
        entry = entry[key]
    return entry


def main() -> None:
    """Six runs, one table."""
    o, _ = parse_args(Options, description=__doc__.split("\n\n")[0])
    done = {
        algorithm: [finished_run(Path(o.runs).resolve(), algorithm, seed) for seed in o.seeds]
        for algorithm in ("grpo", "laser")
    }
    base = done["laser"][0][0]["before"]
    sets = {
        "base": [[base]],
        "held-out": [[s["after"] for s, _ in done[a]] for a in done],
        "hard": [[hard for _, hard in done[a]] for a in done],
    }
    rows, record = [], {}
    for title, columns in sets.items():
        for name, entries in zip(["-"] if title == "base" else done, columns):
            means = {k: statistics.mean(pick(e, p) for e in entries) for k, p in NUMBERS.items()}
            rows.append([f"{title} {name}".strip(" -"), *(percent(m) for m in means.values())])
            record[rows[-1][0]] = {k: [pick(e, p) for e in entries] for k, p in NUMBERS.items()}
    print(table(["", *NUMBERS], rows))
    print("each seed:")
    for name, values in record.items():
        for key in NUMBERS:
            print(f"  {name:15s} {key:15s} " + "  ".join(percent(v) for v in values[key]))
    cost = [
        f"{s['seconds'] / 60:.1f} min, {s['peak_memory_bytes'] / 2**20:.0f} MiB"
        for s, _ in done["laser"]
    ]
    print("laser runs:", "; ".join(cost))
    print(json.dumps(record))


if __name__ == "__main__":
    main_guard(main)
