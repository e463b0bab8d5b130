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
    ("time", numbers)  ("said", x, words)   a number with words after it that are no unit

What is ambiguous is refused rather than guessed: `\sqrt12`, `\frac123`, `x2`, `1/2x`, `2\frac43`,
`\sin x/2`, an ellipsis. Three conventions are chosen: `a/bc` is a/(bc), `2^10` is 1024, and `2e-3`
is 0.002 (the checker also tries 2e - 3, where e is Euler's number).
Every loop is linear in the text, and recursion stops at MAX_DEPTH brackets.
"""

import re
import unicodedata
from fractions import Fraction
from functools import cached_property

# The bounds keep parsing linear and shallow for any text a model can write. Past one of them there
# is a ParseError, so the answer can still be right as equal text, never by arithmetic.
MAX_CHARS = 3000    # a longer text is compared as text only: no benchmark answer has 400
MAX_TOKENS = 1500
MAX_DEPTH = 32      # nested groups; each costs about eleven Python frames of the 1000 there are
MAX_HEIGHT = 160    # of a tree, in nested tuples: what walks it takes at most two frames for each
MAX_DIGITS = 1000   # of one number; far below CPython's own limit of 4300
MAX_EXPONENT = 999  # of scientific notation


class ParseError(ValueError):
    """The text has no structure that this grammar knows; the message says what stopped it."""


# ---------------------------------------------------------------------------------------------
# Words and commands. Each table is one decision, so that a new spelling is one new entry.

# Greek letters are names like x and y. Without pi, which is a number; the others have no fixed
# meaning: \varphi may be the golden ratio, an angle or Euler's function.
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda "
            "mu nu xi rho varrho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta "
            "Lambda Xi Pi Sigma Phi Psi Omega ell hbar aleph mho partial".split())
# Without a backslash too: models write sin(x) as often as \sin(x). A new function needs an
# evaluation rule in evaluate.py beside its entry here.
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh "
                "coth ln lg log exp cis gcd lcm max min".split())
#   \sin^{-1} x is arcsin x, and not 1/sin x: the mathematician's reading, also that of graders
INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec",
           "csc": "arccsc"}
# Spellings of other schools and of programming languages.
FUNCTION_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "cosec": "csc",
                    "tg": "tan", "ctg": "cot"}
# Words that are symbols when written without a backslash, in plain text or inside \text{}.
NAMES = {"pi": ("const", "pi"), "inf": ("const", "inf"), "infty": ("const", "inf"),
         "infinity": ("const", "inf"), "oo": ("const", "inf"), "percent": ("op", "%"),
         "percentage": ("op", "%"), "pct": ("op", "%"),
         "degree": ("op", "deg"), "degrees": ("op", "deg"), "deg": ("op", "deg"),
         "and": ("sep", "and"), "or": ("sep", "or"), "sqrt": ("plain", "2"),
         "cbrt": ("plain", "3"), "union": ("op", "cup"), "abs": ("plain", "abs"),
         "floor": ("plain", "floor"), "ceil": ("plain", "ceil")}
# The values are the tokens that the parser sees, so \times, \cdot and * are one token "*", and the
# grammar needs one rule for the three of them.
# A mark makes another name of a letter, and each mark its own: \hat x is not \bar x.
COMMANDS = {name: (kind, value) for kind, value, names in (
    ("op", "*", "cdot ast cdotp"), ("op", "×", "times"), ("op", "/", "div slash"),
    ("op", "pm", "pm"), ("op", "mp", "mp"), ("op", "<=", "le leq leqslant leqq"),
    ("op", ">=", "ge geq geqslant geqq"), ("op", "<", "lt"), ("op", ">", "gt"),
    ("op", "!=", "ne neq"), ("op", "in", "in"), ("op", "~", "approx"), ("op", "cup", "cup"),
    ("op", "cap", "cap"), ("op", "setminus", "setminus backslash"), ("op", "lfloor", "lfloor"),
    ("op", "rfloor", "rfloor"), ("op", "lceil", "lceil"), ("op", "rceil", "rceil"),
    ("op", "|", "lvert rvert vert"), ("op", "\\{", "lbrace {"), ("op", "\\}", "rbrace }"),
    ("op", "[", "lbrack"), ("op", "]", "rbrack"), ("op", "<(", "langle"), ("op", ")>", "rangle"),
    ("op", "(", "lparen"), ("op", ")", "rparen"), ("op", "%", "%"), ("op", "$", "$"),
    ("op", "euro", "euro"), ("op", "sterling", "pounds"), ("op", "deg", "degree"),
    ("op", "'", "prime"), ("op", "\\\\", "\\ cr"), ("op", ":", "colon"), ("op", "choose", "choose"),
    ("op", "over", "over"), ("frac", "", "frac dfrac tfrac cfrac"), ("sqrt", "", "sqrt"),
    ("binom", "", "binom dbinom tbinom"), ("sum", "sum", "sum"), ("sum", "prod", "prod"),
    ("figure", "angle", "angle"), ("figure", "triangle", "triangle"),
    ("mark", "bar", "overline bar"), ("mark", "hat", "hat widehat"), ("mark", "dot", "dot"),
    ("mark", "tilde", "tilde widetilde"), ("mark", "ddot", "ddot"), ("mark", "vec",
    "vec overrightarrow"), ("mark", "line", "overleftrightarrow"), ("node", ("set", ()),
    "emptyset varnothing"), ("const", "inf", "infty"), ("const", "pi", "pi"),
    ("const", "i", "imath"), ("sep", "and", "land"), ("sep", "or", "lor"))
    for name in names.split()}
# Commands whose argument is words, a unit, or ordinary mathematics in another face.
TEXT_COMMANDS = set("text mbox hbox textbf textit textrm textsf texttt textnormal mathrm mathbf "
                    "mathit mathsf mathtt operatorname rm bf".split())
# Invisible: size and spacing. What stands in braces after them reads as a group.
SILENT = set("tiny small large Large LARGE huge Huge left right middle big Big bigg Bigg bigl bigr "
             "Bigl Bigr biggl biggr Biggl Biggr "
             # \rm and \bf are no switches here: they are in TEXT_COMMANDS, as
             # their argument may follow.
             "quad qquad displaystyle textstyle scriptstyle limits nolimits thinspace enspace "
             "boldsymbol bm underline mathcal mathscr mathord mathop hfill nobreak negthinspace "
             "it em".split())
MATRICES = {"matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array", "psmallmatrix"}

# "5 meters" and "5 m" must give one tree. A unit is only read after a number: m alone is a letter.
# The first of a line is the one name that is compared; plurals are found by `unit_name`.
UNITS = {spelling: line.split()[0] for line in (
    "m meter metre", "cm centimeter centimetre", "mm millimeter millimetre", "in inch",
    "ft foot feet", "km kilometer kilometre", "yd yard", "mi mile", "g gram",
    "kg kilogram", "day", "mg milligram", "lb lbs pound", "oz ounce", "ton tonne",
    "s sec secs second", "week", "month", "ms millisecond", "min mins minute", "h hr hrs hour",
    "yr yrs year", "century", "acre", "pint", "l liter litre", "ml milliliter millilitre",
    "gal gallon", "quart", "dollar usd buck", "cent", "euro", "penny pence", "rad radian",
    "degree", "sterling", "people person", "n newton", "j joule", "w watt", "v volt", "hz hertz",
    "c celsius",
    "f fahrenheit", "k kelvin", "a amp", "child children", "times", "man men", "woman women",
    "die dice")
    for spelling in line.split()} | {"mph": "mi / h", "kph": "km / h"}
# Counted things, which golds often leave out: 12 apples is 12. Singular; see `unit_name`.
COUNTED = set("""unit way point solution student apple book boy girl ball marble coin ticket page
    question game car cookie egg step tile triangle square side path flower tree dog cat bag box pen
    pencil pair cup sticker card chair table house room bottle piece slice orange banana candy cake
    pizza worker player team member letter word digit number factor divisor edge vertex vertices
    face diagonal rectangle circle cube block row column seat bus train plane truck wheel bike bird
    fish chicken cow horse sheep pig rabbit fruit vegetable glass plate spoon stamp toy doll shirt
    dress shoe nickel dime problem test class teacher friend kid adult guest meal bead brick plant
    seed leaf rose nut pie trip lap vote item set group pattern outcome arrangement combination
    permutation subset integer element handshake function triple region line segment message photo
    song toss flip roll old""".split())
_POWERS = {"square": "^2", "sq": "^2", "sq.": "^2", "squared": "^2", "cubic": "^3", "cu": "^3",
           "cubed": "^3"}


def unit_name(word: str) -> str | None:
    """The one name of a unit or a counted thing, in singular or plural; None for other words."""
    singulars = [word, word.removesuffix("s"), word.removesuffix("es"),
                 word[:-3] + "y" if word.endswith("ies") else word]
    # Short spellings have no plural: "as" is no amperes.
    return next((UNITS.get(one, one) for one in singulars if one in COUNTED or one in UNITS and (
        one == word or len(one) > 2)), None)


def unit_of(words: list) -> str | None:
    """Words after a number as one unit; None unless every word of them belongs to a unit.

    Whatever is not in the tables can change the number, so it is no unit: "5 hundred", "2 thirds",
    "3 or more", "7 mod 9".
    """
    parts, before = [], ""
    for word in words:
        #   square meters, meters squared, m^2  ->  "m ^2"     miles per hour, mi/h  ->  "mi / h"
        if word in _POWERS and word[-2:] != "ed":
            before = _POWERS[word]
            continue
        name = "/" if word in ("/", "per") else word if re.fullmatch(r"\^-?\d+", word) else (
            _POWERS.get(word) or unit_name(word))
        if name is None or name[0] in "/^" and (not parts or parts[-1] == "/" or before):
            return None
        parts.append(name)
        if before:
            parts.append(before)
            before = ""
    return " ".join(parts) if parts and parts[-1] != "/" and not before else None


# Two letters would be a product (see `is_word`): "no" must not equal "on".
SMALL_WORDS = set("no on or in is if of to up it by at so".split())
# Golds write 52_{\text{eight}} as well as 52_8.
NUMBER_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
                "nine": 9, "ten": 10, "twelve": 12, "sixteen": 16}

# Unicode signs become the LaTeX that stands for them, so that there is one grammar for both. A
# space after each command: "\pi r" from πr must not read as the command \pir.
_UNICODE = str.maketrans({
    **{sign: f"\\{name} " for pair in (
        "×times ·cdot ⋅cdot ∙cdot ÷div πpi ∞infty ±pm ∓mp ≤le ≥ge ⩽le ⩾ge ≠ne ∪cup ∩cap ∈in "
        "∅emptyset ≈approx ⌊lfloor ⌋rfloor ⌈lceil ⌉rceil ∖setminus αalpha βbeta γgamma δdelta "
        "θtheta λlambda μmu µmu φvarphi ϕphi ωomega σsigma €euro £pounds").split()
       for sign, name in [(pair[0], pair[1:])]},
    **{sign: rf"\mathbb{{{letter}}}" for sign, letter in zip("ℝℤℕℚℂ", "RZNQC")},
    "−": "-", "°": r"\degree ", "º": r"\degree ", "√": " sqrt ", "“": '"', "”": '"', "’": "'",
    "‘": "'", "′": "'", "￥": "$", "⁄": "/", "∕": "/",
    # Invisible: zero-width characters vanish, odd spaces become plain ones.
    "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "\u00a0": " ", "\u2009": " ",
    "\u202f": " ",
})


# ---------------------------------------------------------------------------------------------
# Cleaning: what a page would not show goes away before a token is read.

# All of these are linear: a fixed prefix, then one bounded or one-class repetition.
# The lookahead in each: \boxedfoo would be another command.
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BOXES_IN_A_ROW = re.compile(r"\}\s{0,3}\\(?:boxed|fbox)(?![A-Za-z])")
#   1{,}234  1\,234  1,\!234   ->  1234, where exactly three digits follow: 1\,23 stays as it is
_JOIN_THOUSANDS = re.compile(r"(?<=\d)(?:,\s{0,3}\\!\s{0,3}|\{,\}|\\,|\\!)(?=\d{3}(?!\d))")
# What takes space or colour but has no mathematical content goes with its argument. {0,40} bounds
# the search for the brace; a colour's name is short.
_DROPPED = re.compile(r"\\(?:hspace|phantom|hphantom|vphantom|color|tag|label)\*?\{[^{}]{0,40}\}"
                      r"|\\textcolor\{[^{}]{0,40}\}")
#   30^\circ and 30^{\circ}: a raised circle means degrees and is no power
_RAISED_CIRCLE = re.compile(r"\^\s?(?:\\?circ(?![A-Za-z])|\{\s?\\?circ\s?\})")
# The marks round a choice letter: (B), B., B: are all the choice B.
_CHOICE = re.compile(r"\(?([A-Ja-j])[).:]")
# The lookbehinds spare "\$", which is money, and "\\[2pt]", which is a line break.
_DELIMITERS = re.compile(r"(?<!\\)(?:\\[()\[\]]|\$)")
_BARE_DOLLAR = re.compile(r"(?<!\\)\$")


def closing_brace(text: str, start: int) -> int:
    """Position of the brace that closes the one at `start`, or -1; escaped braces do not count."""
    depth = 0
    # One scan with a counter; a pattern that matches nested braces could take exponential time.
    for match in _BRACE.finditer(text, start):
        brace = match.group()
        depth += (brace == "{") - (brace == "}")
        if depth == 0:
            return match.start()
    return -1


_BRACE = re.compile(r"\\.|[{}]", re.S)  # "\\." swallows an escaped brace, so it is not counted


def unbox(text: str) -> str:
    r"""Take away \boxed and \fbox; their braces stay as groups, boxes side by side are a list."""
    #   \boxed{3}\boxed{5}  ->  {3}, {5}  ->  the list 3, 5
    text = _BOX.sub("", _BOXES_IN_A_ROW.sub("}, ", text)).strip()
    # Four times is more than models nest, and the bound keeps a text of 3000 braces linear.
    for _ in range(4):  # {{9}} is 9, so that words in a box are seen as words
        if not text.startswith("{") or closing_brace(text, 0) != len(text) - 1:
            break
        text = text[1:-1].strip()
    return text


_START = re.compile(r"\A(?:\s|~|\\[,;:! ]|\\quad)+")
_EDGES = ("\\,", "\\;", "\\:", "\\!", "\\ ", "~", "\\quad")


def trim(text: str) -> str:
    """Take spaces, visible or TeX's, off both ends."""
    text = _START.sub("", text)
    # The text ends in a TeX space, unless the backslash of "\\," belongs to a line break before it.
    while text.endswith(_EDGES) and not text.endswith("\\\\,"):  # a line break, then a comma
        text = text[:-next(len(edge) for edge in _EDGES if text.endswith(edge))].rstrip()
    return text


_DASH = re.compile(r"(?<![\d)}\]%°$\s])\s{0,9}[–—]|[–—](?=\s{0,9}[A-Za-z])")


def spell_out(text: str) -> str:
    r"""Unicode as LaTeX, without losing what a sign's place or size says.

    2ⁿ⁺¹ is 2^{n+1} (NFKC would make it 2n+1), 101₂ is 101_{2}, 2⅝ is 2\frac{5}{8} (NFKC: 25/8).
    Unicode's own table of decompositions says what is raised, lowered or a fraction.
    """
    # A dash between numbers, 3–5, is a range and stays unknown; x – 3 and –5 are minus signs.
    text = _DASH.sub(lambda match: match.group().replace("—", "–").replace("–", "-"), text)
    spelled, open_script = [], ""
    for char in text:
        tag, *codes = unicodedata.decomposition(char).split() or [""]
        script = "" if ord(char) in _UNICODE else {"<super>": "^", "<sub>": "_"}.get(tag, "")
        if script != open_script:
            spelled.append("}" * bool(open_script) + (script + "{") * bool(script))
            open_script = script
        # Faces (bold, full width) are dropped as LaTeX's are. What else could stick to the digits
        # beside it, such as ① in 1①, stays an unknown sign.
        if ord(char) not in _UNICODE and (script or tag in (
                "<font>", "<wide>", "<narrow>", "<noBreak>", "<fraction>")):
            char = "".join(chr(int(code, 16)) for code in codes)
            if tag == "<fraction>":
                char = "\\frac{%s}{%s}" % tuple(char.partition("\u2044")[::2])
        spelled.append(char)
    return ("".join(spelled) + "}" * bool(open_script)).translate(_UNICODE)


def clean(text: str) -> str:
    """One spelling for unicode symbols, no boxes, no $...$, no final full stop."""
    if not text.isascii():
        text = spell_out(text)
    text = trim(text.strip())
    if text.startswith("**") and text.endswith("**"):
        text = text.strip("* ")  # bold in Markdown
    if "\\boxed" in text or "\\fbox" in text:
        text = unbox(text)
    if "$" in text or "\\(" in text or "\\[" in text:
        # An odd number of bare dollars is a currency sign, not a pair of delimiters.
        #   "$5"  ->  "\$5", five dollars        "$5$"  ->  "5", mathematics
        if len(_BARE_DOLLAR.findall(text)) % 2:
            text = _BARE_DOLLAR.sub(lambda _: "\\$", text)
        text = trim(_DELIMITERS.sub(" ", text).strip())
    while text.endswith("\\\\"):
        # A trailing line break is left over from a display; two of them as well.
        text = text[:-2].rstrip()
    # The full stop of a sentence goes, an ellipsis stays (and is refused later): 0.333... is no
    # 0.333. \right. is a delimiter that shows nothing.
    if text.endswith(".") and not text.endswith("..") and not text.endswith("\\right."):
        text = text[:-1].rstrip()
    elif text.endswith((",", ";")) and text[-2:-1] != "\\":
        text = text[:-1].rstrip()
    if "+/-" in text:
        text = text.replace("+/-", "\\pm ")
    # Only the whole text: in "(A) 5" the letter stands beside a value.
    if choice := _CHOICE.fullmatch(text):
        return choice.group(1)  # A) and (A): are choice letters
    if "circ" in text:
        text = _RAISED_CIRCLE.sub(r"\\degree ", text)
    # Last, when the braces that could hide them are gone; the test spares plain answers two scans.
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
#   time       2:05, 10:30, 1:02:03 as a clock shows them: as the ratio 2:5, 2:05 would equal 4:10,
#              which is another time; 2:5 and 3:100 are ratios
#   thousands  1,234,567 if the whole run of digits and commas has that form: not 27,54,108
#   num        also 6.02e23
# Thousands begin with a digit that is not 0, since 0,123 is a European decimal
# or a list, never a thousand.
_TOKEN = re.compile(r"""
    (?P<space>\s+|~|\\[,;:!>\s]|\\(?:left|right)\s*\.(?!\d))
  | (?P<based>\d+\s?_\s?(?:\d{1,2}(?!\d)|\{\s?\d{1,2}\s?\}|\{\s?\\text\s?\{\s?[a-z]+\s?\}\s?\})
       |\d[0-9A-F]*_(?:1[26](?!\d)|\{1[26]\}))
  | (?P<repeating>\d*\.\d*\\(?:overline|bar|dot)\s?\{\d+\})
  | (?P<time>(?<![\d.:])(?:1?\d|2[0-4]|0\d)(?:\s?:\s?[0-5]\d){1,2}(?!\s?[\d.:]))
  | (?P<thousands>(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?!,?\d))
  | (?P<num>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?)
  | (?P<command>\\(?:[A-Za-z]+|.))
  | (?P<letters>[A-Za-z]+)
  | (?P<op>\*\*|<=|>=|!=|[-+*/^_=<>(){}\[\]|,;:!%'$&])
""", re.X | re.S | re.A)


def tokenize(text: str, level: int = 0) -> list[tuple]:
    """Split cleaned text into tokens; raises ParseError on a character or command unknown here."""
    # `listing` counts the open brackets in which a comma separates items.
    tokens, position, gap, listing = [], 0, False, 0
    while position < len(text):
        # `match` at a position and not `findall`: a character that no pattern knows must be an
        # error. Skipping what is unknown would read "5 ☃" as 5, and let garbage pass for an answer.
        match = _TOKEN.match(text, position)
        if not match:
            raise ParseError(f"unknown character {text[position]!r}")
        kind, value, position = match.lastgroup, match.group(), match.end()
        if kind == "thousands" and listing:
            # Inside ( ), [ ] and \{ \} a comma separates: (1,000) is a pair.
            value = value[:value.index(",")]
            position, kind = match.start() + len(value), "num"
        if kind == "space":
            # A space is no token, but the next token remembers it.
            gap = True
            continue
        if kind == "command":
            position = _command(value[1:], text, position, gap, tokens, level)
        elif kind == "letters":
            _letters(value, gap, tokens)
        elif kind == "thousands":
            tokens.append(("num", value.replace(",", ""), gap))
        elif kind in _LITERALS:
            tokens.append(("node", _LITERALS[kind](value), gap))
        else:
            tokens.append((kind, "^" if value == "**" else value, gap))
        # May go below zero for ]0, 1[: it only says whether a comma is a separator.
        if tokens and tokens[-1][0] == "op":
            listing += _LISTING.get(tokens[-1][1], 0)
        gap = False
        if len(tokens) > MAX_TOKENS:
            raise ParseError(f"more than {MAX_TOKENS} tokens")
    return tokens


# Tokens that are whole trees already, each with what reads its text.
#   052_8  ->  ("base", "52", 8): zeros in front do not count       2:05  ->  ("time", (2, 5))
_LITERALS = {
    "based": lambda text: in_base(*re.sub(r"\\text|[{}\s]", "", text).split("_")),
    "repeating": lambda text: repeating(text),
    "time": lambda text: ("time", tuple(map(int, text.split(":"))))}
_BOLD = re.compile(r"\s?\{([A-Z ]{1,6}|\s?[a-z]\s?)\}")
_ASCII_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LISTING = {"(": 1, "[": 1, "\\{": 1, ")": -1, "]": -1, "\\}": -1}


def _command(name: str, text: str, position: int, gap: bool, tokens: list, level: int) -> int:
    """Append the tokens of one LaTeX command; returns where reading goes on."""
    # No token: \left( is "(", \displaystyle x is "x".
    if name in SILENT:
        return position
    if bold := _BOLD.match(text, position) if name in ("mathbf", "boldsymbol", "bm") else None:
        #   \mathbf{A}, \mathbf{AB}: vectors and matrices, whose products have an order
        tokens.extend(("bold", letter, gap) for letter in bold.group(1) if letter != " ")
        return bold.end()
    if name in COMMANDS:
        tokens.append((*COMMANDS[name], gap))
    elif name in GREEK:
        tokens.append(("sym", name, gap))
    elif name in FUNCTIONS:
        tokens.append(("fn", name, gap))
    elif name in TEXT_COMMANDS or name in ("mathbb", "begin", "end"):
        # Commands with an argument that is not read as mathematics (or not
        # at once): find its braces.
        while position < len(text) and text[position] == " ":
            position += 1
        if text[position:position + 1] != "{":
            if name in ("rm", "bf"):
                # The switch stands alone; what follows it is read as usual.
                return position  # {\bf 42}
            if name == "mathbb" and text[position:position + 1].isalpha():
                #   \mathbb R without braces, as TeX allows
                tokens.append(("node", ("domain", text[position]), gap))
                return position + 1
            # Refused, since \text 5 takes one character, and nobody knows whether that was meant.
            raise ParseError(f"\\{name} without braces")
        end = closing_brace(text, position)
        if end < 0:
            raise ParseError("unclosed brace")
        content = text[position + 1:end]
        position = end + 1
        if name in ("mathbb", "begin", "end"):
            content = content.strip()
            tokens.append(("node", ("domain", content), gap) if name == "mathbb" else (
                name, content, gap))
        else:
            # `level` bounds \text{\text{...}}: each level calls the tokeniser once more.
            _text(name, content.strip(), gap, tokens, level)
    else:
        raise ParseError(f"unknown command \\{name}")
    return position


def _text(name: str, content: str, gap: bool, tokens: list, level: int) -> None:
    r"""Append the tokens of \text{content}: words, a unit, or mathematics in another face."""
    letters = len(content) - len(content.lstrip(_ASCII_LETTERS))
    head, known = content[:letters], content.strip(" .").lower()
    # After a number, a name or a closing bracket a unit can stand: 5\text{ m}, (5)\text{ m}.
    # Elsewhere \text{m} is the letter m in upright type.
    after_number = tokens and (tokens[-1][0] in ("num", "text") or tokens[-1][1] in ("}", ")"))
    #   5\text{ cm^2}  ->  num 5, text cm, op ^, num 2: the exponent is read by `unit` in the parser
    # Not e and i: 2\mathrm{e} is twice Euler's number.
    if after_number and unit_name(head.lower()) and head not in ("e", "i") and (
            letters < len(content) and content[letters] == "^" or letters == len(content)):
        tokens.append(("text", head, gap))  # \text{ m}, \text{ cm^2}
        tokens.extend(tokenize(content[letters:], level + 1))
        return
    # Words only: letters, spaces and the few marks that names have (O'Brien, Mr., m/s).
    if len(content) > 1 and all(c.isalpha() or c in " '-./" for c in content):
        # \text{and}, \operatorname{lcm}, \mathrm{pi} mean the symbol, not a word of prose.
        if known in NAMES or known in FUNCTIONS or content in GREEK:
            _letters(known if known in NAMES or known in FUNCTIONS else content, True, tokens)
        else:
            tokens.append(("text", content, gap))
        return
    # Anything else is mathematics in another face: \mathbf{x}, \text{(A)}, \mathrm{2x}.
    if level >= 4:
        raise ParseError("text nested too deeply")
    tokens.extend(tokenize(content, level + 1))


def _letters(run: str, gap: bool, tokens: list) -> None:
    """Append a run of plain letters: a function, a name, a word, or a product of letters."""
    # Functions first, whole runs only: "sin" is one function, though "sinh" begins with it as well.
    lower = FUNCTION_ALIASES.get(run.lower(), run.lower())
    if lower in FUNCTIONS:
        tokens.append(("fn", lower, gap))
    elif lower in NAMES and len(run) > 1:
        tokens.append((*NAMES[lower], gap))
    elif run in GREEK:
        tokens.append(("sym", run, gap))
    elif len(run) > 1 and is_word(run):
        #   sinx + 1  ->  sin x + 1, as one letter follows; any longer run is a word and no product
        head = next((f for f in ("sin", "cos", "tan", "ln", "log") if run == f + run[-1]), None)
        if head:
            tokens.append(("fn", head, gap))
            _letters(run[-1], False, tokens)
        else:
            # A word is a token of its own kind: allowed as a unit or as a whole
            # item, refused in arithmetic.
            tokens.append(("word", run, gap))
    else:
        #   xy  ->  x, y    2e  ->  2, Euler's number    3i  ->  3, the imaginary unit
        for letter in run:
            kind = "const" if letter in "ei" else "sym"
            tokens.append((kind, letter, gap))
            # Only the first letter had space before it.
            gap = False


# Letters that are usual together as variables; any subset of a family, in any order, multiplies.
_VARIABLE_RUNS = [set("abcd"), set("uvwxyz"), set("pqrst"), set("ijkmn"), set("xyzt"), set("abxy"),
                  set("mnpq"), set("hkr")]


def is_word(run: str) -> bool:
    """True if a run of letters reads as a word or a unit, False if as a product of letters.

    'east' must not equal 'seat', which a product would; so letters multiply only in pairs (mn, ab,
    RC) or where all come from one usual family (abc, xyz).
    """
    lower = run.lower()
    # One letter is a letter, and the symbols of the tables are no words.
    if len(run) == 1 or lower in NAMES or lower in FUNCTIONS or run in GREEK:
        return False
    # Before the rule for pairs: cm, kg, no, on are words although they have two letters.
    if unit_name(lower) or lower in _POWERS or lower in SMALL_WORDS:
        return True
    if len(run) == 2:
        return False
    letters = set(run)
    return not any(letters <= family for family in _VARIABLE_RUNS)


# The content has no braces or commands of its own: \text{two \emph{words}} is refused.
_WRAPPED = re.compile(r"\\(?:text|mbox|hbox|textbf|textit|textrm|mathrm|mathbf|mathit)\s?"
                      r"\{([^{}\\]*)\}\s*[.]?")


def words_of(text: str) -> str | None:
    """The words, if the whole answer is words (\\text{Evelyn}, odd, Yes); None otherwise."""
    # Unwraps \text{\textbf{odd}} from outside in; each round is shorter, so this ends.
    wrapped = False
    while match := _WRAPPED.fullmatch(text):
        text, wrapped = match.group(1).strip(), True
    stripped = text.strip(" .\"")
    # A single letter is a choice or a variable, never a word.
    if len(stripped) < 2 or not stripped[0].isalpha():
        return None
    # A digit or a sign makes it mathematics or a sentence: "5 apples" goes to the grammar.
    if not all(c.isalpha() or c in " '-" for c in stripped):
        return None
    runs = stripped.replace("-", " ").split()
    # "x and y" is a list; "sin x" is an expression, even if it has letters only.
    if any(run.lower() in ("and", "or") or run.lower() in FUNCTIONS for run in runs):
        return None
    # \text{pi} is the number, \text{pi day} are words.
    known = runs[0].lower() in NAMES or runs[0] in GREEK
    if any(is_word(run) for run in runs) or (wrapped and not (known and len(runs) == 1)):
        # Case and spacing carry no meaning in words: "Yes", "YES" and "yes " are the same.
        return " ".join(stripped.lower().split())
    return None


# ---------------------------------------------------------------------------------------------
# The parser proper: one method a line of the grammar.

# The kinds that are answers but not numbers. Everything else can be added, multiplied and raised.
STRUCTURES = {"list", "or", "set", "tuple", "domain", "setop", "matrix", "rel", "ratio", "text",
              "base", "time", "said"}
RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "in", "~"}
# What can begin a factor, by kind of token; and the brackets with what may close them.
_STARTS = {"num", "sym", "const", "fn", "frac", "sqrt", "binom", "sum", "figure", "plain", "mark",
           "bold", "begin", "node"}
