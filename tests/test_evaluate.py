"""evaluate.py as a user runs it, on the embedded model; and what it asks of judge.py."""

import json
import shutil
import signal
import time

import pytest
import torch

from nanolaser.judge import confidences, judgement_prompt, tokens_of, verdict
from nanolaser.sampler import generate
from tests.test_commands import C_REF, ROOT, ROW_KEYS, rows_of, start, write_rows

RESULT_KEYS = {"problems", "n", "accuracy", "accuracy_stderr", "majority_vote", "weighted_vote",
               "best_of", "pass_at", "verification", "mean_response_tokens",
               "finished_share"}  # fmt: skip
VERIFICATION_KEYS = {"f1", "f1_all", "f1_filtered", "accuracy_correct", "accuracy_wrong", "auroc",
                     "ece", "brier", "spearman_length", "auroc_within", "mean_r_s_correct",
                     "mean_r_s_wrong"}  # fmt: skip
SMALL = ["--max-problems", 24, "--n", 4, "--max-new-tokens", 64, *C_REF]


def results_of(folder, name="arithmetic"):
    return json.loads((folder / "results.json").read_text())[name]


def samples_of(folder):
    return rows_of((folder / "samples.jsonl").read_text())


def error_of(err):
    """The one line that an error is."""
    (line,) = [x for x in err.splitlines() if not x.startswith("warning: ")]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """One undisturbed evaluation with all verifiers, shared by the tests that look at it."""
    out = tmp_path_factory.mktemp("evaluation") / "results"
    done = start("evaluate.py", *SMALL, "--generative", "--log-ratio", "tiny", "--output", out)
    text, err = done.communicate(timeout=600)
    assert done.returncode == 0, err
    return out, text


# ---------------------------------------------------------------------------------------------
# solutions and results


def test_results_and_samples(evaluated):
    out, text = evaluated
    rows = samples_of(out)
    assert len(rows) == 24 * 4 and all(ROW_KEYS <= set(row) for row in rows)
    order = [(row["prompt_id"], row["sample"]) for row in rows]
    assert order == sorted(order)
    entry = results_of(out)
    assert set(entry) >= RESULT_KEYS and set(entry["verification"]) >= VERIFICATION_KEYS
    assert (entry["problems"], entry["n"], entry["checker_errors"]) == (24, 4, 0)
    assert set(entry["weighted_vote"]) == {"1", "2", "4"}
    assert entry["accuracy"] == pytest.approx(sum(r["r_v"] for r in rows) / 96, abs=1e-6)
    # the terminal shows the same, and the picture is there
    assert f"{100 * entry['accuracy']:.1f} +-" in text and "weighted@n" in text
    assert (out / "arithmetic.svg").stat().st_size > 5_000


def test_the_judgement_in_words_is_measured_like_r_s(evaluated):
    out, text = evaluated
    entry = results_of(out)["generative_verification"]
    judgements = rows_of((out / "judgements.jsonl").read_text())
    rows = samples_of(out)
    ended = sum(row["finished"] for row in rows)
    assert 90 < len(judgements) == ended  # of one that was cut off nothing is asked
    assert {j["judgement"][:1] for j in judgements} <= {"y", "n"}
    # the model knows the question: one letter and its end
    assert entry["tokens"] == pytest.approx(2, abs=0.1) and entry["undecided"] < 0.1
    # the base model knows well what is right, if asked (its r_s, untrained, does not)
    untrained = results_of(out)["verification"]
    for name in ("f1", "auroc", "auroc_within"):
        assert entry[name] > 0.8 > 0.7 > untrained[name]
    assert entry["best_of"]["4"] > results_of(out)["best_of"]["4"]
    said = {(j["prompt_id"], j["sample"]): j["score"] for j in judgements}
    right = [said.get((r["prompt_id"], r["sample"])) == 1.0 for r in rows if r["r_v"]]
    assert entry["accuracy_correct"] == pytest.approx(sum(right) / len(right), abs=1e-6)
    assert "arithmetic: in words" in text


