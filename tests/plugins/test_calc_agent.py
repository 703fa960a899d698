"""The agent calc: what people and models write is calculated exactly, and nothing takes long."""

from __future__ import annotations

import operator
import re
import time
from contextlib import suppress
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.calc_agent.agent import Calc
from plugins.calc_agent.arithmetic import DIGITS, LONGEST, calculate
from tests.support import PATHS, House, calling, said, whole

VALUES = {
    "0.1 + 0.2": "0.3",
    "3 × 19.99 − 15%": "50.9745",  # a percentage of what stands before it
    "200 + 10%": "220",
    "5% + 3% + 2%": "0.1",
    "100 / 5%": "2000",
    "80 + -2.5e1%": "60",
    "15% of 2,340": "351",
    "25 percent of 80": "20",
    "17 % 5": "2",
    "-17 mod 5": "3",
    "(10**199 + 6) mod 7": str((10**199 + 6) % 7),
    "-7 // 2": "-4",
    "1,234.56 * 2": "2469.12",
    "12,34,567 + 1": "1234568",
    "1’000 + 1\u202f000 + 1_000": "3000",
    "-2^2": "-4",
    "2**3**2": "512",
    "3² + 2³": "17",
    "3 x 4 · 2 ÷ 6": "4",
    "5! - 4!": "96",
    "√(16) + sqrt(2.25)": "5.5",
    "1 / 3 * 3": "1",
    "2 / 3": "0.666666666666666666666666666667 (rounded)",
    "1e-7": "0.0000001",
    "1.00375 ** 360": "3.84769804996350174350714826954 (rounded)",
    "round(2.5) + round(-2.5)": "0",
    "round(2.675, 2)": "2.68",
    "round(1 / 3 * 7.5)": "3",
    "floor(-2.5) + ceil(2.1)": "0",
    "max(1,234)": "234",  # in a function of several numbers a comma separates them
    "mean(1, 2, 6) + min(4, 2) + sum(1, 2) + abs(-1)": "9",
    "log(8, 2) + log10(1000) + ln(1) + log(1)": "6",
    "sin(pi) + cos(radians(60))": "0.5",
    "tan(radians(45)) + degrees(pi)": "181",
    "sin(1)^2 + cos(1)^2": "1 (rounded)",
    "10**-100": "1e-100",
    "e": "2.71828182845904523536028747135 (rounded)",
    "(1\n+ 2)": "3",
    "0 * -1": "0",
    "20.00 / 2 =": "10",
}
COMPARED = {
    **dict.fromkeys(["9.9 > 9.11", "0.1 + 0.2 = 0.3", "sqrt(2)**2 == 2", "3! ≥ 6"], "true"),
    **dict.fromkeys(["9.9 < 9.11", "1 ≠ 1", "3! <= 5", "10**199 + 1 = 10**199"], "false"),
}
TOO_LARGE = (
    "9**9**9 10**10**8 1e999999999 1e-999999999 factorial(10**9) 999! 10**199*100 10**-999"
    " 1.5**10**99 exp(999) 0**-1"
).split()
NO_VALUE = "1/0 0/0 1//0 1%(0) sqrt(-1) (-8)**(1/3) asin(2) log(2,1) min() mean()".split()
NO_VALUE += ["factorial(1/2)", "factorial(-1)"]
UNREADABLE = (  # Python, and what people might think of
    "__import__('os') a.b x True 1j 0x10 007 (1,2) [1] 1;2 1<<9 ~1 1|2 1<2<3 abs(x=1) abs(*1) f(1)"
    " lambda:1 (x:=1) {} 2(3) 0,5+1 1.234,56 1.2.3 € ½ ３ 5!! 1e + * ( ) max(1,2"
).split() + ["", "  ", "1 if 1 else 2", "1 and 2", "5 in 5", "1 000", "what is 2+2", "1 2", "\0"]
UNREADABLE += ["round(1,234.567, 2)", "round()", "sqrt(1, 2)"]
LONG = (
    "1+" * 499 + "1",
    "-" * 999 + "1",
    "(" * 499 + "1" + ")" * 499,
    "9" * LONGEST,
    "2**.5+" * 166 + "1",
    "ln(7)+" * 166 + "1",
    "2^" * 499 + "2",
    "1" + "%" * 999,
    "1.1" * 333 + "%",
    "1,111" * 200,
    "abs(" * 199 + "1" + ")" * 199,
    "5!+" * 333 + "1",
)