_CLOSING = {"(": (")", "]"), "[": (")", "]"), "{": ("}",), "\\{": ("\\}",), "|": ("|",),
            "<(": (")>",), "lfloor": ("rfloor",), "lceil": ("rceil",)}
_ROUNDED = {"|": "abs", "lfloor": "floor", "lceil": "ceil"}
_SIGNS = ("+", "-", "pm", "mp")
CURRENCY = {"$": "dollar", "euro": "euro", "sterling": "sterling"}
_SUFFIXES = {"^": (), "!": (), "%": ("pct",), "deg": ("deg",)} | {
    sign: ("unit", name) for sign, name in CURRENCY.items()}
END = ("end of text", "", False)


def parse(text: str, reading: dict | None = None) -> tuple:
    """The tree of an answer's text; raises ParseError with the reason when it has none.

    `reading` is {name: is it a function?}. It is filled here and handed on from the gold to the
    answer, so that P(3) is a product on both sides or on none.
    """
    # Checked before the cleaning, whose passes would cost time on a text of a megabyte.
    if len(text) > MAX_CHARS:
        raise ParseError(f"longer than {MAX_CHARS} characters")
    text = clean(text)
    if not text:
        raise ParseError("empty")
    # Words before tokens: "odd" is a word and not o times d times d.
    if words := words_of(text):
        return ("text", words)
    return _Parser(tokenize(text), {} if reading is None else reading).answer()


