r"""From the text of an answer (LaTeX or plain) to a small tree, or a ParseError that says why not.

Grammar, loosest first (LaTeX commands stand for their symbols; spaces and \left \right \, vanish):

    answer    := words | items
    items     := item ((',' | ';' | 'and' | 'or') item)*
    item      := side (relop side)*                  relop: = < > <= >= != in, approximately
    side      := sum ((cup | cap | setminus) sum)* (':' sum)* [unit]
    sum       := sign* term (('+' | '-' | '\pm' | '\mp') term)*
    term      := factor (('*' | '/' | nothing) factor)*
    factor    := sign* postfix
    postfix   := primary ('^' factor | '!' | '!!' | '%' | degree)*
    primary   := number | mixed number | digits_base | letter[_index] | pi | e | i | infinity
               | group | '|' sum '|' | floor | ceiling | \frac | \binom | \sqrt[n]{} | matrix
               | function [^n] [_base] argument | (\sum | \prod)_{k=a}^{b} term | \emptyset | R
    group     := '(' items ')' | '[' items ']' | '(' items ']' | '[' items ')' | '\{' items '\}'
               | '{' items '}' | '{' items '\choose' items '}'

The tree is made of tuples whose first entry names the kind, so equal trees are equal tuples:
    ("num", value, places)   places = digits after the point if written as a decimal, else None
    ("sym", name)  ("const", "pi" | "e" | "i" | "inf")  ("base", digits, base)
    ("add", terms)  ("mul", factors)  ("neg", x)  ("inv", x)  ("pow", x, n)  ("root", n, x)
    ("fact", x)  ("fact2", x)  ("abs", x)  ("floor", x)  ("ceil", x)  ("binom", n, k)
    ("fn", name, args)  ("log", base, x)  ("call", name, args)  ("pm", sign, x)
    ("sum" | "prod", letter, low, high, body)  ("pct", x)  ("deg", x)  ("unit", x, name)
    ("list", items)  ("or", items)  ("set", items)  ("tuple", open, close, items)  ("domain", name)
    ("setop", op, a, b)  ("matrix", rows)  ("rel", ops, sides)  ("ratio", parts)  ("text", words)

What is ambiguous is refused rather than guessed: `\sqrt12`, `\frac123`, `x2`, `1/2x`, `2\frac43`,
`\sin x/2`, an ellipsis. Three conventions are chosen: `a/bc` is a/(bc), `2^10` is 1024, and `2e-3`
is 0.002 (checker.py also tries 2e - 3, where e is Euler's number).
Every loop is linear in the text, and recursion stops at MAX_DEPTH brackets.
"""

import re
import unicodedata
from fractions import Fraction

MAX_CHARS = 3000    # a longer text is compared as text only: no benchmark answer has 400
MAX_TOKENS = 1500
MAX_DEPTH = 32      # nested groups; each costs about eleven Python frames of the 1000 there are
MAX_DIGITS = 1000   # of one number; far below CPython's own limit of 4300
MAX_EXPONENT = 999  # of scientific notation


class ParseError(ValueError):
    """The text has no structure that this grammar knows; the message says what stopped it."""


# ---------------------------------------------------------------------------------------------
# Words and commands. Each table is one decision, so that a new spelling is one new entry.

GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda "
            "mu nu xi rho varrho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta "
            "Lambda Xi Pi Sigma Phi Psi Omega ell hbar aleph mho partial".split())
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh "
                "coth ln lg log exp cis gcd lcm max min".split())
INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec",
           "csc": "arccsc"}
FUNCTION_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "cosec": "csc",
                    "tg": "tan", "ctg": "cot"}
NAMES = {"pi": ("const", "pi"), "inf": ("const", "inf"), "infty": ("const", "inf"),
         "infinity": ("const", "inf"), "oo": ("const", "inf"), "percent": ("op", "%"),
         "degree": ("op", "deg"), "degrees": ("op", "deg"), "deg": ("op", "deg"),
         "and": ("sep", "and"), "or": ("sep", "or"), "sqrt": ("cmd", "root"),
         "cbrt": ("cmd", "cbrt"), "union": ("op", "cup"), "abs": ("cmd", "absolute"),
         "floor": ("cmd", "floor"), "ceil": ("cmd", "ceil")}
COMMANDS = {
    "cdot": ("op", "*"), "times": ("op", "*"), "ast": ("op", "*"), "cdotp": ("op", "*"),
    "div": ("op", "/"), "slash": ("op", "/"), "pm": ("op", "pm"), "mp": ("op", "mp"),
    "le": ("op", "<="), "leq": ("op", "<="), "leqslant": ("op", "<="), "leqq": ("op", "<="),
    "ge": ("op", ">="), "geq": ("op", ">="), "geqslant": ("op", ">="), "geqq": ("op", ">="),
    "lt": ("op", "<"), "gt": ("op", ">"), "ne": ("op", "!="), "neq": ("op", "!="),
    "in": ("op", "in"), "approx": ("op", "~"), "cup": ("op", "cup"), "cap": ("op", "cap"),
    "setminus": ("op", "setminus"), "backslash": ("op", "setminus"),
    "lfloor": ("op", "lfloor"), "rfloor": ("op", "rfloor"), "lceil": ("op", "lceil"),
    "rceil": ("op", "rceil"), "lvert": ("op", "|"), "rvert": ("op", "|"), "vert": ("op", "|"),
    "lbrace": ("op", "\\{"), "rbrace": ("op", "\\}"), "{": ("op", "\\{"), "}": ("op", "\\}"),
    "lbrack": ("op", "["), "rbrack": ("op", "]"), "langle": ("op", "<("), "rangle": ("op", ")>"),
    "lparen": ("op", "("), "rparen": ("op", ")"), "%": ("op", "%"), "$": ("op", "$"),
    "euro": ("op", "euro"), "pounds": ("op", "sterling"),
    "circ": ("op", "circ"), "degree": ("op", "deg"), "prime": ("op", "'"), "\\": ("op", "\\\\"),
    "cr": ("op", "\\\\"), "choose": ("op", "choose"), "colon": ("op", ":"),
    "frac": ("cmd", "frac"), "dfrac": ("cmd", "frac"), "tfrac": ("cmd", "frac"),
    "cfrac": ("cmd", "frac"), "sqrt": ("cmd", "sqrt"), "binom": ("cmd", "binom"),
    "dbinom": ("cmd", "binom"), "tbinom": ("cmd", "binom"), "sum": ("cmd", "sum"),
    "prod": ("cmd", "prod"), "angle": ("cmd", "angle"), "triangle": ("cmd", "angle"),
    "overline": ("cmd", "mark"), "bar": ("cmd", "mark"), "vec": ("cmd", "mark"),
    "hat": ("cmd", "mark"), "tilde": ("cmd", "mark"), "dot": ("cmd", "mark"),
    "overrightarrow": ("cmd", "mark"), "overleftrightarrow": ("cmd", "mark"),
    "widehat": ("cmd", "mark"), "emptyset": ("set", ""), "varnothing": ("set", ""),
    "infty": ("const", "inf"), "pi": ("const", "pi"), "imath": ("const", "i"),
    "land": ("sep", "and"), "lor": ("sep", "or"),
}
# Commands whose argument is words, a unit, or ordinary mathematics in another face.
TEXT_COMMANDS = set("text mbox hbox textbf textit textrm textsf texttt textnormal mathrm mathbf "
                    "mathit mathsf mathtt operatorname rm bf".split())
