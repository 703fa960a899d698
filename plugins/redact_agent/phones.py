"""Phones: numbers by the metadata of the library `phonenumbers`, and by the words before them.

A number with + or 00 counts if its country has numbers of that length. Others must be a number of a
country: behind a word for a phone in any form, else with the trunk prefix 0, or grouped as people
group a phone number. In the operator's own `regions` bare digits count, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import phonenumbers

from .finding import Pattern, Span
from .folding import END, LETTER, UNSPACED
from .forms import any_of, is_barcode

REGIONS = (  # where a national number is known by how it is written
    "DE AT CH LI LU FR BE NL GB IE ES PT IT GR PL CZ SK HU RO BG HR SI RS BA UA RU BY KZ LT LV EE"
    " FI SE NO DK IS TR IL SA AE EG MA ZA NG KE IN PK BD LK CN HK TW JP KR SG MY TH VN ID PH AU NZ"
    " US CA MX BR AR CL CO PE"
)
TYPES = "fixed_line mobile toll_free premium_rate shared_cost personal_number voip uan pager"

# Digits with spaces and other signs between. A chunk has no space in it, nor a slash: in the middle
# of one no number begins or ends.
CANDIDATE = re.compile(
    rf"(?<![^\W{UNSPACED}])(?<![$€£¥₹₩₽#№=])(?<!\d[.:'])"
    r"\d{1,20}+(?:[ ./()-]{1,4}+(?=\d)\d{1,15}+){0,9}+"
)
BRACKET = r"(?:\((?=[\d ]{1,6}\)))?"  # one that is closed again
CHUNK = re.compile(rf"(?:(?<!{LETTER})\+)?{BRACKET}\d+(?:[.()-]{{1,4}}\d+)*")
CUT = re.compile(rf"_|-?{LETTER}|[:'%]\d|[%€$£¥₹₩₽]| ?(?:[kKMGT]i?B|EUR|USD)\b")  # no end before it
MOST = 8  # chunks of a number

YEAR = r"(?:19|20)\d\d(?!\d)"
NEVER = re.compile(  # dates, years behind a slash, two numbers, file modes, machines' addresses
    rf"(?<!\d)(?:{YEAR}[-./ ]\d{{1,2}}[-./ ]\d{{1,2}}(?!\d)|\d{{1,2}}([-./ ])\d{{1,2}}\1{YEAR})"
    rf"|/ ?{YEAR}|(?<!\d){YEAR}/|(?:\d[ -]?){{6,15}}/ ?0|^0[0-7]{{3}}(?:[ /-]0[0-7]{{3}})+$"
    r"|^(?:(?:[1-9]?\d|1\d\d|2[0-5]\d)\.){3}(?:[1-9]?\d|1\d\d|2[0-5]\d)$"
)
UNLIKELY = re.compile(  # amounts, ISBNs, decimals, 1 to 9, and single digits in a row
    r"\+?[1-9]\d{0,2}(?:[ .]\d{3})* 000|\+?[1-9]\d{0,2}(?:\.\d{3}){2,}"
    r"|(?:97[89][- ])?\d{1,5}[- ]\d{1,7}[- ]\d{1,7}[- ]\d|\+?\d{1,3}\.\d{4,8}|\d{3}\.\d{4,8}"
    r"|0?1234567890?|0123456789|(?:\d[ ./()-]+){3,}.*"
)
GROUPED = re.compile(  # as people write a number without a trunk prefix
    r"(?:1[ .-])?\d{3}[ .-]\d{3}[ .-]\d{4}|\d{3}[ -]\d{4}[ -]\d{4}|[78][ -]?\(?\d{3}\)?[ -]?\d{3}"
    r"[ -]\d\d[ -]\d\d|\d{3}(?:[ .-]\d\d){3}|\d\d[ .-]\d{3}(?:[ .-]\d\d){2}|\d\d[ -]\d{4,5}-\d{4}"
    r"|(?:1[ .-])?\(\d+\).*"
)
GERMAN_MOBILE = ("015", "016", "017")  # as long as a barcode

# Digits beside a number
LEFT, RIGHT = re.compile(r"(?<![.,/-])\b(\d+) $"), re.compile(r" (\d+)(?![.,/-]?\d)")

NUMBER = r"(?:no|nr|num|number|nummer|numero|n[°ºo]|номер|№|号码?|號碼?|番号|번호|#)"
SIGNS = r"[\s:.=\-\"'*)|/#>\[\]~`]{0,6}+"


class Phones:
    """Finds phone numbers in a folded text."""

    def __init__(self, words: dict[str, list[str]], regions: list[str]) -> None:
        self._any = re.compile(numbers_of(REGIONS.split()) + r"|[2-9]\d{6}")
        self._own = re.compile(numbers_of(regions)) if regions else None
        tail = rf"(?=\+?{BRACKET}\d)"
        between = rf"(?:{SIGNS}(?:{any_of(words['is'])})){{0,2}}{SIGNS}{tail}"
        suffix = rf"(?:[ _.-]?{NUMBER}\.?)?(?![^\W\d_{UNSPACED}])"
        extra = rf"(?:[ (]{{1,2}}{LETTER}{{1,14}}\)?(?= ?[:=]))?"
        near = re.compile(suffix + extra + between, re.IGNORECASE)
        far = re.compile(rf"{END}(?!\()[^\d\n]{{0,32}}?{tail}")
        self._labels = [  # what stands further down counts more
            Pattern("far", far, words=(*words["phone"], *words["call"])),
            Pattern("other", near, words=tuple(words["other"])),
            Pattern("near", near, words=tuple(words["phone"])),
        ]

    def find(self, text: str) -> Iterator[Span]:
        labels: dict[int, str] | None = None
        for candidate in CANDIDATE.finditer(text):
            if candidate.end() - candidate.start() > 5:
                if labels is None:
                    labels = {m.end(): it.kind for it in self._labels for m in it.matches(text)}
                yield from self._numbers(text, candidate, labels)

    def _numbers(
        self, text: str, candidate: re.Match[str], labels: dict[int, str]
    ) -> Iterator[Span]:
        chunks = CHUNK.finditer(text, max(0, candidate.start() - 2), candidate.end())
        places = [chunk.span() for chunk in chunks]
        if CUT.match(text, candidate.end()):
            places.pop()
        after = 0
        for n, (start, _) in enumerate(places):
            label = labels.get(start, "")
            if start >= after and (end := self._longest(text, places[n : n + MOST], label)):
                yield Span(start, end, "PHONE", label in ("near", "far"))
                after = end

    def _longest(self, text: str, places: list[tuple[int, int]], label: str) -> int:
        """Return the end of the longest number that begins with the first of some chunks, or 0."""
        start = places[0][0]
        for _, end in reversed(places):
            if 6 <= end - start <= 30 and self._is_number(text[start:end], label):
                if label or not in_row(text, start, end):
                    return end
        return 0

    def _is_number(self, value: str, label: str) -> bool:
        trunk, grouped = value[0] in "0+" or value[:2] == "(0", GROUPED.fullmatch(value)
        if not (label or trunk or grouped or self._own):
            return False  # as most are: the rest takes longer
        number = re.sub(r"\D", "", value)
        if not 6 <= len(number) <= 15 or NEVER.search(value):
            return False
        if label == "near" and value[0] != "+":
            return len(number) <= 13
        if UNLIKELY.fullmatch(value):
            return False
        if value[0] == "+":
            return is_international(re.sub(r"\(0\)|\D", "", value))
        bare, far = value.isdecimal(), label == "far"
        if label == "other" or (bare and is_barcode(number) and number[:3] not in GERMAN_MOBILE):
            return False
        if self._own and len(number) > 7 and self._own.fullmatch(number):
            return True
        if number.startswith("00"):
            return len(number) > 10 and is_international(number[2:])
        least = 7 if far and not bare else 9 if far or not bare else 10
        return len(number) >= least and self._any.fullmatch(number) is not None


def in_row(text: str, start: int, end: int) -> bool:
    """Tell whether a group of digits stands beside a value that is as long as one of its own."""
    sizes = {len(group) for group in re.split(r"\D+", text[start:end])}
    if " " not in text[start:end] or (text[start] in "0+(" and sizes != {2}):
        return False
    beside = LEFT.search(text, max(0, start - 20), start), RIGHT.match(text, end)
    return any(len(digits[1]) in sizes for digits in beside if digits)


def is_international(number: str) -> bool:
    """Tell whether the country of a number, given from its calling code on, has such long ones."""
    try:
        parsed = phonenumbers.parse(f"+{number}")
    except phonenumbers.NumberParseException:
        return False
    possible = phonenumbers.is_possible_number_with_reason(parsed)
    return len(number) > 7 and possible == phonenumbers.ValidationResult.IS_POSSIBLE


def numbers_of(regions: Iterable[str]) -> str:
    """Return the pattern of the national numbers of countries, with their trunk prefix or not."""
    forms = []
    for region in regions:
        country = phonenumbers.PhoneMetadata.metadata_for_region(region)
        if country is None:
            raise ValueError(f"settings: regions: must be countries such as DE, not {region!r}")
        kinds = [getattr(country, kind) for kind in TYPES.split()]
        numbers = [kind.national_number_pattern for kind in kinds if kind]
        forms.append(f"(?:{country.national_prefix or ''})?(?:{'|'.join(filter(None, numbers))})")
    return "|".join(forms)