@pytest.mark.parametrize(("text", "value"), VALUES.items())
def test_it_calculates_what_people_write(text: str, value: str) -> None:
    assert calculate(text) == f"{text.rstrip('= ')} = {value}"


@pytest.mark.parametrize(("text", "holds"), COMPARED.items())
def test_it_compares(text: str, holds: str) -> None:
    assert calculate(text) == f"{text} is {holds}"


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (TOO_LARGE, f"too large or too small: numbers may have {DIGITS} digits"),
        (NO_VALUE, "it has no value, like 1 / 0 or the root of a negative number"),
        (["1" * (LONGEST + 1), "(" * 1_000_000], f"too long: an expression may have {LONGEST} "),
    ],
)
def test_what_has_no_value_ends_at_once_with_the_reason(texts: list[str], why: str) -> None:
    for text in texts:
        began = time.perf_counter()
        with pytest.raises(ValueError, match=re.escape(why)):
            calculate(text)
        assert time.perf_counter() - began < 0.5, text


@pytest.mark.parametrize("text", UNREADABLE)
def test_nothing_else_is_read_and_the_model_is_told_what_can_be(text: str) -> None:
    with pytest.raises(ValueError, match="cannot be read. Possible are numbers") as refused:
        calculate(text)

    assert str(refused.value).startswith(repr(text.strip())) and "sqrt" in str(refused.value)


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:9])
def test_the_longest_expressions_end_soon(text: str) -> None:
    began = time.perf_counter()

    with suppress(ValueError):
        calculate(text)

    assert time.perf_counter() - began < 2


NUMBERS = st.decimals(-(10**9), 10**9, places=3).map(str)
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@settings(deadline=None)
@given(NUMBERS, st.lists(st.tuples(st.sampled_from(sorted(SIGNS)), NUMBERS), max_size=6))
def test_sums_and_products_are_exact(first: str, others: list[tuple[str, str]]) -> None:
    text, exact = first, Fraction(first)
    for sign, number in others:
        text, exact = f"({text}) {sign} ({number})", SIGNS[sign](exact, Fraction(number))

    value, _, rounded = calculate(text).rpartition(" = ")[2].partition(" ")

    assert Fraction(value) == exact or (rounded and abs(Fraction(value) / exact - 1) < 1e-29)


@settings(deadline=None)
@given(st.text(max_size=40) | st.text("0123456789.,%!*/+-() ^²xe", max_size=40))
def test_any_text_is_calculated_or_refused(text: str) -> None:
    with suppress(ValueError):
        assert calculate(text)


async def called(**arguments: Any) -> str:
    calc = Calc()
    (tool,) = calc.tools
    return await calc.on_tool(tool["name"], arguments)


async def test_a_careless_model_is_understood_or_told_what_is_right() -> None:
    assert await called(expression="2+2") == "2+2 = 4"
    assert await called(expression=7, note="x") == "7 = 7"
    assert await called(input="2+2") == "2+2 = 4"

    for arguments in ({}, {"expression": None}, {"expression": ["1+1"]}, {"a": "1", "b": "2"}):
        with pytest.raises(ValueError, match="expression must be a text like"):
            await called(**arguments)


@pytest.mark.parametrize("path", PATHS)
async def test_the_model_is_told_what_it_asked_for(house: House, path: str) -> None:
    house.link("calc")
    asked = [("calculate", {"expression": text}) for text in ("0.1+0.2", "9**9**9")]
    rounds = calling(path, "", *asked, stream=False), whole(path, "It is 0.3.")
    house.ollama.says_in_turn(path, *rounds, stream=False)

    answer = await house.ask(path, "/calc what is it?", stream=False)

    assert said(answer.content) == "It is 0.3."
    sent = [request.body.decode() for request in house.ollama.asked]
    assert "calculate" in sent[0] and "radians" in sent[0]
    assert "0.1+0.2 = 0.3" in sent[1]
    assert "failed: ValueError: too large or too small: numbers may have 200 digits" in sent[1]
