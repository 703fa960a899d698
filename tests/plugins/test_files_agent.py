"""The agent files: what lies in the folders is listed, read and found; nothing else is opened."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel.agent import Reply
from plugins.files_agent import agent as limits
from plugins.files_agent.agent import Files
from plugins.files_agent.folders import LARGEST
from tests.plugins.context import a_context
from tests.support import PATHS, House, calling, message, said, whole

FOLDER = Path(__file__).parents[2] / "plugins/files_agent"
CONFIG = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
SECRET = "the secret outside"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder with notes, beside files that nobody may read."""
    folder = tmp_path / "notes"
    (folder / "garden").mkdir(parents=True)
    (folder / "todo.md").write_text("buy paint\nsell the bike\n", encoding="utf-8")
    (folder / "garden/barrels.md").write_text("two Rain Barrels\n300 litres", encoding="utf-8")
    (folder / ".env").write_text(SECRET, encoding="utf-8")
    (tmp_path / "secret.txt").write_text(SECRET, encoding="utf-8")
    (tmp_path / "notes2").mkdir()
    (tmp_path / "notes2/secret.txt").write_text(SECRET, encoding="utf-8")
    return folder


def loaded(*folders: Path, **settings: Any) -> Files:
    files = Files()
    named = {"folders": {folder.name: str(folder) for folder in folders}}
    files.settings = CONFIG["settings"] | named | settings
    files.setup()
    return files


@pytest.fixture
def files(notes: Path) -> Files:
    return loaded(notes)


def call(files: Files, name: str, /, **arguments: Any) -> str:
    """Return the result of a tool, or the error as the model is told it."""
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    try:
        return files.on_tool(name, arguments)
    except Exception as exc:
        return f"failed: {type(exc).__name__}: {exc}"
    finally:
        assert not before or len(os.listdir("/proc/self/fd")) == before, "a file is left open"


def test_the_tools_are_offered_with_the_names_of_the_folders(files: Files, notes: Path) -> None:
    assert [tool["name"] for tool in files.tools] == ["list", "read", "search"]
    assert files.tools[1]["parameters"]["properties"]["path"]["description"] == "begins with notes"
    assert files.progress == "notes" and str(notes) not in json.dumps(files.tools)


def test_folders_are_listed(files: Files, notes: Path) -> None:
    (notes / "link.md").symlink_to("todo.md")

    assert call(files, "list") == "1 there:\nnotes/"
    assert call(files, "list", path="notes") == "2 there:\ngarden/\ntodo.md"
    assert call(files, "list", path="/notes/./garden/") == "1 there:\nbarrels.md"
    assert call(files, "list", path="garden") == "1 there:\nbarrels.md"  # there is one folder only
    assert call(files, "list", path="notes/todo.md").endswith("it is a file, not a folder")


def test_files_are_read(files: Files) -> None:
    text = "Lines 1 to 3 of 3:\nbuy paint\nsell the bike\n"

    assert call(files, "read", path="notes/todo.md") == text
    assert call(files, "read", path="todo.md", line="2") == "Lines 2 to 3 of 3:\nsell the bike\n"
    assert call(files, "read", path="todo.md", line=None, more=1) == text


def test_a_long_file_is_read_in_pieces(notes: Path) -> None:
    files = loaded(notes, max_chars=100)
    lines = [f"line {number} {'x' * number}" for number in range(50)] + ["y" * 500, "end"]
    (notes / "long.txt").write_text("\n".join(lines), encoding="utf-8")
    seen, at = set(), "1"

    while at:
        head, _, text = call(files, "read", path="long.txt", line=at).partition("\n")
        seen |= {*text.split("\n")}
        assert len(text) <= 100
        at = head.partition("line=")[2].rstrip(":")

    assert {*lines} - seen == {"y" * 500} and "y" * 100 in seen


def test_lines_and_names_with_all_words_are_found(files: Files) -> None:
    line = "notes/garden/barrels.md:1: two Rain Barrels"

    assert call(files, "search", text="RAIN barrel") == f"1 found:\n{line}"
    assert call(files, "search", text="barrels") == f"2 found:\nnotes/garden/barrels.md\n{line}"
    assert call(files, "search", text="bike", path="notes/garden") == "0 found:"
    assert call(files, "search", text="300", path="notes/garden/barrels.md").startswith("1 found")
    assert call(files, "search", text="((a+)+)+$ .*") == "0 found:"  # no pattern
    assert call(files, "search", text="x", path="gone").startswith("failed: FileNotFoundError")


