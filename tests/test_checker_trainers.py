"""The checker as other trainers use it: TRL's and verl's reward, and an installation without torch.
"""

import shutil
import subprocess
import sys
import tempfile

import pytest

from nanolaser.checker import compute_score, is_correct, reward_function

from .conftest import ROOT


def message(content) -> list[dict]:
    return [{"role": "assistant", "content": content}]


@pytest.mark.parametrize("completion,gold,reward", [
    (r"so \boxed{1/2}", "0.5", 1.0), (r"so \boxed{1/3}", "0.5", 0.0), ("so 0.5", "0.5", 0.0),
    (r"\boxed{4} or \boxed{5}", "5", 0.0), ("", "5", 0.0), (r"\boxed{}", "", 0.0),
    # as chats come: the last message counts, its content a text, parts, or nothing but a call
    (message(r"so \boxed{7}"), "7", 1.0), (message(r"\boxed{7}") + message("8?"), "7", 0.0),
    (message([{"type": "text", "text": r"\boxed"}, {"type": "text", "text": "{7}"}]), "7", 1.0),
    (message(None), "7", 0.0), ([], "7", 0.0),
    # as data sets have their golds: numbers, lists, worked solutions
    (r"\boxed{7}", 7, 1.0), (r"\boxed{3, 2}", ["2", "3"], 1.0), (r"\boxed{2}", ["2", "3"], 0.0),
    (r"\boxed{7}", r"We add 3 and 4, which is $\boxed{7}$.", 1.0), (r"\boxed{7}", None, 0.0),
    (r"\boxed{1,234}", "He has 1,000 + 234 #### 1,234", 1.0), (r"\boxed{1000}", "1000 #### 7", 0.0),
])
def test_a_completion_is_rewarded_by_its_box(completion, gold, reward):
    assert reward_function(["2+5=?"], [completion], answer=[gold]) == [reward]
    if isinstance(completion, str):
        assert compute_score("any/source", completion, gold, extra_info={"index": 3}) == reward


def test_the_gold_is_the_answer_column_before_the_solution_column():
    given = dict(prompts=["a", "b"], completions=[r"\boxed{1}", r"\boxed{2}"], trainer_state=None)
    assert reward_function(**given, solution=[r"\boxed{2}"] * 2, answer=["1", "1"]) == [1.0, 0.0]
    assert reward_function(**given, solution=[r"\boxed{2}"] * 2) == [0.0, 1.0]
    assert reward_function(**given, ground_truth=["1", "2"]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="gold"):
        reward_function(**given, label=["1", "2"])


@pytest.mark.filterwarnings("ignore")  # of options that transformers will rename
@pytest.mark.parametrize("chat", [False, True])
def test_trl_trains_with_it(chat, tmp_path):
    """Two steps of GRPOTrainer on the embedded model earn what the checker says of each text."""
    datasets, transformers, trl = map(pytest.importorskip, ("datasets", "transformers", "trl"))
    from nanolaser.problems import made_up_problems

    folder, seen = ROOT / "nanolaser" / "tiny", []

    def reward(**given):
        seen.append((given, reward_function(**given)))
        return seen[-1][1]

    def prompt(question):
        return [{"role": "user", "content": question}] if chat else (
            f"<|user|>{question}<|end|>")

    rows = [{"prompt": prompt(p.problem), "answer": p.answer, "solution": "see above"}
            for p in made_up_problems(8, 0)]
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=16, num_generations=4,
        max_completion_length=96, beta=0.0, use_cpu=True, bf16=False, gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0)
    trainer = trl.GRPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder), reward, config,
        datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder))
    trainer.train()
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert logged == pytest.approx([sum(rewards) / 16 for _, rewards in seen]) and len(seen) == 2
    for given, rewards in seen:
        texts = [c[-1]["content"] if chat else c for c in given["completions"]]
        assert rewards == [float(is_correct(text, gold))
                           for text, gold in zip(texts, given["answer"])]
    # the model has learned its sums: a reward that is always 0 or 1 would tell nothing
    assert 0 < sum(sum(rewards) for _, rewards in seen) < 32


def test_installed_it_works_without_torch_and_has_the_embedded_model(tmp_path):
    """The package, built and put into a new environment that holds nothing else, no network."""
    source, site = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "nanolaser", source / "nanolaser")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index", "--no-cache-dir"]
    run = dict(check=True, cwd=tmp_path, text=True, capture_output=True)
    subprocess.run([*pip, "wheel", "--no-build-isolation", *offline, str(source), "-w", "."], **run)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(site)], **run)
    python = str(site / "bin" / "python")
    wheels = [str(path) for path in tmp_path.glob("*.whl")]
    subprocess.run([*pip, "--python", python, "install", *offline, *wheels], **run)
    code = r"""
import importlib.util, sys
from pathlib import Path
assert not importlib.util.find_spec("torch") and not importlib.util.find_spec("numpy")
import nanolaser.checker
from nanolaser import explain, extract_answer, is_correct, is_equivalent
from nanolaser.checker import reward_function
assert is_equivalent("1/2", "0.5") and not is_equivalent("1/3", "0.5")
assert is_correct("so \\boxed{7}", "7") and extract_answer("\\fbox 5") == "5" and explain("a", "a")
print(reward_function(["?"], ["\\boxed{7}"], answer=["7"]))
tiny = Path(nanolaser.__file__).parent / "tiny"
assert tiny.is_relative_to(sys.prefix)
print(*sorted(path.name for path in tiny.iterdir() if path.is_file()))
"""
    done = subprocess.run([python, "-I", "-c", code], check=False, cwd=tempfile.gettempdir(),
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    rewards, names = done.stdout.splitlines()
    assert rewards == "[1.0]"
    assert names.split() == sorted(path.name for path in (ROOT / "nanolaser" / "tiny").iterdir()
                                   if path.is_file())
