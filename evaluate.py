"""
Benchmarks: how often is a model right, does it know when, and what do votes make of that?

    python evaluate.py                                          # the embedded model, arithmetic
    python evaluate.py --model runs/tiny-laser --n 8 --max-problems 200
    python evaluate.py --model qwen2.5-7b --data math500,amc23,my/problems.jsonl --n 32
    python evaluate.py ... --generative                         # the baseline: asked in words
    python evaluate.py ... --log-ratio qwen2.5-7b               # and DPO's implicit reward
    python evaluate.py ... --fit-threshold results/solved/samples.jsonl
    python evaluate.py --samples theirs.jsonl [--model M]       # solutions sampled elsewhere
    python evaluate.py --output results/a --scores p-yes,rm.jsonl    # other scores, same solutions
    python evaluate.py --compare results/a results/b            # two runs, paired intervals

Into --output go samples.jsonl, every solution, a problem's as soon as all of them are there;
results.json, {data set: accuracy, votes, verification, ...}; NAME.svg, a picture of each data set;
and config.json, what was evaluated: a folder that holds something else is refused.

Stopped?  The same command goes on where it was: what is finished is not sampled again, and the
solutions of a problem depend on --seed and its text alone, whatever is sampled beside them (but
for the last digits).  A model that is a training run's folder knows what it was trained on: those
problems are left out.

--samples reads what verify.py reads (problem and response, or OpenAI's messages), each with `gold`
or with its `r_v`.  Without --model r_s is what stands in the file; with it, the model reads it.

--scores are JSON lines with `score` (or `r_s`, as verify.py writes it) and either `dataset`,
`prompt_id` and `sample`, or one line for each line of samples.jsonl in its order; or names: p-yes,
mean-logprob, self-certainty, lowest-group (nanolaser/judge.py), vote-share.  Votes and calibration
take scores clipped to [0, 1]; what lies outside needs a --score-scale: sigmoid for logits, rank for
all else, or none to clip it.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanolaser import metrics, report
from nanolaser.checker import is_equivalent, parses
from nanolaser.checkpoint import find_checkpoint, load_pretrained
from nanolaser.cli import Progress, main_guard, option, parse_args, warn
from nanolaser.files import (
    NUMBER, RunFolder, described, differences, numbered, read_jsonl, read_log, run_of, to_json,
    to_jsonl, write_atomic,
)  # fmt: skip
from nanolaser.judge import (
    OWN_SCORES, SamplingOptions, ask_checker, check_prompts, confidences, fitted_threshold, judge,
    open_model, own_scores, score_rows, tokens_of,
)  # fmt: skip
from nanolaser.problems import (
    MADE_UP, Problem, has_test_split, load_problems, read_solutions, train_and_test,
)  # fmt: skip
from nanolaser.reward import judged_rows, load_reward, self_reward
from nanolaser.rollout import Rollout
from nanolaser.scoring import score
from nanolaser.sampler import generate

ENOUGH = 200  # of problems that are made up, where --max-problems does not say


# One helper a heading of --help: the field's name, its default and its meaning are one line.
what, sampling, verifiers = (
    functools.partial(option, group=group) for group in ("what", "sampling", "verifiers")
)


# fmt: off
@dataclass
class Options(SamplingOptions):
    """What to evaluate, and how."""

    data: tuple[str, ...] = what(("arithmetic",),
        "data sets: arithmetic, arithmetic-hard, subset-sum, aliases, .jsonl files")
    n: int = what(8, "solutions per problem", min=1)
    max_problems: int | None = what(None, "problems per data set", min=1,
        shown="all; of what is made up 200")
    include_trained: bool = what(False, "of a training run, also what it was trained on")
    samples: str | None = what(None, metavar="FILE", help="solutions sampled elsewhere, in the "
        "place of --data; r_s by --model if that is given, else as the file has it")
    output: str | None = what(None, "results' folder", metavar="DIR", shown="results/MODEL")

    reward: str | None = sampling(None, "r_v by a function of your own, as in train.py",
        metavar="FILE.py:FUNCTION", shown="the checker")
    token_ids: bool = sampling(False, "keep the solutions' tokens in samples.jsonl")

    fit_threshold: str | None = verifiers(None, metavar="FILE", help="also verdicts at the "
        "threshold of r_s that has the best F1 on these: samples.jsonl of other, solved problems")
    generative: bool = verifiers(False,
        "also ask the model in words whether each solution is right: the baseline of r_s")
    log_ratio: str | None = verifiers(None, metavar="MODEL", help="also score each solution by "
        "log pi - log pi_ref, this being the reference: what the model was before RL")
    scores: tuple[str, ...] = verifiers((), metavar="FILE|NAME,...", help="other scores of the "
        f"solutions in --output: files, or {', '.join(OWN_SCORES)}, vote-share")
    score_scale: str | None = verifiers(None, choices=("sigmoid", "rank", "none"),
        help="how scores outside [0, 1] are brought there", shown="refused")
    compare: tuple[str, ...] = verifiers((), count=2, metavar="A B",
        help="two results' folders: differences, with 95 % intervals over problems")
    # fmt: on

    def __post_init__(self):
        # What contradicts itself is refused before a model is loaded for it.
        if self.compare and len(self.compare) != 2:
            raise ValueError(f"--compare takes two folders, got {len(self.compare)}")
        if self.scores and self.output is None:
            raise ValueError("--scores needs --output, the folder of the solutions they belong to")
        # a/rm.jsonl and b/rm.jsonl would be one file of results, and one line of the table
        labels = [Path(source).stem for source in self.scores]
        if len(set(labels)) < len(labels):
            raise ValueError(f"--scores: two are called alike ({', '.join(labels)}); rename one")
        if self.samples and (self.generative or self.log_ratio):
            raise ValueError("--samples takes neither --generative nor --log-ratio; "
                             "--scores p-yes on its results asks the model, too")


def main() -> int:
    """Load, sample what is missing, measure, write, show."""
    o, given = parse_args(Options, description=__doc__.split("\n\n")[0])
    # Three questions that need no sampling: two runs beside each other, other scores of solutions
    # that are there, solutions of somebody else.
    if o.compare:
        return compare(*o.compare)
    if o.scores:
        return other_scores(o, "model" in given)
    fitted_threshold(o.fit_threshold)  # a bad file is said now, and not after hours of sampling
    if o.samples:
        return finish(take_in(o, "model" in given), o)

    # 1. What is evaluated.  Everything that can be wrong fails here, before anything is sampled.
    sets = load_sets(o)
    load_reward(o.reward)
    # Numbers of another judge than the one in training are not wrong, but rarely meant.
    trained = (run_of(o.model) or {}).get("reward")
    if trained and not o.reward:
        warn(f"{o.model} was trained with --reward {trained}; here the checker decides")
    model, tokenizer = open_model(o)
    reference = find_checkpoint(o.log_ratio) if o.log_ratio else None
    for problems in sets.values():
        check_prompts(model, tokenizer, [p.problem for p in problems])
    # The folder last: what failed above has left nothing behind.
    how = o.how(model)
    mine = identity(o, sets, model, tokenizer, how)
    run = open_results(o, mine, Path(o.model.rstrip("/")).name)
    # What it will cost is said before it is spent.
    count = f"{sum(map(len, sets.values()))} problems x {o.n}"
    print(f"{o.model}: {count}, up to {how['max_new_tokens']} tokens each, results in {run.path}")

    # 2. Solutions, each with its verdict and its r_s, and 3. what other verifiers say of them: all
    # of it is on disk as soon as it is known.
    more = {}
    try:
        sample(model, tokenizer, run, sets, how, o)
        if tokenizer.c_ref is not None:
            end_what_was_cut_off(model, tokenizer, run)
        if o.generative:
            judge_all(model, tokenizer, run, how)
            more["generative_verification"] = generative_entries(run)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        raise
    if reference:
        more["log_ratio"] = log_ratio_entries(model, tokenizer, run, reference, o)
    return finish(run, o, more)


def finish(run: RunFolder, o: Options, more: dict[str, dict] = {}) -> int:  # noqa: B006
    """Numbers, tables and pictures; `more` is what other verifiers said: {"log_ratio": {data set:
    entry}}."""
    # From the files alone: the same numbers however often the run was interrupted.
    sets = by_set(read_log(run.path / "samples.jsonl", SAMPLE))
    results, votes = {}, {}
    for name, rows in sets.items():
        results[name], votes[name] = entry_of(name, rows)
        # Verdicts at 0.5 are the paper's; those at a fitted threshold stand beside them.
        if o.fit_threshold:
            threshold = fitted_threshold(o.fit_threshold, rows)
            results[name]["verification_fitted"] = {
                "threshold": threshold, **metrics.verification(rows, threshold)}
        results[name] |= {kind: entries[name] for kind, entries in more.items()}
    run.write_json("results.json", results)
    show(results, votes)
    for name, rows in sets.items():
        picture = run.path / f"{name.replace('/', '-')}.svg"
        print(report.save(picture, report.evaluation(name, rows, votes[name])))
    print(f"results {run.path}/results.json")
    return 0


# ---------------------------------------------------------------------------------------------
# what is evaluated


def load_sets(o: Options) -> dict[str, list[Problem]]:
    """{name: problems} of all data sets; ValueError or FileNotFoundError says what is wrong."""
    # What a model has learned by heart says nothing about what it can do.
    run = None if o.include_trained else run_of(o.model)
    sets: dict[str, list[Problem]] = {}
    for source in o.data:
        name = set_name(source)
        name = source if name in sets else name  # two files called alike: then by their paths
        if name in sets:
            raise ValueError(f"--data names {source} twice")
        # The test split: of arithmetic, neither the embedded model nor its training has seen any.
        most = o.max_problems or (ENOUGH if source in MADE_UP else None)
        trained = trained_on(run, source) if run else set()
        problems = load_problems(source, "test", None if trained else most, parses=parses)
        # By text, not by name: a problem may be in two files, and a file have two names.
        left = [p for p in problems if p.problem not in trained]
        if not left:
            raise ValueError(f"{o.model} was trained on all of {source}; --include-trained "
                             "evaluates it there all the same")
        if trained:
            print(f"{name}: the run was trained on {len(problems) - len(left)} of its "
                  f"{len(problems)} problems; evaluated are the other {len(left)} "
                  "(--include-trained: all)")
        sets[name] = left[:most]
    return sets


def trained_on(run: dict, source: str) -> set[str]:
    """The texts of the problems that a training run (its options) has learned from, as far as the
    data set may hold them."""
    # A run on FILE holds out every n-th problem of it, or evaluates on another data set; how, its
    # options say, and train_and_test divides today as it did then: 30 problems, 6 held out, and
    # the 24 others are what it was trained on.
    data, eval_data, most = run.get("data"), run.get("eval_data"), run.get("eval_problems")
    if not isinstance(data, str) or has_test_split(data):
        return set()  # what is evaluated is another split
    path = Path(data).expanduser()
    same = source.lower() == data.lower()
    if not same and path.suffix and not path.is_file() and Path(source).name == path.name:
        # Trained from another folder, where its path was another: the file's name has to do.
        eval_data, data, same = source if eval_data == data else eval_data, source, True
    if not (same or path.is_file()):
        return set()  # another benchmark; nothing is downloaded to look for shared problems
    return {p.problem for p in train_and_test(data, eval_data or data, most)[0]}


def set_name(source: str) -> str:
    """What a data set is called in results.json: its alias, or its file's name, or where that says
    nothing its folder's."""
    # gsm8k -> gsm8k, my/problems.jsonl -> problems, math500/test.jsonl -> math500
    path = Path(source)
    if not path.suffix:
        return source
    plain = path.stem in ("test", "train", "validation", "data") and path.parent.name
    return path.parent.name if plain else path.stem