def test_killed_and_resumed_keeps_what_was_finished(evaluated, tmp_path):
    whole, _ = evaluated
    out = tmp_path / "results"
    first = start("evaluate.py", *SMALL, "--output", out)
    samples = out / "samples.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and first.poll() is None:
        if samples.exists() and samples.read_text().count("\n") > 8:
            break
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = samples.read_text()
    kept = kept[: kept.rindex("\n") + 1]
    assert 8 < kept.count("\n") < 96, "the machine was too quick for this test"
    *finished, half = kept.splitlines()
    # the kill came in the middle of a problem, and of a line
    samples.write_text("\n".join(finished) + "\n" + half[:40])
    done = start("evaluate.py", *SMALL, "--output", out)
    text, err = done.communicate(timeout=600)
    assert done.returncode == 0 and "are there already" in text, err
    now = samples.read_text().splitlines()
    whole_problems = [x for x in finished if json.loads(x)["prompt_id"]
                      != json.loads(half)["prompt_id"]]  # fmt: skip
    assert set(whole_problems) <= set(now) and len(now) == 96
    # what was not there came out as in the run that nobody disturbed, but for the last digits
    for row, other in zip(samples_of(out), samples_of(whole)):
        assert (row["response"], row["r_v"]) == (other["response"], other["r_v"])
        assert row["r_s"] == pytest.approx(other["r_s"], abs=1e-4)


def test_solutions_do_not_depend_on_their_company(evaluated, call, tmp_path):
    # another selection, another order, a file instead of the generator: the same solutions
    rows = samples_of(evaluated[0])
    some = [{"problem": row["problem"], "answer": row["gold"]} for row in rows[80:60:-4]]
    data = write_rows(tmp_path / "some.jsonl", some)
    out = tmp_path / "results"
    code, _, err = call("evaluate.py", *SMALL, "--data", data, "--output", out, "--token-ids")
    assert code == 0, err
    mine = samples_of(out)
    assert all(row["response_token_ids"] for row in mine)
    texts = {(r["problem"], r["sample"]): r["response"] for r in rows}
    assert all(texts[r["problem"], r["sample"]] == r["response"] for r in mine)
    assert list(json.loads((out / "results.json").read_text())) == ["some"]


def test_cut_off_after_its_box_is_scored_as_if_it_had_ended(evaluated, call, tmp_path):
    """The same random numbers, one token less room: where the end came next, r_s is read there."""
    row = max((r for r in samples_of(evaluated[0]) if r["finished"]),
              key=lambda r: r["response_tokens"])  # fmt: skip
    data = write_rows(tmp_path / "one.jsonl", [{"problem": row["problem"], "answer": row["gold"]}])
    out = tmp_path / "results"
    less = ["--data", data, "--n", 4, "--max-new-tokens", row["response_tokens"] - 1, *C_REF]
    code, _, err = call("evaluate.py", *less, "--output", out)
    assert code == 0, err
    cut = samples_of(out)[row["sample"]]
    assert cut["response"] == row["response"] and not cut["finished"] and cut["r_s"] is None
    assert cut["r_s_if_ended"] == pytest.approx(row["r_s"], abs=1e-4)
    assert all("r_s_if_ended" not in r for r in samples_of(out) if r["finished"])


def test_a_folder_of_other_results_is_refused(evaluated, call, tmp_path):
    out, _ = evaluated
    before = (out / "samples.jsonl").read_bytes()
    code, _, err = call("evaluate.py", *SMALL, "--n", 8, "--output", out)
    assert code == 2 and "n 4 there, 8 here" in error_of(err)
    assert (out / "samples.jsonl").read_bytes() == before
    (tmp_path / "config.json").write_text('{"options": {}}')
    code, _, err = call("evaluate.py", *SMALL, "--output", tmp_path)
    assert code == 2 and "something else" in error_of(err)


