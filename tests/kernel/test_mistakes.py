"""Mistakes of an agent's author: the log names each, and says what mends it.

One proxy has an agent for each mistake of the tables below.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import PATHS, SENT, running, said, turn, write_agent

AGENT = "from kernel.agent import BaseAgent\n"
ASKS = "self.context.chat([{'role': 'user', 'content': 'x'}])"
Fields = dict[str, Any]


def write(plugins: Path, name: str, code: str) -> None:
    """Write an agent that has nothing imported but what its code imports, with helpers."""
    folder = write_agent(plugins, name, "")
    (folder / "agent.py").write_text(code, encoding="utf-8")
    (folder / "helper.py").write_text(AGENT + "X = 1\nclass Far(BaseAgent):\n    pass\n")
    (folder / "parts").mkdir()
    (folder / "parts" / "__init__.py").write_text("X = 1\n")


def hook(line: str, name: str = "on_request", head: str = AGENT) -> str:
    """Return an agent whose hook is one line, the fourth of agent.py."""
    return f"{head}class It(BaseAgent):\n    async def {name}(self, given):\n        {line}\n"


CONTRACT = ["BaseAgent", "Reply", "Abort", "Context", "add_context", "Payload", "Message"]
# What stands in the way of loading: the code, the type of its error, and the cure
LOADS = [
    *((f"X = {n}", "NameError", f"`from kernel.agent import {n}`") for n in CONTRACT),
    (AGENT + "X = json.loads('1')", "NameError", "is `import json` missing?"),
    (AGENT + "import nowhere", "ModuleNotFoundError", "-m pip install nowhere"),
    (AGENT + "import nowhere.deep", "ModuleNotFoundError", "-m pip install nowhere"),
    (AGENT + "import sklearn", "ModuleNotFoundError", "-m pip install scikit-learn"),
    (AGENT + "from helper import X", "ModuleNotFoundError", "from .helper import"),
    (AGENT + "import helper", "ModuleNotFoundError", "with a dot: from .helper"),
    (AGENT + "from parts.deep import X", "ModuleNotFoundError", "from .parts import"),
    (AGENT + "class It(BaseAgent):\n    def __init__(self, k):\n        pass",
     "TypeError", "without arguments"),
    ("from .helper import Far", "PluginLoadError", "must define one subclass of BaseAgent"),
    ("class It:\n    pass", "PluginLoadError", "one subclass of BaseAgent; found: none"),
]  # fmt: skip

# Errors that look like one of these mistakes and are none: the code, and what is no cure
OTHERS = [
    *((f"{AGENT}X = {name}", "kernel.agent") for name in ("Path", "Any", "dataclass")),
    (AGENT + "raise ModuleNotFoundError('get sqlite-vec')\n", "with a dot"),
    (AGENT + "from .helper import NOPE\n", "pip install"),
    (AGENT + "from .helpr import X", "pip install"),
    (AGENT + "from .parts.dep import X", "pip install"),
]

# What goes wrong while a hook runs: the code, the mistake and the cure
RUNS = [
    (hook("pass"), "returned NoneType, but on_request must return", "`return` missing?"),
    (hook("return 'x'"), "returned str, but on_request must return", "the payload"),
    (hook("return self.setup()"), "returned coroutine", "`await` missing?"),
    (hook(f"given['messages'][0]['content'] = {ASKS}; return given"), "coroutine", "`await`"),
    (hook("pass", "on_response"), "a response hook must return text", "`return` missing?"),
    (hook(f"return {ASKS}", "on_response"), "returned coroutine", "`await` missing?"),
    (hook("return json.loads('{}')"), "NameError", "`import json`"),
    (hook("raise Reply('x')"), "NameError", "`from kernel.agent import Reply`"),
    (hook("import helper"), "ModuleNotFoundError", "from .helper import"),
    (hook("import nowhere"), "ModuleNotFoundError", "-m pip install nowhere"),
    (hook("raise Abort(200, 'ok')", head=AGENT[:-1] + ", Abort\n"), "200 is no", "400 to 599"),
    (hook("given['messages'] = []; return given"), "without a list of messages", ""),
    (
        hook("given['messages'].append('x'); return given"),
        "cannot be sent: a message",
        "be an object",
    ),
    (hook("given['messages'][0]['content'] = 5; return given"), "content", ""),
    (hook("given['x'] = {1, 2}; return given"), "returned what cannot be sent", "set"),
    (hook("del given['model']; return given"), "model", ""),
]
# What would write the prompt into the log
LEAKS = [
    "int(given['messages'][0]['content'])",
    "{}[given['messages'][0]['content']]",
    "raise ExceptionGroup(str(given), [ValueError(given)])",
    "__import__(given['messages'][0]['content'])",
    "__import__('helper.' + given['messages'][0]['content'])",
    "exec(given['messages'][0]['content'])",
    "compile('(', given['messages'][0]['content'], 'exec')",
    "raise NameError(str(given), name=str(given))",
    "raise type('E', (Exception,), {})(given)",
]


class Kept(logging.Handler):
    """Keeps the log of what is longer than one test."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def find(self, event: str, name: str) -> Fields:
        """Return the fields of the only such line on an agent."""
        found = [r.__dict__["fields"] for r in self.records if r.getMessage() == event]
        (fields,) = [fields for fields in found if fields["agent"] == name]
        return dict(fields)


