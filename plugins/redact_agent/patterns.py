"""Patterns: e-mail addresses, phone numbers, IBANs and payment cards.

What can be checked is checked: the digits of an IBAN and of a card, the length in each country.
What cannot, a phone number, is known by the ways in which people write one. Dates, times, amounts,
versions, IP addresses and ISBNs are not among them.
"""

from __future__ import annotations

import re

from .finding import Rule

# 64 signs and labels of 63 are what RFC 5321 and RFC 1035 allow; git@ begins every clone by SSH.
EMAIL = re.compile(
    r"(?P<value>(?<!\w)(?!git@)\w[\w.+%'-]{0,63}@(?:[\w-]{1,63}\.){1,8}"
    r"(?:xn--[\w-]{2,24}|[^\W\d_]{2,24}))"
)

START = r"(?<![^\W_])(?<!\d[.:/-])"  # not inside of a word, a decimal, a date, a time, an ISBN
DATE = r"(?:(?:19|20)\d\d-[01]\d-[0-3]\d|\d{1,2}([-./ ])\d{1,2}\1(?:19|20)\d\d)(?!\d)"
NO_DATE = r"(?!(?:19|20)\d\d-[01]\d-[0-3]\d)"
GAP = r"(?:[ \xa0]?[-–./()]{1,2}[ \xa0]?|[ \xa0])?"  # between the digits of a number
INTERNATIONAL = re.compile(rf"{START}(?P<value>(?:\+|00)[1-9](?:{GAP}{NO_DATE}\d){{7,14}})(?!\d)")
TRUNK = re.compile(  # 030 1234567, (0711) 123-456, 089 / 12 34 56, 020 7946 0958, 0612345678
    rf"{START}(?!{DATE})(?P<value>(?:\(0[1-9]\d{{0,4}}\)|0[1-9]\d{{0,4}})"
    rf"(?:[ \xa0]?[-–/][ \xa0]?|[ \xa0])?{NO_DATE}\d(?:[ \xa0-]?{NO_DATE}\d){{4,9}})(?!\d)"
)
PAIRS = re.compile(rf"{START}(?P<value>0[1-9](?:([ .-])\d\d)(?:\2\d\d){{3}})(?!\d|\.\d)")
AMERICAN = re.compile(
    rf"{START}(?P<value>(?:1[ .-])?(?:\([2-9]\d\d\)[ ]?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{{4}})"
    r"(?!\d|[.-]\d)"
)
BRAZILIAN = re.compile(rf"{START}(?P<value>\([1-9]\d\)[ ]?9?\d{{4}}-\d{{4}})(?!\d)")
LABELLED = re.compile(
    r"(?<![^\W_])(?:tel(?:efon|ephone)?|(?:cell|mobile|smart)?phone|mobile?|handy|fax|whatsapp"
    r"|(?:telefon|ruf|mobil|handy)nummer)(?:[ _]?(?:nr|no|number|nummer))?"
    r"[\"'*]{0,3}(?:[ ]?[.:=]{1,2}|[ ](?:is|ist))?[\s\"'*]{0,4}"
    rf"(?!{DATE})(?P<value>\(?\d(?:{GAP}\d){{5,14}})(?!\d)",
    re.IGNORECASE,
)
DOTTED = re.compile(r"\d+(?:\.\d{1,3}){1,3}")  # an IP address, a version, an amount
AMOUNT = re.compile(r"\+\d{1,3}(?:(?:\.\d{3})+|(?: \d{3})* 000)|\+\d+\.\d+")


def is_international(value: str) -> bool:
    number = digits(value).removeprefix("00")
    if AMOUNT.fullmatch(value) or not 8 <= len(number) <= 15:
        return False
    return len(number) == 11 or not number.startswith("1")  # North America's have eleven


def is_national(value: str) -> bool:
    """Tell whether there are enough digits: more, where no gap says that it is for a phone."""
    return (9 if value.isdecimal() else 8) <= len(digits(value)) <= 13


def is_no_version(value: str) -> bool:
    return not DOTTED.fullmatch(value)


def digits(text: str) -> str:
    return "".join(filter(str.isdecimal, text))


# The length in each country, from SWIFT's registry of IBANs
LENGTHS = """
    AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18
    DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23
    IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27
    MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19
    SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30
""".split()
FORMS = "|".join(rf"{it[:2]}\d\d(?:[ \xa0-]?[A-Z0-9]){{{int(it[2:]) - 4}}}" for it in LENGTHS)
IBAN = re.compile(
    rf"(?<![^\W_])(?=[A-Z]{{2}}\d\d)(?P<value>{FORMS})(?![^\W_])", re.IGNORECASE | re.ASCII
)


def is_iban(value: str) -> bool:
    signs = re.sub(r"[ \xa0-]", "", value)
    return int("".join(str(int(sign, 36)) for sign in signs[4:] + signs[:4])) % 97 == 1


# As they are printed. Each match is empty, so that every start has its try: what stands before or
# behind a card's number may look like a part of it.
CARDS = [
    re.compile(rf"{START}(?=(?P<value>{form})(?!\d|\.\d))")
    for form in (
        r"\d{13,19}",
        r"\d{4}([ \xa0-])\d{4}\2\d{4}\2\d{1,4}",
        r"\d{4}([ \xa0-])\d{4}\2\d{4}\2\d{4}\2\d{1,3}",
        r"\d{4}([ \xa0-])\d{6}\2\d{4,5}",
    )
]
NETWORKS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3[0689]\d{12}(?:\d\d)?"
    r"|35\d{14,17}|(?:5[06-9]|6\d)\d{11,17}"
)
DOUBLED = str.maketrans("0123456789", "0246813579")  # and the digits of that summed up


def is_card(value: str) -> bool:
    """Tell whether a network has such numbers, and whether the last digit fits (Luhn)."""
    number = digits(value)
    if not NETWORKS.fullmatch(number):
        return False
    return sum(map(int, number[-1::-2] + number[-2::-2].translate(DOUBLED))) % 10 == 0


RULES = [
    Rule("EMAIL", EMAIL),
    Rule("IBAN", IBAN, is_iban),
    *(Rule("CARD", card, is_card) for card in CARDS),
    Rule("PHONE", INTERNATIONAL, is_international),
    Rule("PHONE", TRUNK, is_national),
    *(Rule("PHONE", form) for form in (PAIRS, AMERICAN, BRAZILIAN)),
    Rule("PHONE", LABELLED, is_no_version, told=True),
]