def identity(o: Options, sets: dict, model, tokenizer, how: dict) -> dict:
    """What decides about the results: two evaluations with equal identities are the same one.
    --device and --max-rows are not among it: they change no more than the last bits."""
    digest = lambda x: f"{zlib.crc32(x):08x}"  # noqa: E731
    # A run's folder gets better checkpoints under the same name, and a file may be edited: both
    # are recognised by what they hold.  A few numbers of every tensor tell checkpoints apart.
    weights = torch.cat([p.detach().flatten()[:64].float().cpu() for p in model.parameters()])
    data = {}
    for name, problems in sets.items():
        held = repr([(p.id, p.problem, p.answer) for p in problems]).encode()
        data[name] = f"{len(problems)} problems, {digest(held)}"
    reward = o.reward
    if reward:
        reward += " " + digest(Path(reward.rpartition(":")[0]).expanduser().read_bytes())
    return {
        "model": o.model, "weights": digest(weights.numpy().tobytes()),
        "dtype": str(model.dtype).removeprefix("torch."), "thinking": o.thinking,
        **{name: getattr(tokenizer, name) for name in ("z_c", "c_ref", "beta_v")},
        "data": data, "n": o.n, "token_ids": o.token_ids, "reward": reward,
        **{name: how[name] for name in ("seed", "temperature", "top_p", "max_new_tokens")},
    }