def check_height(tree: tuple) -> None:
    """Raise ParseError unless every function that walks the tree is safe to recurse.

    Groups are counted while they are read (MAX_DEPTH), but trees also grow without a bracket:
    5!!!...!, x^2^2, A \\cup B \\cup C. So every tree is measured once, here, before it is walked.
    """
    # A loop, level by level: this must not recurse itself.
    level, height = [tree], 0
    while level:
        height += 1
        if height > MAX_HEIGHT:
            raise ParseError(f"a tree of more than {MAX_HEIGHT} levels")
        level = [part for node in level for part in node if isinstance(part, tuple)]


def is_structure(node: tuple) -> bool:
    """True for tuples, sets, relations and the like: what arithmetic cannot be done on."""
    return node[0] in STRUCTURES


# An ordinary recursive descent: each method is a line of the grammar in the module's docstring,
# sees only the tokens from `self.at` on, and either consumes its part or raises. It never goes back
# (the two places that look ahead say so), hence linear time.
class _Parser:
    """A cursor over the tokens; every method reads its part of the grammar and returns a tree."""

    def __init__(self, tokens: list[tuple], reading: dict):
        # Four sentinels, because no rule looks further ahead than that.
        self.tokens, self.at, self.reading = tokens + [END] * 4, 0, reading
        self.depth, self.bars = 0, False  # open groups; is an absolute value the innermost one?
        self.bold: set = set()  # letters in bold type: vectors or matrices
        self.signed = False  # whether a plus-minus sign was met
        self.indices = set()  # letters that a sum counts with: its i is not the imaginary unit

    # -- cursor -------------------------------------------------------------------------------
    def peek(self, ahead: int = 0) -> tuple:
        """The token under the cursor, or a few further on; past the end it is END."""
        return self.tokens[self.at + ahead]

    def is_op(self, *values: str) -> bool:
        """Is the token under the cursor one of these operators?"""
        # The kind is tested as well: the text token "in" is no operator.
        kind, value, _ = self.tokens[self.at]
        return kind == "op" and value in values

    def op_in(self, table) -> bool:
        """Is it one of the operators of a table?"""
        kind, value, _ = self.tokens[self.at]
        return kind == "op" and value in table

    def take(self, *values: str) -> bool:
        """Step over one of these operators, if it is next."""
        if self.is_op(*values):
            self.at += 1
            return True
        return False

    def expect(self, *values: str) -> str:
        """Step over one of these operators, which must be next; returns which it was."""
        value = self.peek()[1]
        # The message names what was found, since `explain` shows it to whoever debugs a reward.
        if not self.take(*values):
            raise ParseError(f"expected {' or '.join(values)}, found {value or 'the end'}")
        return value

    # -- lists and relations ------------------------------------------------------------------
    def answer(self) -> tuple:
        """The whole text: a group, and nothing after it."""
        node = self.group()
        # Everything must be consumed. To ignore a rest would make "5 because x is positive" equal
        # to 5, and pay for any hedge that begins with the right value.
        if self.peek() is not END:
            raise ParseError(f"cannot read on at {self.peek()[1]!r}")
        # No node is more than four levels higher than its parts, and takes a token at least.
        if len(self.tokens) > MAX_HEIGHT // 4:
            check_height(node)
        #   2 \pm \sqrt3  ->  the list 2 + \sqrt3, 2 - \sqrt3
        # `signed` spares the walk over the tree for answers without such a sign, which are most.
        if self.signed:
            items = node[1] if node[0] in ("list", "or") else (node,)
            found = tuple([choice for item in items for choice in expand_signs(item)])
            node = found[0] if len(found) == 1 else ("or" if node[0] == "or" else "list", found)
        return node

    def group(self) -> tuple:
        r"""Items, or {a \over b} and {n \choose k}, which take all of their group on both sides."""
        node = self.items()
        if not self.is_op("over", "choose"):
            return node
        kind = self.expect("over", "choose")
        parts = scalar(node), scalar(self.items())
        return fraction(*parts) if kind == "over" else ("binom", *parts)

    def items(self) -> tuple:
        """One item, or the list of several; 'or' is remembered because x<1 or x>3 is a union."""
        found, word = [self.item()], ""
        # Commas and words may come together, and "and" between two items says no more than a comma.
        while self.is_op(",", ";") or self.peek()[0] == "sep":
            while self.is_op(",", ";") or self.peek()[0] == "sep":  # "3, 5, and 8"
                word = self.peek()[1] if self.peek()[0] == "sep" else word
                self.at += 1
            found.append(self.item())
        if len(found) == 1:
            return found[0]
        return ("or" if word == "or" else "list", tuple(found))

    def item(self) -> tuple:
        """A side, or a chain of sides with relations between them: 1 < x <= 4."""
        sides, ops = [self.side()], []
        while self.op_in(RELATIONS):
            ops.append(self.expect(*RELATIONS))
            sides.append(self.side())
        #   1 < x \le 4  ->  ("rel", ("<", "<="), (1, x, 4)): a chain keeps all its members
        return ("rel", tuple(ops), tuple(sides)) if ops else sides[0]

    def side(self) -> tuple:
        """A sum with its unit; set operations and ratios bind looser than +."""
        #   \$5 and \$5+3  ->  ("unit", 5, "dollar"), ("unit", 8, "dollar")
        currency = self.op_in(CURRENCY) and CURRENCY[self.expect(*CURRENCY)]
        node = self.sum()
        while self.is_op("cup", "cap", "setminus") or self.union_letter(node):
            op = self.peek()[1].replace("U", "cup")
            self.at += 1
            right = self.sum()
            # Units, numbers and letters have no union; a cup of something
            # else was probably misread.
            if not (_is_set(node) and _is_set(right)):
                raise ParseError("a set operation on something that is not a set")
            # Left to right: A \cup B \setminus C is (A \cup B) \setminus C.
            node = ("setop", op, node, right)
        if self.is_op(":"):
            #   3:4:5  ->  ("ratio", (3, 4, 5)), all parts in one node
            parts = [node]
            while self.take(":"):
                parts.append(self.sum())
            node = ("ratio", tuple(parts))
        words = [currency] if currency else self.words()
        if words and (is_structure(node) or node[0] in ("pct", "deg", "unit")):
            raise ParseError("words after something that is not a number")
        unit = unit_of(words)
        return ("unit", node, unit) if unit else ("said", node, " ".join(words)) if words else node

    def union_letter(self, node: tuple) -> bool:
        """(0,1) U (2,3): a plain U between two sets."""
        # As a letter U stays usable: only between two sets it is a union.
        return self.peek()[:2] == ("sym", "U") and _is_set(node)

    def words(self) -> list:
        """The words after a number, in small letters, with their powers and slashes."""
        parts = []
        while True:
            #   5\text{ m/s}  ->  m, /, s        5 cm^2, 5 cm^{2}  ->  cm, ^2
            kind, value, _ = self.peek()
            known = kind == "word" and (unit_of([value.lower()]) or value.lower() in _POWERS
                                        or value.lower() == "per")
            if kind != "text" and not known and not (parts and self.is_op("/", "^")):
                return parts
            self.at += 1
            parts += ["^" + self.raw()] if value == "^" else (
                value.lower().strip(" .").replace("/", " / ").split())

    # -- arithmetic ---------------------------------------------------------------------------
    def with_signs(self, read) -> tuple:
        """Leading signs and what `read` reads after them."""
        if not self.op_in(_SIGNS):
            return read()
        # A loop, and the signs are multiplied out here: 4000 minus signs are no deeper than one.
        sign, both = 1, ""
        while self.op_in(_SIGNS):
            op = self.expect(*_SIGNS)
            if op == "-":
                sign = -sign
            elif op != "+":
                # \pm and \mp are remembered, not resolved: the whole item decides
                # which sign goes with which
                both, self.signed = op, True
        node = read()
        # Structures have no sign; a lone structure is passed through as it is.
        if sign < 0:
            node = ("neg", scalar(node))
        # ("pm", 1, x) is +-x and ("pm", -1, x) is -+x: in a \pm b \mp c the signs are opposite.
        return ("pm", 1 if both == "pm" else -1, scalar(node)) if both else node

    def sum(self) -> tuple:
        """Terms with signs between them. A flat node: 1+1+...+1 must not nest."""
        terms = [self.with_signs(self.term)]
        while self.op_in(_SIGNS):
            terms.append(self.with_signs(self.term))
        # A single term needs no node, so that "5" and "(5)" are the same tree.
        return terms[0] if len(terms) == 1 else ("add", tuple(map(scalar, terms)))

    def starts_factor(self) -> bool:
        """Can the next token begin a factor written without a multiplication sign?"""
        kind, value, _ = self.peek()
        if kind != "op":
            return kind in _STARTS
        # A bar that could close the open absolute value closes it: |x|y|z| is |x| y |z|.
        return value in _CLOSING and not (value == "|" and self.bars)

    def number_may_follow(self) -> bool:
        """(n-2) 2^n and 5!3! are products; x2 could mean an index, a power or a product."""
        # Refusing costs a rare answer; guessing x2 as x^2 or 2x would pay for wrong ones.
        before, gap = self.tokens[self.at - 1], self.peek()[2]
        if before[1] in (")", "!"):
            return True
        # x 2^n, {x}2^n: a power after a space or a group is a factor; 3 2^n
        # could be a misprint of 32^n
        return before[0] != "num" and (gap or before[1] == "}") and self.peek(1)[1] == "^"

    def term(self, before_function: bool = False) -> tuple:
        """A product; with before_function, the argument of an unbracketed function (sin 2x)."""
        # The tree of a product is flat, ("mul", (a, b, c)), and division is a factor ("inv", x), so
        # that one rule evaluates a/b, \frac{a}{b} and a b^{-1}.
        factors = [self.factor()]
        divided = None  # the factors after the last '/', while they are still juxtaposed
        while True:
            # In the argument of an unbracketed function "*" and "/" end it:
            #   \sin x \cdot y  ->  (\sin x) y
            if not before_function and self.is_op("*", "×", "/"):
                op = self.expect("*", "×", "/")
                divided = [] if op == "/" else None
                node = self.factor()
                if op == "×" and self.is_vector(factors[-1]) and self.is_vector(node):
                    #   \vec a \times \vec b: an unknown function of both, in this order
                    factors[-1] = ("call", "×", (factors[-1], node))
                elif divided is None:
                    factors.append(node)
                else:
                    #   a/b  ->  factors [a, ("inv", b)], divided [b]
                    divided.append(node)
                    factors.append(("inv", node))
            elif self.starts_factor() and not self.union_letter(factors[-1]):
                #   \sin x \cos y and \sin x (y+1): the argument of the first function ends here
                kind, value, _ = self.peek()
                if before_function and (kind == "fn" or self.is_op("(", "[", "\\{")):
                    break
                if (kind == "num" or kind == "node" and value[0] in ("num", "base")) and (
                        not self.number_may_follow()):
                    raise ParseError("a number right after a factor is ambiguous")
                node = self.factor()
                if self.is_vector(factors[-1]) and self.is_vector(node):
                    row = factors[-1][2] if factors[-1][:2] == ("call", "row") else (factors[-1],)
                    factors[-1] = ("call", "row", (*row, node))
                elif divided:
                    # 1/2x is half of x to some and 1/(2x) to others; a/bc has the
                    # one usual reading a/(bc)
                    if divided[0][0] == "num":
                        raise ParseError("a/b c can be read in two ways")
                    divided.append(node)  # a/bc is a/(bc)
                    factors[-1] = ("inv", ("mul", tuple(divided)))
                else:
                    factors.append(node)
            else:
                break
        # `product` checks that all factors are numbers, or one of them a matrix.
        return product(factors, any(map(is_capital, factors)) and self.both_orders)

    def is_vector(self, node: tuple) -> bool:
        """A bold letter, an arrow over a name, a cross product, and sums and multiples of them."""
        if node[0] in ("add", "mul"):
            found = sum(map(self.is_vector, node[1]))
            return found > 0 if node[0] == "add" else found == 1  # of two it is a dot product
        if node[0] in ("neg", "pow"):
            return self.is_vector(node[1])
        return node[0] == "sym" and (node[1].startswith("vec ") or node[1] in self.bold) or (
            node[:2] in (("call", "×"), ("call", "row")))

    @cached_property
    def both_orders(self) -> bool:
        """AB - BA is no zero: who writes both orders of two capitals means matrices."""
        pairs = {(a[1], b[1]) for a, b in zip(self.tokens, self.tokens[1:])
                 if a[0] == b[0] == "sym"}
        return any(a != b and (b, a) in pairs and (a + b).isupper() for a, b in pairs)

    def factor(self) -> tuple:
        r"""A postfix with its signs: the -3 of 2 \cdot -3."""
        # After a sign the grammar descends to powers: -x^2 is -(x^2).
        return self.with_signs(self.postfix)

    def postfix(self) -> tuple:
        """A primary with what binds tighter than any sign: powers, n!, 5%, 30 degrees, 5$."""
        node = self.primary()
        #   (101)_2  ->  ("base", "101", 2); a decimal or a negative number has no digits in a base
        if self.is_op("_") and node[0] == "num" and node[2] is None and node[1] >= 0:
            self.at += 1
            node = in_base(str(node[1]), self.raw())
        # A loop, for they come in rows: 3!^2, x^2!.
        while self.op_in(_SUFFIXES):
            if self.is_op("^"):
                node = ("pow", scalar(node), self.exponent())
            elif self.take("!"):
                # 5!! is the double factorial 5*3*1, not (5!)!.
                node = ("fact2" if self.take("!") else "fact", scalar(node))
            else:
                # nobody knows what 5%% would be
                if node[0] in ("pct", "deg", "unit"):
                    raise ParseError("a second percent, degree or currency sign")
                kind, *unit = _SUFFIXES[self.expect(*_SUFFIXES)]
                node = (kind, scalar(node), *unit)
        return node

    def exponent(self) -> tuple:
        """What follows ^, right to left: 2^3^2 is 2^9, and 2^-3 has its sign."""
        self.expect("^")
        self.deeper()  # a^b^c^... recurses here

        def raised() -> tuple:
            # All digits count, 2^10 = 1024, though TeX would raise the 1 alone:
            # models and plain text write so.
            base = self.argument(whole_number=True)
            return ("pow", scalar(base), self.exponent()) if self.is_op("^") else base

        node = scalar(self.with_signs(raised))
        self.depth -= 1
        return node

    def argument(self, whole_number: bool = False) -> tuple:
        """What a command applies to: a braced group or one token; TeX takes one digit only."""
        kind, value, gap = self.peek()
        # \frac43: 4 over 3. \frac123 leaves the 3 behind, which is refused as ambiguous afterwards
        if kind == "num" and not whole_number and len(value) > 1:
            if not value.isdigit():
                raise ParseError("braces are missing around a number")
            # The rest of the number becomes the next token. One digit shorter
            # each time, so this ends.
            self.tokens[self.at] = ("num", value[1:], False)  # \frac43: 4, then 3 is left
            return number(value[0])
        #   \frac xy, \sqrt2, x^2: one token is the whole argument
        if kind == "sym" or kind == "num":
            self.at += 1
            return number(value) if kind == "num" else (kind, value)
        return self.primary()

    # -- primaries ----------------------------------------------------------------------------
    def deeper(self) -> None:
        """Count one level of nesting: Python's own recursion limit must never be met."""
        # A RecursionError would depend on how deep the caller's own stack is; a count does not.
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError(f"more than {MAX_DEPTH} nested groups")

    def primary(self) -> tuple:
        """What a factor begins with; all nesting but that of powers comes through here."""
        # Not restored when an error passes through: a ParseError ends the parser anyway.
        self.deeper()
        kind, value, _ = self.peek()
        if kind == "op":
            node = self.bracket()
        else:
            # One method a kind of token, a closed list: no text of an answer can name another one.
            reader = getattr(self, "read_" + kind, None)
            if reader is None:
                raise ParseError(f"expected a number or a letter, found {value or 'the end'!r}")
            self.at += 1
            node = reader(value)
        self.depth -= 1
        return node

    def bracket(self) -> tuple:
        """( ), [ ], \\{ \\}, { }, | |, floor and ceiling, whichever begins here; also -$5."""
        if self.op_in(CURRENCY):
            unit = CURRENCY[self.expect(*CURRENCY)]
            return ("unit", scalar(self.primary()), unit)
        opening = self.expect(*_CLOSING)
        #   \{\}  ->  the empty set, the same tree as \emptyset
        if opening == "\\{" and self.take("\\}"):
            return ("set", ())
        # While a bar is the innermost opening, the next bar closes it; bars opened outside of
        # another bracket cannot close inside it.
        bars, self.bars = self.bars, opening == "|"
        inside = self.group() if opening == "{" else self.items()
        self.bars = bars
        # Mixed brackets are wanted: (1, 2] and [1, 2) are half-open intervals.
        closing = self.expect(*_CLOSING[opening])
        if opening in _ROUNDED:
            return (_ROUNDED[opening], scalar(inside))
        if opening == "\\{":
            return ("set", inside[1] if inside[0] in ("list", "or") else (inside,))
        #   (1, 2)  ->  ("tuple", "(", ")", (1, 2))
        if opening != "{" and inside[0] == "list":
            return ("tuple", opening, closing, inside[1])
        # One item in brackets is a group: (x + 1), [x + 1]. (5] is a misprint, (1 or 2) unknown.
        if opening + closing not in ("()", "[]", "{}") or opening != "{" and inside[0] == "or":
            raise ParseError("brackets do not match")
        return inside

    def read_node(self, node: tuple) -> tuple:
        """A tree that was complete as a token: 52_8, 2:05, 0.\\overline{3}, \\mathbb{R}."""
        return node

    def read_const(self, name: str) -> tuple:
        """pi, e, i, infinity; the i of a sum that counts with i is a letter."""
        return ("sym" if name in self.indices else "const", name)

    def read_text(self, words: str) -> tuple:
        """Words as an item; next to arithmetic they are refused."""
        # In brackets PQRS and pqrs are different points, Yes and yes are one word.
        return ("text", words.lower() if self.depth < 2 or words.istitle() else words)

    read_word = read_text

    def read_bold(self, name: str) -> tuple:
        """A letter in bold type, and remembered as such."""
        self.bold.add(name)
        return self.read_sym(name)

    def read_mark(self, mark: str) -> tuple:
        r"""\hat x: with its mark, x is another letter."""
        return ("sym", f"{mark} {self.raw()}")

    def read_num(self, value: str) -> tuple:
        """A number, or a mixed number: 2\\frac13, and 2 1/3 with a space."""
        node, (kind, name, gap) = number(value), self.peek()
        # Mixed numbers begin with a whole number: 2.5\frac13 is a product.
        if not value.isdigit():
            return node
        if kind == "frac":
            part = self.primary()
        elif kind == "num" and gap and self.peek(1)[1] == "/" and self.peek(2)[0] == "num":
            #   3 1/4  ->  13/4 with a space; 31/4 without
            part = fraction(number(name), number(self.peek(2)[1]))
            self.at += 3
        else:
            return node
        top, (_, bottom) = part[1]
        if not top[0] == bottom[0] == "num" or not top[2] is bottom[2] is None:
            # 2\frac{n}{3} is a product: the fraction, already read, is the next token.
            self.at -= 1
            self.tokens[self.at] = ("node", part, gap)
            return node
        #   2\frac13  ->  7/3, the reading of school; 2\frac43 is refused: 10/3, 8/3?
        if not 0 < top[1] < bottom[1]:
            raise ParseError("a number before an improper fraction is ambiguous")
        return ("num", node[1] + Fraction(top[1], bottom[1]), None)

    def read_sym(self, name: str) -> tuple:
        """A letter with its index and primes; before a bracket a function or a factor."""
        #   x_1, x_{max}, a_{n}_k, f'': index and primes are part of the name
        while self.is_op("_", "'"):
            name += self.expect("_", "'")
            name += self.raw() if name[-1] == "_" else ""
        #   f^{-1}(2) and f^2(x): another function; f^2 without a bracket is a square
        if name[0] in "fgh" and self.is_op("^") and (
                self.peek(1)[0] in ("num", "sym") or self.peek(1)[1] == "{"):
            mark, self.at = self.at, self.at + 1
            power = self.raw()
            name, self.at = (f"{name}^{power}", self.at) if self.is_op("(") else (name, mark)
        if self.is_op("(") and name not in self.reading:
            self.reading[name] = self.shows_function(name)
        if self.is_op("(") and self.reading[name]:
            inside = self.bracket()
            args = inside[3] if inside[0] == "tuple" else (inside,)
            if any(is_structure(arg) and arg[0] != "rel" for arg in args):  # P(X = 2)
                raise ParseError("a function of something that is not a number")
            return ("call", name, args)
        return ("sym", name)

    def shows_function(self, name: str) -> bool:
        """Is the name before this bracket a function here? Once decided, it holds for both sides.

        f, g, h and whatever has a prime are; so is any name in a definition, k(x) = x + 1. A
        capital, a Greek or an indexed name is one of a lone argument or of several: P(3),
        \\phi(n), p_1(x, y), but P(1+r) and \\alpha(\\beta+1) are products. Small letters multiply:
        n(n+1), k(2).
        """
        if name[0] in "fgh" and name not in GREEK or "'" in name:
            return True
        # Looks ahead without moving the cursor.
        inside, end = [], self.at + 1
        while self.tokens[end] is not END and self.tokens[end][1] != ")":
            inside.append(self.tokens[end])
            end += 1
        if all(token[0] == "sym" or token[1] == "," for token in inside) and (
                self.peek(end + 1 - self.at)[1] == "="):
            return True
        if not (name[0].isupper() or "_" in name or name in GREEK):
            return False
        lone = inside[1:] if inside and inside[0][1] == "-" else inside
        return any(token[1] in (",", "=") for token in inside) or (
            len(lone) == 1 and lone[0][0] in ("num", "sym", "const"))

    def raw(self) -> str:
        """The spelling of an index or of a marked name: one token or one braced group."""
        # Indices are compared by spelling, x_{max} is one name whatever "max" may mean elsewhere.
        kind, value, _ = self.peek()
        if value != "{" and kind not in ("num", "sym", "const", "text", "word"):
            raise ParseError("an index that is not a name")
        parts, depth = [], 0
        while self.peek() is not END:
            # Braces inside are counted, so that x_{a_{1}} ends at the right one.
            value = str(self.peek()[1])
            depth += (value == "{") - (value == "}")
            self.at += 1
            parts.append(value)
            if depth == 0:
                return "".join(parts[1:-1] or parts)
        raise ParseError("unclosed brace")

    # -- commands and functions with arguments ------------------------------------------------
    def read_fn(self, name: str) -> tuple:
        r"""\sin x, \sin^2 x, \sin^{-1} x, \log_2 x, \gcd(a, b)."""
        #   \sin^2 x  ->  ("pow", ("fn", "sin", (x,)), 2)      \log_2 8  ->  ("log", 2, 8)
        base = exponent = None
        for _ in range(2):  # \log_2^3 x and \log^3_2 x
            if name == "log" and self.take("_"):
                base = scalar(self.argument())
            elif self.is_op("^"):
                exponent = self.exponent()
        args = self.function_argument()
        # Only an exponent of exactly -1 inverts: \sin^{-2} x is 1/\sin^2 x.
        if exponent == ("neg", ("num", 1, None)) and name in INVERSE:
            name, exponent = INVERSE[name], None
        # \sin(1, 2) has no value; gcd, lcm, max and min take any number of arguments.
        if len(args) != 1 and name not in ("gcd", "lcm", "max", "min"):
            raise ParseError(f"{name} of several arguments")
        # `log` without a base is the decimal one; that is policy.
        if name in ("log", "ln", "lg"):
            node = ("log", base or (("const", "e") if name == "ln" else ("num", 10, None)), args[0])
        elif name == "exp":
            #   \exp(x) and e^x are one tree
            node = ("pow", ("const", "e"), args[0])
        else:
            node = ("fn", name, args)
        return ("pow", node, exponent) if exponent else node

    def function_argument(self) -> tuple:
        """The arguments of a function: bracketed, or the factors that follow it."""
        if self.op_in(_CLOSING):
            #   \sin(x) y is (\sin x) y: the bracket is the whole argument; \max\{a, b\}
            inside = self.bracket()
            args = {"tuple": inside[-1], "set": inside[1]}.get(inside[0], (inside,))
        else:
            #   \sin 2x is \sin(2x)
            args = (self.term(before_function=True),)
            # \sin x/2 is \sin(x/2) to some, half of \sin x to others; \sin x/\cos x is clear.
            if self.is_op("/") and self.peek(1)[0] != "fn":
                raise ParseError("a function of an unbracketed fraction is ambiguous")
        return tuple(map(scalar, args))

    def read_begin(self, name: str) -> tuple:
        """The rows of a matrix; a last empty row (a trailing double backslash) is dropped."""
        #   align, cases and the like hold several equations, not one value
        if name not in MATRICES:
            raise ParseError(f"unknown environment {name}")
        if name == "array" and self.is_op("{"):
            # The column format of {array}{cc} says nothing about the entries.
            self.raw()
        rows = [[]]
        while self.peek()[0] != "end":
            # Cells are sums: a matrix of lists or relations is a system of something else.
            rows[-1].append(scalar(self.sum()))
            if self.take("\\\\"):
                rows.append([])
            elif not self.take("&") and self.peek()[0] != "end":
                raise ParseError("a matrix row that cannot be read")
        self.at += 1
        # Empty rows come from a line break after the last one.
        rows = [tuple(row) for row in rows if row]
        if not rows or any(len(row) != len(rows[0]) for row in rows):
            raise ParseError("matrix rows of different lengths")
        return ("matrix", tuple(rows))

    def read_frac(self, _) -> tuple:
        r"""Two arguments, in TeX's way: \frac43 or \frac{4}{3}."""
        return fraction(scalar(self.argument()), scalar(self.argument()))

    def read_binom(self, _) -> tuple:
        r"""\binom nk or \binom{n}{k}."""
        return ("binom", scalar(self.argument()), scalar(self.argument()))

    def read_sqrt(self, _) -> tuple:
        r"""\sqrt[n]{x}; \sqrt12 is refused, because TeX and people read it differently."""
        degree = ("num", 2, None)
        #   \sqrt[3]{x}  ->  ("root", 3, x)
        if self.take("["):
            degree = scalar(self.sum())
            self.expect("]")
        kind, value, _ = self.peek()
        # TeX draws \sqrt12 as (\sqrt1)2, its writer meant \sqrt{12}.
        if kind == "num" and len(value) > 1:
            raise ParseError("a root of several digits needs braces")
        return ("root", degree, scalar(self.argument()))

    def read_plain(self, kind: str) -> tuple:
        """sqrt 12, cbrt(x), abs(x), floor(x), ceil(x), as plain text has them."""
        inside = scalar(self.argument(whole_number=True))
        return ("root", ("num", int(kind), None), inside) if kind.isdigit() else (kind, inside)

    def read_figure(self, kind: str) -> tuple:
        r"""\angle ABC and \triangle{ABC} are one name, and no product of A, B and C."""
        if self.is_op("{"):
            return ("sym", f"{kind} {self.raw()}")
        name = ""
        # Collects the letters of ABC and their indices; infinity is a constant
        # and no letter of a triangle.
        while self.peek()[0] in ("sym", "word", "const") and self.peek()[1] != "inf":
            name += self.raw()
            while self.take("_"):
                name += "_" + self.raw()
        if not name:
            raise ParseError("an angle without a name")
        # With a space in it the name can meet no letter of the text: angle A and A stay different.
        return ("sym", f"{kind} {name}")

    def read_sum(self, kind: str) -> tuple:
        r"""\sum_{k=a}^{b} term, or \prod."""
        # Only this one form: index, start, end. A sum over a condition
        # (\sum_{d \mid n}) has no loop.
        self.expect("_")
        self.expect("{")
        token, name, _ = self.peek()
        if token not in ("sym", "const"):
            raise ParseError("a sum without an index")
        self.at += 1
        self.expect("=")
        low = scalar(self.sum())
        self.expect("}")
        self.expect("^")
        # The upper limit may be a long number, \sum_{k=1}^{100}: TeX wants
        # braces there, people forget.
        high = scalar(self.argument(whole_number=True))
        outer, self.indices = self.indices, self.indices | {name}
        # One term, as usual: \sum k + 1 is (\sum k) + 1.
        body = scalar(self.term())
        self.indices = outer
        return (kind, name, low, high, body)