# Invisible: size and spacing. What stands in braces after them reads as a group.
SILENT = set("tiny small large Large LARGE huge Huge left right middle big Big bigg Bigg bigl bigr "
             "Bigl Bigr biggl biggr Biggl Biggr "
             "quad qquad displaystyle textstyle scriptstyle limits nolimits thinspace enspace "
             "boldsymbol bm underline mathcal mathscr mathord mathop hfill nobreak negthinspace "
             "it em".split())
MATRICES = {"matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array", "psmallmatrix"}

# Unit spellings; the value is the one name that is compared. An unknown \text{...} is its own name.
UNITS = {}
for _line in ("m meter meters metre metres", "cm centimeter centimeters centimetre centimetres",
              "mm millimeter millimeters", "km kilometer kilometers kilometre kilometres",
              "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles", "g gram grams",
              "kg kilogram kilograms", "mg milligram milligrams", "lb lbs pound pounds",
              "oz ounce ounces", "ton tons tonne tonnes", "s sec secs second seconds",
              "min mins minute minutes", "h hr hrs hour hours", "day days", "week weeks",
              "month months", "yr yrs year years", "l liter liters litre litres",
              "ml milliliter milliliters", "gal gallon gallons", "cup cups", "mph", "kph",
              "dollar dollars usd", "cent cents", "euro euros", "unit units", "square sq squared",
              "cubic cu cubed", "per", "rad radian radians", "point points", "people person",
              "way ways", "n newton newtons", "j joule joules", "w watt watts", "v volt volts",
              "hz hertz", "c celsius", "f fahrenheit", "k kelvin", "a amp amps", "times",
              "solution solutions", "student students", "apple apples", "book books", "boy boys",
              "girl girls", "child children", "ball balls", "marble marbles", "coin coins",
              "ticket tickets", "page pages", "question questions", "game games", "car cars",
              "cookie cookies", "egg eggs", "step steps", "tile tiles", "triangle triangles",
              "side sides", "path paths", "flower flowers", "tree trees", "dog dogs", "cat cats",
              "bag bags", "box boxes", "pen pens", "pencil pencils", "pair pairs", "sq. sq"):
    for _word in _line.split():
        UNITS[_word] = _line.split()[0]
# Words that, after a number, make a sentence or another number of it: never a unit.
NOT_UNITS = set("if when for where not no and or because with is are was only since so but the "
                "otherwise then nor to from than either neither hundred thousand million billion "
                "trillion dozen half halves third thirds quarter quarters less more greater fewer "
                "least most about almost roughly approximately infinity plus minus over divided "
                "mod modulo tenth tenths hundredth hundredths thousandth thousandths fifth "
                "fifths sixth sixths eighth eighths score gross base factorial negative positive "
                "true false remainder".split())
SMALL_WORDS = set("no on or in is if of to up it by at so".split())
CURRENCY = {"$": "dollar", "euro": "euro", "sterling": "sterling"}
NUMBER_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
                "nine": 9, "ten": 10, "twelve": 12, "sixteen": 16}

_UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "±": r"\pm ", "∓": r"\mp ",
    "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "√": " sqrt ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "≈": r"\approx ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∖": r"\setminus ",
    "²": "^{2}", "³": "^{3}", "¹": "^{1}", "⁰": "^{0}", "⁴": "^{4}", "⁵": "^{5}", "⁶": "^{6}",
    "⁷": "^{7}", "⁸": "^{8}", "⁹": "^{9}", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ",
    "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\varphi ", "ω": r"\omega ", "σ": r"\sigma ",
    "“": '"', "”": '"', "’": "'", "‘": "'", "′": "'", "￥": "$", "−": "-", "⁄": "/", "∕": "/",
    "€": r"\euro ", "£": r"\pounds ",
    # Invisible: zero-width characters vanish, odd spaces become plain ones.
    "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "\u00a0": " ", "\u2009": " ",
    "\u202f": " ",
})


# ---------------------------------------------------------------------------------------------
# Cleaning: what a page would not show goes away before a token is read.

# All of these are linear: a fixed prefix, then one bounded or one-class repetition.
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BOXES_IN_A_ROW = re.compile(r"\}\s{0,3}\\(?:boxed|fbox)(?![A-Za-z])")
_JOIN_THOUSANDS = re.compile(r"(?<=\d)(?:,\s{0,3}\\!\s{0,3}|\{,\}|\\,|\\!)(?=\d{3}(?!\d))")
_DROPPED = re.compile(r"\\(?:hspace|phantom|hphantom|vphantom|color|tag|label)\*?\{[^{}]{0,40}\}"
                      r"|\\textcolor\{[^{}]{0,40}\}")
_CHOICE = re.compile(r"\(?([A-Ja-j])[).:]")
_DELIMITERS = re.compile(r"(?<!\\)(?:\\[()\[\]]|\$)")
_BARE_DOLLAR = re.compile(r"(?<!\\)\$")


