"""
Benchmarks: how often is a model right, does it know when, and what do votes make of that?

    python evaluate.py                                          # the embedded model, arithmetic
    python evaluate.py --model runs/tiny-laser --n 8 --max-problems 200
    python evaluate.py --model qwen2.5-7b --data math500,amc23,my/problems.jsonl --n 32
    python evaluate.py ... --generative                         # and the baseline of r_s
    python evaluate.py --output results/a --scores rm.jsonl     # another verifier, same solutions
    python evaluate.py --compare results/a results/b            # two runs, paired intervals

What is written into --output:

    config.json     what was evaluated; a folder that holds something else is refused
    samples.jsonl   every solution, a problem's as soon as all of them are there
    results.json    {data set: accuracy, votes, verification, ...}
    *.png           votes, reliability, r_s, length of each data set (where matplotlib is)

Stopped?  The same command goes on where it was: what is finished is not sampled again, and the
solutions of a problem depend on --seed and its text alone, so a resumed evaluation ends like one
that ran through.  On a CPU that holds to the last bit, because problems are sampled in waves and a
wave that was cut off is sampled again as a whole.  A GPU would idle at the end of each wave, so
there every free row is refilled at once and finished problems are kept one by one; the rounding of
a sum depends on the rows beside it, and a resumed run may differ in late digits (--wave N: exact).

External scores (--scores) are JSON lines with `score` (or `r_s`, as verify.py writes it) and either
`dataset`, `prompt_id` and `sample`, or one line for each line of samples.jsonl in its order.
Judged right: score above --threshold.  Votes and calibration take scores clipped to [0, 1].
"""

from __future__ import annotations

import json
import platform
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from nanolaser import metrics, report
from nanolaser.checker import is_equivalent, parses
from nanolaser.cli import ModelOptions, is_terminal, main_guard, option, parse_args
from nanolaser.judge import default_new_tokens, judge, open_model
from nanolaser.scale.plan import default_kv_cache_gb
from nanolaser.problems import ARITHMETIC, Problem, load_problems
from nanolaser.files import RunFolder, write_atomic
from nanolaser.rollout import Rollout, judged_rows
from nanolaser.sampler import check_prompts, generate

MADE_UP = 200  # arithmetic problems, where --max-problems does not say: there is no end of them
CPU_WAVE = 64  # solutions; see --wave


@dataclass
class Options(ModelOptions):
    """What to evaluate, and how."""

    data: tuple[str, ...] = option(("arithmetic",), "data sets: arithmetic, arithmetic-hard, "
                                   "aliases, .jsonl files", group="what")
    n: int = option(8, "solutions per problem", group="what", min=1)
    max_problems: int | None = option(None, "problems per data set", group="what", min=1,
                                      shown="all; of arithmetic 200")
    output: str | None = option(None, "the results' folder", group="what", metavar="DIR",
                                shown="results/MODEL")
    temperature: float = option(1.0, "of sampling", group="sampling", min=0)
    top_p: float = option(1.0, "sample from the likeliest tokens of this total probability",
                          group="sampling", above=0, max=1)
    max_new_tokens: int | None = option(None, "longest solution", group="sampling", min=1,
                                        shown="by model")
    max_rows: int = option(256, "solutions sampled at the same time", group="sampling", min=1)
    kv_cache_gb: float | None = option(None, "GB the KV cache may take", group="sampling", above=0,
                                       shown="half of what is free")
    wave: int = option(0, "problems sampled together, the unit in which a stopped run goes on",
                       group="sampling", min=0, shown="64 solutions' worth on a CPU, all on a GPU")
    token_ids: bool = option(False, "keep the solutions' tokens in samples.jsonl", group="sampling")
    generative: bool = option(False, "also ask the model in words whether each solution is right, "
                                     "the baseline that r_s replaces", group="verifiers")
    scores: str | None = option(None, "an external verifier's scores of the solutions in --output",
                                group="verifiers", metavar="FILE")
    threshold: float = option(0.5, "external scores above it say right", group="verifiers")
    compare: tuple[str, ...] = option((), "two results' folders: differences, 95 % intervals from "
                                          "a paired bootstrap over problems", group="verifiers",
                                      count=2, metavar="A B")

    def __post_init__(self):
        if self.compare and len(self.compare) != 2:
            raise ValueError(f"--compare takes two folders, got {len(self.compare)}")
        if self.scores is not None and self.output is None:
            raise ValueError("--scores needs --output, the folder of the solutions they belong to")