# ---------------------------------------------------------------------------------------------
# Small builders

def number(text: str) -> tuple:
    """The node of a literal; raises ParseError beyond MAX_DIGITS or MAX_EXPONENT."""
    # Digits by hand and never through float: 0.1 is 1/10 exactly, 1e400 is no infinity.
    mantissa, _, exponent = text.lower().partition("e")
    # int() takes quadratic time, and raises on its own beyond 4300 digits.
    if len(text) > MAX_DIGITS:
        raise ParseError(f"a number of more than {MAX_DIGITS} digits")
    whole, point, decimals = mantissa.partition(".")
    #   "2.50"  ->  whole "2", decimals "50": 250 shifted by -2, ("num", 5/2, 2)
    value = int(whole + decimals)
    shift = -len(decimals)
    if exponent:
        # The length first: int() of a long exponent would be work already.
        if len(exponent) > 6 or abs(int(exponent)) > MAX_EXPONENT:
            raise ParseError(f"an exponent of ten above {MAX_EXPONENT}")
        shift += int(exponent)
    if shift:
        value = value * 10 ** shift if shift > 0 else Fraction(value, 10 ** -shift)
    # `places` remembers that a decimal was written; the checker rounds only against those.
    return ("num", value, len(decimals) if point or exponent else None)


