"""docs/break-it.md: each wrong move is made in a copy, and gives the message on the page."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from kernel.config import HOME
from tests.docs import claims
from tests.docs.claims import Facts, text_of, word
from tests.docs.copies import change, changes, copied, run
from tests.test_architecture import complaints

PAGE = text_of("docs/break-it.md")
MOVE = r"^## \d\. (.*?)\n.*?In\s`([^`]+)`:\n\n```diff\n(.*?)```\n\n<.*?```text\n(.*?)```"
MOVES = re.findall(MOVE, PAGE, re.DOTALL | re.MULTILINE)
FACTS: Facts = {"{} wrong moves": lambda: word(len(MOVES))}


def test_the_page_is_true() -> None:
    claims.check("docs/break-it.md", FACTS)


@pytest.mark.parametrize("move", MOVES, ids=[name for name, *_ in MOVES])
def test_a_wrong_move_gives_the_message_on_the_page(tmp_path: Path, move: list[str]) -> None:
    tree = copy_with(move, tmp_path)

    assert complaints(tree) == [" ".join(move[3].split())]


def test_the_command_prints_the_message_and_nothing_without_a_move(tmp_path: Path) -> None:
    (command,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    move = next(move for move in MOVES if move[0] == "A circle")  # which Python could refuse, too
    tree = copy_with(move, tmp_path)
    message = " ".join(move[3].split())

    assert message in " ".join(run(command, tree)[1].split())
    shutil.copy(HOME / move[1], tree / move[1])
    assert run(command, tree)[0] == 0


def copy_with(move: list[str], folder: Path) -> Path:
    tree = copied(folder)
    for old, new in changes(move[2]):
        change(tree / move[1], old, new)
    return tree
