"""
Text to token ids and back, as the checkpoint's own tokenizer files say.

    tokenizer = Tokenizer.from_folder("path/of/a/checkpoint")
    tokenizer.encode_prompt("What is 2+3?")   # chat template and instruction: what the model reads
    tokenizer.stop_ids                        # every token that ends an answer
    tokenizer.z_c_id                          # the token whose log-probability is the self-reward

Three rules keep token ids honest:
*  Ids in, ids out.  What was sampled is scored as it was sampled; text is decoded for people and
   for the checker only.  Decoding and encoding again does not give the same ids back.
*  Nothing is added behind the caller's back.  `encode` adds no BOS and no EOS; a template that
   writes BOS itself therefore gives one BOS and never two.
*  Every stop id counts: those of generation_config.json, config.json and the tokenizer.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from .files import parse_json

# The paper's sentence, appended to the problem after a space, in training and evaluation alike.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

# For base models that come without a chat template.  Plain text of the kind that pre-training is
# full of: markers such as <|im_start|> would be noise to a model that has never seen them.
DEFAULT_TEMPLATE = "Question: {{ messages[-1]['content'] }}\n\nAnswer:"

# The prompt that Open-Reasoner-Zero was trained with (playground/zero_setting_base.py of its
# repository), word for word: a model asked in other words is another model.
R1_TEMPLATE = (
    "{{ bos_token }}A conversation between User and Assistant. The User asks a question, and the "
    "Assistant solves it. The Assistant first thinks about the reasoning process in the mind and "
    "then provides the User with the answer. The reasoning process is enclosed within <think> "
    "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: You must put your "
    "answer inside <answer> </answer> tags, i.e., <answer> answer here </answer>. And your final "
    "answer will be extracted automatically by the \\boxed{} tag.\nThis is the problem:\n"
    "{{ messages[-1]['content'] }}\nAssistant: <think>"
)

# What set_thinking has written in front of a template.
THINKING = re.compile(r"^\{% set enable_thinking = \w+ \+%\}")

# What goes along, byte for byte, from the checkpoint that was loaded.
FILES = (
    "tokenizer.json",  # run by the `tokenizers` library
    "tokenizer_config.json",  # names of special tokens, and the chat template, which in newer
    "chat_template.jinja",  # checkpoints has a file of its own
    "special_tokens_map.json",  # names once more
    "generation_config.json",  # stop ids
)

# z_c by family, best first: the released runs use <|vision_start|> (Qwen2.5, which reads no
# images) and 128002, the first reserved token of LLaMA 3.  Then anything that says it is unused.
PREFERRED_Z_C = ("<|vision_start|>", "<|reserved_special_token_0|>")
UNUSED_NAME = re.compile(r"reserved|unused|extra|placeholder", re.IGNORECASE)
# Special, yet not idle: they close documents, fill masks or stand for what cannot be read.
BUSY_NAME = re.compile(r"pad|unk|mask|sep|cls|bos|eos|endoftext|^</?s>$", re.IGNORECASE)

# What laser.json holds: the type of each value (or None), what is meant where it is absent, and
# what else has to be true of it.  Each is an attribute of the tokenizer.
LASER = {
    "z_c": (str, None, bool),  # the token at which r_s is read
    "instruction": (str, INSTRUCTION, lambda x: True),  # appended to every problem; "" for none
    # how the model is asked for a judgement in a second turn; None: by default text
    "verify_prompt": (str, None, lambda x: True),
    "beta_v": (float, 0.1, lambda x: x > 0),  # scale of r_s
    # what r_s was trained with: mse, or an ablation on another scale (laser.py)
    "self_reward_loss": (str, "mse", lambda x: x in ("mse", "bce", "sft")),
    # nats, a log-probability and its spread over solutions; None until it has been estimated
    "c_ref": (float, None, lambda x: x <= 0),
    "c_ref_std": (float, None, lambda x: x >= 0),
}


class Tokenizer:
    """A checkpoint's tokenizer, its prompts, its `stop_ids`, the readout token `z_c` (`z_c_id`),
    and what else laser.json says."""

    def __init__(self, files: dict[str, bytes], config: dict, laser: dict):
        """From the contents of the files; use `from_folder`.  ValueError says what is wrong."""
        self._files = dict(files)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:  # the library raises nothing more specific than Exception
            raise ValueError(f"tokenizer.json cannot be read: {error}") from None
        # Training files may carry truncation or padding: here a text is exactly its own tokens.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._settings = _json_object(files, "tokenizer_config.json")
        # Ids from `size` on have no text and are never sampled.  Usually the output matrix has such
        # rows to spare (Qwen2.5-7B: 399); a tokenizer with more ids than rows is cut.
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = 1 + max(vocabulary.values(), default=-1)
        if isinstance(config.get("vocab_size"), int):
            self.size = min(self.size, config["vocab_size"])
        added = sorted(self._tokenizer.get_added_tokens_decoder().items())
        self._special = {i: t.content for i, t in added if t.special and i < self.size}
        self._names = self._special_names()
        # In this order: the template writes special tokens by name, and z_c must not stand in it.
        self.stop_ids = self._find_stop_ids(config)
        self._set_template()
        self._read_laser(laser)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read a checkpoint folder; FileNotFoundError without a tokenizer.json, ValueError (with
        the folder's name) for files that are damaged or contradict each other."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{folder}: no tokenizer.json; only the fast tokenizer format is read "
                "(transformers writes it: AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        wanted = (*FILES, "config.json", "laser.json")
        files = {n: (folder / n).read_bytes() for n in wanted if (folder / n).is_file()}
        try:
            config = _json_object(files, "config.json")
            laser = _json_object(files, "laser.json")
            return cls({n: files[n] for n in FILES if n in files}, config, laser)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    def files(self) -> dict[str, bytes]:
        """What a checkpoint has of it, laser.json included: {file name: content}."""
        # transformers and vLLM must stop where we stop: all ids in the file they read them from.
        generation = _json_object(self._files, "generation_config.json")
        stops = list(self.stop_ids)
        generation["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        laser = {name: getattr(self, name) for name in (*LASER, "z_c_id")}
        new = {"generation_config.json": generation, "laser.json": laser}
        return self._files | {name: to_json(value).encode() for name, value in new.items()}

    # -- text and ids ------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing added; special tokens written out in it are recognised.
        ValueError if an id lies beyond `size`: the tokenizer is another model's."""
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            # A lone surrogate, half of a UTF-16 pair, is no character and has no bytes.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.size:
            raise ValueError(
                f"token {max(ids)} does not exist in this model (it has {self.size}): "
                "tokenizer.json belongs to another model"
            )
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids, byte for byte; special tokens left out unless asked for."""
        # No "clean up" of spaces before punctuation, which transformers may do: it makes text
        # that the model did not write.
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The name of each id, as in the vocabulary; "" for an id that has none."""
        return [self._tokenizer.id_to_token(i) or "" for i in ids]

    def streamer(self, skip_special: bool = True) -> Streamer:
        """A new decoder for ids that come one at a time."""
        return Streamer(self, skip_special)

    # -- prompts -----------------------------------------------------------------------------

    def prompt_text(self, problem: str) -> str:
        """What the model is to read: problem and instruction as the user's turn of its template."""
        # "What is 2+3?" in ChatML:  <|im_start|>user\nWhat is 2+3? Please reason step by step,
        # and put ...<|im_end|>\n<|im_start|>assistant\n   and here the answer begins.
        content = f"{problem} {self.instruction}" if self.instruction else problem
        return self._render(content)

    @property
    def asks_for_tags(self) -> bool:
        """Does the prompt ask for the answer within <answer> tags, as Open-Reasoner-Zero's does?"""
        return all(tag in self.prompt_text("") for tag in ("<answer>", "</answer>"))

    def use_template(self, template: str) -> None:
        """Ask in other words from now on: those of "r1" or of a .jinja file, without an instruction
        of our own; saved with the model.  ValueError or FileNotFoundError if that cannot be."""
        self.instruction = ""
        self._replace_template(
            R1_TEMPLATE if template == "r1" else Path(template).read_text(encoding="utf-8")
        )

    def set_thinking(self, thinking: bool) -> None:
        """Let the model think in a <think> block of its own before it answers, or not; saved with
        it.  ValueError if its chat template has no such switch."""
        if "enable_thinking" not in self._template:
            flag = "--thinking" if thinking else "--no-thinking"
            raise ValueError(f"{flag}: this model's chat template does not know enable_thinking")
        # Written into the template, not handed to it: so transformers and vLLM, which know nothing
        # of this choice, ask what we train in the same words.
        # ({% set enable_thinking = false +%}, in front of all else; +: a newline after it stays.)
        chosen = f"{{% set enable_thinking = {str(thinking).lower()} +%}}"
        self._replace_template(chosen + THINKING.sub("", self._template))

    def _replace_template(self, source: str) -> None:
        """Ask by this chat template, which must leave z_c alone, and save it with the model."""
        self._files["chat_template.jinja"] = source.encode()
        self._set_template()
        self.__dict__.pop("_prompt_ids", None)
        reason = self.why_not_z_c(self.z_c)
        if reason:
            raise ValueError(f"z_c {self.z_c!r}: {reason}; name another with --z-c")

    def encode_prompt(self, problem: str) -> list[int]:
        """The ids of the prompt of a problem, up to where the model's answer begins."""
        return self.encode(self.prompt_text(problem))

    def _set_template(self) -> None:
        """Find the chat template, or make the default one this model's; then compile it."""
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several, by name (for tools, for retrieval)
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if "chat_template.jinja" in self._files:  # the newer place wins
            template = self._files["chat_template.jinja"].decode("utf-8", "replace")
        if not template:
            # Models that were trained with BOS in front miss it badly.  Who adds it is decided
            # by what the tokenizer does by itself; templates write it, so ours has to as well.
            start = self._tokenizer.encode("", add_special_tokens=True).ids
            begins = bool(start) and self._special.get(start[0]) == self._names.get("bos_token")
            template = ("{{ bos_token }}" if begins else "") + DEFAULT_TEMPLATE
            # Saved along, so that whoever loads what we trained asks it in the same words.
            self._files["chat_template.jinja"] = template.encode()
        self._template = str(template)
        from .template import compile_template  # here: only who loads a model waits for jinja2

        self._render = compile_template(self._template, self._names)

    def _special_names(self) -> dict[str, str]:
        """{"bos_token": "<s>", ...}: what templates may refer to; absent ones are left out."""
        raw = _json_object(self._files, "special_tokens_map.json") | self._settings
        names = {}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"):
            value = raw.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                names[key] = value
        return names

    # -- where an answer ends ----------------------------------------------------------------

    def _find_stop_ids(self, config: dict) -> tuple[int, ...]:
        """The union of what tokenizer, generation_config.json and config.json call EOS."""
        # The tokenizer's own comes first: in chat models it is the one that ends a turn, and the
        # first is what is appended to a solution that somebody hands in without an end.
        found = [self._tokenizer.token_to_id(self._names.get("eos_token", ""))]
        for raw in (_json_object(self._files, "generation_config.json"), config):
            ids = raw.get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
        # Ids that the tokenizer does not have can never be sampled.
        stops = [i for i in found if type(i) is int and 0 <= i < self.size]
        if not stops:
            raise ValueError(
                "no stop token: set eos_token in tokenizer_config.json "
                "or eos_token_id in generation_config.json"
            )
        return tuple(dict.fromkeys(stops))

    # -- z_c ---------------------------------------------------------------------------------

    def set_z_c(self, token: str) -> None:
        """Read r_s at this token from now on; ValueError says why a token cannot be z_c."""
        reason = self.why_not_z_c(token)
        if reason:
            raise ValueError(f"z_c {token!r}: {reason}")
        if token != self.z_c:
            self.c_ref = self.c_ref_std = None  # they were another token's
        self.z_c, self.z_c_id = token, self.encode(token)[0]

    def why_not_z_c(self, token: str) -> str | None:
        """Why r_s cannot be read at this token, or None if it can."""
        ids = self.encode(token)
        if len(ids) != 1 or self.decode(ids, skip_special=False) != token:
            # what the vocabulary lacks may be one token all the same: that of the unknown
            return f"it is no token of this vocabulary ({len(ids)} would be needed to write it)"
        if ids[0] in self.stop_ids:
            # Its probability after an answer is that of stopping (again): anything but unused.
            return "it is a stop token, and its probability has another meaning already"
        # Written out in the template, be it in a branch that is not taken, or made by it.
        if token in self._template or ids[0] in self._prompt_ids:
            return "it occurs in the prompt template, where it has another meaning already"
        return None

    @functools.cached_property
    def _prompt_ids(self) -> frozenset[int]:
        """The ids that every prompt contains, whatever the problem."""
        return frozenset(self.encode_prompt(""))

    def unused_special_ids(self) -> list[int]:
        """Special tokens other than z_c that could be z_c, in the order of their ids."""
        others = (i for i in self._special if i != self.z_c_id)
        return [i for i in others if self.why_not_z_c(self._special[i]) is None]

    def _default_z_c(self) -> str:
        """The family's z_c, else the special token least likely to mean something."""

        def rank(token: str) -> int:
            return 0 if UNUSED_NAME.search(token) else 2 if BUSY_NAME.search(token) else 1

        special = list(self._special.values())
        preferred = [t for t in PREFERRED_Z_C if t in special]
        for token in preferred + sorted(special, key=rank):  # sorted is stable: lowest id first
            if self.why_not_z_c(token) is None:
                return token
        raise ValueError("no unused special token to read r_s at; name a token with --z-c")

    def _read_laser(self, laser: dict) -> None:
        """Take over laser.json, key by key; ValueError for values that cannot be right."""
        for name, (kind, default, sound) in LASER.items():
            value = default if laser.get(name) is None else laser[name]
            # JSON's -20 for -20.0; by type, for True is an int to Python; and a whole number may be
            # larger than any float.
            if kind is float and type(value) is int and abs(value) < 1e300:
                value = float(value)
            if value is not default and (type(value) is not kind or not sound(value)):
                raise ValueError(f"laser.json: {name} is {value!r:.40}, which it cannot be")
            setattr(self, name, value)
        self.z_c = self.z_c or self._default_z_c()
        self.set_z_c(self.z_c)
        if laser.get("z_c_id") not in (None, self.z_c_id) and laser.get("z_c"):
            raise ValueError(
                f"laser.json: z_c {self.z_c!r} is token {self.z_c_id} here, not "
                f"{laser['z_c_id']}: the file belongs to another tokenizer"
            )