def in_base(digits: str, base: str) -> tuple:
    """Digits in the base that an index names: 8, or the word eight."""
    # At most 36, the digits and letters there are.
    number = NUMBER_BASES.get(base) or (int(base) if base.isdigit() and len(base) < 3 else 0)
    if not 2 <= number <= 36:
        raise ParseError("unknown number base")
    return ("base", digits.lstrip("0") or "0", number)


def repeating(text: str) -> tuple:
    r"""0.1\overline{6} = 1/6."""
    #   "0.1\overline{6}": whole "0", decimals "1", digits "6": 1/10 + 6/(9 * 10) = 1/6
    plain, _, rest = text.partition("\\")
    digits = rest[rest.index("{") + 1:-1]
    whole, _, decimals = plain.partition(".")
    if len(text) > MAX_DIGITS:
        raise ParseError(f"a number of more than {MAX_DIGITS} digits")
    scale = 10 ** len(decimals)
    # A period of n digits is worth digits/(10^n - 1), shifted behind the decimals before it.
    return ("num", Fraction(int((whole + decimals) or "0"), scale)
            + Fraction(int(digits), (10 ** len(digits) - 1) * scale), None)


def fraction(top: tuple, bottom: tuple) -> tuple:
    """A product with an inverse, so that there is one rule for both: 3/4 is 3 times 1/4."""
    return ("mul", (top, ("inv", bottom)))


