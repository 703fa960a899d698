"""docs/add-a-slice.md: a learner's way, step by step as it stands, on a copy of the project."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kernel.config import HOME
from tests.docs import claims
from tests.docs.copies import change, changes, copied, run, text_of
from tests.exercises.test_embeddings_cache import LARGEST, MOST
from tests.test_size import CORE, code_lines

PAGE = claims.text_of("docs/add-a-slice.md")
FIRST, *EXERCISES, BACK = PAGE.split("\n## ")
BLOCK = re.compile(r"(?:`([\w./]+)`:\n\n)?^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ADDED = re.compile(r"^\+LIMIT \+= (\d+)", re.MULTILINE)
COMMIT = "git init -q && git add -A && git -c user.name=me -c user.email=me@here commit -qm all"
Edit = tuple[Path, str, str]  # a file, a text in it, and what takes its place


def follow(steps: str, tree: Path) -> list[Edit]:
    """Run the commands and make the edits of a part of the page; return the edits."""
    made: list[Edit] = []
    for name, kind, code in BLOCK.findall(steps):
        if kind == "sh":
            for line in code.splitlines():
                check(line, tree)
            continue
        file = tree / name
        old = text_of(file)
        whole = [(old, f"{old}\n\n{code}" if old else code)]  # a new file, or the end of one
        for before, after in changes(code) if kind == "diff" else whole:
            change(file, before, after)
            made.append((file, before, after))
    return made


def check(line: str, tree: Path) -> None:
    """Run a command; a comment behind it says what it prints, and whether it fails."""
    said = line.partition(" # ")[2]
    status, printed = run(line, tree)
    assert (status != 0) == ("failed" in said), f"{line}\n{printed}"
    assert not printed if said == "nothing" else claims.stands_in(said, printed), printed


def size(tree: Path) -> int:
    return sum(code_lines(text_of(file)) for part in CORE for file in tree.glob(part))


@pytest.mark.skipif("LIMIT +=" in text_of(HOME / "tests/test_size.py"), reason="in the exercises")
def test_the_exercises_go_in_as_the_page_says_and_out_again(tmp_path: Path) -> None:
    tree = copied(tmp_path)
    run(COMMIT, tree)

    edits = [edit for exercise in EXERCISES for edit in follow(exercise, tree)]
    assert size(tree) - size(HOME) == sum(map(int, ADDED.findall(PAGE)))
    for file, old, new in reversed(edits):
        change(file, new, old)
    follow(BACK, tree)


FACTS: claims.Facts = {
    "{} exercises of half an hour": lambda: claims.word(len(EXERCISES)).capitalize(),
    "up to {} MiB of memory": lambda: MOST * LARGEST >> 20,
}


def test_what_the_page_says_is_true() -> None:
    assert claims.wrong("docs/add-a-slice.md", FACTS) == []
    assert BLOCK.findall(FIRST)[0][2] in claims.blocks_of("CONTRIBUTING.md")