def test_a_checker_that_fails_costs_no_evaluation(evaluated, call, monkeypatch, tmp_path):
    def fails(answer, gold):
        raise RecursionError("nested too deeply")

    monkeypatch.setattr("nanolaser.checker.is_equivalent", fails)
    shutil.copytree(evaluated[0], tmp_path / "results")
    code, _, err = call("evaluate.py", *SMALL, "--output", tmp_path / "results")
    assert code == 0 and "the checker failed" in err
    entry = results_of(tmp_path / "results")
    assert entry["checker_errors"] > 10  # no two different answers could be compared
    assert entry["accuracy"] == results_of(evaluated[0])["accuracy"]


# ---------------------------------------------------------------------------------------------
# a run's own data


@pytest.fixture
def run_of_file(tmp_path, monkeypatch):
    """A run's folder (the embedded model, as if trained) and the file of 30 problems it learned
    from, named as it was on train.py's command line."""
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"{i}+1=?", "answer": str(i + 1)} for i in range(1, 31)]
    write_rows(tmp_path / "mine.jsonl", rows)
    folder = tmp_path / "run"
    shutil.copytree(ROOT / "nanolaser" / "tiny", folder / "checkpoints" / "step-000001")
    (folder / "checkpoints" / "latest").write_text("step-000001\n")
    options = {"data": "mine.jsonl", "eval_data": "mine.jsonl", "eval_problems": 400}
    (folder / "config.json").write_text(json.dumps({"options": options}))
    return folder


HELD_OUT = [f"{i}+1=?" for i in range(1, 31, 5)]


@pytest.mark.parametrize("model", ["run", "run/checkpoints/step-000001"])
@pytest.mark.parametrize("data", ["mine.jsonl", "copy.jsonl", "elsewhere/mine.jsonl"])
def test_what_a_run_was_trained_on_is_left_out(run_of_file, call, tmp_path, model, data):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy("mine.jsonl", "copy.jsonl")
    shutil.copy("mine.jsonl", "elsewhere/mine.jsonl")
    few = ["--model", model, "--data", data, "--n", 1, "--max-new-tokens", 8, *C_REF]
    code, out, err = call("evaluate.py", *few, "--output", "a")
    assert code == 0, err
    assert [row["problem"] for row in samples_of(tmp_path / "a")] == HELD_OUT
    assert "trained on 24 of its 30 problems" in out
    code, out, err = call("evaluate.py", *few, "--output", "b", "--include-trained")
    assert code == 0 and len(samples_of(tmp_path / "b")) == 30, err
    code, out, err = call("evaluate.py", *few, "--output", "c", "--max-problems", 4)
    assert [row["problem"] for row in samples_of(tmp_path / "c")] == HELD_OUT[:4]