@pytest.fixture(scope="module")
async def house(
    demo_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[httpx.AsyncClient, Kept]]:
    plugins = tmp_path_factory.mktemp("mistakes") / "plugins"
    codes = {"load": [load[0] for load in LOADS], "other": [other[0] for other in OTHERS]}
    codes |= {"run": [run[0] for run in RUNS], "leak": [hook(line) for line in LEAKS]}
    for kind, each in codes.items():
        for number, code in enumerate(each):
            write(plugins, f"{kind}{number}", code)
    handler = Kept()
    logging.getLogger("kernel").addHandler(handler)
    async with running(demo_url, plugins) as client:
        yield client, handler
    logging.getLogger("kernel").removeHandler(handler)


@pytest.mark.parametrize("number", range(len(LOADS)))
async def test_what_stands_in_the_way_of_loading_is_named_with_its_cure(
    house: tuple[httpx.AsyncClient, Kept], number: int
) -> None:
    _, kind, cure = LOADS[number]

    fields = house[1].find("agent failed to load", f"load{number}")

    assert fields["error"].startswith(f"{kind}: ") and cure in fields["error"]


@pytest.mark.parametrize("number", range(len(OTHERS)))
async def test_an_error_of_another_kind_gets_no_wrong_cure(
    house: tuple[httpx.AsyncClient, Kept], number: int
) -> None:
    fields = house[1].find("agent failed to load", f"other{number}")

    assert OTHERS[number][1] not in fields["error"]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("number", range(len(RUNS)))
async def test_what_goes_wrong_in_a_hook_is_named_with_its_cure_and_harms_nobody(
    house: tuple[httpx.AsyncClient, Kept], number: int
) -> None:
    (client, log), (_, mistake, cure), name = house, RUNS[number], f"run{number}"

    answer = await client.post(PATHS[number % 2], json=turn(f"/{name} x"))

    notice = f"\n\n[without {name}: it failed, the proxy's log says why]"
    assert said(answer.content) == f"{SENT}[user] x{notice}"
    fields = log.find("agent failed", name)
    assert mistake in fields["error"] and cure in fields["error"].partition(mistake)[2]
    if "Error" in mistake:
        assert fields["where"].endswith(f"/{name}_agent/agent.py:4")


@pytest.mark.parametrize("number", range(len(LEAKS)))
async def test_no_error_of_a_hook_writes_the_prompt_into_the_log(
    house: tuple[httpx.AsyncClient, Kept], number: int
) -> None:
    (client, log), name = house, f"leak{number}"

    answer = await client.post("/api/chat", json=turn(f"/{name} hunter2"))

    assert answer.headers["x-osp-agents"].startswith(f"{name};error;")
    fields = log.find("agent failed", name)
    assert fields["where"].endswith("agent.py:4") and "hunter2" not in str(fields)


async def test_who_asks_for_a_mistaken_plugin_is_told_where_but_not_what(
    house: tuple[httpx.AsyncClient, Kept],
) -> None:
    number = next(n for n, load in enumerate(LOADS) if "json" in load[0])

    answer = await house[0].post("/api/chat", json=turn(f"/load{number} x"))

    text = said(answer.content)
    assert f"the agent load{number} failed to load: NameError at " in text
    assert f"/load{number}_agent/agent.py:2" in text and "json" not in text