def scalar(node: tuple) -> tuple:
    """The node itself, if arithmetic can be done on it; raises ParseError otherwise."""
    if is_structure(node):
        raise ParseError("arithmetic on something that is not a number")
    return node


def is_capital(node: tuple) -> bool:
    """A capital letter, perhaps with an index or a power: it could be a matrix."""
    base = node[1] if node[0] == "pow" else node
    return base[0] == "sym" and base[1][0].isupper() and base[1] not in GREEK


def product(factors: list, ordered: bool = False) -> tuple:
    """A product node; a number times a matrix is multiplied out, other structures are refused."""
    if len(factors) == 1:
        return factors[0]
    # A^{-1}B and A^TB are products of matrices, which have an order; AB alone is a segment or a
    # product of numbers, unless the text shows both orders.
    #   2 A^{-1} B  ->  2 times an unknown function of A^{-1} and B
    if ordered or any(is_capital(f) and f[0] == "pow" and f[2][0:2] in (
            ("neg", ("num", 1, None)), ("sym", "T")) for f in factors):
        capitals = tuple(f for f in factors if is_capital(f))
        if len(capitals) > 1:
            factors = [f for f in factors if not is_capital(f)] + [("call", "row", capitals)]
    matrices = [f for f in factors if f[0] == "matrix"]
    #   2 (matrix)  ->  each entry times 2. A product of two has rules of its own and is not needed.
    others = [scalar(f) for f in factors if f[0] != "matrix"]
    if not matrices:
        return ("mul", tuple(others)) if len(others) > 1 else others[0]
    if len(matrices) > 1 or any(map(is_capital, others)):
        raise ParseError("a product of matrices")
    return ("matrix", tuple(tuple(("mul", (*others, cell)) for cell in row)
                            for row in matrices[0][1]))