def test_a_run_moved_away_from_its_data_still_knows_the_file(run_of_file, call, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.move("mine.jsonl", "elsewhere/mine.jsonl")
    few = ["--n", 1, "--max-new-tokens", 8, *C_REF, "--output", "a"]
    code, _, err = call("evaluate.py", "--model", "run", "--data", "elsewhere/mine.jsonl", *few)
    assert code == 0 and [row["problem"] for row in samples_of(tmp_path / "a")] == HELD_OUT, err


def test_a_file_of_trained_problems_alone_is_refused(run_of_file, call, tmp_path):
    write_rows(tmp_path / "trained.jsonl", [{"problem": "2+1=?", "answer": "3"}])
    code, _, err = call("evaluate.py", "--model", "run", "--data", "trained.jsonl", *C_REF)
    assert code == 2 and "--include-trained" in error_of(err)
    assert not (tmp_path / "results").exists()


# ---------------------------------------------------------------------------------------------
# other verifiers, other runs


def scored(call, evaluated, tmp_path, scores, *more):
    """(entry of the scores' json, stdout) of these scores of the shared evaluation."""
    write_rows(tmp_path / "theirs.jsonl", scores)
    code, text, err = call("evaluate.py", "--output", evaluated[0], "--scores",
                           tmp_path / "theirs.jsonl", *more)  # fmt: skip
    if code:
        return code, error_of(err)
    return json.loads((evaluated[0] / "scores-theirs.json").read_text())["arithmetic"], text


def test_external_scores(evaluated, call, tmp_path):
    rows = samples_of(evaluated[0])
    # by place in the file, an oracle
    oracle = [{"score": row["r_v"]} for row in rows]
    entry, text = scored(call, evaluated, tmp_path, oracle)
    assert "arithmetic: theirs" in text
    assert entry["verification"]["f1"] == entry["verification"]["auroc"] == 1.0
    assert entry["weighted_vote"]["4"] == entry["best_of"]["4"] == entry["pass_at"]["4"]
    # by name, in any order: r_s itself has to give what results.json says
    keys = ("dataset", "prompt_id", "sample", "r_s")
    entry, _ = scored(call, evaluated, tmp_path, [{k: row[k] for k in keys} for row in rows[::-1]])
    assert entry["verification"] == results_of(evaluated[0])["verification"]
    assert scored(call, evaluated, tmp_path, oracle[1:]) == (
        2, f"error: {tmp_path}/theirs.jsonl scores 95 solutions, but there are 96")


def test_scores_outside_0_to_1_need_a_rule(evaluated, call, tmp_path):
    """Logits: a weight of 1 for whatever is above 1 would be no weighted vote."""
    rows = samples_of(evaluated[0])
    logits = [{"score": 6.0 * row["r_v"] - 3 + 0.01 * i} for i, row in enumerate(rows)]
    code, line = scored(call, evaluated, tmp_path, logits)
    assert code == 2 and "--score-scale" in line
    entry, _ = scored(call, evaluated, tmp_path, logits, "--score-scale", "sigmoid")
    assert entry["score_scale"] == "sigmoid" and entry["verification"]["f1"] == 1.0
    assert 0.9 < entry["verification"]["mean_r_s_correct"] < 1
    ranked, _ = scored(call, evaluated, tmp_path, logits, "--score-scale", "rank")
    assert ranked["verification"]["auroc"] == entry["verification"]["auroc"] == 1.0
    # every kind lies at the midpoint of its ranks
    means = [ranked["verification"][f"mean_r_s_{kind}"] for kind in ("correct", "wrong")]
    right = sum(row["r_v"] for row in rows) / 96
    assert means == pytest.approx([1 - right / 2, (1 - right) / 2], abs=1e-5)
    plain, _ = scored(call, evaluated, tmp_path, logits, "--score-scale", "none")
    assert plain["verification"]["mean_r_s_correct"] > 3


OWN = ("p-yes", "mean-logprob", "self-certainty", "lowest-group", "vote-share")


def test_scores_by_name(evaluated, call):
    out, _ = evaluated
    code, text, err = call("evaluate.py", "--output", out, "--scores", ",".join(OWN))
    assert code == 0, err
    found = {name: json.loads((out / f"scores-{name}.json").read_text())["arithmetic"]
             for name in OWN}
    assert all(f"arithmetic: {name}" in text for name in OWN)
    for entry in found.values():
        assert all(0 <= entry["verification"][f"mean_r_s_{k}"] <= 1 for k in ("correct", "wrong"))
    # asked for the probability of its verdict the model says what it says when asked to write it
    words = results_of(out)["generative_verification"]
    assert found["p-yes"]["verification"]["auroc"] > words["auroc"] - 0.02
    assert found["p-yes"]["verification"]["f1"] == pytest.approx(words["f1"], abs=0.05)
    # the share of the votes is the majority vote by another name
    share = found["vote-share"]
    assert share["best_of"]["4"] == pytest.approx(share["majority_vote"]["4"], abs=0.02)


def test_the_share_of_votes_in_whatever_order_the_solutions_were_written(call, tmp_path):
    """Two data sets, interleaved as an evaluation that was stopped leaves them."""
    rows = [{"dataset": name, "prompt_id": 0, "sample": i, "problem": "2+3=?", "response": "",
             "answer": answer, "r_v": float(answer == "5"), "r_s": None, "finished": True,
             "response_tokens": 3}
            for i in range(4) for name, answer in (("a", "5"), ("b", "56"[i % 2]))]  # fmt: skip
    write_rows(tmp_path / "samples.jsonl", rows)
    (tmp_path / "config.json").write_text('{"evaluation": {}}')
    code, _, err = call("evaluate.py", "--output", tmp_path, "--scores", "vote-share")
    assert code == 0, err
    found = json.loads((tmp_path / "scores-vote-share.json").read_text())
    # all four of the first say 5; of the second two do
    assert found["a"]["verification"]["mean_r_s_correct"] == 1.0
    assert found["b"]["verification"]["mean_r_s_correct"] == 0.5


def test_the_threshold_is_fitted_on_solved_problems(evaluated, call, tmp_path):
    out = tmp_path / "results"
    shutil.copytree(evaluated[0], out)
    solved = [row | {"problem": "other", "r_s": row["r_v"] * 0.1 + 0.05} for row in samples_of(out)]
    data = write_rows(tmp_path / "solved.jsonl", solved)
    code, text, err = call("evaluate.py", *SMALL, "--output", out, "--fit-threshold", data)
    assert code == 0 and "r_s > 0.100" in text and err == ""
    fitted = results_of(out)["verification_fitted"]
    assert fitted["threshold"] == pytest.approx(0.1)
    believed = [row["r_s"] > 0.1 for row in samples_of(out) if row["r_v"] and row["finished"]]
    assert fitted["accuracy_correct"] == pytest.approx(sum(believed) / len(believed), abs=0.03)
    # what was fitted on the very problems that are judged is said to be so
    code, _, err = call("evaluate.py", *SMALL, "--output", out, "--fit-threshold",
                        out / "samples.jsonl")  # fmt: skip
    assert code == 0 and "24 of the problems" in err
    # verify.py takes the same file
    code, text, _ = call("verify.py", "--problem", "2+3=?", "--solution", "\\boxed{5}", *C_REF,
                         "--fit-threshold", data)  # fmt: skip
    assert code == 0 and "right means r_s > 0.1)" in text
    write_rows(data, solved[:1])
    for script, more in (("verify.py", ["--problem", "x", "--solution", "y"]), ("evaluate.py", [])):
        code, _, err = call(script, *more, "--fit-threshold", data)
        assert code == 2 and "solved.jsonl" in error_of(err)


# ---------------------------------------------------------------------------------------------
# solutions sampled elsewhere


def chat(problem, response):
    return {"messages": [{"role": "system", "content": "be brief"},
                         {"role": "user", "content": [{"type": "text", "text": problem}]},
                         {"role": "assistant", "content": response}]}  # fmt: skip


THEIRS = [chat("2+3=?", "2+3=5\n\\boxed{5}") | {"answer": 5},
          {"question": "2+3=?", "solution": "\\boxed{5.0}", "answer": "so #### 5"},
          {"problem": "2+3=?", "response": "\\boxed{6}", "gold": "5"},
          {"problem": "1+1=?", "response": "\\boxed{3}", "r_v": 0, "gold": None},
          {"problem": "1+1=?", "response": "\\boxed{2}", "r_v": 1},
          {"problem": "1+1=?", "response": "two", "r_v": 0}]  # fmt: skip


def test_solutions_sampled_elsewhere(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "theirs.jsonl", THEIRS)
    code, text, err = call("evaluate.py", "--samples", "theirs.jsonl")
    assert (code, err) == (0, "") and "2 problems, 6 solutions" in text and "no r_s" in text
    entry = results_of(tmp_path / "results" / "theirs", "theirs")
    assert (entry["problems"], entry["n"], entry["accuracy"]) == (2, 3, 0.5)
    # 5 and 5.0 outvote 6; 3 and 2 tie
    assert entry["majority_vote"]["3"] == entry["weighted_vote"]["3"] == 0.75
    assert entry["pass_at"]["3"] == 1 and entry["pass_at"]["2"] == pytest.approx(5 / 6)
    assert entry["verification"]["f1"] is None and entry["mean_response_tokens"] is None


def test_r_s_of_solutions_sampled_elsewhere(call, tmp_path):
    """In the file; or read by a model, which is what verify.py reads."""
    file, out = tmp_path / "theirs.jsonl", tmp_path / "out"
    write_rows(file, [row | {"r_s": i / 10} for i, row in enumerate(THEIRS)])
    code, _, err = call("evaluate.py", "--samples", file, "--output", tmp_path / "file")
    assert code == 0 and [row["r_s"] for row in samples_of(tmp_path / "file")] == [
        0.0, 0.1, 0.2, 0.3, 0.4, 0.5], err  # fmt: skip
    code, text, err = call("evaluate.py", "--samples", file, "--model", "tiny", *C_REF,
                           "--output", tmp_path / "model")  # fmt: skip
    assert code == 0 and "no r_s" not in text, err
    call("verify.py", "--input", file, "--output", out, "--model", "tiny", *C_REF)
    mine, theirs = samples_of(tmp_path / "model"), rows_of(out.read_text())
    for key in ("r_s", "r_v", "answer", "response_tokens"):
        assert [row[key] for row in mine] == [row[key] for row in theirs], key
    # and they are solutions like any others
    code, text, err = call("evaluate.py", "--output", tmp_path / "model", "--scores", "p-yes")
    assert code == 0 and "theirs: p-yes" in text, err


@pytest.mark.parametrize("bad, said", [
    ({"problem": "x", "response": "y"}, "neither gold"),
    ({"problem": "x", "response": "y", "r_v": True}, "neither gold"),
    ({"problem": "x", "response": "y", "gold": "1", "r_s": "high"}, "r_s"),
    ({"messages": [{"role": "user", "content": "x"}], "gold": "1"}, "messages"),
    ({"messages": [{"role": "user"}, {"role": "assistant"}], "gold": "1"}, "messages"),
    ({"messages": 5, "gold": "1"}, "messages"),
    ({"problem": "x", "response": "y", "gold": "1", "finished": "yes"}, "finished"),
    ({"problem": "x", "response": "y", "gold": "1", "response_tokens": 1.5}, "response_tokens"),
    ({"response_token_ids": [1], "prompt_token_ids": [1], "gold": "1"}, "as text"),
])  # fmt: skip
def test_solutions_without_sense_are_named_by_their_line(call, tmp_path, monkeypatch, bad, said):
    monkeypatch.chdir(tmp_path)
    file = write_rows(tmp_path / "theirs.jsonl", [THEIRS[0], bad])
    code, _, err = call("evaluate.py", "--samples", file)
    assert code == 2 and "theirs.jsonl:2" in error_of(err) and said in error_of(err)
    assert not (tmp_path / "results").exists()


def test_the_log_ratio_is_that_of_the_two_models(evaluated, make_checkpoint, tmp_path):
    """Against the log-probs with which the sampler drew; the ratio to itself is nothing."""
    from nanolaser import load_pretrained

    model, tokenizer = load_pretrained(make_checkpoint(tmp_path / "a"))
    drawn = generate(model, tokenizer, ["2+3=?", "1+1+1=?"], n=5, max_new_tokens=9)
    prompts, responses = ([getattr(r, name) for r in drawn]
                          for name in ("prompt_tokens", "response_tokens"))  # fmt: skip
    mine = confidences(model, prompts, responses, tokenizer.size, budget=64)
    assert mine["logprob"] == pytest.approx([sum(r.logprobs) for r in drawn], abs=1e-4)
    other, _ = load_pretrained(make_checkpoint(tmp_path / "b", seed=1))
    theirs = confidences(other, prompts, responses, tokenizer.size)["logprob"]
    assert torch.tensor(mine["logprob"]).sub(torch.tensor(theirs)).abs().min() > 0.1
    # the others as their papers define them, a solution at a time over the whole vocabulary
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        hidden = model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        p = (hidden @ model.lm_head_weight.T).softmax(-1)[:, : tokenizer.size].detach()
        assert mine["mean-logprob"][i] == pytest.approx(mine["logprob"][i] / len(response))
        certainty = -(tokenizer.size * p).log().mean()
        assert mine["self-certainty"][i] == pytest.approx(certainty.item(), abs=1e-4)
        confidence = [-row.log().sort().values[-20:].mean().item() for row in p]
        groups = [sum(confidence[j : j + 8]) / 8 for j in range(max(1, len(response) - 7))]
        if len(response) >= 8:
            assert mine["lowest-group"][i] == pytest.approx(min(groups), abs=1e-4)
    entry = results_of(evaluated[0])["log_ratio"]
    assert entry["reference"] == "tiny" and entry["auroc"] == pytest.approx(0.5, abs=0.1)
    assert abs(entry["mean_r_s_correct"]) < 1e-3 and "log ratio" in evaluated[1]


def test_a_log_ratio_where_nothing_came_to_an_end(call, tmp_path):
    few = ["--max-problems", 2, "--n", 2, "--max-new-tokens", 1, *C_REF]
    code, _, err = call("evaluate.py", *few, "--log-ratio", "tiny", "--output", tmp_path / "r")
    assert code == 0, err
    assert results_of(tmp_path / "r")["finished_share"] == 0
    assert results_of(tmp_path / "r")["log_ratio"]["auroc"] is None


def test_a_reference_with_other_tokens_is_refused(evaluated, call, make_checkpoint, tmp_path):
    shutil.copytree(evaluated[0], tmp_path / "results")
    code, _, err = call("evaluate.py", *SMALL, "--output", tmp_path / "results", "--log-ratio",
                        make_checkpoint(tmp_path / "other"))  # fmt: skip
    assert code == 2 and "other tokens" in error_of(err)


def test_compare(evaluated, call, tmp_path):
    out, _ = evaluated
    code, text, err = call("evaluate.py", *SMALL, "--seed", 5, "--output", tmp_path / "b")
    assert code == 0, err
    code, text, err = call("evaluate.py", "--compare", out, tmp_path / "b")
    assert code == 0 and "24 problems in common" in text and "95 % interval" in text, err
    accuracy = [results_of(f)["accuracy"] for f in (out, tmp_path / "b")]
    line = next(x for x in text.splitlines() if x.startswith("accuracy"))
    assert line.split()[1:3] == [f"{a:.4f}" for a in accuracy]
    code, _, err = call("evaluate.py", "--compare", out)
    assert code == 2 and "two folders" in err


DAMAGE = {
    "a number": "5",
    "a list": "[1, 2]",
    "no json": "{nothing",
    "no answer": '{"dataset": "arithmetic", "prompt_id": 0, "sample": 0}',
    "a text for a number": None,
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("how", ["resume", "compare", "scores"])
def test_damaged_samples_are_one_line(evaluated, call, tmp_path, damage, how):
    out = tmp_path / "results"
    shutil.copytree(evaluated[0], out)
    lines = (out / "samples.jsonl").read_text().splitlines()
    bad = damage or json.dumps(json.loads(lines[7]) | {"r_v": "yes"})
    (out / "samples.jsonl").write_text("\n".join([*lines[:7], bad, *lines[8:]]) + "\n")
    before = (out / "samples.jsonl").read_bytes()
    arguments = {"resume": [*SMALL, "--output", out], "compare": ["--compare", evaluated[0], out],
                 "scores": ["--output", out, "--scores", out / "samples.jsonl"]}[how]  # fmt: skip
    code, _, err = call("evaluate.py", *arguments)
    assert code == 2 and "samples.jsonl:8" in error_of(err)
    assert (out / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", ['"text"', '{"score": "high"}', '{"score": true}', "{}", "{",
                                  '{"score": 1' + 400 * "0" + "}",
                                  '{"dataset": [], "prompt_id": 0, "sample": 0, "score": 1}'])
def test_damaged_scores_are_one_line(evaluated, call, tmp_path, line):
    (tmp_path / "scores.jsonl").write_text('{"score": 1}\n' + line + "\n")
    code, _, err = call("evaluate.py", "--output", evaluated[0], "--scores",
                        tmp_path / "scores.jsonl")  # fmt: skip
    assert code == 2 and "scores.jsonl:2" in error_of(err)


@pytest.mark.parametrize("config", ["", "[]", '{"evaluation": 3}', "[" * 100_000, "\x00"])
def test_damaged_results_folders_are_one_line(evaluated, call, tmp_path, config):
    out = tmp_path / "results"
    shutil.copytree(evaluated[0], out)
    (out / "config.json").write_text(config)
    for arguments in (["--compare", out, evaluated[0]], [*SMALL, "--output", out]):
        code, _, err = call("evaluate.py", *arguments)
        assert code == 2 and str(out) in error_of(err)


# ---------------------------------------------------------------------------------------------
# judgements


def test_judgements_of_models_without_a_question_of_their_own(tiny):
    _, tokenizer = tiny
    row = {"problem": "2+3=?", "response": "it is \\boxed{5}"}
    text = tokenizer.decode(judgement_prompt(tokenizer, row), skip_special=False)
    assert "2+3=?" in text and "it is \\boxed{5}" in text and text.endswith("assistant\n")
    for judgement, expected in (
        ("The sum is right. \\boxed{Yes}", 1.0), ("Yes? \\boxed{\\text{no}}", 0.0),
        ("At first yes, but then: No.", 0.0), ("\\boxed{5}, so yes", 1.0),
        ("nothing to notice", None), ("", None),
    ):  # fmt: skip
        assert verdict(judgement, follow_up=False) == expected, judgement
    assert [verdict(t, follow_up=True) for t in ("y", " n", "x")] == [1.0, 0.0, None]


def test_tokens_of_a_row_have_an_end(tiny):
    _, tokenizer = tiny
    stop = tokenizer.stop_ids[0]
    row = {"problem": "2+3=?", "response": "\\boxed{5}"}
    prompt, response = tokens_of(tokenizer, row)
    assert prompt == tokenizer.encode_prompt("2+3=?")
    assert response == tokenizer.encode("\\boxed{5}") + [stop]
    # tokens that spell the text win over it; what was cut off gets the end that it lacks
    ids = [*tokenizer.encode("\\box"), *tokenizer.encode("ed{5}")]
    assert tokens_of(tokenizer, row | {"response_token_ids": [*ids, stop]})[1] == [*ids, stop]
    assert tokens_of(tokenizer, row | {"response_token_ids": ids})[1] == [*ids, stop]
    assert tokens_of(tokenizer, row | {"response_token_ids": ids}, ended=False)[1] == ids
    assert tokens_of(tokenizer, row | {"response_token_ids": [7, 8]})[1] == response
    assert tokens_of(tokenizer, row | {"response": ""})[1] == [stop]


@pytest.mark.slow
def test_real_benchmarks_pass_through(call, shared, tmp_path):
    names = ("math500", "aime24", "aime25", "amc23", "OlympiadBench")
    files = ",".join(str(shared / name / "test.jsonl") for name in names)
    code, _, err = call("evaluate.py", *C_REF, "--data", files, "--n", 1, "--max-new-tokens", 48,
                        "--output", tmp_path / "r")  # fmt: skip
    assert code == 0, err
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    counts = {name: entry["problems"] for name, entry in results.items()}
    assert counts == dict(zip(names, (500, 30, 30, 40, 675)))
