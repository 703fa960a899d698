"""Arithmetic: calculates an expression as people and models write it.

No Python runs: of the syntax tree only what `value` lists is calculated, in decimals, so that
0.1 + 0.2 is 0.3. Numbers have at most 200 digits and an expression 1000 characters: none takes
long.
"""

from __future__ import annotations

import ast
import decimal
import math
import operator as op
import re
from collections.abc import Callable
from decimal import Context, Decimal
from typing import Any

LONGEST, DIGITS = 1000, 200  # characters of an expression, digits of a number
TRAPS = [decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Underflow]
SIGNS = dict(zip("×·⋅÷∕⁄−–^", [*"***///--", "**"], strict=True)) | {"²": "**2", "³": "**3"}
SIGNS |= {"π": "pi", "√": "sqrt", "≤": "<=", "≥": ">=", "≠": "!="}
SPELLINGS = {  # in this order; a % before a number is the remainder, any other one a percentage
    r"(?<=[\s)])x(?=[\s(])|\bof\b": "*",
    r"(?<=\d)[_'’\xa0\u2009\u202f](?=\d{3}(?!\d))": "",
    r"(\d[\d.]*(?:e[+-]?\d+)?|\.\d+)\s*(?:%(?!\s*[\w.(])|percent\b)": r"(\1*percent)",
    r"\bmod\b": "%",
    r"\b(\d+)!(?!=)": r"factorial(\1)",
    "(?<![<>=!])=(?!=)": "==",
}
THOUSANDS = r"(?<=\d),(?=(?:\d\d,)*\d{3}(?!\d))"  # 1,234,567, and 12,34,567 as in India
SEVERAL = r"\b(?:min|max|sum|mean|round|log)\s*\("  # a comma separates their arguments

UNREADABLE = r"[^\w\s.+*/%(),<>=!-]|\d(?!e[+-]?\d|_\d)[^\W\d]"  # other signs, 0x10, 2j, 1if


def calculate(written: str) -> str:
    """Return an expression and its value. Raises ValueError, which says what would be right."""
    if len(written) > LONGEST:
        raise ValueError(f"too long: an expression may have {LONGEST} characters")
    written = written.strip().rstrip("=? ")
    text = written.lower().translate(str.maketrans(SIGNS))
    text = text if re.search(SEVERAL, text) else re.sub(THOUSANDS, "", text)
    for pattern, sign in SPELLINGS.items():
        text = re.sub(pattern, sign, text)
    text = " ".join(text.split())  # in one line
    # With some digits more than `believed` leaves.
    context = Context(DIGITS + 50, Emin=-DIGITS, Emax=DIGITS, traps=TRAPS)
    try:
        if re.search(UNREADABLE, text, re.ASCII):
            raise SyntaxError
        with decimal.localcontext(context):
            return f"{written} {result(ast.parse(text, mode='eval').body, text)}"
    except (SyntaxError, TypeError) as exc:
        raise ValueError(f"{written[:80]!r} cannot be read. {POSSIBLE}") from exc
    except (ZeroDivisionError, decimal.InvalidOperation, ValueError) as exc:
        raise ValueError("it has no value, like 1 / 0 or the root of a negative number") from exc
    except (decimal.DecimalException, RecursionError, MemoryError) as exc:
        raise ValueError(f"too large or too small: numbers may have {DIGITS} digits") from exc


def result(node: ast.expr, text: str) -> str:
    """Return "= 5", "= 0.3333 (rounded)" or "is true"."""
    match node:
        case ast.Compare(left, [kind], [right]) if (sign := type(kind).__name__) in COMPARISONS:
            sides = believed(value(left, text)), believed(value(right, text))
            return f"is {COMPARISONS[sign](*sides)}".lower()
    number = believed(value(node, text))
    precision = Context(15 if re.search("sin|cos|tan", text) else 30)  # of floats, of decimals
    short = number if number == number.to_integral_value() else precision.plus(number)
    spelt = format(short.normalize(), "f" if number.adjusted() > -30 else "e")
    return f"= {spelt}{'' if short == number else ' (rounded)'}"


