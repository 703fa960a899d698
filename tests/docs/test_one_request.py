"""docs/one-request.md tells the truth: its chats are sent over sockets, and go this way."""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType

import pytest

from kernel.config import HOME
from tests.docs import claims
from tests.support import CHAT, House, done, line, running, turn

PAGE = claims.text_of("docs/one-request.md")
(COMMAND,) = re.findall(r"`(/rag .+)`", PAGE)
DRAWINGS = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
ITEM = r"^(?:(\d+)\.|-) `(.+)`, `(.+)`: (?:[^.]|\.\w)+\.\n"  # of a list; it has one sentence
STEPS = {f"{file} {name}": n or "•" for n, file, name in re.findall(ITEM, PAGE, re.MULTILINE)}
NAMES = {place.split()[1]: number for place, number in STEPS.items() if number != "•"}
LANES = {name: name for name in ("client", "kernel", "slices/chat.py", "plugins/rag_agent")}
LANES["Ollama"] = "tests/support.py FakeOllama.answer"
WIDTH, LINE = 18, str.maketrans(" │", "─┼")
LEFT_OUT = [number for name, number in NAMES.items() if name not in DRAWINGS[1].split()]
INSTEAD = [*STEPS.values()].count("•")
FACTS: claims.Facts = {
    "Left out are the steps {}.": lambda: ", ".join(LEFT_OUT),
    "{} functions run in their place": lambda: claims.word(INSTEAD).capitalize(),
}


@contextmanager
def recorded(entered: dict[str, None]) -> Iterator[None]:
    """Note file and name of each function that is entered, in any thread.

    It keeps the place of its first entry: coroutines are entered again whenever they go on.
    """

    def note(code: CodeType, _: int = 0) -> None:
        entered[f"{code.co_filename.removeprefix(f'{HOME}/')} {code.co_qualname}"] = None

    def call(frame: FrameType, *_: object) -> None:
        note(frame.f_code)

    with ExitStack() as undo:
        if sys.version_info >= (3, 12):
            tool, start = sys.monitoring.PROFILER_ID, sys.monitoring.events.PY_START
            sys.monitoring.use_tool_id(tool, "one request")
            undo.callback(sys.monitoring.free_tool_id, tool)
            sys.monitoring.register_callback(tool, start, note)
            sys.monitoring.set_events(tool, start)
            undo.callback(sys.monitoring.set_events, tool, 0)
        else:
            undo.callback(sys.settrace, sys.gettrace())
            undo.callback(threading.settrace, threading.gettrace())
            threading.settrace(call)
            sys.settrace(call)
        yield


async def sent(house: House, text: str) -> dict[str, None]:
    """Return what a chat enters in the proxy as it is shipped, in that order."""
    entered: dict[str, None] = {}
    house.ollama.answers(line("We "), house.ollama.pause, done())
    only = {"only": ["rag"]}
    with recorded(entered):
        async with running(house.url, HOME / "plugins", house.plugins, plugins=only) as client:
            entered.clear()
            async with client.stream("POST", CHAT, json=turn(text, stream=True)) as answer:
                async for _ in answer.aiter_lines():
                    entered["client"] = None
                    house.ollama.go.set()
    return entered.copy()  # a thread may go on


def drawing(entered: dict[str, None]) -> str:
    """Return the steps in their lanes; an arrow leads to each from where the request was."""
    rows, at = ["".join(f"{lane:{WIDTH}}" for lane in LANES).rstrip()], 0
    for place in (place for place in entered if place in {*STEPS, *LANES.values()}):
        to = WIDTH * [place.startswith(lane) for lane in LANES.values()].index(True)
        if place in STEPS:
            rows.append("│".ljust(WIDTH) * (len(LANES) - 1) + f"│  {place.split()[1]}")
        row, left = rows[-1], min(at, to) + 1
        right, start = max(at, to, left), to - (at < to)
        label = "►" * (at < to) + STEPS.get(place, "│") + "◄" * (at > to)
        row = row[:left] + row[left:right].translate(LINE) + row[right:]
        rows[-1] = row[:start] + label + row[start + len(label) :]
        at = at if place == "client" else to
    return "\n".join([*rows, ""])


@pytest.mark.parametrize("number", [0, 1])
async def test_a_chat_goes_the_way_that_is_drawn(
    house: House, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    caplog.set_level(logging.INFO, "kernel.log")

    drawn = drawing(await sent(house, [COMMAND, COMMAND.removeprefix("/rag ")][number]))

    assert drawn == DRAWINGS[number], f"it should show\n{drawn}"


def test_the_drawing_has_each_step_of_a_dozen() -> None:
    assert [row.split()[-1] for row in DRAWINGS[0].splitlines()[1:]] == [*NAMES]
    assert [*NAMES.values()] == [str(number) for number in range(1, 13)]


def test_what_it_names_exists() -> None:
    claims.check("docs/one-request.md", FACTS)
