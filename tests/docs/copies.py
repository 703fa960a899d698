"""Copies of the project, in which a test does what a page says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kernel.config import HOME
from tests.test_readme import LEFT_OUT


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(HOME, folder / "osp", ignore=LEFT_OUT))


def run(command: str, tree: Path) -> tuple[int, str]:
    """Run a command of a page; return its status, and what it printed."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    line = ["bash", "-c", command]
    done = subprocess.run(line, cwd=tree, env=env, capture_output=True, text=True, timeout=150)
    return done.returncode, done.stdout + done.stderr


def changes(diff: str) -> Iterator[tuple[str, str]]:
    """Yield a text of a file, and what takes its place, for each part of a diff."""
    for part in diff.split("@@\n"):
        lines = part.splitlines(keepends=True)
        before, after = ([n[1:] or n for n in lines if n[0] != sign] for sign in "+-")
        yield "".join(before), "".join(after)


def change(file: Path, old: str, new: str) -> None:
    """Put a text in the place of one that stands there once."""
    text = text_of(file)
    assert text.count(old) == 1, f"this no longer fits {file.name}:\n{old}"
    file.write_text(text.replace(old, new), encoding="utf-8")
    if not text_of(file):
        file.unlink()


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""