def main() -> int:
    """Load, sample what is missing, measure, write, show."""
    o, _ = parse_args(Options, description=__doc__.split("\n\n")[0])
    if o.compare:
        return compare(*o.compare)
    if o.scores is not None:
        return external_scores(o)

    # Everything that can be wrong fails here, before anything is sampled.
    sets = load_sets(o)
    model, tokenizer = open_model(o)
    for problems in sets.values():
        check_prompts(model, tokenizer, [p.problem for p in problems])
    limit = o.max_new_tokens or default_new_tokens(model)
    run = open_results(o, identity(o, sets, model, tokenizer, limit))
    count = f"{sum(map(len, sets.values()))} problems x {o.n}"
    print(f"{o.model}: {count}, up to {limit} tokens each, results in {run.path}")

    try:
        sample(model, tokenizer, run, sets, limit, o)
        if o.generative:
            judge_all(model, tokenizer, run, limit, o)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        raise
    results, votes = summarise(run)
    if o.generative:
        for name, entry in generative_entries(run).items():
            results[name]["generative_verification"] = entry
    run.write_json("results.json", rounded(results))
    show(run, results, votes)
    return 0


# ---------------------------------------------------------------------------------------------
# what is evaluated


def load_sets(o: Options) -> dict[str, list[Problem]]:
    """{name: problems} of all data sets; ValueError or FileNotFoundError says what is wrong."""
    sets: dict[str, list[Problem]] = {}
    for source in o.data:
        name = set_name(source)
        if name in sets:
            name = source  # two files called alike: then by their paths
        if name in sets:
            raise ValueError(f"--data names {source} twice")
        # The test split: of arithmetic, neither the embedded model nor its training has seen any.
        most = o.max_problems or (MADE_UP if source in ARITHMETIC else None)
        sets[name] = load_problems(source, split="test", max_problems=most, parses=parses)
    return sets


def set_name(source: str) -> str:
    """What a data set is called in results.json: its alias, or its file's name, or where that says
    nothing (math500/test.jsonl) its folder's."""
    path = Path(source)
    if not path.suffix:
        return source
    plain = path.stem in ("test", "train", "validation", "data") and path.parent.name
    return path.parent.name if plain else path.stem