def open_results(o: Options, mine: dict, name: str) -> RunFolder:
    """The results' folder, new or to go on with; ValueError shows how an existing one differs."""
    # Without --output: results/NAME, results/NAME-2, ... until one is free or the same.
    for path in [Path(o.output)] if o.output else numbered(Path("results") / name):
        there = read_identity(path)
        differ = differences(there, mine) if there else ""
        # The same evaluation goes on; another one must not be mixed with it.
        if differ and o.output:
            raise ValueError(f"{path} holds other results ({differ}); give another --output")
        if not differ:
            run = RunFolder(path)
            if there is None:
                run.describe("evaluation", mine)
            return run


def read_identity(path: Path) -> dict | None:
    """What the results in a folder are of; None for a folder that is new; ValueError where it
    holds something that is not an evaluation."""
    if (path / "config.json").exists():
        return described(path, "evaluation")
    # Never write into somebody's files, should they be called like ours.
    for other in ("samples.jsonl", "results.json"):
        if (path / other).exists():
            raise ValueError(f"{path} holds a {other} without config.json; give another --output")
    return None


# ---------------------------------------------------------------------------------------------
# sampling

# What every line of the files must hold; anything else is a damaged line, and is named.  That a
# file was written by this script is no promise: people edit, and disks fail.
#     {"dataset": "arithmetic", "prompt_id": 0, "sample": 3, "problem": "2+3=?", "gold": "5",
#      "response": "\\boxed{5}", "answer": "5", "r_v": 1.0, "r_s": 0.93, "finished": true, ...}
SOME_NUMBER = (*NUMBER, type(None))
KEYS = {"dataset": str, "prompt_id": int, "sample": int}  # which solution of which problem
SAMPLE = KEYS | {"problem": str, "response": str, "answer": (str, type(None)), "r_v": NUMBER,
                 "r_s": SOME_NUMBER, "finished": bool, "response_tokens": (int, type(None))}
