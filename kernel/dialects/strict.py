"""Strict: JSON as it is read and written here, so that nobody could read it otherwise."""

from __future__ import annotations

import json
import re
from json.encoder import encode_basestring
from typing import Any, NoReturn

# Characters that line-splitting clients treat as newlines (httpx does), and lone surrogates
UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def dumps(value: Any) -> bytes:
    """Encode JSON on one line, safe for clients that split lines on more than a newline.

    Raises ValueError for NaN and infinity, TypeError for values that JSON does not have.
    """
    text = encode_basestring(value) if type(value) is str else ENCODER.encode(value)
    if not text.isascii() or "\x7f" in text:
        text = UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.encode()


def loads(data: bytes) -> Any:
    """Decode strict JSON: UTF-8 without BOM, no NaN. Raises ValueError and RecursionError."""
    text = data.decode().strip(" \t\n\r")  # `decode` looks for white space with two regexes
    value, end = DECODER.raw_decode(text)
    return value if end == len(text) else DECODER.decode(text)


def loads_once(data: bytes) -> Any:
    """Decode as `loads` does, and raise ValueError where a key stands twice in one object."""
    return STRICT_DECODER.decode(data.decode())


def reject(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def finite(text: str) -> float:
    number = float(text)
    return reject(text) if number in (float("inf"), float("-inf")) else number


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else reject("a key that stands twice")


# Made once: json.dumps and json.loads make a new one for each call with options.
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
DECODER = json.JSONDecoder(parse_constant=reject, parse_float=finite)
STRICT_DECODER = json.JSONDecoder(
    parse_constant=reject, parse_float=finite, object_pairs_hook=unique
)
