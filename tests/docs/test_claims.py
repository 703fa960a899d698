"""Pages cannot lie: each is checked by a test of its own, with what `claims` can tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel.config import HOME
from tests.docs import claims

PAGES = {str(file.relative_to(HOME)) for name in ("*.md", "docs/*.md") for file in HOME.glob(name)}
OTHERS = {"README.md", "CHANGELOG.md", "docs/scale.md"}  # with tests of their own, or of the past


@pytest.mark.parametrize("page", sorted(PAGES - OTHERS))
def test_each_page_is_checked_by_a_test(page: str) -> None:
    tests = [file.read_text(encoding="utf-8") for file in HOME.glob("tests/docs/test_*.py")]

    assert any(f'claims.check("{page}"' in test for test in tests)


TEXT = """
# A page

Read `slices/chat.py`, `relay.forward` and `Chat.read`; type `/rag why?` or ask `GET /plugins`.
Set `server.port`; `tests/test_size.py::test_functions_are_short` counts. It has two parts.
"""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("", None),
        ("1. See `os.environ`, `on_error`, `@dataclass` and `async def`.", None),
        ("It says `hello`.\n\n```sh\nhello 12\n```", None),
        ("It has seven parts, and [more](../README.md).", None),
        ("See `slices/chats.py`.", "`slices/chats.py` is nowhere"),
        ("See `relay.forwards`.", "`relay.forwards` is nowhere"),
        ("See `server.ports`.", "`server.ports` is nowhere"),
        ("Type `/ragg why?`.", "`/ragg why?` is nowhere"),
        ("Ask `GET /plugin`.", "`GET /plugin` is nowhere"),
        ("Ask `POST /plugins`.", "`POST /plugins` is nowhere"),
        ("See `Guards` in `kernel/guards.py`.", None),
        ("See `Guards` in `kernel/relay.py`.", "kernel/relay.py has no Guards"),
        ("See `guards.Admit`.", "`guards.Admit` is nowhere"),
        ("Type `python osp.py --fast`.", "`python osp.py --fast` is nowhere"),
        ("See `tests/test_size.py::test_it`.", "`tests/test_size.py::test_it` is nowhere"),
        ("See [more](more.md).", "a dead link: more.md"),
        ("It takes 4.5 seconds.", "no fact has 4.5"),
        ("It takes eleven seconds.", "no fact has eleven"),
        ("It takes ninety seconds.", "no fact has ninety"),
        ("It has eight parts.", "no fact has eight"),
    ],
)
def test_what_a_page_cannot_know_is_noticed(tmp_path: Path, more: str, said: str | None) -> None:
    page = tmp_path / "page.md"
    page.write_text(TEXT + more, encoding="utf-8")
    (tmp_path.parent / "README.md").touch()
    facts = {"It has {} parts": lambda: "seven"} if "seven" in more else {}

    found = claims.wrong(str(page), facts)

    assert [each.partition(": ")[2].partition(": ...")[0] for each in found] == [said] * bool(said)