OUTSIDE = [
    *("..", "../secret.txt", "notes/../secret.txt", "notes/garden/../../secret.txt", "notes/.."),
    *("/etc/passwd", "//etc/passwd", "~/secret.txt", "notes//../secret.txt"),
    "../notes2/secret.txt",
    *("{parent}/secret.txt", "notes/{parent}/secret.txt", "file://{parent}/secret.txt", "notes2"),
    *("notes/link", "notes/folder/secret.txt", "notes/garden/up/secret.txt", "notes/loop/loop"),
    *(".env", "notes/.env", "notes/./.env", "notes/.git/config", "notes/\u200b.env", "notes/.env/"),
    *("notes/todo.md\0.png", "\0", "notes/..\\secret.txt", "..\\secret.txt", "C:\\secret.txt"),
    *("\\\\host\\share\\secret.txt", "notes/CON", "notes/todo.md::$DATA", "notes/todo.md/../.env"),
    *("notes/%2e%2e/secret.txt", "notes/．．/secret.txt", "notes/\ud800", "notes/" + "a/" * 5000),
    *("notes/" + "b" * 100_000, "notes/fifo", "notes/socket", "notes/todo.md/x", "/dev/zero"),
]

INSIDE = ("notes2", "notes/fifo", "notes/CON", "notes/todo.md::$DATA")  # some tool may use it


@pytest.fixture
def traps(notes: Path) -> Iterator[None]:
    """Links that lead out of the folder, and files that are none."""
    (notes / "link").symlink_to(notes.parent / "secret.txt")
    (notes / "folder").symlink_to(notes.parent)
    (notes / "garden/up").symlink_to("../..")
    (notes / "loop").symlink_to("loop")
    (notes / ".git").mkdir()
    (notes / ".git/config").write_text(SECRET, encoding="utf-8")
    os.mkfifo(notes / "fifo")
    here = os.getcwd()
    os.chdir(notes)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        os.chdir(here)
        yield


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: ascii(path)[:30])
def test_no_path_leads_out(traps: None, files: Files, notes: Path, path: str) -> None:
    path = path.format(parent=notes.parent) if "{" in path else path
    other = loaded(notes, notes.parent / "notes2", write=True)

    for agent, tool in ((files, "read"), (files, "search"), (other, "write"), (other, "list")):
        told = call(agent, tool, path=path, text="secret", content="mine")
        assert SECRET not in told and str(notes.parent) not in told.replace(path, "")
        assert len(told) < 2000
        assert told.startswith("failed: ") or path in INSIDE

    assert {file.name for file in notes.parent.iterdir()} == {"notes", "notes2", "secret.txt"}
    assert [file.name for file in (notes.parent / "notes2").iterdir()] == ["secret.txt"]
    assert (notes.parent / "secret.txt").read_text(encoding="utf-8") == SECRET


def test_the_model_is_told_what_is_there_and_not_where(traps: None, files: Files) -> None:
    assert call(files, "read", path="notes/plan.md") == (
        "failed: FileNotFoundError: 'plan.md': No such file or directory;"
        " in notes is: garden/, todo.md"
    )
    assert "it begins with notes" in call(files, "read")
    assert "it is a folder: list it" in call(files, "read", path="garden")
    assert call(files, "list") == "1 there:\nnotes/"
    assert call(files, "list", path="notes") == "2 there:\ngarden/\ntodo.md"
    assert call(files, "search", text="secret") == "0 found:"


def test_a_folder_that_is_gone_is_told_without_its_path(files: Files, notes: Path) -> None:
    notes.rename(notes.parent / "moved")

    for tool in ("list", "read", "search"):
        told = call(files, tool, path="notes/todo.md", text="x")
        assert told == "failed: OSError: No such file or directory"


@given(path=st.text("./\\~nots2.e\0v\u200b:", max_size=30) | st.text(max_size=20))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_path_says_nothing_outside_is_read(traps: None, files: Files, path: str) -> None:
    for tool in ("list", "read", "search"):
        told = call(files, tool, path=path, text="secret")
        assert SECRET not in told and "notes2/" not in told


def test_what_becomes_a_link_after_it_was_listed_leads_nowhere(files: Files, notes: Path) -> None:
    (notes / "secret.txt").write_text("mine", encoding="utf-8")
    steps = files.folders.walk(("notes",))

    assert next(steps)[0] == "notes"  # and what is in it is known by now
    for name, target in (("garden", notes.parent), ("secret.txt", notes.parent / "secret.txt")):
        (notes / name).rename(notes.parent / f"{name}.moved")
        (notes / name).symlink_to(target)

    assert dict(steps) == {
        "notes/garden": "",
        "notes/secret.txt": "",
        "notes/todo.md": "buy paint\nsell the bike\n",
    }