def closing_brace(text: str, start: int) -> int:
    """Position of the brace that closes the one at `start`, or -1; escaped braces do not count."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        brace = match.group()
        depth += (brace == "{") - (brace == "}")
        if depth == 0:
            return match.start()
    return -1


_BRACE = re.compile(r"\\.|[{}]", re.S)  # "\\." swallows an escaped brace, so it is not counted


def unbox(text: str) -> str:
    r"""Take away \boxed and \fbox; their braces stay as groups, boxes side by side are a list."""
    text = _BOX.sub("", _BOXES_IN_A_ROW.sub("}, ", text)).strip()
    for _ in range(4):  # {{9}} is 9, so that words in a box are seen as words
        if not text.startswith("{") or closing_brace(text, 0) != len(text) - 1:
            break
        text = text[1:-1].strip()
    return text


_EDGES = ("\\,", "\\;", "\\:", "\\!", "\\ ", "~", "\\quad")


def trim(text: str) -> str:
    """Take spaces, visible or TeX's, off both ends."""
    while text.startswith(_EDGES):
        text = text[next(len(edge) for edge in _EDGES if text.startswith(edge)):].lstrip()
    while text.endswith(_EDGES) and not text.endswith("\\\\,"):  # a line break, then a comma
        text = text[:-next(len(edge) for edge in _EDGES if text.endswith(edge))].rstrip()
    return text


