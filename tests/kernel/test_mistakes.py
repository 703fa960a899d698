"""Mistakes of an agent's author or operator: the log names each, and says what mends it.

GET /plugins says its type, file and line; the text of an error is only in the log. One proxy has an
agent for each mistake of the tables below.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.slices.test_chain import PATHS, SENT
from tests.support import running, said, turn, write_agent

AGENT = "from kernel.agent import BaseAgent\n"
PASSES = AGENT + "class It(BaseAgent):\n    pass\n"
ASKS = "self.context.chat([{'role': 'user', 'content': 'x'}])"


def write(plugins: Path, name: str, code: str, **config: Any) -> Path:
    """Write an agent that has nothing imported but what its code imports, with helpers."""
    folder = write_agent(plugins, name, "", **config)
    (folder / "agent.py").write_text(code, encoding="utf-8")
    (folder / "helper.py").write_text(AGENT + "X = 1\nclass Far(BaseAgent):\n    pass\n")
    (folder / "parts").mkdir()
    (folder / "parts" / "__init__.py").write_text("X = 1\n")
    return folder


def hook(line: str, name: str = "on_request", head: str = AGENT) -> str:
    """Return an agent whose hook is one line, the fourth of agent.py."""
    given = "" if name in ("setup", "on_end") else ", given"
    return f"{head}class It(BaseAgent):\n    async def {name}(self{given}):\n        {line}\n"


# What stands in the way of loading: the code, type and line of its error, mistake and cure
LOADS = [
    (
        "class It(BaseAgent):\n    pass",
        "NameError",
        1,
        "'BaseAgent'",
        "`from kernel.agent import BaseAgent`",
    ),
    (AGENT + "X = json.loads('1')", "NameError", 2, "'json'", "`import json`"),
    (AGENT + "X = time.time()", "NameError", 2, "'time'", "`import time`"),
    (AGENT + "L = logging.getLogger()", "NameError", 2, "'logging'", "`import logging`"),
    (AGENT + "import nowhere", "ModuleNotFoundError", 2, "'nowhere'", "-m pip install"),
    (AGENT + "import nowhere.deep", "ModuleNotFoundError", 2, "'nowhere'", "-m pip install"),
    (AGENT + "from helper import X", "ModuleNotFoundError", 2, "'helper'", "from .helper import"),
    (AGENT + "import helper", "ModuleNotFoundError", 2, "'helper'", "with a dot: from .helper"),
    (AGENT + "from parts import X", "ModuleNotFoundError", 2, "'parts'", "from .parts import"),
    (AGENT + "from parts.deep import X", "ModuleNotFoundError", 2, "'parts'", "from .parts"),
    (AGENT + "from .helpr import X", "ModuleNotFoundError", 2, "helpr", "helpr.py"),
    (AGENT + "from .parts.dep import X", "ModuleNotFoundError", 2, "dep", "dep.py"),
    (
        AGENT + "class It(BaseAgent):\n    def __init__(self, k):\n        pass",
        "TypeError",
        0,
        "positional argument: 'k'",
        "without arguments",
    ),
    (
        PASSES + "class Other(It):\n    pass",
        "PluginLoadError",
        0,
        "found: It, Other",
        "must define one subclass",
    ),
    (
        "from .helper import Far",
        "PluginLoadError",
        0,
        "found: none",
        "agent.py must define one subclass",
    ),
    ("class It:\n    pass", "PluginLoadError", 0, "found: none", "one subclass of BaseAgent"),
]

# What stands in config.json
CONFIGS: list[tuple[dict[str, Any], str, str]] = [
    ({"setings": {}}, "unknown key 'setings'", "settings, arguments"),
    ({"on_eror": "abort"}, "unknown key 'on_eror'", "on_error"),
    ({"on_error": "stop"}, "on_error: 'stop' is wrong here", "'skip', 'abort'"),
    ({"priority": "high"}, "priority: 'high' is wrong here", "a number"),
    ({"models": "llama3.2"}, "models:", "a list of strings"),
    ({"arguments": ["k"]}, "arguments: ['k'] is wrong here", "a table"),
    ({"arguments": {"k": None}}, "arguments: k", "a string, a number or a boolean"),
    ({"command": "/bad"}, "'/bad' cannot be a command", "letters, digits, _ and - can"),
]

# What stands in osp.toml: config.json has the setting `folder` and the argument `k`, a number
TABLES: list[tuple[dict[str, Any], str, str]] = [
    ({"settings": {"foldr": "x"}}, "'foldr'", "known are folder"),
    ({"arguments": {"kk": 6}}, "'kk'", "known are k"),
    ({"arguments": {"k": "six"}}, "k: 'six' is wrong here", "a whole number"),
    ({"alway": True}, "unknown key 'alway'", "always"),
]

# What goes wrong while a hook runs
RUNS = [
    (
        hook("pass"),
        "returned NoneType, but on_request must return the payload",
        "`return` missing?",
    ),
    (hook("return 'x'"), "returned str, but on_request must return", "the payload"),
    (
        hook("return self.setup()"),
        "returned coroutine, but on_request must return",
        "`await` missing?",
    ),
    (hook(f"given['messages'][0]['content'] = {ASKS}; return given"), "coroutine", "`await`"),
    (
        hook("pass", "on_response"),
        "returned NoneType, but a response hook must return text",
        "`return` missing?",
    ),
    (hook(f"return {ASKS}", "on_response"), "returned coroutine", "`await` missing?"),
    (hook("return json.loads('{}')"), "NameError: name 'json'", "`import json`"),
    (hook("return time.time()"), "NameError: name 'time'", "`import time`"),
    (hook("raise Reply('x')"), "NameError: name 'Reply'", "`from kernel.agent import Reply`"),
    (hook("import helper"), "ModuleNotFoundError: No module named 'helper'", "from .helper import"),
    (hook("import nowhere"), "ModuleNotFoundError: No module named 'nowhere'", "-m pip install"),
    (
        hook("raise Abort(200, 'ok')", head=AGENT[:-1] + ", Abort\n"),
        "200 is no error status",
        "400 to 599",
    ),
    (hook("given['messages'] = []; return given"), "without a list of messages", ""),
    (hook("given['messages'].append('x'); return given"), "returned a message that is", " dict"),
    (hook("given['messages'][0]['content'] = ['x']; return given"), "content", ""),
    (hook("given['messages'][0]['content'] = 5; return given"), "content", ""),
    (hook("given['messages'][0]['content'] = {'x': 1}; return given"), "content", ""),
    (hook("given['x'] = {1, 2}; return given"), "returned what is no JSON", "set"),
    (hook("del given['model']; return given"), "model", ""),
]

# What would go wrong later: bodies of the class, and the attributes that are state
STATES = [
    ("seen = []", "seen"),
    ("seen: list = []\n    names: dict = {}", "seen names"),
    ("__cache = set()\n    lastSeen = {}", "_It__cache lastSeen"),
    ("def on_response(self, response):\n        return response\n    seen = {}", "seen"),
]
NO_STATES = [
    "seen: list",
    "name: str = 'x'",
    "WORDS = {'a': 1}",
    "words = ('a', 'b')",
    "words = frozenset('ab')",
    "__slots__ = ['seen']",
    "def setup(self):\n        self.words = {}",
]
# Errors that look like one of these mistakes and are none: the code, and what is no cure
OTHERS = [
    (AGENT + "raise ModuleNotFoundError('get sqlite-vec')\n", "with a dot"),
    (
        hook("Path()", "setup", AGENT + "class Path:\n    def __init__(self, k): ...\n"),
        "an agent is",
    ),
    (AGENT + "from .helper import NOPE\n", "pip install"),
]
FOREIGN = ["Path", "Any", "dataclass", "field", "Mapping"]
CONTRACT = ["Reply", "Abort", "Context", "add_context", "Payload", "Message", "text_of"]


class Kept(logging.Handler):
    """Keeps the log of what is longer than one test."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@dataclass