def test_what_is_moved_after_it_was_opened_is_still_the_same(files: Files, notes: Path) -> None:
    with files.folders.opened(("notes", "garden")) as garden:
        (notes / "garden").rename(notes / "old")
        (notes / "garden").symlink_to(notes.parent)

        assert files.folders.names(garden) == ["barrels.md"]


def test_hidden_files_are_shown_where_the_operator_says_so(notes: Path) -> None:
    files = loaded(notes, hidden=True)

    assert ".env" in call(files, "list", path="notes").splitlines()
    assert SECRET in call(files, "read", path="notes/.env")
    assert call(files, "read", path="notes/../secret.txt").startswith("failed: ")


BINARY = bytes(range(256)) * 9
ENCODED = {
    "utf-8": ("Käse ☕".encode(), "Käse ☕"),
    "utf-8-sig": ("Käse".encode("utf-8-sig"), "Käse"),
    "utf-16": ("Käse ☕".encode("utf-16"), "Käse ☕"),
    "cp1252": ("Käse für 3 €".encode("cp1252"), "Käse für 3 €"),
    "empty": (b"", ""),
}


@pytest.mark.parametrize(("data", "text"), ENCODED.values(), ids=ENCODED)
def test_text_is_read_however_it_is_encoded(
    files: Files, notes: Path, data: bytes, text: str
) -> None:
    (notes / "cheese.txt").write_bytes(data)

    head, _, told = call(files, "read", path="cheese.txt").partition("\n")

    assert told == text
    assert ("Windows-1252" in head) == ("für" in text)


def test_what_is_no_text_or_too_large_is_not_read(files: Files, notes: Path) -> None:
    (notes / "photo.jpg").write_bytes(BINARY)
    with (notes / "sparse.log").open("wb") as file:
        file.truncate(10**12)

    assert call(files, "read", path="photo.jpg") == "failed: ValueError: it is no text"
    assert f"more than {LARGEST} bytes" in call(files, "read", path="sparse.log")
    assert call(files, "search", text="photo").startswith("1 found:\nnotes/photo.jpg")


def test_results_are_bounded(notes: Path) -> None:
    files = loaded(notes, max_chars=3000)
    for number in range(300):
        (notes / f"garden/{number:03}.txt").write_text("bean " * 9999, encoding="utf-8")

    listed = call(files, "list", path="garden").splitlines()
    found = call(files, "search", text="bean").splitlines()

    assert listed[0] == "301 there, the first 100:" and len(listed) == 101
    assert found[0].startswith("Some of what there is; with more words there is less, the first")
    assert all(len(line) < 250 for line in found) and len("\n".join(found)) <= 3000
    assert len(call(files, "read", path="garden/7")) < 800  # no such file, and what is there
    (notes / "one.txt").write_text("x" * 1_999_000 + " needle", encoding="utf-8")
    assert call(files, "search", text="needle").splitlines()[1].endswith("x needle")


def test_a_search_ends_in_time(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0)
    (notes / "aaa.md").write_text("bike", encoding="utf-8")

    assert call(loaded(notes), "search", text="bike") == (
        "Some of what there is; with more words there is less:"
    )


def test_a_deep_tree_and_hard_words_are_searched_soon(files: Files, notes: Path) -> None:
    at = notes
    for _ in range(300):
        at /= "d"
        at.mkdir()
    (at / "deep.txt").write_text("treasure", encoding="utf-8")
    (notes / "hard.txt").write_text("a" * 1_900_000, encoding="utf-8")
    began = time.perf_counter()

    assert "d/deep.txt:1: treasure" in call(files, "search", text="treasure")
    assert call(files, "search", text=" ".join(["a" * 900 + "b"] * 100)) == "0 found:"
    assert time.perf_counter() - began < 10


# Writing


def test_nothing_is_written_unless_the_operator_switched_it_on(files: Files, notes: Path) -> None:
    told = call(files, "write", path="notes/new.md", content="x")

    assert told == "failed: ValueError: there is no tool 'write'"
    assert not (notes / "new.md").exists()