def clean(text: str) -> str:
    """One spelling for unicode symbols, no boxes, no $...$, no final full stop."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE))
    text = trim(text.strip())
    if text.startswith("**") and text.endswith("**"):
        text = text.strip("* ")  # bold in Markdown
    if "\\boxed" in text or "\\fbox" in text:
        text = unbox(text)
    if "$" in text or "\\(" in text or "\\[" in text:
        # An odd number of bare dollars is a currency sign, not a pair of delimiters.
        if len(_BARE_DOLLAR.findall(text)) % 2:
            text = _BARE_DOLLAR.sub(lambda _: "\\$", text)
        text = trim(_DELIMITERS.sub(" ", text).strip())
    while text.endswith("\\\\"):
        text = text[:-2].rstrip()
    if text.endswith(".") and not text.endswith("..") and not text.endswith("\\right."):
        text = text[:-1].rstrip()
    if "+/-" in text:
        text = text.replace("+/-", "\\pm ")
    if choice := _CHOICE.fullmatch(text):
        return choice.group(1)  # A) and (A): are choice letters
    if "{" in text or "\\" in text:
        text = _DROPPED.sub("", text)
        text = _JOIN_THOUSANDS.sub("", text.replace("{}", ""))
    return text


# ---------------------------------------------------------------------------------------------
# Tokens: (kind, value, gap) where gap says whether space stood before.

# One pattern a kind of token, tried in this order; none of them can backtrack for long, because
# each repeats one class of characters at a time and begins with what only it begins with.
#   space      invisible, but remembered: 3 1/4 is a mixed number, 31/4 is not
#   based      52_8, 52_{10}, 52_{\text{eight}}; 1A_{16} only where letters can be digits
#   thousands  1,234,567 if the whole run of digits and commas has that form: not 27,54,108
#   num        also 6.02e23
_TOKEN = re.compile(r"""
    (?P<space>\s+|~|\\[,;:!>\s]|\\(?:left|right)\s*\.(?!\d))
  | (?P<based>\d+\s?_\s?(?:\d{1,2}(?!\d)|\{\s?\d{1,2}\s?\}|\{\s?\\text\s?\{\s?[a-z]+\s?\}\s?\})
       |\d[0-9A-F]*_(?:1[26](?!\d)|\{1[26]\}))
  | (?P<repeating>\d*\.\d*\\(?:overline|bar|dot)\s?\{\d+\})
  | (?P<thousands>(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?!,?\d))
  | (?P<num>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?)
  | (?P<command>\\(?:[A-Za-z]+|.))
  | (?P<letters>[A-Za-z]+)
  | (?P<op>\*\*|<=|>=|!=|[-+*/^_=<>(){}\[\]|,;:!%'$&])
""", re.X | re.S | re.A)


def tokenize(text: str, level: int = 0) -> list[tuple]:
    """Split cleaned text into tokens; raises ParseError on a character or command unknown here."""
    tokens, position, gap, listing = [], 0, False, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise ParseError(f"unknown character {text[position]!r}")
        kind, value, position = match.lastgroup, match.group(), match.end()
        if kind == "thousands" and listing:
            # Inside ( ), [ ] and \{ \} a comma separates: (1,000) is a pair.
            value = value[:value.index(",")]
            position, kind = match.start() + len(value), "num"
        if kind == "space":
            gap = True
            continue
        if kind == "command":
            position = _command(value[1:], text, position, gap, tokens, level)
        elif kind == "letters":
            _letters(value, gap, tokens)
        elif kind == "thousands":
            tokens.append(("num", value.replace(",", ""), gap))
        else:
            tokens.append((kind, "^" if value == "**" else value, gap))
        if tokens and tokens[-1][0] == "op":
            listing += _LISTING.get(tokens[-1][1], 0)
        gap = False
        if len(tokens) > MAX_TOKENS:
            raise ParseError(f"more than {MAX_TOKENS} tokens")
    return tokens


_ASCII_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LISTING = {"(": 1, "[": 1, "\\{": 1, ")": -1, "]": -1, "\\}": -1}


def _command(name: str, text: str, position: int, gap: bool, tokens: list, level: int) -> int:
    """Append the tokens of one LaTeX command; returns where reading goes on."""
    if name in SILENT:
        return position
    if name in COMMANDS:
        tokens.append((*COMMANDS[name], gap))
    elif name in GREEK:
        tokens.append(("sym", name, gap))
    elif name in FUNCTIONS:
        tokens.append(("fn", name, gap))
    elif name in TEXT_COMMANDS or name in ("mathbb", "begin", "end"):
        while position < len(text) and text[position] == " ":
            position += 1
        if text[position:position + 1] != "{":
            if name in ("rm", "bf"):
                return position  # {\bf 42}
            if name == "mathbb" and text[position:position + 1].isalpha():
                tokens.append(("domain", text[position], gap))
                return position + 1
            raise ParseError(f"\\{name} without braces")
        end = closing_brace(text, position)
        if end < 0:
            raise ParseError("unclosed brace")
        content = text[position + 1:end]
        position = end + 1
        if name in ("mathbb", "begin", "end"):
            tokens.append(({"mathbb": "domain"}.get(name, name), content.strip(), gap))
        else:
            _text(name, content.strip(), gap, tokens, level)
    else:
        raise ParseError(f"unknown command \\{name}")
    return position


def _text(name: str, content: str, gap: bool, tokens: list, level: int) -> None:
    r"""Append the tokens of \text{content}: words, a unit, or mathematics in another face."""
    letters = len(content) - len(content.lstrip(_ASCII_LETTERS))
    head, known = content[:letters], content.strip(" .").lower()
    after_number = tokens and (tokens[-1][0] in ("num", "text") or tokens[-1][1] in ("}", ")"))
    if after_number and head.lower() in UNITS and head not in ("e", "i") and (
            letters < len(content) and content[letters] == "^" or letters == len(content)):
        tokens.append(("text", head, gap))  # \text{ m}, \text{ cm^2}
        tokens.extend(tokenize(content[letters:], level + 1))
        return
    if len(content) > 1 and all(c.isalpha() or c in " '-./" for c in content):
        if known in NAMES or known in FUNCTIONS or content in GREEK:
            _letters(known if known in NAMES or known in FUNCTIONS else content, True, tokens)
        else:
            tokens.append(("text", content, gap))
        return
    if level >= 4:
        raise ParseError("text nested too deeply")
    tokens.extend(tokenize(content, level + 1))


def _letters(run: str, gap: bool, tokens: list) -> None:
    """Append a run of plain letters: a function, a name, a word, or a product of letters."""
    lower = FUNCTION_ALIASES.get(run.lower(), run.lower())
    if lower in FUNCTIONS:
        tokens.append(("fn", lower, gap))
    elif lower in NAMES and len(run) > 1:
        tokens.append((*NAMES[lower], gap))
    elif run in GREEK:
        tokens.append(("sym", run, gap))
    elif len(run) > 1 and is_word(run):
        head = next((f for f in ("sin", "cos", "tan", "ln", "log") if run == f + run[-1]), None)
        if head:
            tokens.append(("fn", head, gap))
            _letters(run[-1], False, tokens)
        else:
            tokens.append(("word", run, gap))
    else:
        for letter in run:
            kind = "const" if letter in "ei" else "sym"
            tokens.append((kind, letter, gap))
            gap = False


_VARIABLE_RUNS = [set("abcd"), set("uvwxyz"), set("pqrst"), set("ijkmn"), set("xyzt"), set("abxy"),
                  set("mnpq"), set("hkr")]


def is_word(run: str) -> bool:
    """True if a run of letters reads as a word or a unit, False if as a product of letters.

    'east' must not equal 'seat', which a product would; so letters multiply only in pairs (mn, ab,
    RC) or where all come from one usual family (abc, xyz).
    """
    lower = run.lower()
    if len(run) == 1 or lower in NAMES or lower in FUNCTIONS or run in GREEK:
        return False
    if lower in UNITS or lower in SMALL_WORDS:
        return True
    if len(run) == 2:
        return False
    letters = set(run)
    return not any(letters <= family for family in _VARIABLE_RUNS)


_WRAPPED = re.compile(r"\\(?:text|mbox|hbox|textbf|textit|textrm|mathrm|mathbf|mathit)\s?"
                      r"\{([^{}\\]*)\}\s*[.]?")


def words_of(text: str) -> str | None:
    """The words, if the whole answer is words (\\text{Evelyn}, odd, Yes); None otherwise."""
    wrapped = False
    while match := _WRAPPED.fullmatch(text):
        text, wrapped = match.group(1).strip(), True
    stripped = text.strip(" .\"")
    if len(stripped) < 2 or not stripped[0].isalpha():
        return None
    if not all(c.isalpha() or c in " '-" for c in stripped):
        return None
    runs = stripped.replace("-", " ").split()
    if any(run.lower() in ("and", "or") or run.lower() in FUNCTIONS for run in runs):
        return None
    known = runs[0].lower() in NAMES or runs[0] in GREEK
    if any(is_word(run) for run in runs) or (wrapped and not (known and len(runs) == 1)):
        return " ".join(stripped.lower().split())
    return None


# ---------------------------------------------------------------------------------------------
# The parser proper: one method a line of the grammar.

STRUCTURES = {"list", "or", "set", "tuple", "domain", "setop", "matrix", "rel", "ratio", "text",
              "base"}
RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "in", "~"}
# What can begin a factor, by kind of token, and which operators can.
_STARTS = {"num", "based", "repeating", "sym", "const", "fn", "cmd", "set", "domain", "begin",
           "node"}
_OPENERS = {"(", "[", "{", "\\{", "lfloor", "lceil", "<("}
END = ("end of text", "", False)


def parse(text: str) -> tuple:
    """The tree of an answer's text; raises ParseError with the reason when it has none."""
    if len(text) > MAX_CHARS:
        raise ParseError(f"longer than {MAX_CHARS} characters")
    text = clean(text)
    if not text:
        raise ParseError("empty")
    if words := words_of(text):
        return ("text", words)
    return _Parser(tokenize(text)).answer()


def is_structure(node: tuple) -> bool:
    """True for tuples, sets, relations and the like: what arithmetic cannot be done on."""
    return node[0] in STRUCTURES


class _Parser:
    """A cursor over the tokens; every method reads its part of the grammar and returns a tree."""

    def __init__(self, tokens: list[tuple]):
        # Four sentinels, because no rule looks further ahead than that.
        self.tokens, self.at = tokens + [END] * 4, 0
        self.depth, self.bars = 0, 0  # open groups; open absolute values
        self.signed = False  # whether a plus-minus sign was met

    # -- cursor -------------------------------------------------------------------------------
    def peek(self, ahead: int = 0) -> tuple:
        """The token under the cursor, or a few further on; past the end it is END."""
        return self.tokens[self.at + ahead]

    def is_op(self, *values: str) -> bool:
        """Is the token under the cursor one of these operators?"""
        kind, value, _ = self.tokens[self.at]
        return kind == "op" and value in values

    def take(self, *values: str) -> bool:
        """Step over one of these operators, if it is next."""
        if self.is_op(*values):
            self.at += 1
            return True
        return False

    def expect(self, *values: str) -> str:
        """Step over one of these operators, which must be next; returns which it was."""
        value = self.peek()[1]
        if not self.take(*values):
            raise ParseError(f"expected {' or '.join(values)}, found {value or 'the end'}")
        return value

    # -- lists and relations ------------------------------------------------------------------
    def answer(self) -> tuple:
        """The whole text: items, and nothing after them."""
        node = self.items(expand=True)
        if self.peek() is not END:
            raise ParseError(f"cannot read on at {self.peek()[1]!r}")
        return node

    def items(self, expand: bool = False) -> tuple:
        """One item, or the list of several; 'or' is remembered because x<1 or x>3 is a union.

        With expand, an item with a plus-minus sign becomes its two values: at the top and in a
        set, but not inside brackets, where arithmetic still goes on.
        """
        found, word = [self.item()], ""
        while self.is_op(",", ";") or self.peek()[0] == "sep":
            while self.is_op(",", ";") or self.peek()[0] == "sep":  # "3, 5, and 8"
                word = self.peek()[1] if self.peek()[0] == "sep" else word
                self.at += 1
            found.append(self.item())
        if expand and self.signed:
            found = [choice for node in found for choice in expand_signs(node)]
        if len(found) == 1:
            return found[0]
        return ("or" if word == "or" else "list", tuple(found))

    def item(self) -> tuple:
        """A side, or a chain of sides with relations between them: 1 < x <= 4."""
        sides, ops = [self.function_head() or self.side()], []
        while self.peek()[0] == "op" and self.peek()[1] in RELATIONS:
            ops.append(self.peek()[1])
            self.at += 1
            sides.append(self.side())
        return ("rel", tuple(ops), tuple(sides)) if ops else sides[0]

    def function_head(self) -> tuple | None:
        """f(x) or N(n, k) left of '=': a name, not a product."""
        if self.peek()[0] != "sym" or self.peek(1)[:2] != ("op", "("):
            return None
        end, args = self.at + 2, []
        while self.tokens[end][0] == "sym":
            args.append(("sym", self.tokens[end][1]))
            end += 1
            if self.tokens[end][1] != ",":
                break
            end += 1
        if not args or [t[1] for t in self.tokens[end:end + 2]] != [")", "="]:
            return None
        name = self.peek()[1]
        self.at = end + 1
        return ("call", name, tuple(args))

    def side(self) -> tuple:
        """A sum with its unit; set operations and ratios bind looser than +."""
        currency = CURRENCY[self.expect(*CURRENCY)] if self.is_op(*CURRENCY) else ""
        node = self.sum()
        while self.is_op("cup", "cap", "setminus") or self.union_letter(node):
            op = self.peek()[1].replace("U", "cup")
            self.at += 1
            right = self.sum()
            if not (_is_set(node) and _is_set(right)):
                raise ParseError("a set operation on something that is not a set")
            node = ("setop", op, node, right)
        if self.is_op(":"):
            parts = [node]
            while self.take(":"):
                parts.append(self.sum())
            node = ("ratio", tuple(parts))
        if not currency and self.is_op(*CURRENCY):  # 5\$
            currency = CURRENCY[self.expect(*CURRENCY)]
        unit = currency or self.unit()
        if unit and not is_structure(node):
            node = ("unit", node, unit)
        elif unit:
            raise ParseError("a unit after something that is not a number")
        return node

    def union_letter(self, node: tuple) -> bool:
        """(0,1) U (2,3): a plain U between two sets."""
        return self.peek()[:2] == ("sym", "U") and _is_set(node)

    def unit(self) -> str:
        """The unit words after a number, spelled one way: 'cm^2', 'square unit', 'm/s'."""
        parts = []
        while True:
            kind, value, _ = self.peek()
            if kind == "op" and value == "/" and parts:
                parts.append("/")
            elif kind == "op" and value == "^" and parts and self.peek(1)[0] == "num":
                parts.append("^" + self.peek(1)[1])
                self.at += 1
            elif kind == "op" and value == "^" and parts and self.peek(1)[1] == "{" and (
                    self.peek(2)[0] == "num" and self.peek(3)[1] == "}"):
                parts.append("^" + self.peek(2)[1])
                self.at += 3
            elif kind == "text" or (kind == "word" and value.lower() in UNITS):
                words = value.lower().strip(" .").split()
                if len(words) > 3 or NOT_UNITS.intersection(words) or (
                        not parts and words[0] in ("squared", "cubed")):
                    raise ParseError(f"words after the answer: {value!r}")
                parts += [UNITS.get(word, word) for word in words]
            else:
                return " ".join(parts)
            self.at += 1

    # -- arithmetic ---------------------------------------------------------------------------
    def signs(self) -> tuple[int, str]:
        """Skip leading signs in a loop (4000 minus signs are no deeper than one)."""
        sign, both = 1, ""
        while self.is_op("+", "-", "pm", "mp"):
            op = self.expect("+", "-", "pm", "mp")
            if op == "-":
                sign = -sign
            elif op != "+":
                both, self.signed = op, True
        return sign, both

    def sum(self) -> tuple:
        """Terms with signs between them. A flat node: 1+1+...+1 must not nest."""
        terms = []
        while True:
            sign, both = self.signs()
            node = self.term()
            if (sign < 0 or both or terms) and is_structure(node):
                raise ParseError("arithmetic on something that is not a number")
            node = ("neg", node) if sign < 0 else node
            terms.append(("pm", 1 if both == "pm" else -1, node) if both else node)
            if not self.is_op("+", "-", "pm", "mp"):
                break
        if len(terms) > 1 and is_structure(terms[0]):
            raise ParseError("arithmetic on something that is not a number")
        return terms[0] if len(terms) == 1 else ("add", tuple(terms))

    def starts_factor(self) -> bool:
        """Can the next token begin a factor written without a multiplication sign?"""
        kind, value, _ = self.peek()
        if kind == "op":
            return value in _OPENERS or (value == "|" and not self.bars)
        return kind in _STARTS

    def number_may_follow(self) -> bool:
        """(n-2) 2^n is a product; x2 could mean an index, a power or a product."""
        before, gap = self.tokens[self.at - 1], self.peek()[2]
        if before[1] == ")":
            return True
        return before[0] != "num" and (gap or before[1] == "}") and self.peek(1)[1] == "^"

    def term(self, before_function: bool = False) -> tuple:
        """A product; with before_function, the argument of an unbracketed function (sin 2x)."""
        factors = [self.factor()]
        divided = None  # the factors after the last '/', while they are still juxtaposed
        while True:
            if not before_function and self.is_op("*", "/"):
                divided = [] if self.expect("*", "/") == "/" else None
                node = self.factor()
                if divided is None:
                    factors.append(node)
                else:
                    divided.append(node)
                    factors.append(("inv", node))
            elif self.starts_factor() and not self.union_letter(factors[-1]):
                if before_function and (self.peek()[0] == "fn" or self.is_op("(", "[", "\\{")):
                    break
                if self.peek()[0] in ("num", "based", "repeating") and not self.number_may_follow():
                    raise ParseError("a number right after a factor is ambiguous")
                node = self.factor()
                if divided:
                    if divided[0][0] == "num":
                        raise ParseError("a/b c can be read in two ways")
                    divided.append(node)  # a/bc is a/(bc)
                    factors[-1] = ("inv", ("mul", tuple(divided)))
                else:
                    factors.append(node)
            else:
                break
        return product(factors)

    def factor(self) -> tuple:
        r"""A postfix with its signs: the -3 of 2 \cdot -3."""
        sign, both = self.signs()
        node = self.postfix()
        if (sign < 0 or both) and is_structure(node):
            raise ParseError("arithmetic on something that is not a number")
        node = ("neg", node) if sign < 0 else node
        return ("pm", 1 if both == "pm" else -1, node) if both else node

    def postfix(self) -> tuple:
        """A primary with what binds tighter than any sign: powers, n!, 5%, 30 degrees, f'."""
        node = self.primary()
        if self.is_op("_") and node[0] == "num" and node[2] is None and node[1] >= 0:
            self.at += 1  # (101)_2
            node = ("base", str(node[1]), number_base(self.raw()))
        while self.is_op("^", "!", "%", "deg", "'"):
            if is_structure(node):
                raise ParseError("arithmetic on something that is not a number")
            if self.take("!"):
                node = ("fact2", node) if self.take("!") else ("fact", node)
            elif self.take("%"):
                node = ("pct", node)
            elif self.take("deg"):
                node = ("deg", node)
            elif self.take("'"):
                if node[0] != "sym":
                    raise ParseError("a prime after something that is not a letter")
                node = ("sym", node[1] + "'")
            else:
                node = self.power(node)
        return node

    def power(self, node: tuple) -> tuple:
        """The exponent after ^, right to left: 2^3^2 is 2^9. A raised circle means degrees."""
        self.expect("^")
        if self.peek()[1] == "circ":
            self.at += 1
            return ("deg", node)
        if self.peek()[1] == "{" and self.peek(1)[1] == "circ" and self.peek(2)[1] == "}":
            self.at += 3
            return ("deg", node)
        self.deeper()  # a^b^c^... recurses here
        sign, both = self.signs()
        exponent = self.argument(whole_number=True)
        if self.is_op("^"):
            exponent = self.power(exponent)
        self.depth -= 1
        if both or is_structure(exponent):
            raise ParseError("an exponent that is not a number")
        return ("pow", node, ("neg", exponent) if sign < 0 else exponent)

    def argument(self, whole_number: bool = False) -> tuple:
        """What a command applies to: a braced group or one token; TeX takes one digit only."""
        kind, value, gap = self.peek()
        if kind == "num" and not whole_number and len(value) > 1:
            if not value.isdigit():
                raise ParseError("braces are missing around a number")
            self.tokens[self.at] = ("num", value[1:], False)  # \frac43: 4, then 3 is left
            return number(value[0])
        if kind == "sym" or kind == "num" or kind == "const":
            self.at += 1
            return number(value) if kind == "num" else (kind, value)
        return self.primary()

    # -- primaries ----------------------------------------------------------------------------
    def deeper(self) -> None:
        """Count one level of nesting: Python's own recursion limit must never be met."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError(f"more than {MAX_DEPTH} nested groups")

    def primary(self) -> tuple:
        """What a factor begins with; all nesting but that of powers comes through here."""
        self.deeper()
        node = self.primary_()
        self.depth -= 1
        return node

    def primary_(self) -> tuple:
        """One branch a kind of token; the longer ones are methods of their own."""
        kind, value, _ = self.peek()
        if kind == "op":
            return self.bracket()
        self.at += 1
        if kind == "num":
            return self.number(value)
        if kind == "sym":
            return self.symbol(value)
        if kind == "const":
            return (kind, value)
        if kind == "node":
            return value
        if kind in ("text", "word"):
            return ("text", value.lower())  # words in a list; next to arithmetic they are refused
        if kind == "based":
            digits, _, base = value.replace(" ", "").partition("_")
            return ("base", digits.lstrip("0") or "0",
                    number_base(base.replace("\\text", "").strip("{}")))
        if kind == "repeating":
            return repeating(value)
        if kind == "set":
            return ("set", ())
        if kind == "domain":
            return (kind, value)
        if kind == "begin":
            return self.matrix(value)
        if kind == "fn":
            return self.function(value)
        if kind == "cmd":
            return getattr(self, "cmd_" + value)()
        raise ParseError(f"expected a number or a letter, found {value or 'the end'!r}")

    def number(self, value: str) -> tuple:
        """A number, or a mixed number: 2\\frac13, and 2 1/3 with a space."""
        node = number(value)
        if not value.isdigit():
            return node
        kind, name, gap = self.peek()
        if kind == "cmd" and name == "frac":
            mark = self.at
            self.at += 1
            top, bottom = scalar(self.argument()), scalar(self.argument())
            if top[0] == bottom[0] == "num" and top[2] is bottom[2] is None:
                if not top[1] < bottom[1]:
                    raise ParseError("a number before an improper fraction is ambiguous")
                return ("num", node[1] + Fraction(top[1], bottom[1]), None)
            # 2\frac{n}{3} is a product: leave the fraction, already read, as the next token.
            self.tokens[mark:self.at] = [("node", ("mul", (top, ("inv", bottom))), gap)]
            self.at = mark
        elif kind == "num" and gap and self.peek(1)[:2] == ("op", "/"):
            bottom = self.peek(2)
            if name.isdigit() and bottom[0] == "num" and bottom[1].isdigit():
                top, below = number(name)[1], number(bottom[1])[1]
                if 0 < top < below:
                    self.at += 3
                    return ("num", node[1] + Fraction(top, below), None)
        return node

    def symbol(self, name: str) -> tuple:
        """A letter with its index; f(x) and g(x), h(x) are unknown functions, k(k+1) a product."""
        while self.is_op("_"):
            self.at += 1
            name += "_" + self.raw()
        if name in ("f", "g", "h") and self.is_op("("):
            inside = self.bracket()
            args = inside[3] if inside[0] == "tuple" else (inside,)
            if any(is_structure(arg) for arg in args):
                raise ParseError("a function of something that is not a number")
            return ("call", name, args)
        return ("sym", name)

    def raw(self) -> str:
        """The spelling of an index or of a marked name: one token or one braced group."""
        if not self.take("{"):
            kind, value, _ = self.peek()
            if kind not in ("num", "sym", "const", "text", "word"):
                raise ParseError("an index that is not a name")
            self.at += 1
            return value
        parts, depth = [], 1
        while self.peek() is not END:
            value = self.peek()[1]
            depth += (value == "{") - (value == "}")
            self.at += 1
            if depth == 0:
                return "".join(parts)
            parts.append(value)
        raise ParseError("unclosed brace")

    def bracket(self) -> tuple:
        """( ), [ ], \\{ \\}, { }, | |, floor and ceiling, whichever begins here."""
        if self.take("{"):
            inside = self.inner()
            if self.take("choose"):
                inside = ("binom", scalar(inside), scalar(self.inner()))
            self.expect("}")
            return inside
        if self.is_op("|"):
            return self.bars_()
        for opening, closing, kind in (("lfloor", "rfloor", "floor"), ("lceil", "rceil", "ceil")):
            if self.take(opening):
                inside = self.inner()
                self.expect(closing)
                return (kind, scalar(inside))
        if self.take("\\{"):
            if self.take("\\}"):
                return ("set", ())
            inside = self.inner(expand=True)
            self.expect("\\}")
            return ("set", inside[1] if inside[0] in ("list", "or") else (inside,))
        if self.is_op("$") and self.peek(1)[0] == "num":  # -\$5: the sign came first
            self.at += 2
            return number(self.peek(-1)[1])
        opening = self.expect("(", "[", "<(")
        inside = self.inner()
        closing = self.expect(*((")>",) if opening == "<(" else (")", "]")))
        if inside[0] in ("list", "or"):
            if inside[0] == "or" or (opening == "<(") != (closing == ")>"):
                raise ParseError("brackets do not match")
            return ("tuple", opening, closing, inside[1])
        if (opening, closing) not in (("(", ")"), ("[", "]")):
            raise ParseError("brackets do not match")
        return inside

    def inner(self, expand: bool = False) -> tuple:
        """The items in a bracket; bars opened outside cannot close inside it."""
        bars, self.bars = self.bars, 0
        inside = self.items(expand)
        self.bars = bars
        return inside

    def bars_(self) -> tuple:
        """An absolute value. While it is open, the next bar closes it, it does not open one."""
        self.expect("|")
        self.bars += 1
        inside = self.sum()
        self.bars -= 1
        self.expect("|")
        return ("abs", scalar(inside))

    def function(self, name: str) -> tuple:
        r"""\sin x, \sin^2 x, \sin^{-1} x, \log_2 x, \gcd(a, b)."""
        base = exponent = None
        for _ in range(2):  # \log_2^3 x and \log^3_2 x
            if name == "log" and self.take("_"):
                base = scalar(self.argument())
            elif self.is_op("^"):
                exponent = self.power(("num", 1, None))
                if exponent[0] != "pow":
                    raise ParseError("an exponent that is not a number")
                exponent = exponent[2]
        args = self.function_argument()
        if exponent == ("neg", ("num", 1, None)) and name in INVERSE:
            name, exponent = INVERSE[name], None
        if len(args) != 1 and name not in ("gcd", "lcm", "max", "min"):
            raise ParseError(f"{name} of several arguments")
        if name == "log":
            node = ("log", base or ("num", 10, None), args[0])
        elif name in ("ln", "lg"):
            node = ("log", ("const", "e") if name == "ln" else ("num", 10, None), args[0])
        elif name == "exp":
            node = ("pow", ("const", "e"), args[0])
        else:
            node = ("fn", name, args)
        return ("pow", node, exponent) if exponent else node

    def function_argument(self) -> tuple:
        """The arguments of a function: bracketed, or the factors that follow it."""
        if self.is_op("(", "[", "{", "|", "\\{", "lfloor", "lceil"):
            inside = self.bracket()
            if inside[0] == "set":
                inside = ("tuple", "(", ")", inside[1])  # \max\{a, b\}
        else:
            inside = self.term(before_function=True)
            if self.is_op("/") and self.peek(1)[0] != "fn":
                raise ParseError("a function of an unbracketed fraction is ambiguous")
        args = inside[3] if inside[0] == "tuple" else (inside,)
        return tuple(scalar(arg) for arg in args)

    def matrix(self, name: str) -> tuple:
        """Rows of cells; a last empty row (a trailing double backslash) is dropped."""
        if name not in MATRICES:
            raise ParseError(f"unknown environment {name}")
        if name == "array" and self.is_op("{"):
            self.raw()
        rows = [[]]
        while self.peek()[0] != "end":
            rows[-1].append(scalar(self.sum()))
            if self.take("\\\\"):
                rows.append([])
            elif not self.take("&") and self.peek()[0] != "end":
                raise ParseError("a matrix row that cannot be read")
        self.at += 1
        rows = [tuple(row) for row in rows if row]
        if not rows or any(len(row) != len(rows[0]) for row in rows):
            raise ParseError("matrix rows of different lengths")
        return ("matrix", tuple(rows))

    # -- commands with arguments --------------------------------------------------------------
    def cmd_frac(self) -> tuple:
        """A fraction is a product with an inverse, so that there is one rule for both."""
        top, bottom = scalar(self.argument()), scalar(self.argument())
        return ("mul", (top, ("inv", bottom)))

    def cmd_binom(self) -> tuple:
        r"""Two arguments, in TeX's way: \binom nk or \binom{n}{k}."""
        return ("binom", scalar(self.argument()), scalar(self.argument()))

    def cmd_sqrt(self) -> tuple:
        r"""\sqrt[n]{x}; \sqrt12 is refused, because TeX and people read it differently."""
        degree = ("num", 2, None)
        if self.take("["):
            degree = scalar(self.sum())
            self.expect("]")
        kind, value, _ = self.peek()
        if kind == "num" and len(value) > 1:
            raise ParseError("a root of several digits needs braces")
        return ("root", degree, scalar(self.argument()))

    def cmd_root(self) -> tuple:
        """sqrt as plain text or as the sign takes the whole number after it."""
        return ("root", ("num", 2, None), scalar(self.argument(whole_number=True)))

    def cmd_cbrt(self) -> tuple:
        """cbrt(x), as plain text has it."""
        return ("root", ("num", 3, None), scalar(self.argument()))

    def cmd_absolute(self) -> tuple:
        """abs(x), as plain text has it."""
        return ("abs", scalar(self.argument()))

    def cmd_floor(self) -> tuple:
        """floor(x), as plain text has it."""
        return ("floor", scalar(self.argument()))

    def cmd_ceil(self) -> tuple:
        """ceil(x), as plain text has it."""
        return ("ceil", scalar(self.argument()))

    def cmd_angle(self) -> tuple:
        """An angle or triangle is one name: angle ABC is not a product of A, B and C."""
        name = ""
        while self.peek()[0] in ("sym", "word", "const") and self.peek()[1] != "inf":
            name += self.peek()[1]
            self.at += 1
            while self.take("_"):
                name += "_" + self.raw()
        if not name:
            raise ParseError("an angle without a name")
        return ("sym", "angle " + name)

    def cmd_mark(self) -> tuple:
        """A letter with a bar, an arrow or a hat is another name; a bar over AB is one name too."""
        return ("sym", "mark " + self.raw())

    def cmd_sum(self, kind: str = "sum") -> tuple:
        r"""\sum_{k=a}^{b} term."""
        self.expect("_")
        self.expect("{")
        name = self.peek()[1]
        if self.peek()[0] not in ("sym", "const"):
            raise ParseError("a sum without an index")
        self.at += 1
        self.expect("=")
        low = scalar(self.sum())
        self.expect("}")
        self.expect("^")
        high = scalar(self.argument(whole_number=True))
        body = scalar(self.term())
        if name in "ei":  # the index i is not the imaginary unit
            body = _replaced(body, ("const", name), ("sym", name))
        return (kind, name, low, high, body)

    def cmd_prod(self) -> tuple:
        r"""\prod_{k=a}^{b} term."""
        return self.cmd_sum("prod")


# ---------------------------------------------------------------------------------------------
# Small builders

def number(text: str) -> tuple:
    """The node of a literal; raises ParseError beyond MAX_DIGITS or MAX_EXPONENT."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(text) > MAX_DIGITS:
        raise ParseError(f"a number of more than {MAX_DIGITS} digits")
    whole, point, decimals = mantissa.partition(".")
    value = int(whole + decimals)
    shift = -len(decimals)
    if exponent:
        if len(exponent) > 6 or abs(int(exponent)) > MAX_EXPONENT:
            raise ParseError(f"an exponent of ten above {MAX_EXPONENT}")
        shift += int(exponent)
    if shift:
        value = value * 10 ** shift if shift > 0 else Fraction(value, 10 ** -shift)
    return ("num", value, len(decimals) if point or exponent else None)


def number_base(text: str) -> int:
    """The base that an index names: 8, or the word eight."""
    base = NUMBER_BASES.get(text) or (int(text) if text.isdigit() and len(text) < 3 else 0)
    if not 2 <= base <= 36:
        raise ParseError("unknown number base")
    return base


def repeating(text: str) -> tuple:
    r"""0.1\overline{6} = 1/6."""
    plain, _, rest = text.partition("\\")
    digits = rest[rest.index("{") + 1:-1]
    whole, _, decimals = plain.partition(".")
    if len(text) > MAX_DIGITS:
        raise ParseError(f"a number of more than {MAX_DIGITS} digits")
    scale = 10 ** len(decimals)
    return ("num", Fraction(int((whole + decimals) or "0"), scale)
            + Fraction(int(digits), (10 ** len(digits) - 1) * scale), None)


def scalar(node: tuple) -> tuple:
    """The node itself, if arithmetic can be done on it; raises ParseError otherwise."""
    if is_structure(node):
        raise ParseError("arithmetic on something that is not a number")
    return node


def product(factors: list) -> tuple:
    """A product node; a number times a matrix is multiplied out, other structures are refused."""
    if len(factors) == 1:
        return factors[0]
    matrices = [f for f in factors if f[0] == "matrix"]
    others = [scalar(f) for f in factors if f[0] != "matrix"]
    if not matrices:
        return ("mul", tuple(others))
    if len(matrices) > 1:
        raise ParseError("a product of matrices")
    return ("matrix", tuple(tuple(("mul", (*others, cell)) for cell in row)
                            for row in matrices[0][1]))


def _is_set(node: tuple) -> bool:
    """Could this stand on a side of a union? An interval is read as a pair."""
    return node[0] in ("set", "setop", "domain") or (node[0] == "tuple" and len(node[3]) == 2)


def expand_signs(node: tuple) -> list:
    r"""[node], or the two nodes that a \pm in it stands for (all signs of one item together)."""
    if node[0] == "set" or not _has_sign(node):
        return [node]  # the items of a set were expanded when they were read
    return [_choose_sign(node, 1), _choose_sign(node, -1)]


def _has_sign(node) -> bool:
    """Is there a plus-minus anywhere in the tree?"""
    if not isinstance(node, tuple):
        return False
    if node and node[0] == "pm":
        return True
    for part in node:
        if _has_sign(part):
            return True
    return False


def _choose_sign(node, sign: int):
    """The tree with every plus-minus resolved: the upper signs for sign = 1, else the lower."""
    if not isinstance(node, tuple):
        return node
    if node and node[0] == "pm":
        inside = _choose_sign(node[2], sign)
        return inside if node[1] * sign > 0 else ("neg", inside)
    return tuple([_choose_sign(part, sign) for part in node])


def _replaced(node, old: tuple, new: tuple):
    """The tree with every `old` in it replaced by `new`."""
    if node == old or not isinstance(node, tuple):
        return new if node == old else node
    return tuple([_replaced(part, old, new) for part in node])
