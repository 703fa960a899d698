"""examples/: each is listed in the README, and says what it is for, what to type, how it ends."""

from __future__ import annotations

import re

from kernel.config import HOME

READMES = {file.parent: file.read_text() for file in (HOME / "examples").glob("*/README.md")}
PROJECT = (HOME / "README.md").read_text()


def test_each_example_stands_in_the_readme_of_the_project() -> None:
    names = {folder.name for folder in READMES}

    assert len(names) >= 6
    assert {name for name in names if f"(examples/{name})" not in PROJECT} == set()


def test_each_file_that_a_readme_names_is_there() -> None:
    for folder, text in READMES.items():
        for link in re.findall(r"\]\(([^:)]+)\)", text):
            assert (folder / link).exists(), f"{folder.name}: {link}"


def test_each_readme_is_short_and_says_how_to_remove_it() -> None:
    for folder, text in READMES.items():
        assert len(text.splitlines()) <= 50, folder.name
        assert re.search("[Rr]emove|down --volumes", text), folder.name