def _is_set(node: tuple) -> bool:
    """Could this stand on a side of a union? An interval is read as a pair."""
    # Here (0, 1) is an interval, elsewhere a point: the grammar cannot know, a union can.
    return node[0] in ("set", "setop", "domain") or (node[0] == "tuple" and len(node[3]) == 2)


def expand_signs(node: tuple, level: int = 0) -> list:
    r"""[node], or the two nodes that a \pm in it stands for (all signs of one item together)."""
    #   1 \pm 2 \mp 3  ->  1 + 2 - 3 and 1 - 2 + 3: two nodes, not four
    # Sets in sets double the tree at every level, hence the limit.
    if level > 2:
        raise ParseError("a plus-minus sign in nested sets")
    return [_choose_sign(node, sign, level) for sign in ((1, -1) if _has_sign(node) else (1,))]


def _has_sign(node) -> bool:
    """Is there a plus-minus in the tree, outside of sets, which have items of their own?"""
    if not isinstance(node, tuple) or node[:1] == ("set",):
        return False
    return node[:1] == ("pm",) or any([_has_sign(part) for part in node])


def _choose_sign(node, sign: int, level: int):
    """The tree with every plus-minus resolved: the upper signs for sign = 1, else the lower."""
    if not isinstance(node, tuple):
        return node
    # \{\pm 3, 0\}  ->  the set of 3, -3 and 0
    if node[:1] == ("set",):
        return ("set", tuple([x for item in node[1] for x in expand_signs(item, level + 1)]))
    # ("pm", 1, x) gives +x first; ("pm", -1, x), a minus-plus, gives -x first.
    if node[:1] == ("pm",):
        inside = _choose_sign(node[2], sign, level)
        return inside if node[1] * sign > 0 else ("neg", inside)
    return tuple([_choose_sign(part, sign, level) for part in node])
