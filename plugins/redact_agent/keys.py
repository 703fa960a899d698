"""Keys: tokens, passwords and private keys.

Some show what they are by how they begin. All others are told by a word before them (`token:`,
`password=`), and then they must look like one: names of variables, paths and words that stand in
such a place in program text are none.
"""

from __future__ import annotations

import re

from .finding import Rule

TOKEN = re.compile(
    r"(?<![\w-])(?P<value>sk-[\w-]{16,}+|[rsp]k_(?:live|test)_\w{16,}+|gh[oprsu]_\w{20,}+"
    r"|github_pat_\w{20,}+|glpat-[\w-]{16,}+|(?:hf|npm)_\w{20,}+|pypi-[\w-]{20,}+"
    r"|xox[a-z]-[\w-]{10,}+|A(?:KIA|SIA)[0-9A-Z]{16}|AIza[\w-]{30,}+|\d{8,10}:[\w-]{35})",
    re.ASCII,
)
JWT = re.compile(r"(?<![\w-])(?P<value>eyJ[\w-]{8,}+(?:\.[\w-]*+){2,4})", re.ASCII)
LINE = r"-----{} (?:[A-Z0-9]{{1,12}} ){{0,3}}PRIVATE KEY(?: BLOCK)?-----"
PEM = re.compile(  # up to its end, or where that is missing as far as it looks like a key
    rf"(?P<value>{LINE.format('BEGIN')}(?:(?:[^-]|-(?!----))*+{LINE.format('END')}"
    r"|(?:\s*+[A-Za-z0-9+/=]{16,}+)++))"
)
URL = re.compile(r"://[^\s/:@]{0,64}:(?P<value>[^\s/@${<]{1,128})@")
BEARER = re.compile(
    r"(?<![^\W_])bearer\s{1,3}(?P<value>[\w.~+/-]{8,}+=*+)", re.ASCII | re.IGNORECASE
)
AUTHORIZATION = re.compile(
    r"authorization[\"']?\s?[:=]\s?[\"']?(?:basic|token)\s{1,3}(?P<value>[\w.~+/=-]{8,}+)",
    re.ASCII | re.IGNORECASE,
)


def behind(words: str, value: str) -> re.Pattern[str]:
    """Return the pattern of a value behind `word:`, `"word" = `, `word is` or `--word `."""
    option = rf"(?<![\w-])--(?:[a-z\d]{{1,12}}-){{0,3}}(?:{words})[ ]"
    tells = rf"(?:{option}|(?:{words})[\"'`*\]]{{0,3}}(?:{BETWEEN}))"
    return re.compile(rf"{tells}[\s\"'`*]{{0,6}}(?P<value>{value})", re.IGNORECASE)


BETWEEN = r"\s{0,3}(?::=|=>|[:=>])|\s{1,3}(?:is|ist|lautet)(?=\s)"
KEYS = r"keys?|tokens?|secrets?|credentials?|schl(?:ü|ue)ssel"
PASSWORDS = r"passw(?:or)?[dt]|passphrase|(?<![^\W_])pass|pwd|kennwort"
KEY = behind(KEYS, r"(?:[A-Za-z0-9+/_~-]|\.(?=[A-Za-z0-9])){16,}+=*+")
# Neither the end of a sentence nor the next parameter of a URL belongs to it.
PASSWORD = behind(
    PASSWORDS,
    r"(?![$%*.])(?:[^\s\"'`<>,;(){}\[\]|.?:&]|[.?:](?=[^\s\"'`<>,;(){}\[\]|])|&(?!\w{1,30}=)){6,}+",
)
PATH = re.compile(r"[~.]?/[a-z]+[/.]")


def is_key(value: str) -> bool:
    """Tell a key from a name: letters and digits mixed, without signs between or in both cases."""
    plain = value.rstrip("=")
    if not has_digit(value) or not any(map(str.isalpha, value)) or PATH.match(value):
        return False
    one_run = plain.isalnum() or re.fullmatch(r"[0-9a-fA-F-]+", plain) is not None
    return one_run or (plain != plain.lower() and plain != plain.upper())


def is_password(value: str) -> bool:
    has_sign = any(sign in "!@#$%^&*?" for sign in value)
    return has_digit(value) or (has_sign and any(map(str.isalpha, value)))


def has_digit(value: str) -> bool:
    return any(map(str.isdecimal, value))


RULES = [
    Rule("SECRET", PEM),
    Rule("SECRET", JWT),
    Rule("SECRET", TOKEN, has_digit),
    Rule("SECRET", URL, told=True),
    Rule("SECRET", BEARER, has_digit, told=True),
    Rule("SECRET", AUTHORIZATION, told=True),
    Rule("SECRET", KEY, is_key, told=True),
    Rule("SECRET", PASSWORD, is_password, told=True),
]