def value(node: ast.expr, text: str) -> Decimal:
    """Return the value of a part of the text. Raises SyntaxError for what is not listed here."""
    number: Any
    match node:
        case ast.Constant(int() | float()):
            number = text[node.col_offset : node.end_col_offset]  # as it was written
        case ast.Name(name) if name in CONSTANTS:
            number = CONSTANTS[name]
        case ast.UnaryOp(ast.UAdd() | ast.USub() as sign, operand):
            number = value(operand, text) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(first, sign, second) if (name := type(sign).__name__) in OPERATORS:
            left, right = value(first, text), value(second, text)
            if name in SUMS and is_percentage(second) and not is_percentage(first):
                right *= left  # 80 - 25%
            number = OPERATORS[name](left, right)
        case ast.Call(ast.Name(name), arguments, []) if name in FUNCTIONS:
            number = FUNCTIONS[name](*(value(argument, text) for argument in arguments))
        case _:
            raise SyntaxError
    if not (number := +Decimal(number)).is_finite():
        raise decimal.Overflow
    return Decimal(number)


def is_percentage(node: ast.expr) -> bool:
    match node:
        case ast.BinOp(first, ast.Add() | ast.Sub(), second):
            return is_percentage(first) and is_percentage(second)
        case ast.UnaryOp(_, operand):
            return is_percentage(operand)
        case ast.BinOp(_, _, ast.Name("percent")):
            return True
    return False


def believed(number: Decimal) -> Decimal:
    """Return a number without its last digits, in which 1 / 3 * 3 is not 1."""
    return Context(DIGITS + 20).add(number, 0)


def floor(number: Decimal) -> int:
    return math.floor(believed(number))


def rounded(number: Decimal, digits: Decimal = Decimal(0)) -> Decimal:
    return believed(number).quantize(Decimal(1).scaleb(-digits), decimal.ROUND_HALF_UP)


def factorial(number: Decimal) -> int:
    if number > DIGITS:
        raise decimal.Overflow
    if number != int(number):
        raise ValueError
    return math.factorial(int(number))


def by_floats(name: str) -> Callable[[Decimal], str]:
    return lambda number: str(round(getattr(math, name)(number), 15))  # sin(pi) is 0


CONSTANTS = dict(pi="3.14159265358979323846264338327950288419716939937511", percent="0.01")
CONSTANTS |= dict(e="2.71828182845904523536028747135266249775724709369996")
PI = Decimal(CONSTANTS["pi"])
Table = dict[str, Callable[..., Any]]
SUMS: Table = dict(Add=op.add, Sub=op.sub)
OPERATORS = SUMS | dict(Mult=op.mul, Div=op.truediv, Pow=op.pow)
OPERATORS |= dict(FloorDiv=lambda a, b: floor(a / b), Mod=lambda a, b: a - b * floor(a / b))
COMPARISONS: Table = dict(Eq=op.eq, NotEq=op.ne, Lt=op.lt, LtE=op.le, Gt=op.gt, GtE=op.ge)
FUNCTIONS: Table = {name: getattr(Decimal, name) for name in ("sqrt", "ln", "log10", "exp")}
FUNCTIONS |= dict(log=lambda a, base=None: a.ln() / (1 if base is None else base.ln()))
FUNCTIONS |= dict(abs=abs, round=rounded, floor=floor, ceil=lambda a: -floor(-a))
FUNCTIONS |= dict(min=lambda *n: min(n), max=lambda *n: max(n), sum=lambda *n: sum(n))
FUNCTIONS |= dict(mean=lambda *n: sum(n) / len(n), factorial=factorial)
FUNCTIONS |= dict(radians=lambda a: a * PI / 180, degrees=lambda a: a / PI * 180)
FUNCTIONS |= {n: by_floats(n) for n in "sin cos tan asin acos atan".split()}
POSSIBLE = (
    "Possible are numbers (1,234.5, 12%), ( ), + - * / // % ** !, < <= > >= == !=, pi, e and"
    f" {', '.join(FUNCTIONS)}"
)
