"""Text and ids: prompts as the checkpoint's template has them, every stop id, z_c, streaming."""

from __future__ import annotations

import json
import time

import pytest
import torch

from nanolaser.files import peak_memory_bytes
from nanolaser.problems import load_problems
from nanolaser.tokenizer import DEFAULT_TEMPLATE, INSTRUCTION, Tokenizer

from .conftest import ROOT, SPECIAL, write_tokenizer

ENDOFTEXT, IM_START, IM_END, VISION, RESERVED = range(256, 261)


@pytest.fixture
def tokenizer_of(tmp_path):
    """tokenizer_of(files={name: JSON or text}, **settings of tokenizer_config.json)."""

    def make(files=None, **settings) -> Tokenizer:
        write_tokenizer(tmp_path, **settings)
        for name, content in (files or {}).items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text)
        return Tokenizer.from_folder(tmp_path)

    return make


def write(tokenizer: Tokenizer, folder) -> None:
    """Its files, as a checkpoint has them."""
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)


# ---------------------------------------------------------------------------------------------
# prompts


def test_the_prompt_is_template_problem_and_the_papers_sentence(tokenizer_of):
    tokenizer = tokenizer_of()
    text = f"<|im_start|>user\n2+2? {INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.prompt_text("2+2?") == text
    ids = tokenizer.encode_prompt("2+2?")
    assert tokenizer.decode(ids, skip_special=False) == text
    # markers are one token each; nothing was put before them
    assert ids[0] == IM_START and ids.count(IM_START) == 2 and ids.count(IM_END) == 1


def test_no_instruction_when_laser_json_says_so(tokenizer_of):
    template = "{{ messages[0].content }}|"
    tokenizer = tokenizer_of({"laser.json": {"instruction": ""}}, chat_template=template)
    assert tokenizer.prompt_text("2+2?") == "2+2?|"


