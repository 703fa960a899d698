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


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Edit]]:
    """A clone, and the edits that were made in it: the tests below go on one after the other."""
    if "LIMIT +=" in text_of(HOME / "tests/test_size.py"):
        pytest.skip("somebody is in the exercises")
    tree = copied(tmp_path_factory.mktemp("learner"))
    run(COMMIT, tree)
    return tree, []


def follow(steps: str, tree: Path, made: list[Edit]) -> None:
    """Run the commands and make the edits of a part of the page; add those to what was made."""
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


def check(line: str, tree: Path) -> None:
    """Run a command; a comment behind it says what it prints, and whether it fails."""
    said = line.partition(" # ")[2]
    status, printed = run(line, tree)
    assert (status != 0) == ("failed" in said), f"{line}\n{printed}"
    assert not printed if said == "nothing" else claims.stands_in(said, printed), printed


def size(tree: Path) -> int:
    return sum(code_lines(text_of(file)) for part in CORE for file in tree.glob(part))


@pytest.mark.parametrize("exercise", EXERCISES, ids=["a new slice", "a slice that grows"])
def test_an_exercise_goes_in_as_the_page_says(
    learner: tuple[Path, list[Edit]], exercise: str
) -> None:
    tree, _ = learner
    before = size(tree)

    follow(exercise, *learner)

    assert size(tree) - before == sum(map(int, ADDED.findall(exercise)))


def test_and_all_of_it_goes_out_again(learner: tuple[Path, list[Edit]]) -> None:
    tree, edits = learner

    for file, old, new in reversed(edits):
        change(file, new, old)

    follow(BACK, tree, [])


FACTS: claims.Facts = {
    "{} exercises of half an hour": lambda: claims.word(len(EXERCISES)).capitalize(),
    "up to {} MiB of memory": lambda: MOST * LARGEST >> 20,
}


def test_what_the_page_says_is_true() -> None:
    claims.check("docs/add-a-slice.md", FACTS)
    assert BLOCK.findall(FIRST)[0][2] in claims.blocks_of("CONTRIBUTING.md")