def test_a_file_is_written_whole_with_consent(notes: Path) -> None:
    files = loaded(notes, write=True)
    (notes / "todo.md").chmod(0o640)

    assert files.tools[-1]["name"] == "write" and files.tools[-1]["consent"] is True
    assert call(files, "write", path="notes/garden/new.md", content="Käse") == (
        "notes/garden/new.md: created, 5 bytes written"
    )
    assert call(files, "write", path="notes/todo.md", content="") == (
        "notes/todo.md: replaced, it had 24 bytes, 0 bytes written"
    )

    assert (notes / "garden/new.md").read_text(encoding="utf-8") == "Käse"
    assert (notes / "todo.md").read_bytes() == b""
    assert (notes / "todo.md").stat().st_mode & 0o777 == 0o640
    assert {file.name for file in notes.iterdir()} == {"garden", "todo.md", ".env"}


@pytest.mark.parametrize(
    ("path", "content", "why"),
    [
        ("notes/new/x.md", "x", "'new': No such file or directory; in notes is: garden/, todo.md"),
        ("notes/garden", "x", "it is no file, and is not replaced"),
        ("notes/link", "x", "it is no file, and is not replaced"),
        ("notes/fifo", "x", "it is no file, and is not replaced"),
        ("notes", "x", "this is no name for a file"),
        ("", "x", "this is no name for a file"),
        ("notes/.env", "x", "this is no name for a file"),
        ("notes/a\nb", "x", "this is no name for a file"),
        ("notes/todo.md/x", "x", "Not a directory"),
        ("notes/" + "n" * 300, "x", "File name too long"),
        ("notes/x.md", None, "content must be a text"),
        ("notes/x.md", {"a": 1}, "content must be a text"),
        ("notes/x.md", "\ud800", "surrogates not allowed"),
        ("notes/x.md", "x" * (LARGEST + 1), f"more than {LARGEST} bytes"),
    ],
)
def test_what_cannot_be_written_leaves_nothing_behind(
    traps: None, notes: Path, path: str, content: Any, why: str
) -> None:
    before = {*notes.parent.rglob("*")}

    told = call(loaded(notes, write=True), "write", path=path, content=content)

    assert told.startswith("failed: ") and why in told and str(notes) not in told
    assert {*notes.parent.rglob("*")} == before


# Settings


async def test_without_folders_it_says_how_to_name_them() -> None:
    files = loaded()
    files.context = a_context("what?")

    with pytest.raises(Reply) as reply:
        await files.on_request({"messages": []})

    assert "[agents.files.settings.folders]" in str(reply.value.text)
    assert files.tools == [] and "there is no tool" in call(files, "list")


async def test_a_chat_is_left_as_it_is(files: Files) -> None:
    for agent, asked in ((files, True), (loaded(), False)):
        agent.context = a_context("what?", asked=asked)
        assert await agent.on_request({"messages": []}) == {"messages": []}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"write": "false"}, "settings: write: 'false' is wrong, False would be right"),
        ({"max_chars": "9"}, "settings: max_chars: '9' is wrong, 8000 would be"),
        ({"folders": "~/notes"}, "settings: folders: '~/notes' is wrong, {'notes': '~/notes'}"),
        ({"folders": {"x": "notes"}}, "an existing folder"),
        ({"folders": {"x": "/gone/away"}}, "an existing folder"),
        ({"folders": {"a/b": "/"}}, "an existing folder"),
        ({"folders": {"..": "/"}}, "an existing folder"),
    ],
)
def test_wrong_settings_are_said_at_the_start(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        loaded(**wrong)


# Through the proxy


@pytest.mark.parametrize("path", PATHS)
async def test_a_file_is_read_at_once_and_written_after_a_yes(
    house: House, notes: Path, path: str
) -> None:
    house.link("files")
    table = {"settings": {"folders": {"notes": str(notes)}, "write": True}}
    read = ("read", {"path": "notes/todo.md"})
    write = ("write", {"path": "notes/todo.md", "content": "rest"})
    rounds = (calling(path, "", call, stream=False) for call in (read, write))
    house.ollama.says_in_turn(path, *rounds, whole(path, "Done."), stream=False)

    async with house.open(agents={"files": table}) as client:
        first = await house.post(client, path, "/files do it", stream=False)
        assert (notes / "todo.md").read_text(encoding="utf-8").startswith("buy paint")
        history = "/files do it", message("assistant", said(first.content)), "/yes"
        second = await house.post(client, path, *history, stream=False)

    assert "files write" in said(first.content) and said(second.content) == "Done."
    assert "buy paint" in house.ollama.asked[1].body.decode()
    assert "replaced, it had 24 bytes, 4 bytes written" in house.ollama.asked[-1].body.decode()
    assert (notes / "todo.md").read_text(encoding="utf-8") == "rest"
