"""docs/lesson.md: an hour has sixty minutes, and its commands are those that other tests run."""

from __future__ import annotations

import re

from kernel.config import HOME
from tests.docs import claims
from tests.test_readme import ASK, UV

PAGE = claims.text_of("docs/lesson.md")
HOURS = re.findall(r"^\| (\d+)–(\d+) ", PAGE, re.MULTILINE)
ALONE = ("commands", "editor", "rounds")  # modules of the kernel that only the chat slice imports


def forwarding() -> int:
    """Count the slices that send on what they do not read."""
    return sum("import Forward" in source for source in sources("slices/*.py"))


def sources(pattern: str) -> list[str]:
    return [file.read_text(encoding="utf-8") for file in HOME.glob(pattern)]


FACTS: claims.Facts = {
    "Questions 1 to 3": lambda: (),
    "the moves 1 and 2 before": lambda: (),
    "Questions 4 and 5": lambda: (),
    "Question 6": lambda: (),
    "Question 7": lambda: (),
    "questions 8 to {}": lambda: len(re.findall(r"^\d+\. \*\*.*\?\*\*", PAGE, re.MULTILINE)),
    "up to step 3": lambda: (),
    "Four protocols, one chat: is that one slice or four": lambda: (),
    "with four faces": lambda: (),
    "{} slices send on what they do not read": forwarding,
}


def test_what_it_says_holds() -> None:
    claims.check("docs/lesson.md", FACTS)
    assert [HOURS[0][0], *(end for _, end in HOURS)] == [*(begin for begin, _ in HOURS), "60"]


def test_its_commands_are_those_that_are_run() -> None:
    install, start, ask = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)

    assert install in claims.blocks_of("CONTRIBUTING.md")
    assert start.replace("OSP_PAGE_BODIES=true python", "uv run") == UV
    assert ask == ASK + ASK.replace("/rag:k=1 ", "")


def test_some_modules_serve_the_chat_slice_alone() -> None:
    others = [file for file in HOME.glob("slices/*.py") if file.stem != "chat"]
    text = "".join(
        [*sources("kernel/*.py"), *(file.read_text(encoding="utf-8") for file in others)]
    )

    assert not re.search(rf"kernel\.({'|'.join(ALONE)})\b", text)
