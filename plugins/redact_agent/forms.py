"""Forms: the rules of forms.toml and keys.txt, and the checks that they name.

What can be checked is checked: the digits of an IBAN and of a card, whether a key looks like one.
Names of variables, paths and words that stand in the place of a key in program text are none.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from .finding import Pattern, Words, plain
from .folding import END, LETTER, START, UNSPACED, Folded

HERE = Path(__file__).parent
PATH = re.compile(r"[~.]?/[a-z]+[/.]")
CODE = re.compile(r"[a-z_]\w*(?:\.[a-z_]\w*)+|.*://.*|.*\(")  # names, links and calls
STOPS = rf"\s\"'`<>,;(){{}}\[\]|。、！？「」{UNSPACED}"  # signs that are no part of a password
PASSWORD = rf"(?![$%*.:=])(?:[^{STOPS}.?:&]|[.?:](?=[^{STOPS}])|&(?!\w{{1,30}}=)){{4,}}+\(?"
DOUBLED = str.maketrans("0123456789", "0246813579")  # and the digits of that summed up
UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue"})


def read_words() -> dict[str, list[str]]:
    """Return the lists of words.toml, folded."""
    lists = tomllib.loads((HERE / "words.toml").read_text("utf-8"))
    return {name: re.split(r"\s*,\s*", folded(text).strip()) for name, text in lists.items()}


def any_of(words: Iterable[str]) -> str:
    """Return the pattern of any of some words."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


def rules(words: dict[str, list[str]]) -> list[Pattern]:
    """Return the rules for all that has a form; `words` are the lists of words.toml."""
    table = tomllib.loads((HERE / "forms.toml").read_text("utf-8"))
    networks = re.compile(table["cards"], re.VERBOSE)
    checks = {"is_card": partial(is_card, networks), "is_iban": is_iban, "bool": bool}
    checks |= {check.__name__: check for check in (has_digit, is_key, is_password, is_token)}
    macros = {"START": START, "END": END, "LETTER": LETTER, "UNSPACED": UNSPACED}
    macros |= {"PASSWORD": PASSWORD, "IS": f"(?:{any_of(words['is'])})"}
    macros |= {"IBAN": iban_pattern(table["iban"]), "KEYS": keys_pattern()}
    found = []
    for form in table["form"]:
        pattern = re.sub(r"\{\{(\w+)\}\}", lambda name: macros[name[1]], form["pattern"])
        form["pattern"] = re.compile(pattern, re.VERBOSE | re.IGNORECASE)
        form["check"] = checks[form.get("check", "bool")]
        form["words"] = words.get(form.get("words"), ())
        found.append(Pattern(**form))
    return found


def names_rule(names: Iterable[str]) -> Words:
    """Return the rule for names, however they are spelled: ß as ss, umlauts as ae, oe, ue."""
    found = set()
    for name in names:
        name = unicodedata.normalize("NFC", " ".join(name.split()))
        decomposed = unicodedata.normalize("NFD", name)
        found |= {
            folded(form) for form in (name, decomposed, name.upper(), name.translate(UMLAUTS))
        }
    return Words("NAME", found)


def folded(text: str) -> str:
    """Return a text in the form in which words are compared."""
    return plain(Folded(text).text)


def keys_pattern() -> str:
    lines = (HERE / "keys.txt").read_text("utf-8").splitlines()
    return "|".join(line for line in lines if line and not line.startswith("#"))


def iban_pattern(lengths: str) -> str:
    """Return the pattern of all IBANs; `lengths` are such as "DE22"."""
    forms = [(form[:2], int(form[2:]) - 4) for form in lengths.split()]
    return "|".join(rf"{country}\d\d(?:[ -]?[A-Z\d]){{{rest}}}" for country, rest in forms)


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
