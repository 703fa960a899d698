"""docs/lesson.md: an hour has sixty minutes, and its commands are those that other tests run."""

from __future__ import annotations

import re

from kernel.config import HOME
from tests.docs import claims
from tests.test_readme import ASK, INSTALL, TEST

PAGE = claims.text_of("docs/lesson.md")


def forwarding() -> int:
    """Count the slices that send on what a client asks."""
    sources = [file.read_text(encoding="utf-8") for file in HOME.glob("slices/*.py")]
    return sum(1 for source in sources if re.search(r"\bForward\(|relay\.forward\(", source))


def questions() -> int:
    return len(re.findall(r"^\d+\. \*\*.*\?\*\*", PAGE, re.MULTILINE))


FACTS: claims.Facts = {
    "Questions 1 to 3": lambda: (),
    "Questions 4 and 5": lambda: (),
    "Questions 6 to {}": questions,
    "beside its four layers": lambda: (),
    "Four protocols, one chat: is that one slice or four": lambda: (),
    "with four faces": lambda: (),
    "{} slices send something on": forwarding,
    "It has {} lines of code": lambda: claims.lines("slices/chat.py"),
}


def test_what_it_says_holds() -> None:
    hours = re.findall(r"^\| (\d+)–(\d+) ", PAGE, re.MULTILINE)

    assert claims.wrong("docs/lesson.md", FACTS) == []
    assert [hours[0][0], *(end for _, end in hours)] == [*(begin for begin, _ in hours), "60"]


def test_its_commands_are_those_of_the_readme() -> None:
    install, start, ask = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)

    assert (install, ask) == (TEST, ASK)
    assert INSTALL.endswith(start)
