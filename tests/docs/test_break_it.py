"""docs/break-it.md: each wrong move is made in a copy, and gives the message on the page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernel.config import HOME
from tests.docs import claims
from tests.docs.claims import Facts, text_of, word
from tests.test_architecture import complaints
from tests.test_readme import LEFT_OUT

PAGE = text_of("docs/break-it.md")
MOVE = r"^## \d\. (.*?)\n.*?In\s`([^`]+)`:\n\n```diff\n(.*?)```\n\n```text\n(.*?)```"
MOVES = re.findall(MOVE, PAGE, re.DOTALL | re.MULTILINE)
FACTS: Facts = {"{} wrong moves": lambda: word(len(MOVES))}


def test_the_page_is_true() -> None:
    assert claims.wrong("docs/break-it.md", FACTS) == []


@pytest.mark.parametrize("move", MOVES, ids=[name for name, *_ in MOVES])
def test_a_wrong_move_gives_the_message_on_the_page(tmp_path: Path, move: list[str]) -> None:
    tree = copy_with(move, tmp_path)

    assert complaints(tree) == [" ".join(move[3].split())]


def test_the_command_prints_the_message_and_nothing_without_a_move(tmp_path: Path) -> None:
    (command,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    move = next(move for move in MOVES if move[0] == "A circle")  # which Python could refuse, too
    tree = copy_with(move, tmp_path)

    def said() -> str:
        run = subprocess.run(command, shell=True, cwd=tree, env=env, capture_output=True, text=True)
        return " ".join(run.stdout.split())

    message = " ".join(move[3].split())
    assert message in said()
    shutil.copy(HOME / move[1], tree / move[1])
    assert message not in said() and " passed" in said()


def copy_with(move: list[str], folder: Path) -> Path:
    """Copy the project, and apply a diff: what it shows or takes away stands there, once."""
    tree = shutil.copytree(HOME, folder / "osp", ignore=LEFT_OUT)
    code = (tree / move[1]).read_text(encoding="utf-8")
    for part in move[2].split("@@\n"):
        lines = part.splitlines(keepends=True)
        old, new = ("".join(n[1:] for n in lines if n[0] in signs) for signs in (" -", " +"))
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    (tree / move[1]).write_text(code, encoding="utf-8")
    return tree