JUDGEMENT = KEYS | {"score": SOME_NUMBER, "tokens": int}


def by_set(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Rows by data set, in the order of the rows, which in a finished file is that of --data."""
    sets: dict[str, list[dict]] = {}
    for row in rows:
        sets.setdefault(row["dataset"], []).append(row)
    return sets


def sample(model, tokenizer, run: RunFolder, sets: dict, how: dict, o: Options) -> None:
    """Fill samples.jsonl, problem by problem, skipping those that are there."""
    # 1. What is there?  A problem that a kill left half-written is sampled again.
    samples = run.path / "samples.jsonl"
    rows = read_log(samples, SAMPLE)
    have = Counter((row["dataset"], row["prompt_id"]) for row in rows)
    rows = [row for row in rows if have[row["dataset"], row["prompt_id"]] == o.n]
    write_atomic(samples, to_jsonl(rows))
    missing = [(name, place, problem) for name, problems in sets.items()
               for place, problem in enumerate(problems) if have[name, place] != o.n]
    problems, groups = [problem for *_, problem in missing], {}

    # 2. A problem is written when all its solutions have ended, which they do in any order.
    def finish(rollout: Rollout) -> None:
        progress.update()
        group = groups.setdefault(rollout.prompt_id, [])
        group.append(rollout)
        if len(group) < o.n:
            return
        # Whole: judged now, so that a kill costs no more than the problems in flight.
        group = sorted(groups.pop(rollout.prompt_id), key=lambda r: r.sample_id)
        rows = judged_rows(group, problems, tokenizer, o.token_ids, load_reward(o.reward))
        name, place, problem = missing[rollout.prompt_id]
        which = {"dataset": name, "problem_id": problem.id, "prompt_id": place}
        run.append("samples.jsonl", [row | which | {"sample": j} for j, row in enumerate(rows)])

    # All data sets in one call: the last rows of one share their batch with the first of the next.
    total = sum(map(len, sets.values())) * o.n
    if rows:
        print(f"{len(rows)} of {total} solutions are there already")
    with Progress("sampling", total, "solution", done=len(rows)) as progress:
        generate(
            model, tokenizer, [p.problem for p in problems], n=o.n,
            # The random numbers of a problem's first solution: of its text, not of its place, so
            # the same problem gets the same solutions in any data set, order or selection.  2^20
            # solutions fit between two checksums; should two problems share one, nothing breaks.
            streams=[zlib.crc32(p.problem.encode()) << 20 for p in problems],
            on_finish=finish, **how,
        )  # fmt: skip
    # 3. A finished file is in the order of the data, whatever ended first: other runs and other
    #    scores pair with it line by line.
    order = list(sets)
    rows = sorted(read_log(samples, SAMPLE), key=lambda row: (
        order.index(row["dataset"]), row["prompt_id"], row["sample"]))
    write_atomic(samples, to_jsonl(rows))


def end_what_was_cut_off(model, tokenizer, run: RunFolder) -> None:
    """Read r_s of solutions cut off after their box as the authors' script does, as if they had
    ended there, into r_s_if_ended: F1 counts it, nothing else."""
    # Long solutions are often cut off after their answer: who drops them measures another set.
    rows = read_log(run.path / "samples.jsonl", SAMPLE)
    cut = [row for row in rows if not row["finished"] and row["answer"] is not None]
    if all("r_s_if_ended" in row for row in cut):
        return  # read already, before an interruption
    prompts, responses = zip(*(tokens_of(tokenizer, row) for row in cut))
    for row, logp_zc in zip(cut, score(model, tokenizer.z_c_id, prompts, responses)):
        row["r_s_if_ended"] = self_reward(logp_zc, tokenizer)
    write_atomic(run.path / "samples.jsonl", to_jsonl(rows))


def take_in(o: Options, model_given: bool) -> RunFolder:
    """The results' folder of solutions sampled elsewhere, with a samples.jsonl as if sampled here.
    ValueError names the line of a solution of which nobody says whether it is right."""
    # 1. Read, strictly: accuracy over the rows that happen to be whole is that of another data set.
    model, tokenizer = open_model(o) if model_given else (None, None)
    rows = []
    for line, row in read_solutions(o.samples):
        # Somebody has to know what is right: the checker, by a gold answer, or whoever judged it.
        judged = row["gold"] is not None or type(row.get("r_v")) in NUMBER
        for fits, why in (
            (None not in (row["problem"], row["response"]), "needs problem and response as text"),
            (judged, "has neither gold, the reference answer, nor r_v, the verdict"),
            (type(row.get("r_s")) in SOME_NUMBER, "has an r_s that is no number"),
            (type(row.get("finished", True)) is bool, "has a finished that is not true or false"),
            (type(row.get("response_tokens")) in (int, type(None)),
             "has response_tokens that are no count"),
        ):
            if not fits:
                raise ValueError(f"{o.samples}:{line}: the row {why}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{o.samples}: no solutions in it")
    # 2. Check, and read r_s where there is somebody to ask.
    if model_given:
        with Progress("reading r_s", len(rows), "solution") as progress:
            rows = score_rows(model, tokenizer, rows, on_scored=progress.update)
    else:
        # How long they are in tokens only a tokenizer knows.
        known = {"r_s": None, "finished": True, "response_tokens": None}
        rows = [known | row | ask_checker(row) for row in rows]
    # 3. Solutions of one problem are found by its text, and numbered as they come:
    #    problems a b a  ->  prompt_id 0 1 0, sample 0 0 1
    places, counts, name = {}, Counter(), set_name(o.samples)
    for row in rows:
        place = places.setdefault(row["problem"], len(places))
        row |= {"dataset": name, "prompt_id": place, "sample": counts[place]}
        counts[place] += 1
    rows.sort(key=lambda row: row["prompt_id"])
    # 4. From here on they are solutions like any others: --scores and --compare take them as well.
    digest = f"{zlib.crc32(Path(o.samples).read_bytes()):08x}"
    mine = {"samples": f"{o.samples}, {digest}", "model": o.model if model_given else None}
    run = open_results(o, mine, name)
    write_atomic(run.path / "samples.jsonl", to_jsonl(rows))
    print(f"{o.samples}: {len(places)} problems, {len(rows)} solutions, results in {run.path}")
    if all(row["r_s"] is None for row in rows):
        print("no r_s: weighted@n is the majority, best@n a random pick; --model reads it")
    return run


# ---------------------------------------------------------------------------------------------
# measuring


def entry_of(name: str, rows: list[dict]) -> tuple[dict, dict]:
    """(entry of results.json, vote tables) of one data set."""
    # Merging equal answers is the slow part: once, for the numbers and for the pictures.
    equivalent = metrics.safely(is_equivalent)
    votes = metrics.vote_tables(rows, equivalent)
    entry = metrics.summarise(rows, equivalent, votes=votes)
    if entry["checker_errors"]:
        warn(f"{name}: the checker failed {entry['checker_errors']} times: counted as wrong, or as "
             "answers that differ")
    return entry, votes


def show(results: dict, votes: dict) -> None:
    """The tables in the terminal: accuracy and votes, then every verifier that was asked."""
    # Does it solve?  Do votes help?
    print("\n" + report.accuracy_table(results, votes))
    # Does it know when it is right?  One table for all that was asked, r_s first.
    verifiers = {}
    for name, entry in results.items():
        threshold = entry.get("verification_fitted", {}).get("threshold", math.nan)
        labels = {"verification": name, "verification_fitted": f"{name}: r_s > {threshold:.3f}",
                  "generative_verification": f"{name}: in words", "log_ratio": f"{name}: log ratio"}
        verifiers |= {label: entry[key] for key, label in labels.items() if key in entry}
    print("\n" + report.verification_table(verifiers))
    # The question in words costs a second generation, which is what LaSeR replaces.
    for name, entry in results.items():
        if "generative_verification" in entry:
            words = entry["generative_verification"]
            print(f"{name}: a judgement in words takes {report.decimal(words['tokens'], 1)} tokens "
                  f"(r_s: 1); {report.percent(words['undecided'])} % undecided")
    print()


# ---------------------------------------------------------------------------------------------
# baselines: the judgement in words, the log ratio


def key_of(row: dict) -> tuple:
    """Which solution of which problem a row is about."""
    return row["dataset"], row["prompt_id"], row["sample"]


def rescored(rows: list[dict], scores: Iterable[float | None]) -> list[dict]:
    """The rows with another verifier's score in the place of r_s: every metric that is defined for
    r_s is then that of the score."""
    # ... and what r_s would have been at a cut is not the other's business
    return [row | {"r_s": s, "r_s_if_ended": None} for row, s in zip(rows, scores)]


def judge_all(model, tokenizer, run: RunFolder, how: dict) -> None:
    """Ask for a judgement of every solution that has none yet, into judgements.jsonl."""
    done = {key_of(row) for row in run.read("judgements.jsonl", JUDGEMENT)}
    # One that was cut off counts as judged wrong by both verifiers: there is nothing to ask.
    asked = [row for row in run.read("samples.jsonl", SAMPLE) if row["finished"]]
    left = [row for row in asked if key_of(row) not in done]
    with Progress("judging in words", len(asked), "judgement", done=len(done)) as progress:

        # On disk at once: a judgement in words takes as long as a solution.
        def finish(index: int, facts: dict) -> None:
            place = {key: left[index][key] for key in KEYS}
            run.append("judgements.jsonl", [place | facts])
            progress.update()

        if left:
            judge(model, tokenizer, left, finish, **how)


def generative_entries(run: RunFolder) -> dict[str, dict]:
    """`generative_verification` of each data set: how good the judgements are, and their cost."""
    # A judgement is a score like any other: 1.0 yes, 0.0 no, None where it does not commit itself.
    # Put in the place of r_s, it goes through the same metrics and the same votes.
    judgements = {key_of(row): row for row in run.read("judgements.jsonl", JUDGEMENT)}
    entries = {}
    for name, rows in by_set(run.read("samples.jsonl", SAMPLE)).items():
        # None for a solution that was cut off: of that one nothing was asked.
        said = [judgements.get(key_of(row)) for row in rows]
        entry, _ = entry_of(name, rescored(rows, (j and j["score"] for j in said)))
        mine = [j for j in said if j]
        count = len(mine) or math.nan  # RunFolder writes NaN as null
        entries[name] = entry["verification"] | {
            "weighted_vote": entry["weighted_vote"],
            "best_of": entry["best_of"],
            "undecided": sum(j["score"] is None for j in mine) / count,
            "tokens": sum(j["tokens"] for j in mine) / count,
            "self_reward_tokens": 1,  # of the batch that samples the solutions
        }
    return entries


def log_ratio_entries(model, tokenizer, run: RunFolder, reference: Path, o: Options) -> dict:
    """`log_ratio` of each data set: how well log pi(y|x) - log pi_ref(y|x), summed over the tokens
    of a solution, knows right from wrong, and how much it follows the length."""
    # The implicit reward of DPO (Rafailov et al. 2023) without its factor, which orders nothing.
    before, cutter = load_pretrained(reference, device=o.device, dtype=o.dtype)
    entries = {}
    for name, rows in by_set(run.read("samples.jsonl", SAMPLE)).items():
        ended = [row for row in rows if row["finished"]]  # those that have an r_s: a fair contest
        # Sums over other tokens are not comparable; a hundred texts show whether they are others.
        if any(cutter.encode(row["response"]) != tokenizer.encode(row["response"])
               for row in ended[:100]):
            raise ValueError(f"--log-ratio {o.log_ratio}: it cuts text into other tokens than "
                             f"{o.model}")
        # The same tokens through both models; the difference is what RL has changed.
        tokens = [tokens_of(tokenizer, row) for row in ended]
        prompts, responses = [p for p, _ in tokens], [r for _, r in tokens]
        with Progress("log ratios", 2 * len(ended), "reading") as progress:
            sums = [confidences(m, prompts, responses, tokenizer.size, on_read=progress.update)
                    ["logprob"] for m in (model, before)]  # fmt: skip
        quality = metrics.verification(rescored(ended, (a - b for a, b in zip(*sums))))
        # A sum of log ratios is no probability: it orders solutions, and that is all.
        entries[name] = {"reference": o.log_ratio} | {
            key: quality[key] for key in ("auroc", "auroc_within", "spearman_length",
                                          "mean_r_s_correct", "mean_r_s_wrong")}
    return entries


# ---------------------------------------------------------------------------------------------
# other verifiers, other runs


def read_samples(folder: str) -> list[dict]:
    """The solutions of a results' folder; ValueError or FileNotFoundError if there are none."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    # Not to be locked: one may look at an evaluation that is still running.
    rows = read_log(path / "samples.jsonl", SAMPLE) if read_identity(path) is not None else []
    if not rows:
        raise ValueError(f"{folder} holds no evaluation: config.json or solutions are missing")
    return rows


def other_scores(o: Options, model_given: bool) -> int:
    """The same metrics for other scores of the same solutions, beside those of r_s."""
    rows = read_samples(o.output)
    # A score is a number for each solution, wherever it comes from; put in the place of r_s it goes
    # through the same metrics.  r_s first: it is what the others are compared with.
    shown = {f"{name}: r_s": metrics.verification(mine) for name, mine in by_set(rows).items()}
    asked = own_scores_of(rows, o, model_given)
    for source in o.scores:
        if source in asked:
            scores, scale = asked[source], o.score_scale
            # Of these it is known what they are: nats have an order, and that is all.
            if scale is None and source not in ("p-yes", "vote-share"):
                scale = "rank"
        else:
            scores, scale = read_scores(source, rows, o.score_scale), o.score_scale
        # In the place of r_s: with the numbers as they are for the table, its votes on a scale.
        label, results, votes = Path(source).stem, {}, {}
        for name, mine in by_set(rescored(rows, scores)).items():
            values = scaled([row["r_s"] for row in mine], scale)
            results[name], votes[name] = entry_of(name, rescored(mine, values))
            results[name]["score_scale"] = scale
            shown[f"{name}: {label}"] = results[name]["verification"]
        out = Path(o.output) / f"scores-{label}.json"
        write_atomic(out, to_json(results))
        print(f"votes weighted by {label} (wrote {out}):")
        print(report.accuracy_table(results, votes) + "\n")
    print(report.verification_table(shown))
    return 0


def own_scores_of(rows: list[dict], o: Options, model_given: bool) -> dict[str, list]:
    """{name: one score for each row} of the --scores that are no files; ValueError if there is no
    model to ask."""
    found, names = {}, [name for name in o.scores if name in OWN_SCORES]
    if "vote-share" in o.scores:
        # Solutions of one problem: of the same place in the same data set, in whatever order.
        owners = [row | {"prompt_id": key_of(row)[:2]} for row in rows]
        found["vote-share"] = metrics.vote_share(owners, is_equivalent)
    # All that need a model in one go: it is loaded once.
    if names:
        # The model that wrote the solutions, unless another one is asked for.
        wrote = o.model if model_given else read_identity(Path(o.output)).get("model")
        if wrote is None:
            raise ValueError(f"--scores {names[0]} needs the --model to ask")
        model, tokenizer = open_model(replace(o, model=wrote))
        # One that was cut off has no end to be asked about: no score.
        ended = [i for i, row in enumerate(rows) if row["finished"]]
        # P(yes) is one forward pass over all, the others are another, together.
        passes = ("p-yes" in names) + bool(set(names) - {"p-yes"})
        with Progress("reading scores", passes * len(ended), "reading") as progress:
            scores = own_scores(model, tokenizer, [rows[i] for i in ended], names, progress.update)
        for name, x in scores.items():
            mine = dict(zip(ended, x))
            found[name] = [mine.get(i) for i in range(len(rows))]
    return found


def scaled(scores: list[float | None], scale: str | None) -> list[float | None]:
    """Scores of one data set on the scale of a probability; None stays None."""
    if scale == "sigmoid":
        # tanh does not overflow: -1e5 becomes 0
        return [None if s is None else 0.5 + 0.5 * math.tanh(s / 2) for s in scores]
    if scale == "rank":
        # The share of solutions that score lower, ties counting half: 3 of 4 score lower, 0.875.
        ranks = iter(metrics.quantiles([s for s in scores if s is not None]))
        return [None if s is None else next(ranks) for s in scores]
    return scores


def read_scores(name: str, rows: list[dict], scale: str | None) -> list[float | None]:
    """One score (None: has none) for each row; ValueError names the line that does not fit, and
    refuses scores that no `scale` brings into [0, 1]."""
    # {"dataset": "math500", "prompt_id": 7, "sample": 0, "score": 0.83}, or {"score": 0.83}
    keys = {tuple(map(str, key_of(row))): i for i, row in enumerate(rows)}
    scores, outside = {}, []
    # Compared as texts: whoever wrote the file may have made "7" of 7.
    for place, (number, line) in enumerate(read_jsonl(name)):
        where, field = f"{name}:{number}", "score" if "score" in line else "r_s"
        # With the three keys the order is free; without them it has to be that of the samples.
        keyed = all(key in line for key in KEYS)
        index = keys.get(tuple(str(line[key]) for key in KEYS)) if keyed else place
        if index is None:
            raise ValueError(f"{where}: no such solution in the samples")
        value = line.get(field, "")
        if type(value) not in SOME_NUMBER:
            raise ValueError(f"{where}: no score, or one that is no number")
        scores[index] = value
        # r_s lies outside as well, and its rule is known: clip.  Of other scores nobody knows
        # whether 3.7 is a logit or a mark out of ten, and a vote weighted wrongly would look like
        # a result.
        if field == "score" and value is not None and not 0 <= value <= 1:
            outside.append(value)
    # Half of the scores would be those of an easier or a harder half.
    if set(scores) != set(range(len(rows))):
        raise ValueError(f"{name} scores {len(scores)} solutions, but there are {len(rows)}")
    if outside and scale is None:
        raise ValueError(f"{name}: {len(outside)} scores lie outside [0, 1] ({outside[0]:g}); say "
                         "--score-scale sigmoid (for logits), rank, or none (they are cut off)")
    return [scores[i] for i in range(len(rows))]


def compare(a: str, b: str) -> int:
    """Two evaluations side by side, on the problems that both have."""
    sets_a, sets_b = by_set(read_samples(a)), by_set(read_samples(b))
    # By name: what one run calls gsm8k and another test cannot be known to be the same.
    common = [name for name in sets_a if name in sets_b]
    if not common:
        raise ValueError(f"{a} ({', '.join(sets_a)}) and {b} ({', '.join(sets_b)}) have no data "
                         "set in common")
    print(f"A = {a}\nB = {b}\n* the interval excludes 0")
    # Problem by problem: a hard one is hard for both, and that shared part of the luck cancels.
    for name in common:
        problems, table = metrics.compare(sets_a[name], sets_b[name], is_equivalent)
        print(f"\n{name}, {problems} problems in common\n" + report.comparison_table(table))
    return 0


if __name__ == "__main__":
    main_guard(main)
