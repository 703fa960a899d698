"""docs/decisions.md: each has its cost, a number that holds, and a test that exists."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from pathlib import Path
from timeit import repeat
from typing import Any

import osp
from kernel.config import PluginsConfig
from kernel.guards import OPEN
from kernel.registry import PluginRegistry
from tests.docs import claims
from tests.docs.claims import lines, word
from tests.integration.test_presets import MOST as PRESET
from tests.slices.test_guards import UNSEEN
from tests.test_architecture import PROBES
from tests.test_install import GENERAL
from tests.test_recordings import RECORDINGS, chats, raw

PAGE = claims.text_of("docs/decisions.md")
COPY = 100  # microseconds


def cell(row: str, column: str) -> str:
    """Return what the README's table of costs says."""
    table = claims.text_of("README.md").partition("## What it costs")[2]
    rows = [[c.strip() for c in line.split("|")] for line in table.splitlines() if line[:1] == "|"]
    (found,) = [each for each in rows if each[1].startswith(row)]
    return found[rows[0].index(column)]


def rewritten(side: str) -> tuple[int, int]:
    """Return how many recorded JSON bodies there are, and how many differ when written again."""
    bodies = [raw(recording[side]["body"]) for recording in RECORDINGS.values()]
    differ = [again(body) != body.strip() for body in bodies if again(body) is not None]
    return len(differ), sum(differ)


def again(body: bytes) -> bytes | None:
    """Return JSON as starlette.responses.JSONResponse writes it, None for what is no JSON."""
    try:
        value: Any = json.loads(body)
    except ValueError:
        return None
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def of_slices() -> int:
    """Return how many lines of `create_app` name a slice."""
    names = re.compile(rf"\b({'|'.join(PROBES)})\.[a-zA-Z]")
    return sum(1 for line in inspect.getsource(osp.create_app).splitlines() if names.search(line))


def dependencies() -> int:
    return len(tomllib.loads(claims.text_of("pyproject.toml"))["project"]["dependencies"])


DIALECTS = [f"kernel/dialects/{name}.py" for name in ("completions", "messages", "responses")]
FACTS: claims.Facts = {
    "{} decisions": lambda: word(PAGE.count("\n**It costs**")).capitalize(),
    "of {} requests in JSON that were recorded, {} would": lambda: rewritten("request"),
    "so would {1} of {0} answers": lambda: rewritten("answer"),
    "`kernel/dialects/completions.py` has {} lines of code, `kernel/dialects/messages.py` {} and"
    " `kernel/dialects/responses.py` {}": lambda: tuple(map(lines, DIALECTS)),
    "`slices/chat.py` has {}, once and not four times": lambda: lines("slices/chat.py"),
    "in {} dialects": lambda: word(len({d.path for _, d, _, _ in chats()})),
    "All {} recorded chats": lambda: len(list(chats())),
    "less than {} microseconds": lambda: COPY,
    "It costs** {} lines of code in `kernel/connection.py` and `kernel/client.py`": lambda: lines(
        "kernel/connection.py", "kernel/client.py"
    ),
    "{} requests a second pass through": lambda: cell("requests a second", "OSP"),
    "and {} through the forwarder": lambda: cell("requests a second", "naive"),
    "nginx does {}": lambda: cell("requests a second", "nginx"),
    "{} endpoints are open": lambda: len(OPEN),
    "{} paths are tried": lambda: len(UNSEEN),
    "{} milliseconds from the start": lambda: cell("milliseconds from start", "OSP"),
    "`kernel/reload.py` has {} lines": lambda: lines("kernel/reload.py"),
    "less than {:,} bytes": lambda: PRESET,
    "{} lines of code in `kernel/store.py`, `kernel/sqlite.py` and `kernel/postgres.py`": (
        lambda: lines("kernel/store.py", "kernel/sqlite.py", "kernel/postgres.py")
    ),
    "the proxy needs {} packages": dependencies,
    "`create_app` has {} lines": lambda: len(inspect.getsource(osp.create_app).splitlines()),
    "{} of them name a slice, and there are {} slices": lambda: (of_slices(), word(len(PROBES))),
    "{} names of ours": lambda: len(GENERAL.split()),
}


def test_what_it_says_holds() -> None:
    claims.check("docs/decisions.md", FACTS)


def test_each_decision_has_its_cost_its_number_and_its_test() -> None:
    for section in re.split(r"^## \d+\. ", PAGE, flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n## How")[0].partition("\n")

        _, cost, rest = re.split(r"\*\*(?:It costs|Measured:|Held by)\*\*", text, maxsplit=2)
        number, held = rest.partition("**Held by**")[::2]
        assert cost and re.search(r"\d|none", number) and "`tests/" in held, title
        assert 80 <= len(text.split()) <= 200, f"{title}: {len(text.split())} words"


async def test_an_instance_for_each_request_is_a_matter_of_microseconds(tmp_path: Path) -> None:
    async with PluginRegistry(PluginsConfig(), {}, tmp_path, {}) as registry:
        agents = [plugin for plugin in registry.plugins.values() if plugin.agent]
        context: Any = None

        for plugin in agents:
            seconds = repeat(lambda: plugin.instance(context, {}), number=100, repeat=20)  # noqa: B023
            assert min(seconds) / 100 < COPY / 1e6, plugin.name
        assert len(agents) > 5