def test_a_base_model_without_template_gets_the_default_one(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of(chat_template=None)
    assert tokenizer.prompt_text("2+2?") == f"Question: 2+2? {INSTRUCTION}\n\nAnswer:"
    # and whoever loads what is saved asks in the same words
    (tmp_path / "saved").mkdir()
    write(tokenizer, tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == DEFAULT_TEMPLATE
    assert Tokenizer.from_folder(tmp_path / "saved").prompt_text("x") == tokenizer.prompt_text("x")


def add_bos(folder):
    """Make a tokenizer.json put <|endoftext|> before every text, as LLaMA's do with their BOS."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    bos, a, b = SPECIAL[0], {"id": "A", "type_id": 0}, {"id": "B", "type_id": 1}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": a}],
        "pair": [{"Sequence": a}, {"Sequence": b}],
        "special_tokens": {bos: {"id": bos, "ids": [ENDOFTEXT], "tokens": [bos]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("template, count", [
    ("{{ bos_token }}{{ messages[0].content }}", 1),  # the template writes it: once, not twice
    ("{{ messages[0].content }}", 0),  # it does not: then transformers has none either
    (None, 1),  # no template: what the tokenizer was trained with
])  # fmt: skip
def test_bos_is_never_doubled(tmp_path, template, count):
    write_tokenizer(tmp_path, chat_template=template, bos_token="<|endoftext|>")
    add_bos(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode_prompt("2+2?")
    assert ids.count(ENDOFTEXT) == count and (ids[0] == ENDOFTEXT) == bool(count)
    assert tokenizer.encode("a") == tokenizer.encode("a")[:1]


def test_the_newer_place_of_a_template_wins(tokenizer_of):
    tokenizer = tokenizer_of({"chat_template.jinja": "new {{ messages[0].content }}"})
    assert tokenizer.prompt_text("x").startswith("new x")


def test_of_several_templates_the_default_one_is_used(tokenizer_of):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert tokenizer_of(chat_template=named).prompt_text("x") == "yes"


def test_what_templates_of_real_models_use(tokenizer_of):
    template = (
        "{%- for m in messages %}\n    {%- if m.role == 'none' %}{% continue %}{% endif %}\n"
        "    {%- generation %}{{ m.content | trim | tojson }}{% endgeneration %}\n{%- endfor %}\n"
        "{%- if tools is none and not documents %} {{ strftime_now('%d %b %Y') }}{% endif %}"
    )
    tokenizer = tokenizer_of({"laser.json": {"instruction": ""}}, chat_template=template)
    # the date is a fixed one: a run resumed tomorrow reads the same prompts
    assert tokenizer.prompt_text(" <é> ") == '"<é>" 26 Jul 2024'


@pytest.mark.parametrize("template", [
    # ways out of a template into the interpreter, each of them well known
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch OWNED').read() }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch OWNED') }}",
    "{% set x = raise_exception.__globals__ %}{{ x['json'] }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ (''|attr('__class__')|attr('__mro__'))[1] }}",
    "{{ messages.append(1) }}",
    # and mistakes
    "{{ raise_exception('only tools') }}",
    "{% if %}",
    "{{ nothing.at.all }}",
    "{{ 1 / 0 }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% include 'secrets' %}",
])  # fmt: skip
def test_a_hostile_template_runs_nothing_and_is_one_line(
    tokenizer_of, tmp_path, monkeypatch, template
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="chat template") as error:
        tokenizer_of(chat_template=template).prompt_text("x")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not (tmp_path / "OWNED").exists()


LOOP, END = "{% for i in range(9999) %}", "{% endfor %}"
GROW = "{% set n = namespace(x=['xx']) %}{% for i in range(60) %}{% set n.x = BODY %}{% endfor %}"


@pytest.mark.parametrize("template", [
    LOOP * 2 + END * 2, LOOP * 60 + END * 60,
    "{% for a in 'x' * 90000 %}{% for b in 'x' * 90000 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in ['x'] recursive %}{{ loop(x) }}{% endfor %}",
    "{{ 'x' * 10**12 }}", "{% set x = 10**12 * 'x' %}", "{{ [0] * 10**10 }}", "{{ 2**(10**9) }}",
    "{{ messages[0].content * 10**9 }}", LOOP + "{{ 'x' * 9000 }}" + END,
    GROW.replace("BODY", "n.x + n.x"), GROW.replace("BODY", "n.x ~ n.x"),
    GROW.replace("BODY", "[n.x, n.x]") + "{{ n.x }}",
    GROW.replace("BODY", "{'a': n.x, 'b': n.x}") + "{{ n.x | tojson }}",
    GROW.replace("{% set n.x = BODY %}", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    "{{ 'x'.center(10**12) }}", "{{ 'x' | center(10**12) }}", "{{ range(10**9) | list }}",
    "{{ ['x'] | map('center', 10**10) | list }}", "{{ messages | tojson(indent=10**9) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '{:1000000000}'.format(1) }}",
    "{{ ('x' * 90000).replace('x', 'y' * 90000) }}", "{{ (['x' * 9000] * 9000) | join }}",
    "{{ ('x' * 90000).translate({120: 'y' * 90000}) }}", "{{ lipsum(n=9999) }}",
    LOOP + "{% set x = ('x,' * 30000).split(',') | sort %}" + END,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ 1" + "+1" * 20_000 + " }}", "x" * 2_000_000,
], ids=lambda template: template[:50])  # fmt: skip
def test_a_template_without_end_or_measure_is_one_line_at_once(tokenizer_of, template):
    began, memory = time.process_time(), peak_memory_bytes(torch.device("cpu"))
    with pytest.raises(ValueError, match="chat template") as error:
        tokenizer_of(chat_template=template).prompt_text("x")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert time.process_time() - began < 5
    assert peak_memory_bytes(torch.device("cpu")) - memory < 200e6


def test_bounds_leave_long_problems_alone(tokenizer_of):
    template = (
        "{% for m in messages %}{% set c = m.content | trim %}{{ '<' + m.role + '>' }}"
        "{{ c.split('</think>')[-1].lstrip('\n') ~ '\n' }}{{ m | tojson }}{% endfor %}"
    )
    problem = "7+" * 500_000  # a megabyte
    assert tokenizer_of(chat_template=template).prompt_text(problem).count("7+") == 1_000_000


# ---------------------------------------------------------------------------------------------
# against transformers, on real tokenizers and real problems


@pytest.fixture(scope="module")
def real(shared):
    """The two real tokenizers, by name; each takes most of a second to load."""
    return {n: Tokenizer.from_folder(shared / "tokenizers" / n) for n in ("llama3_1", "qwen3")}


def real_problems(shared) -> list[str]:
    files = ["math500/test", "OlympiadBench/test", "aime24/test", "amc23/test"]
    problems = [p.problem for f in files for p in load_problems(str(shared / f"{f}.jsonl"))]
    problems = problems[:1000]
    assert len(problems) == 1000
    return problems


@pytest.mark.parametrize("name", ["llama3_1", "qwen3"])
def test_ids_equal_those_of_transformers(shared, real, name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    ours = real[name]
    problems = real_problems(shared)
    texts = [f"{p} {INSTRUCTION}" for p in problems]
    chats = [[{"role": "user", "content": t}] for t in texts]
    rendered = theirs.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    expected = theirs(rendered, add_special_tokens=False)["input_ids"]
    for problem, text, ids in zip(problems, rendered, expected):
        assert ours.prompt_text(problem) == text
        assert ours.encode(text) == ids
    assert ours.encode_prompt(problems[7]) == expected[7]
    assert ours.decode(expected[7], skip_special=False) == rendered[7]
    # once through their own one-call path as well
    whole = theirs.apply_chat_template(chats[0], add_generation_prompt=True, return_dict=True)
    assert ours.encode_prompt(problems[0]) == list(whole["input_ids"])


def test_thinking_is_switched_as_the_template_of_qwen3_has_it(shared, tmp_path):
    """In our words, in those of transformers, and in those of whoever loads what was saved."""
    transformers = pytest.importorskip("transformers")
    folder = shared / "tokenizers" / "qwen3"
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": f"2+2? {INSTRUCTION}"}]
    how = {"add_generation_prompt": True, "tokenize": False}
    for thinking in (False, True, True, False):  # the last word holds
        ours.set_thinking(thinking)
        expected = theirs.apply_chat_template(chat, enable_thinking=thinking, **how)
        assert ours.prompt_text("2+2?") == expected
        assert expected.endswith("</think>\n\n") != thinking
        write(ours, tmp_path)
        assert Tokenizer.from_folder(tmp_path).prompt_text("2+2?") == expected
        again = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert again.apply_chat_template(chat, **how) == expected


def test_a_template_without_thinking_cannot_switch_it(tokenizer_of, call):
    tokenizer = tokenizer_of()
    before = tokenizer.files()
    with pytest.raises(ValueError, match="--no-thinking: .* does not know enable_thinking"):
        tokenizer.set_thinking(False)
    assert tokenizer.files() == before
    for script in ("sample.py", "train.py"):
        code, out, err = call(script, "--thinking", *(["1+1=?"] if script == "sample.py" else []))
        assert code == 2 and "enable_thinking" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name, z_c, z_c_id, stop", [
    ("llama3_1", "<|reserved_special_token_0|>", 128002, 128009),
    ("qwen3", "<|vision_start|>", 151652, 151645),
])  # fmt: skip
def test_the_families_defaults(real, name, z_c, z_c_id, stop):
    tokenizer = real[name]
    assert (tokenizer.z_c, tokenizer.z_c_id, tokenizer.stop_ids) == (z_c, z_c_id, (stop,))
    unused = tokenizer.tokens(tokenizer.unused_special_ids())
    assert z_c not in unused and tokenizer.tokens([stop])[0] not in unused
    assert not {"<|im_start|>", "<|start_header_id|>", "<|begin_of_text|>"} & set(unused)
    assert len(unused) > 5


@pytest.mark.parametrize("name", ["llama3_1", "qwen3"])
def test_streaming_real_text_gives_the_decoded_whole(real, name):
    tokenizer = real[name]
    text = "Größe ≤ 3½ µm — 数学の問題 🤔👩‍👩‍👧 \\boxed{∛π}" * 3
    ids = tokenizer.encode(text)
    streamer = tokenizer.streamer()
    parts = [streamer.put(i) for i in ids]
    assert "".join(parts) + streamer.end() == tokenizer.decode(ids) == text
    assert not any("\ufffd" in part for part in parts)
    assert sum(part == "" for part in parts) > 5  # some characters did take several tokens


# ---------------------------------------------------------------------------------------------
# streaming


def test_streaming_never_shows_half_a_character(tokenizer_of):
    tokenizer = tokenizer_of()
    ids = tokenizer.encode("aé🤔b")  # one token a byte
    assert len(ids) == 1 + 2 + 4 + 1
    streamer = tokenizer.streamer()
    assert [streamer.put(i) for i in ids] == ["a", "", "é", "", "", "", "🤔", "b"]
    assert streamer.end() == ""
    # cut off in the middle of a character: shown as broken, at the end and not before
    streamer = tokenizer.streamer()
    assert [streamer.put(i) for i in ids[:5]] == ["a", "", "é", "", ""]
    assert streamer.end() == "\ufffd"


def test_streaming_any_ids_gives_the_decoded_whole(tokenizer_of):
    tokenizer = tokenizer_of()
    # invalid bytes and special tokens included: what an untrained model samples
    for seed in range(20):
        ids = [(seed * 7919 + i * i * 31) % 261 for i in range(60)]
        for skip in (True, False):
            streamer = tokenizer.streamer(skip)
            shown = "".join(streamer.put(i) for i in ids) + streamer.end()
            assert shown == tokenizer.decode(ids, skip_special=skip)


def test_streaming_keeps_the_spaces_that_sentencepiece_tokenizers_hide(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models

    pieces = ["</s>", "<x>", "▁Hello", "▁world", "!", "▁", *(f"<0x{b:02X}>" for b in range(256))]
    fast = Fast(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    fast.add_special_tokens(["</s>", "<x>"])
    fast.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    euro = [6 + b for b in "€".encode()]
    for ids in ([2, 3, 4], [5, 2, 3], [1, 2, 1, 3], [3, *euro, 3, *euro, *euro], [5, 5, 2]):
        streamer = tokenizer.streamer()
        assert "".join(map(streamer.put, ids)) + streamer.end() == tokenizer.decode(ids)


# ---------------------------------------------------------------------------------------------
# where answers end


@pytest.mark.parametrize("generation, config, eos, stops", [
    # the tokenizer's own first, then the rest without repeats
    ([258, 256], 256, "<|im_end|>", (258, 256)),
    (256, [257, 258], "<|im_end|>", (258, 256, 257)),
    (None, 256, None, (256,)),
    (256, None, {"content": "<|im_end|>", "special": True}, (258, 256)),
    # ids that are none, or that the tokenizer does not have, never end anything
    ([256, 99999, -1, True, "258"], None, "<|gone|>", (256,)),
])  # fmt: skip
def test_every_stop_id_counts(tokenizer_of, generation, config, eos, stops):
    files = {"generation_config.json": generation, "config.json": config}
    tokenizer = tokenizer_of({n: {"eos_token_id": i} for n, i in files.items()}, eos_token=eos)
    assert tokenizer.stop_ids == stops
    saved = json.loads(tokenizer.files()["generation_config.json"])["eos_token_id"]
    assert saved == (list(stops) if len(stops) > 1 else stops[0])


def test_no_stop_id_at_all_is_refused(tokenizer_of):
    with pytest.raises(ValueError, match="no stop token: set eos_token"):
        tokenizer_of({"generation_config.json": {}}, eos_token=None)


def test_what_generation_config_says_besides_is_kept(tokenizer_of):
    tokenizer = tokenizer_of({"generation_config.json": {"temperature": 0.7, "eos_token_id": 256}})
    assert json.loads(tokenizer.files()["generation_config.json"])["temperature"] == 0.7


# ---------------------------------------------------------------------------------------------
# z_c


def test_z_c_by_default_and_by_choice(tokenizer_of):
    tokenizer = tokenizer_of()
    assert (tokenizer.z_c, tokenizer.z_c_id) == ("<|vision_start|>", VISION)
    assert tokenizer.unused_special_ids() == [RESERVED]
    tokenizer.c_ref, tokenizer.c_ref_std = -20.0, 0.1
    tokenizer.set_z_c("<|vision_start|>")
    assert tokenizer.c_ref == -20.0  # the same token: its reference stays
    tokenizer.set_z_c("<|reserved_0|>")
    assert (tokenizer.z_c_id, tokenizer.c_ref, tokenizer.c_ref_std) == (RESERVED, None, None)
    assert tokenizer.unused_special_ids() == [VISION]


@pytest.mark.parametrize("token, reason", [
    ("<|im_end|>", "it is a stop token"),
    ("<|endoftext|>", "it is a stop token"),  # of generation_config.json
    ("<|im_start|>", "it occurs in the prompt template"),
    ("u", "it occurs in the prompt template"),
    ("two", "no token of this vocabulary"),
    ("<|nothing|>", "no token of this vocabulary"),
    ("", "no token of this vocabulary"),
])  # fmt: skip
def test_z_c_refused_with_the_reason(tokenizer_of, token, reason):
    tokenizer = tokenizer_of()
    with pytest.raises(ValueError, match=reason):
        tokenizer.set_z_c(token)
    assert tokenizer.z_c_id == VISION  # as it was


def test_what_the_vocabulary_lacks_is_not_the_unknown_token():
    """The embedded model has 108 characters, and one token for all the others."""
    tokenizer = Tokenizer.from_folder(ROOT / "nanolaser" / "tiny")
    for token in ("\u6570", "\U0001f914", "<|vision_start|>"):
        with pytest.raises(ValueError, match="no token of this vocabulary"):
            tokenizer.set_z_c(token)


def test_a_template_that_uses_the_familys_z_c_makes_it_take_another(tokenizer_of):
    template = "{{ messages[0].content }}{% if images %}<|vision_start|>{% endif %}"
    assert tokenizer_of(chat_template=template).z_c == "<|reserved_0|>"


def test_no_token_left_for_z_c(tokenizer_of):
    template = "{{ messages[0].content }}" + "".join(SPECIAL)
    with pytest.raises(ValueError, match="no unused special token .* name a token with --z-c"):
        tokenizer_of(chat_template=template)


def test_rows_beyond_the_matrix_are_no_tokens(tokenizer_of):
    # a config of 260 rows: the last special token has no embedding
    tokenizer = tokenizer_of({"config.json": {"vocab_size": 260}})
    assert tokenizer.size == 260 and tokenizer.unused_special_ids() == []
    with pytest.raises(ValueError, match="token 260 does not exist in this model"):
        tokenizer.encode("<|reserved_0|>")


# ---------------------------------------------------------------------------------------------
# laser.json, and files that are damaged


def test_laser_json_round_trip(tokenizer_of, tmp_path):
    laser = {"z_c": "<|reserved_0|>", "z_c_id": RESERVED, "c_ref": -21.5, "c_ref_std": 0.25}
    laser |= {"beta_v": 0.2, "instruction": "Think."}
    tokenizer = tokenizer_of({"laser.json": laser})
    assert json.loads(tokenizer.files()["laser.json"]).items() >= laser.items()
    out = tmp_path / "out"
    out.mkdir()
    write(tokenizer, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes()  # byte for byte
    again = Tokenizer.from_folder(out)
    assert again.files() == tokenizer.files()
    assert again.prompt_text("x") == tokenizer.prompt_text("x")
    assert (again.stop_ids, again.size) == (tokenizer.stop_ids, tokenizer.size)


@pytest.mark.parametrize("laser, message", [
    ({"z_c": "<|reserved_0|>", "z_c_id": 3}, "is token 260 here, not 3: .* another tokenizer"),
    ({"z_c": "<|im_end|>"}, "it is a stop token"),
    ({"z_c": 5}, "z_c is 5"),
    ({"c_ref": "low"}, "c_ref is 'low'"),
    ({"c_ref": float("nan")}, "laser.json is damaged"),
    ({"c_ref": 5}, "c_ref is 5"),
    ({"beta_v": 0}, "beta_v is 0"),
    ({"beta_v": True}, "beta_v is True"),
    ({"beta_v": 10**400}, "beta_v is 1000"),  # larger than any float
    ({"c_ref": -(10**400)}, "c_ref is -1000"),
    ("[]", "laser.json is damaged"),
    ("{", "laser.json is damaged"),
])  # fmt: skip
def test_laser_json_that_cannot_be(tokenizer_of, tmp_path, laser, message):
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_of({"laser.json": laser})
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json",
])  # fmt: skip
@pytest.mark.parametrize("content", ["", "{", "\xff", "[" * 100_000])
def test_damaged_files_are_named(tokenizer_of, name, content):
    with pytest.raises(ValueError, match=name) as error:
        tokenizer_of({name: content})
    assert "\n" not in str(error.value)


def test_no_tokenizer_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


# ---------------------------------------------------------------------------------------------
# odd texts


def test_odd_texts_do_not_end_a_run(tokenizer_of):
    tokenizer = tokenizer_of()
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.encode("a\x00b")) == "a\x00b"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # half a pair
    assert tokenizer.decode(tokenizer.encode("\ud83e\udd14")) == "🤔"  # a whole one
    assert len(tokenizer.encode("x " * 100_000)) == 200_000
    assert tokenizer.decode([270, 97, 10**6]) == tokenizer.decode([97])  # ids without text
    assert tokenizer.tokens([IM_END, 270]) == ["<|im_end|>", ""]


def test_truncation_and_padding_of_training_are_switched_off(tmp_path):
    from tokenizers import Tokenizer as Fast

    write_tokenizer(tmp_path)
    fast = Fast.from_file(str(tmp_path / "tokenizer.json"))
    fast.enable_truncation(8)
    fast.enable_padding(length=16)
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert [len(tokenizer.encode("x" * n)) for n in (1, 20)] == [1, 20]
