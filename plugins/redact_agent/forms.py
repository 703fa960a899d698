"""Forms: the rules of forms.toml and keys.txt, and the checks that they name.

What can be checked is checked: the digits of an IBAN and of a card, whether a key looks like one.
Names of variables, paths and words that stand in the place of a key in program text are none.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .finding import Pattern, Rule, Span
from .folding import END, LETTER, START, UNSPACED, Folded
from .words import Labels, any_of

LONG = re.compile(r"[\w.:/%+=~$@?&;-]{16,}+", re.ASCII)  # what may hold a key
PATH = re.compile(r"[~.]?/[a-z]+[/.]")
CODE = re.compile(r"[a-z_]\w*(?:\.[a-z_]\w*)+|.*://.*|.*\(")  # names, links and calls
STOPS = rf"\s\"'`<>,;(){{}}\[\]|。、！？「」{UNSPACED}"  # signs that are no part of a password
PASSWORD = rf"(?![$%*.:=])(?:[^{STOPS}.?:&]|[.?:](?=[^{STOPS}])|&(?!\w{{1,30}}=)){{4,}}+\(?"
DOUBLED = str.maketrans("0123456789", "0246813579")  # and the digits of that summed up


def read(name: str) -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / name).read_text("utf-8"))


def read_words() -> dict[str, list[str]]:
    """Return the lists of words.toml, folded."""
    texts = {name: Folded(text).text.lower() for name, text in read("words.toml").items()}
    return {name: re.split(r"\s*,\s*", text.strip()) for name, text in texts.items()}


def rules(words: dict[str, list[str]]) -> list[Rule]:
    """Return the rules for all that has a form; `words` are the lists of words.toml."""
    table = read("forms.toml")
    networks = re.compile(table["cards"], re.VERBOSE)
    checks: dict[str, Callable[[str], bool]] = {"is_card": partial(is_card, networks)}
    checks |= {check.__name__: check for check in (bool, has_digit, is_key, is_password, is_token)}
    macros = {"LETTER": LETTER, "UNSPACED": UNSPACED, "END": END, "PASSWORD": PASSWORD}
    macros["IS"] = any_of(words["is"])
    found: list[Rule] = [Pattern("IBAN", iban_pattern(table["iban"]), is_iban), Keys()]
    for form in table["form"]:
        pattern = form.pop("pattern")
        for name, value in macros.items():
            pattern = pattern.replace("{{" + name + "}}", value)
        form["check"] = checks[form.get("check", "bool")]
        form["pattern"] = re.compile(pattern, re.VERBOSE | re.IGNORECASE)
        listed = form.get("words")
        if listed:
            form["words"] = words[listed] if isinstance(listed, str) else listed
        found.append(Labels(**form) if listed else Pattern(**form))
    return found


class Keys:
    """The rule for the forms of keys.txt."""

    def __init__(self) -> None:
        lines = (Path(__file__).parent / "keys.txt").read_text("utf-8").splitlines()
        found = [line for line in lines if line and not line.startswith("#")]
        placed = "|".join(form for form in found if form.startswith("(?<="))
        others = "|".join(form for form in found if not form.startswith("(?<="))
        self._any = re.compile(rf"(?:{placed}|(?<![\w-])(?:{others}))(?![A-Za-z0-9])", re.ASCII)

    def find(self, text: str) -> Iterator[Span]:
        for run in LONG.finditer(text):
            for found in self._any.finditer(text, *run.span()):
                if has_digit(found[0]):
                    yield Span(*found.span(), "SECRET")


def iban_pattern(lengths: str) -> re.Pattern[str]:
    """Return the pattern of all IBANs; `lengths` are such as "DE22"."""
    forms = [(form[:2], int(form[2:]) - 4) for form in lengths.split()]
    signs = "|".join(rf"{country}\d\d(?:[ -]?[A-Z\d]){{{rest}}}" for country, rest in forms)
    return re.compile(rf"{START}(?=[A-Za-z]{{2}}\d\d)(?P<value>(?ia:{signs}))(?![A-Za-z\d])")


def is_iban(value: str) -> bool:
    signs = re.sub(r"[ -]", "", value)
    return int("".join(str(int(sign, 36)) for sign in signs[4:] + signs[:4])) % 97 == 1


def is_card(networks: re.Pattern[str], value: str) -> bool:
    """Tell whether a network has such numbers, and whether the last digit fits (Luhn)."""
    number = re.sub(r"\D", "", value)
    if not networks.fullmatch(number) or (len(number) in (13, 14) and is_barcode(number)):
        return False
    return sum(map(int, number[-1::-2] + number[-2::-2].translate(DOUBLED))) % 10 == 0


def is_barcode(number: str) -> bool:
    """Tell whether a number has a length and the check digit of GS1 (EAN, UPC, ITF-14)."""
    weighted = sum(map(int, number[-1::-2])) + 3 * sum(map(int, number[-2::-2]))
    return len(number) in (8, 12, 13, 14) and weighted % 10 == 0


def is_key(value: str) -> bool:
    """Tell a key from a name: letters and digits mixed, without signs between or in both cases."""
    plain = value.rstrip("=")
    if not has_digit(value) or not any(map(str.isalpha, value)) or PATH.match(value):
        return False
    one_run = plain.isalnum() or re.fullmatch(r"[0-9a-fA-F-]+", plain) is not None
    return one_run or (plain != plain.lower() and plain != plain.upper())


def is_token(value: str) -> bool:
    return has_digit(value) or (value[1:] != value[1:].lower() and value != value.upper())


def is_password(value: str) -> bool:
    has_sign = re.search(r"[!@#$%^&*?]", value) is not None and any(map(str.isalpha, value))
    return CODE.fullmatch(value) is None and (has_digit(value) or has_sign)


def has_digit(value: str) -> bool:
    return any(map(str.isdecimal, value))