class House:
    """The proxy with all these agents, and what it said while it loaded them."""

    client: httpx.AsyncClient
    plugins: Path
    listed: dict[str, Any] = field(default_factory=dict)
    records: list[logging.LogRecord] = field(default_factory=list)

    def logged(self, event: str, name: str) -> Mapping[str, Any]:
        """Return the fields of the only such line of the log on an agent."""
        (fields,) = find(self.records, event, name)
        return fields


def find(records: list[logging.LogRecord], event: str, name: str) -> list[Mapping[str, Any]]:
    found = [record.__dict__["fields"] for record in records if record.getMessage() == event]
    return [fields for fields in found if name in (fields.get("agent"), "")]


@pytest.fixture(scope="module")
async def house(demo_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    plugins = tmp_path_factory.mktemp("mistakes") / "plugins"
    handler = Kept()
    for number, load in enumerate(LOADS):
        write(plugins, f"load{number}", load[0])
    for number, (config, _, _) in enumerate(CONFIGS):
        write(plugins, f"config{number}", PASSES, **config)
    for number in range(len(TABLES)):
        write(plugins, f"table{number}", PASSES, settings={"folder": "a"}, arguments={"k": 1})
    for number, (code, _, _) in enumerate(RUNS):
        write(plugins, f"run{number}", code)
    for number, (body, _) in enumerate(STATES):
        write(plugins, f"state{number}", f"{AGENT}class It(BaseAgent):\n    {body}\n")
    for number, body in enumerate(NO_STATES):
        write(plugins, f"no_state{number}", f"{AGENT}class It(BaseAgent):\n    {body}\n")
    for number, (code, _) in enumerate(OTHERS):
        write(plugins, f"other{number}", code)
    for name in (*FOREIGN, *CONTRACT):
        write(plugins, f"name_{name}", f"{PASSES}X = {name}")
    write(plugins, "alias", PASSES + "Agent = It\n")
    agents = {f"table{number}": table for number, (table, _, _) in enumerate(TABLES)}
    logging.getLogger("kernel").addHandler(handler)
    async with running(demo_url, plugins, agents=agents) as client:
        house = House(client, plugins, records=handler.records)
        about = (await client.get("/plugins")).json()["plugins"]
        house.listed = {each["name"]: each for each in about}
        yield house
    logging.getLogger("kernel").removeHandler(handler)


@pytest.mark.parametrize("number", range(len(LOADS)))
async def test_what_stands_in_the_way_of_loading_is_named_with_its_cure(
    house: House, number: int
) -> None:
    _, kind, line, mistake, cure = LOADS[number]
    place = str(house.plugins / f"load{number}_agent" / "agent.py") + (f":{line}" if line else "")

    about = house.listed[f"load{number}"]
    fields = house.logged("agent failed to load", f"load{number}")

    assert fields["error"].startswith(f"{kind}: ") and fields["where"] == place
    assert mistake in fields["error"] and cure in fields["error"]
    assert (about["status"], about["error"]) == ("failed", {"type": kind, "where": place})


async def test_a_helper_that_is_not_there_is_nothing_to_install(house: House) -> None:
    numbers = [n for n, load in enumerate(LOADS) if "helpr" in load[0] or "dep" in load[0]]

    errors = [house.logged("agent failed to load", f"load{n}")["error"] for n in numbers]

    assert len(errors) == 2 and "pip install" not in "".join(errors)


@pytest.mark.parametrize("name", FOREIGN)
async def test_what_the_contract_only_imports_is_not_to_be_imported_from_it(
    house: House, name: str
) -> None:
    fields = house.logged("agent failed to load", f"name_{name}".lower())

    assert "NameError" in fields["error"] and "kernel.agent" not in fields["error"]


@pytest.mark.parametrize("name", CONTRACT)
async def test_what_is_of_the_contract_is(house: House, name: str) -> None:
    fields = house.logged("agent failed to load", f"name_{name}".lower())

    assert fields["error"].endswith(f"; is `from kernel.agent import {name}` missing?")


@pytest.mark.parametrize("number", range(len(OTHERS)))
async def test_an_error_of_another_kind_gets_no_wrong_cure(house: House, number: int) -> None:
    fields = house.logged("agent failed to load", f"other{number}")

    assert OTHERS[number][1] not in fields["error"]


async def test_a_second_name_for_the_class_makes_no_second_agent(house: House) -> None:
    assert house.listed["alias"]["status"] == "loaded"


@pytest.mark.parametrize("number", range(len(CONFIGS)))
async def test_a_mistake_in_the_config_is_named_with_what_would_be_right(
    house: House, number: int
) -> None:
    _, mistake, cure = CONFIGS[number]
    file = str(house.plugins / f"config{number}_agent" / "config.json")

    name = next(n for n, each in house.listed.items() if each["folder"] in file)
    (fields,) = [
        fields
        for fields in find(house.records, "agent failed to load", "")
        if fields["where"].startswith(file)
    ]

    assert mistake in fields["error"] and cure in fields["error"].partition(mistake)[2]
    assert house.listed[name]["status"] == "failed"
    assert house.listed[name]["error"]["where"].startswith(file)


async def test_a_config_that_is_no_json_says_where(
    demo_url: str, plugins: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(plugins, "bad", PASSES)
    (folder / "config.json").write_text('{\n    "always": true,\n}\n')

    async with running(demo_url, plugins) as client:
        about = (await client.get("/plugins")).json()["plugins"][0]

    (fields,) = find(caplog.records, "agent failed to load", "bad")
    assert re.search(r"line [23] column \d+", fields["error"])  # Pythons do not agree
    assert about["error"] == {"type": "JSONDecodeError", "where": str(folder / "config.json")}


@pytest.mark.parametrize("number", range(len(TABLES)))
async def test_a_mistake_in_the_operators_table_is_named_with_what_would_be_right(
    house: House, number: int
) -> None:
    _, mistake, cure = TABLES[number]

    error = house.logged("agent failed to load", f"table{number}")["error"]

    assert mistake in error and cure in error.partition(mistake)[2]
    assert house.listed[f"table{number}"]["error"]["type"] == "ConfigError"


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("number", range(len(RUNS)))
async def test_what_goes_wrong_in_a_hook_is_named_with_its_cure_and_harms_nobody(
    house: House, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    code, mistake, cure = RUNS[number]
    name = f"run{number}"

    answer = await house.client.post(PATHS[number % 2], json=turn(f"/{name} x"))
    listed = (await house.client.get("/plugins")).json()["plugins"]

    notice = f"\n\n[without {name}: it failed, the proxy's log says why]"
    assert said(answer.content) == f"{SENT}[user] x{notice}"
    (fields,) = find(caplog.records, "agent failed", name)
    assert mistake in fields["error"] and cure in fields["error"].partition(mistake)[2]
    if fields["error"].startswith(("NameError", "ModuleNotFoundError")):
        assert fields["where"] == f"{house.plugins}/{name}_agent/agent.py:4"
    (about,) = (about for about in listed if about["name"] == name)
    assert about["status"] == "loaded" and about["counts"] == {"activated": 1, "failures": 1}


@pytest.mark.parametrize("number", range(len(STATES)))
async def test_state_on_the_class_is_named_with_its_cure(house: House, number: int) -> None:
    fields = house.logged("agent's class is shared by all requests", f"state{number}")

    assert fields["attributes"] == STATES[number][1]
    assert fields["cure"] == "make it in on_request, or in setup if hooks only read it"
    assert house.listed[f"state{number}"]["status"] == "loaded"


@pytest.mark.parametrize("number", range(len(NO_STATES)))
async def test_what_is_no_state_is_not_complained_of(house: House, number: int) -> None:
    assert house.listed[f"no_state{number}"]["status"] == "loaded"
    assert not find(house.records, "agent's class is shared by all requests", f"no_state{number}")


BLOCKS = "threading.Event().wait(0.25); return "


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("setup", BLOCKS),
        ("on_request", BLOCKS + "given"),
        ("on_request", f"await asyncio.sleep(0); {BLOCKS} given"),
        ("on_response", BLOCKS + "given"),
        ("on_chunk", BLOCKS + "given"),
        ("on_end", BLOCKS + "''"),
    ],
)
async def test_a_call_that_holds_everybody_up_is_named_with_its_cure(
    demo_url: str, plugins: Path, name: str, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(plugins, "bad", hook(line, name, "import asyncio, threading\n" + AGENT))

    async with running(demo_url, plugins) as client:
        answer = await client.post("/api/chat", json=turn("/bad x", stream=False))

    assert said(answer.content) == f"{SENT}[user] x"
    (fields,) = find(caplog.records, "agent held up everybody", "")
    assert fields["cure"] == f"blocking code belongs into `def {name}`, which runs in a thread"
    assert fields["where"] == f"{folder / 'agent.py'}:4" and fields["seconds"] >= 0.2


async def test_the_same_call_in_a_thread_holds_up_nobody(
    demo_url: str, plugins: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = hook(BLOCKS + "given", head="import threading\n" + AGENT)
    write(plugins, "good", code.replace("async def", "def"))

    async with running(demo_url, plugins) as client:
        await client.post("/api/chat", json=turn("/good x"))

    assert not find(caplog.records, "agent held up everybody", "")


async def test_who_asks_for_a_mistaken_plugin_is_told_where_but_not_what(house: House) -> None:
    answer = await house.client.post("/api/chat", json=turn("/load1 x"))

    text = said(answer.content)
    assert "the agent load1 failed to load: NameError at " in text
    assert f"{house.plugins}/load1_agent/agent.py:2" in text and "json" not in text
