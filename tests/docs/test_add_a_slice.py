"""docs/add-a-slice.md: a learner's way, step by step as it stands, on a copy of the project."""

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
from tests.exercises.test_embeddings_cache import LARGEST, MOST
from tests.test_readme import LEFT_OUT
from tests.test_size import CORE, code_lines

PAGE = claims.text_of("docs/add-a-slice.md")
_, *EXERCISES, BACK = PAGE.split("\n## ")
BLOCK = re.compile(r"(?:`([\w./]+)`:\n\n)?^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ADDED = re.compile(r"^\+LIMIT \+= (\d+)", re.MULTILINE)
COMMIT = "git init -q && git add -A && git -c user.name=me -c user.email=me@here commit -qm all"
Edit = tuple[Path, str, str]  # a file, a text in it, and what takes its place


def follow(steps: str, tree: Path) -> list[Edit]:
    """Run the commands and make the edits of a part of the page; return the edits."""
    made = []
    for name, kind, code in BLOCK.findall(steps):
        for piece in code.splitlines() if kind == "sh" else code.split("@@\n"):
            if kind == "sh":
                run(piece, tree)
            else:
                made.append(edit(tree / name, kind, piece))
                change(*made[-1])
    return made


def run(line: str, tree: Path) -> None:
    """Run a command; a comment behind it says what it prints, and whether it fails."""
    said = line.partition(" # ")[2]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-c", line]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=150)
    assert (done.returncode != 0) == ("failed" in said), f"{line}\n{done.stdout}{done.stderr}"
    is_said = not done.stdout if said == "nothing" else claims.stands_in(said, done.stdout)
    assert is_said, f"{line}\n{done.stdout}"


def edit(file: Path, kind: str, code: str) -> Edit:
    """Return what a block does: it is a diff, a new file, or the new end of a file."""
    if kind == "diff":
        lines = code.splitlines(keepends=True)
        before, after = ([n[1:] or n for n in lines if n[0] != sign] for sign in "+-")
        return file, "".join(before), "".join(after)
    old = text_of(file)
    return file, old, f"{old}\n\n{code}" if old else code


def change(file: Path, old: str, new: str) -> None:
    text = text_of(file)
    assert text.count(old) == 1, f"this block no longer fits {file.name}:\n{old}"
    file.write_text(text.replace(old, new), encoding="utf-8")
    if not text_of(file):
        file.unlink()


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def size(tree: Path) -> int:
    return sum(code_lines(text_of(file)) for part in CORE for file in tree.glob(part))


@pytest.mark.skipif("LIMIT +=" in text_of(HOME / "tests/test_size.py"), reason="in the exercises")
@pytest.mark.parametrize("exercise", EXERCISES, ids=["a new slice", "a slice that grows"])
def test_an_exercise_goes_in_as_the_page_says_and_out_again(tmp_path: Path, exercise: str) -> None:
    tree = shutil.copytree(HOME, tmp_path / "osp", ignore=LEFT_OUT)
    run(COMMIT, tree)

    edits = follow(exercise, tree)
    assert size(tree) - size(HOME) == sum(map(int, ADDED.findall(exercise)))
    for file, old, new in reversed(edits):
        change(file, new, old)
    follow(BACK, tree)


FACTS: claims.Facts = {"up to {} MiB of memory": lambda: MOST * LARGEST >> 20}


def test_what_the_page_says_is_true() -> None:
    assert claims.wrong("docs/add-a-slice.md", FACTS) == []