def identity(o: Options, sets: dict, model, tokenizer, limit: int) -> dict:
    """What decides about the results: two evaluations with equal identities are the same one.

    --device and --max-rows are not among it: they change no more than the last bits.
    """
    # A run's folder gets better checkpoints under the same name, and a file may be edited: both
    # are recognised by what they hold.  A few numbers of every tensor tell checkpoints apart.
    weights = torch.cat([p.detach().flatten()[:64].float().cpu() for p in model.parameters()])
    digest = lambda x: f"{zlib.crc32(x):08x}"  # noqa: E731
    return {
        "model": o.model,
        "weights": digest(weights.numpy().tobytes()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "z_c": tokenizer.z_c,
        "c_ref": tokenizer.c_ref,
        "beta_v": tokenizer.beta_v,
        "data": {
            name: f"{len(problems)} problems, "
            + digest(repr([(p.id, p.problem, p.answer) for p in problems]).encode())
            for name, problems in sets.items()
        },
        "n": o.n,
        "seed": o.seed,
        "temperature": o.temperature,
        "top_p": o.top_p,
        "max_new_tokens": limit,
        "token_ids": o.token_ids,
    }


def open_results(o: Options, mine: dict) -> RunFolder:
    """The results' folder, new or to go on with; ValueError shows how an existing one differs."""
    name = Path(o.model.rstrip("/")).name
    tried = 0
    while True:
        tried += 1
        # Without --output: results/NAME, results/NAME-2, ... until one is free or the same.
        path = Path(o.output or f"results/{name}" + (f"-{tried}" if tried > 1 else ""))
        if path.exists() and not path.is_dir():
            raise ValueError(f"--output {path} is a file, not a folder")
        there = read_identity(path)
        if there is None:
            run = RunFolder(path)
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            run.write_json("config.json", {"evaluation": mine, "versions": versions})
            return run
        differ = [key for key in mine if there.get(key) != mine[key]]
        if not differ:
            return RunFolder(path)
        if o.output:
            shown = [f"{key} {there.get(key)} there, {mine[key]} here" for key in differ[:3]]
            raise ValueError(
                f"{path} holds other results ({'; '.join(shown)}); give another --output"
            )


def read_identity(path: Path) -> dict | None:
    """What the results in a folder are of; None for a folder that is new; ValueError where it
    holds something that is not an evaluation."""
    config = path / "config.json"
    if not config.exists():
        # never write into somebody's files
        other = next((n for n in ("samples.jsonl", "results.json") if (path / n).exists()), None)
        if other:
            raise ValueError(f"{path} holds a {other} without config.json; give another --output")
        return None
    try:
        return dict(json.loads(config.read_bytes())["evaluation"])
    except (ValueError, KeyError, TypeError):
        # a training run, a model, anything that has a config.json
        raise ValueError(f"{path} is in use for something else; give another --output") from None


# ---------------------------------------------------------------------------------------------
# sampling


def sample(model, tokenizer, run: RunFolder, sets: dict, limit: int, o: Options) -> None:
    """Sample what is missing, problem by problem into samples.jsonl; in order when all is there."""
    size = o.wave or (max(1, CPU_WAVE // o.n) if model.device.type == "cpu" else 0)
    rows = run.read("samples.jsonl")  # a last line that a kill cut short is no row
    todo = {name: waves(name, len(problems), rows, o.n, size) for name, problems in sets.items()}
    # What is about to be sampled is forgotten first: half-written problems, half-done waves.
    again = {(name, i) for name in todo for wave in todo[name] for i in wave}
    rows = [row for row in rows if (row["dataset"], row["prompt_id"]) not in again]
    write_rows(run, "samples.jsonl", rows)
    total = sum(map(len, sets.values())) * o.n
    if rows:
        print(f"{len(rows)} of {total} solutions are there already")
    # The mean pace of the whole run (smoothing 0).  Solutions in flight count as not begun, which
    # is the right estimate: the tokens already spent on them raise the cost of the finished ones.
    with tqdm(total=total, initial=len(rows), unit="solution", smoothing=0,
              disable=not is_terminal()) as bar:
        for name, problems in sets.items():
            bar.set_description(name)
            began, tokens = time.perf_counter(), 0
            for wave in todo[name]:
                tokens += sample_wave(model, tokenizer, run, name, problems, wave, limit, o, bar)
            if todo[name]:
                solutions, seconds = sum(map(len, todo[name])) * o.n, time.perf_counter() - began
                log_time(run, "sampling", name, solutions, tokens, seconds)
                bar.write(f"{name}: {solutions} solutions, {tokens} tokens in {seconds:.0f} s")
    # Problems end in the order of their lengths; a finished file is in the order of the data.  With
    # it every sum over its rows is taken in one order, however the run was interrupted.
    order = {name: place for place, name in enumerate(sets)}
    write_rows(run, "samples.jsonl", sorted(
        run.read("samples.jsonl"),
        key=lambda row: (order[row["dataset"]], row["prompt_id"], row["sample"])))


def waves(name: str, problems: int, rows: list[dict], n: int, size: int) -> list[list[int]]:
    """The problems of one data set that are still to be sampled, those of a wave together."""
    have = Counter(row["prompt_id"] for row in rows if row["dataset"] == name)
    missing = lambda indices: [i for i in indices if have[i] != n]  # noqa: E731
    if not size:
        left = missing(range(problems))
        return [left] if left else []
    # A wave that is not complete is sampled again as a whole: the same rows side by side give the
    # same numbers to the last bit, other rows would not.
    cut = [list(range(i, min(i + size, problems))) for i in range(0, problems, size)]
    return [wave for wave in cut if missing(wave)]


def sample_wave(model, tokenizer, run, name, problems, wave, limit, o: Options, bar) -> int:
    """Sample some problems (indices) of one data set, writing each when all its solutions have
    ended; returns the number of tokens."""
    chosen = [problems[i] for i in wave]
    groups: dict[int, list[Rollout]] = {}

    def finish(rollout: Rollout) -> None:
        bar.update()
        group = groups.setdefault(rollout.prompt_id, [])
        group.append(rollout)
        if len(group) < o.n:
            return
        group.sort(key=lambda r: r.sample_id)  # they end in any order
        place = wave[rollout.prompt_id]
        extra = {"dataset": name, "problem_id": problems[place].id, "prompt_id": place}
        rows = judged_rows(group, chosen, tokenizer, o.token_ids)
        run.append("samples.jsonl", [{**row, **extra, "sample": j} for j, row in enumerate(rows)])
        del groups[rollout.prompt_id]

    rollouts = generate(
        model, tokenizer, [p.problem for p in chosen], n=o.n, max_new_tokens=limit,
        temperature=o.temperature, top_p=o.top_p, seed=o.seed, max_rows=o.max_rows,
        kv_cache_gb=o.kv_cache_gb or default_kv_cache_gb(model.device),
        streams=[stream(p) for p in chosen], on_finish=finish,
    )  # fmt: skip
    return sum(len(r.response_tokens) for r in rollouts)


def stream(problem: Problem) -> int:
    """The random stream of a problem's first solution: of its text, not of its place, so the same
    problem gets the same solutions in any data set, order or selection."""
    # 2^20 solutions fit between two problems.  Should two checksums collide, nothing breaks: two
    # different problems would see the same random numbers.
    return zlib.crc32(problem.problem.encode()) << 20


def write_rows(run: RunFolder, name: str, rows: Iterable[dict]) -> None:
    """Replace a .jsonl file of the run, whole or not at all."""
    write_atomic(run.path / name, "".join(json.dumps(row) + "\n" for row in rows))


def log_time(run: RunFolder, what: str, name: str, solutions: int, tokens: int, seconds: float):
    """Remember what a call cost: results.json holds no times, which differ from run to run."""
    run.append("timing.jsonl", [{"what": what, "dataset": name, "solutions": solutions,
                                 "tokens": tokens, "seconds": round(seconds, 3)}])


# ---------------------------------------------------------------------------------------------
# measuring


def by_set(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by data set, in the order of the file."""
    # A dict keeps the order in which its keys came: it is that of the file, and so of --data.
    sets: dict[str, list[dict]] = {}
    for row in rows:
        sets.setdefault(row["dataset"], []).append(row)
    return sets


def summarise(run: RunFolder) -> tuple[dict, dict]:
    """(entries of results.json, vote tables), by data set, from the samples on disk."""
    results, votes = {}, {}
    for name, rows in by_set(run.read("samples.jsonl")).items():
        # Once, for the numbers and for the pictures: merging equal answers is the slow part.
        votes[name] = metrics.vote_tables(rows, is_equivalent)
        results[name] = metrics.summarise(rows, is_equivalent, votes=votes[name])
    return results, votes


def rounded(value):
    """Floats to six decimals, however deep: far below any standard error, and above what the
    order of a floating-point sum can change."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def show(run: RunFolder, results: dict, votes: dict) -> None:
    """The tables in the terminal, and the pictures."""
    print("\n" + report.accuracy_table(results, votes))
    print("\n" + report.verification_table({k: e["verification"] for k, e in results.items()}))
    asked = {k: e["generative_verification"] for k, e in results.items()
             if "generative_verification" in e}
    if asked:
        print("\n" + report.generative_table(asked))
    drawn = []
    for name, rows in by_set(run.read("samples.jsonl")).items():
        drawn += report.pictures(run.path, name, rows, votes[name])
    print(f"\nresults.json and {len(drawn)} pictures are in {run.path}")


# ---------------------------------------------------------------------------------------------
# the baseline: judgements in words


def judge_all(model, tokenizer, run: RunFolder, limit: int, o: Options) -> None:
    """Ask for a judgement of every solution that has none yet, into judgements.jsonl."""
    judged = run.read("judgements.jsonl")
    write_rows(run, "judgements.jsonl", judged)
    done = {key_of(row) for row in judged}
    # One that was cut off counts as judged wrong by both verifiers: there is nothing to ask.
    asked = {name: [row for row in rows if row["finished"]]
             for name, rows in by_set(run.read("samples.jsonl")).items()}
    total = sum(map(len, asked.values()))
    with tqdm(total=total, initial=len(done), unit="judgement", smoothing=0,
              disable=not is_terminal()) as bar:
        for name, rows in asked.items():
            bar.set_description(f"{name}, in words")
            left = [row for row in rows if key_of(row) not in done]
            tokens = 0

            def finish(index: int, facts: dict, left=left) -> None:
                nonlocal tokens
                tokens += facts["tokens"]
                place = dict(zip(("dataset", "prompt_id", "sample"), key_of(left[index])))
                run.append("judgements.jsonl", [place | facts])
                bar.update()

            began = time.perf_counter()
            # Nothing left after a resume: no call, and no line in the log of times.
            if left:
                judge(model, tokenizer, left, limit, o.max_rows, finish,
                      o.kv_cache_gb or default_kv_cache_gb(model.device))
                log_time(run, "judging", name, len(left), tokens, time.perf_counter() - began)


def key_of(row: dict) -> tuple:
    """Which solution of which problem a row is about."""
    return row["dataset"], row["prompt_id"], row["sample"]


def generative_entries(run: RunFolder) -> dict[str, dict]:
    """`generative_verification` of each data set: how good the judgements are, and their cost."""
    judgements = {key_of(row): row for row in run.read("judgements.jsonl")}
    timing, entries = run.read("timing.jsonl"), {}
    for name, rows in by_set(run.read("samples.jsonl")).items():
        mine = [judgements[key_of(row)] for row in rows if key_of(row) in judgements]
        scored = [row | {"r_s": judgements.get(key_of(row), {}).get("score")} for row in rows]
        # The same function as for r_s, so that the two lines of the table mean the same.
        quality = metrics.verification(scored)
        cost = {what: pace([t for t in timing if t["what"] == what and t["dataset"] == name])
                for what in ("judging", "sampling")}
        entries[name] = {
            **{k: quality[k] for k in ("f1", "accuracy_correct", "accuracy_wrong", "f1_answered")},
            "auroc": quality["auroc"],
            "undecided": sum(j["score"] is None for j in mine) / len(mine) if mine else None,
            "tokens": sum(j["tokens"] for j in mine) / len(mine) if mine else None,
            "seconds": cost["judging"]["solution"],
            # r_s is one more token of the batch that samples the solutions
            "self_reward_tokens": 1,
            "self_reward_seconds": cost["sampling"]["token"],
        }
    return entries


def pace(calls: list[dict]) -> dict[str, float | None]:
    """Seconds per solution and per token of the calls logged; None where there are none."""
    seconds = sum(call["seconds"] for call in calls)
    per = lambda what: seconds / sum(c[what] for c in calls) if calls else None  # noqa: E731
    return {"solution": per("solutions"), "token": per("tokens")}


# ---------------------------------------------------------------------------------------------
# other verifiers, other runs


def read_samples(folder: str) -> list[dict]:
    """The solutions of a results' folder; ValueError or FileNotFoundError if there are none."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    if read_identity(path) is None or not (path / "samples.jsonl").exists():
        raise ValueError(f"{folder} holds no evaluation: samples.jsonl or config.json is missing")
    rows = []
    with open(path / "samples.jsonl", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                where = f"{path / 'samples.jsonl'}, line {number}"
                raise ValueError(f"{where}: not JSON; is it still being written?") from None
    if not rows:
        raise ValueError(f"{folder}: no solutions there")
    return rows


def external_scores(o: Options) -> int:
    """The same metrics for somebody else's scores of the same solutions, beside those of r_s."""
    rows = read_samples(o.output)
    scores = read_scores(o.scores, rows)
    label, results, shown = Path(o.scores).stem, {}, {}
    # In the place of r_s: every metric that is defined for it is defined for them.
    rescored = by_set([row | {"r_s": s} for row, s in zip(rows, scores)])
    votes = {name: metrics.vote_tables(these, is_equivalent) for name, these in rescored.items()}
    for name, own in by_set(rows).items():
        results[name] = metrics.summarise(rescored[name], is_equivalent, votes=votes[name],
                                          threshold=o.threshold)
        shown[f"{name}: r_s"] = metrics.verification(own)
        shown[f"{name}: {label}"] = results[name]["verification"]
    out = Path(o.output) / f"scores-{label}.json"
    write_atomic(out, json.dumps(rounded(results), indent=2) + "\n")
    print(report.verification_table(shown))
    print(f"\nvotes weighted by {label}:\n" + report.accuracy_table(results, votes))
    print(f"\nwrote {out}")
    return 0


def read_scores(name: str, rows: list[dict]) -> list[float | None]:
    """One score (None: has none) for each row; ValueError names the line that does not fit."""
    keys = {key_of(row): i for i, row in enumerate(rows)}
    scores: dict[int, float | None] = {}
    with open(name, encoding="utf-8") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    for place, (number, line) in enumerate(lines):
        try:
            row = json.loads(line)
            value = row["score"] if "score" in row else row["r_s"]
            # With the three keys the order is free; without them it has to be that of the samples.
            keyed = all(key in row for key in ("dataset", "prompt_id", "sample"))
            index = keys[key_of(row)] if keyed else place
            scores[index] = None if value is None else float(value)
        except (ValueError, TypeError, KeyError) as error:
            reason = "no such solution in the samples" if isinstance(error, KeyError) else error
            if isinstance(error, KeyError) and error.args[0] in ("score", "r_s"):
                reason = "no score"
            raise ValueError(f"{name}, line {number}: {reason}") from None
    if set(scores) != set(range(len(rows))):
        raise ValueError(f"{name} scores {len(scores)} solutions, but there are {len(rows)}")
    return [scores[i] for i in range(len(rows))]


def compare(a: str, b: str) -> int:
    """Two evaluations side by side, on the problems that both have."""
    sets_a, sets_b = by_set(read_samples(a)), by_set(read_samples(b))
    common = [name for name in sets_a if name in sets_b]
    if not common:
        raise ValueError(f"{a} ({', '.join(sets_a)}) and {b} ({', '.join(sets_b)}) have no data "
                         "set in common")
    print(f"A = {a}\nB = {b}\n* the interval excludes 0")
    for name in common:
        problems, differences = metrics.compare(sets_a[name], sets_b[name], is_equivalent)
        print(f"\n{name}, {problems} problems in common\n" + report.comparison_table(differences))
    return 0


if __name__ == "__main__":
    main_guard(main)