class Streamer:
    """Decodes ids as they come: `put(id)` returns the text that is certain by now, `end()` the
    rest; all of it together is the decoded whole."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._decode = functools.partial(tokenizer.decode, skip_special=skip_special)
        # Some decoders treat the first token of a text differently (its space is dropped), so
        # new tokens are decoded together with some that were shown already.
        self._context: list[int] = []
        self._pending: list[int] = []

    def put(self, token_id: int) -> str:
        """Take one more id; the text to show now, often "" in the middle of a character."""
        # A character may be spread over several byte-level tokens.  Until its last byte is there,
        # the text ends in U+FFFD, the replacement character: that is the sign to wait.
        self._pending.append(token_id)
        return "" if self._text().endswith("\ufffd") else self.end()

    def end(self) -> str:
        """No more ids: the text still held back, broken characters included."""
        text = self._text()
        # Without text (a special token, a dropped space) the old context must stay.
        self._context = self._pending if text else self._context + self._pending
        self._pending = []
        return text

    def _text(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]


# ---------------------------------------------------------------------------------------------
# JSON files


def _json_object(files: dict[str, bytes], name: str) -> dict[str, Any]:
    """The parsed JSON object of a file, {} if there is no such file; ValueError if damaged."""
    return parse_json(files[name], name) if name in files else {}


def to_json(value: Any) -> str:
    """JSON to be read by people too; ValueError for NaN, which other readers would reject."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
