"""Loading plugins: what is found, what fails alone, what a request's own instance is."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from kernel.config import PluginsConfig
from kernel.errors import ConfigError
from kernel.registry import PluginRegistry
from tests.support import write_agent

OK = "class Ok(BaseAgent):\n    '''Does nothing.\n\n    More.'''\n"
NOTES = """
class A(BaseAgent):
    def write(self, name):
        with (self.data_dir / name).open("a") as file:
            file.write("x")

    async def setup(self):
        self.write("setup")
        {setup}

    async def teardown(self):
        self.write("teardown")
        raise SystemExit
"""


def loaded(*dirs: Path, agents: Any = None, environ: Any = None, **config: Any) -> Any:
    settings = PluginsConfig(dirs=dirs, **config)
    return PluginRegistry(settings, agents or {}, dirs[0].parent / "data", environ or {})


async def test_a_folder_without_config_is_an_agent_named_after_it(plugins: Path) -> None:
    write_agent(plugins, "Ok", OK)
    (plugins / "notes").mkdir()
    (plugins / "README.md").write_text("text")

    async with loaded(plugins) as registry:
        (plugin,) = registry.plugins.values()

        assert (plugin.name, plugin.status, plugin.description) == ("ok", "loaded", "Does nothing.")


SETS_UP = "class A(BaseAgent):\n    {kind} setup(self):\n        raise {what}"
COPY = "cannot be copied for a request"


@pytest.mark.parametrize(
    ("code", "kind", "line", "text"),
    [
        ("def broken(:\n", "SyntaxError", 4, ""),
        ("x = 1 / 0", "ZeroDivisionError", 4, "division by zero"),
        ("import nowhere", "ModuleNotFoundError", 4, "-m pip install nowhere"),
        ("raise SystemExit", "SystemExit", 4, ""),
        ("raise asyncio.CancelledError", "CancelledError", 4, ""),
        ("from .helper import x", "ZeroDivisionError", 1, ""),
        ("class A(BaseAgent):\n    def __init__(self):\n        raise OSError", "OSError", 6, ""),
        (SETS_UP.format(kind="def", what="OSError('x')"), "OSError", 6, "x"),
        (SETS_UP.format(kind="async def", what="Reply('x')"), "Reply", 6, ""),
        (SETS_UP.format(kind="async def", what="Abort(403, 'x')"), "Abort", 6, ""),
        (SETS_UP.format(kind="async def", what="BaseExceptionGroup('x', [SystemExit()])"),
         "BaseExceptionGroup", 6, ""),
        ("class A(BaseAgent):\n    setup = 5", "TypeError", None, "not callable"),
        ("class A(BaseAgent):\n    async def setup(self):\n        await asyncio.Event().wait()",
         "PluginLoadError", None, "took longer than 0.2 seconds"),
        ("import threading\nthreading.Event().wait(1)",
         "PluginLoadError", None, "took longer than 0.2 seconds"),
        ("", "PluginLoadError", None, "must define one subclass of BaseAgent; found: none"),
        (OK + OK.replace("Ok", "Two"), "PluginLoadError", None, "found: Ok, Two"),
        ("from dataclasses import dataclass\n@dataclass(frozen=True)\n"
         "class A(BaseAgent):\n    x: int = 1", "PluginLoadError", None, COPY),
        ("class A(BaseAgent):\n    __slots__ = ('x',)", "PluginLoadError", None, COPY),
        ("class A(BaseAgent, dict): ...", "PluginLoadError", None, COPY),
    ],
)  # fmt: skip
async def test_a_plugin_that_fails_says_type_text_file_and_line_and_stops_nobody(
    plugins: Path, code: str, kind: str, line: int | None, text: str
) -> None:
    bad = write_agent(plugins, "bad", code)
    (bad / "helper.py").write_text("x = 1 / 0")
    write_agent(plugins, "good", OK)
    registry = loaded(plugins)
    registry.setup_limit = 0.2

    with anyio.fail_after(3):
        async with registry:
            error = registry.plugins["bad"].error
            assert registry.plugins["good"].status == "loaded"

    place = bad / ("helper.py" if "helper" in code else "agent.py")
    assert (error.kind, error.where) == (kind, f"{place}:{line}" if line else str(place))
    assert text in str(error)


CONFIGS: list[tuple[str, str]] = [
    ("{", "Expecting property name"),
    ("[]", "must be a table"),
    ('{"descripton": "x"}', "unknown key 'descripton'; known are description, enabled"),
    ('{"always": "yes"}', "always: 'yes' is wrong here, it must be true or false"),
    ('{"on_error": "ignore"}', "it must be one of 'skip', 'abort'"),
    ('{"arguments": {"x": []}}', "arguments: x: [] is wrong here, it must be text"),
    ('{"settings": {"key": "$OSP_NO"}}', "$OSP_NO is not set in the environment"),
    ('{"settings": {"a": {"b": ["$OSP_NO"]}}}', "$OSP_NO is not set in the environment"),
    ('{"timeout": "1"}', "it must be a number"),
    ('{"timeout": 0}', "timeout: 0.0 is wrong here, it must be above 0"),
    ('{"timeout": -1}', "timeout: -1.0 is wrong here, it must be above 0"),
    ('{"timeout": 1e999}', "1e999 is no JSON"),
    ('{"timeout": NaN}', "NaN is no JSON"),
    (f'{{"priority": 1{"0" * 400}}}', "too large"),
    ('{"exempt": "/api/embed"}', "it must be a list of strings"),
]


NAN, INF = float("nan"), float("inf")
TABLES: list[tuple[Any, str]] = [
    (True, "must be a table"),
    ({"alway": True}, "unknown key 'alway'; known are description"),
    ({"settings": {"foldr": "b"}}, "unknown setting 'foldr'; known are folder"),
    ({"settings": {"folder": "$OSP_NO"}}, "$OSP_NO is not set in the environment"),
    ({"arguments": {"kk": 6}}, "unknown argument 'kk'; known are k"),
    ({"arguments": {"k": "six"}}, "arguments: k: 'six' is wrong here, it must be a whole"),
    ({"timeout": INF}, "timeout: inf is wrong here, it must be above 0"),
    ({"timeout": NAN}, "timeout: nan is wrong here, it must be above 0"),
    ({"priority": -INF}, "priority: -inf is wrong here, it must be finite"),
    ({"arguments": {"f": NAN}}, "arguments: f: nan is wrong here"),
]
GOOD = '{"settings": {"folder": "$SET"}, "arguments": {"k": 1, "f": 0.5}}'


@pytest.mark.parametrize(
    ("config", "table", "text"),
    [(config, {}, text) for config, text in CONFIGS] + [(GOOD, *wrong) for wrong in TABLES],
)
async def test_what_is_wrong_names_its_file_the_key_and_what_is_right(
    plugins: Path, config: str, table: Any, text: str
) -> None:
    file = write_agent(plugins, "bad", OK) / "config.json"
    file.write_text(config)

    async with loaded(plugins, agents={"bad": table}, environ={"SET": "x"}) as registry:
        error = registry.plugins["bad"].error

    assert error and error.where == ("osp.toml: [agents.bad]" if table else str(file))
    assert text in str(error)


async def test_settings_and_arguments_of_the_operator_come_over_those_of_the_plugin(
    plugins: Path,
) -> None:
    settings = {"folder": "$NOT_NEEDED", "key": "$SECRET", "n": 1}
    write_agent(plugins, "ok", OK, settings=settings, arguments={"k": 1, "l": 2}, priority=3)
    table = {"settings": {"folder": "b"}, "arguments": {"k": 5}, "always": True}

    async with loaded(plugins, agents={"ok": table}, environ={"SECRET": "s"}) as registry:
        plugin = registry.plugins["ok"]

        assert plugin.agent and plugin.agent.settings == {"folder": "b", "key": "s", "n": 1}
        assert plugin.config.arguments == {"k": 5, "l": 2}
        assert (plugin.config.always, plugin.config.priority) == (True, 3.0)


async def test_the_environment_is_known_at_any_depth_of_a_setting(plugins: Path) -> None:
    write_agent(plugins, "ok", OK, settings={"servers": {}})
    servers = {"a": {"env": {"KEY": "$SECRET"}, "args": ["$SECRET", "$ 1"]}}
    table = {"settings": {"servers": servers}}

    async with loaded(plugins, agents={"ok": table}, environ={"SECRET": "s"}) as registry:
        agent = registry.plugins["ok"].agent

    known = {"a": {"env": {"KEY": "s"}, "args": ["s", "$ 1"]}}
    assert agent and agent.settings == {"servers": known}


async def test_helpers_beside_an_agent_are_imported_and_nothing_of_it_stays(plugins: Path) -> None:
    code = """
    from dataclasses import dataclass
    from .helper import WORD
    from .parts.deep import NUMBER

    @dataclass
    class Note:
        text: "str" = WORD

    class Ok(BaseAgent):
        def setup(self):
            self.note, self.number = Note(), NUMBER
    """
    folder = write_agent(plugins, "ok", code)
    (folder / "helper.py").write_text("WORD = 'hello'")
    (folder / "parts").mkdir()
    (folder / "parts" / "__init__.py").write_text("")
    (folder / "parts" / "deep.py").write_text("NUMBER = 7")
    path, names = list(sys.path), set(sys.modules)

    async with loaded(plugins) as one, loaded(plugins) as two:
        agents: list[Any] = [registry.plugins["ok"].agent for registry in (one, two)]
        assert [(agent.note.text, agent.number) for agent in agents] == [("hello", 7)] * 2
        assert type(agents[0]) is not type(agents[1])

    assert sys.path == path and {n for n in set(sys.modules) - names if "ok" in n} == set()


@pytest.mark.parametrize("name", ["help", "explain", "a b", "_x"])
async def test_a_name_that_cannot_be_a_command_fails(plugins: Path, name: str) -> None:
    folder = write_agent(plugins, name, OK)

    async with loaded(plugins) as registry:
        ((listed, plugin),) = registry.plugins.items()

    assert listed == (f"{name} ({folder})" if name.isalpha() else name)
    assert "cannot be a command" in str(plugin.error)


async def test_the_first_folder_with_a_command_wins(tmp_path: Path) -> None:
    write_agent(tmp_path / "one", "ok", OK)
    second = write_agent(tmp_path / "two", "ok", OK, always=True, on_error="abort")

    async with loaded(tmp_path / "one", tmp_path / "two") as registry:
        assert registry.plugins["ok"].folder == tmp_path / "one" / "ok_agent"
        other = registry.plugins[f"ok ({second})"]
        assert other.status == "failed" and "is " in str(other.error)
        assert registry.guards(None) == []


@pytest.mark.parametrize(
    ("dirs", "agents", "text"),
    [
        ("plugins", {"rga": {}}, r"\[agents.rga\]: there is no such plugin in"),
        ("nowhere", {}, "plugins.dirs: .*nowhere is no folder"),
    ],
)
def test_what_is_not_there_stops_the_start(
    plugins: Path, dirs: str, agents: Any, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        loaded(plugins.parent / dirs, agents=agents)


async def test_disabled_and_empty_folders_are_listed_and_left_out_ones_are_not(
    plugins: Path,
) -> None:
    write_agent(plugins, "off", "raise OSError", enabled=False, description="Text")
    (plugins / "empty_agent").mkdir()
    write_agent(plugins, "out", OK)

    async with loaded(plugins, only=("off", "empty", "more")) as registry:
        found = {name: (p.status, p.description) for name, p in registry.plugins.items()}
        error = registry.plugins["empty"].error

    assert found == {"off": ("disabled", "Text"), "empty": ("failed", "")}
    assert error and error.kind == "FileNotFoundError"


async def test_setup_runs_once_and_teardown_at_the_end_whatever_it_does(plugins: Path) -> None:
    for name in "ab":
        write_agent(plugins, name, NOTES.format(setup=""))
    write_agent(plugins, "c", NOTES.format(setup="raise OSError"))
    data = plugins.parent / "data"

    async with loaded(plugins):
        assert {file.name for file in data.rglob("*") if file.is_file()} == {"setup"}

    files = {str(f.relative_to(data)): f.read_text() for f in data.rglob("*") if f.is_file()}
    both = {f"{agent}/{hook}": "x" for agent in "ab" for hook in ("setup", "teardown")}
    assert files == both | {"c/setup": "x"}  # a setup that failed has nothing to tear down


async def test_an_end_in_the_middle_of_loading_tears_down_what_began(plugins: Path) -> None:
    setups = {"done": "", "slow": "await asyncio.sleep(0)", "hangs": "await asyncio.sleep(60)"}
    for name, setup in setups.items():
        write_agent(plugins, name, NOTES.format(setup=setup))
    data = plugins.parent / "data"

    loading = asyncio.create_task(loaded(plugins).__aenter__())
    with anyio.fail_after(3):
        while not all((data / name / "setup").exists() for name in setups):  # noqa: ASYNC110
            await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading

    torn = {name: (data / name / "teardown").read_text() for name in setups}
    assert torn == dict.fromkeys(setups, "x")


OWN = """
from collections import Counter, defaultdict, deque

class Base:
    inherited = []

class A(Base, BaseAgent):
    on_class = []
    filled = {}
    nested = {"k": [[]]}
    LIMITS = {"a": 1}

    def __init__(self):
        self.made = []
        self.count = Counter()
        self.queue = deque()
        self.by_name = defaultdict(list)
        self.cycle = [self.made]
        self.cycle.append(self.cycle)
        self.deep = {"k": {"l": []}}
        self.filled_deep = {"k": {"l": []}}
        self.replaced = []
        self.lock = asyncio.Lock()
        self.by_lock = defaultdict(self.lock.locked)

    def setup(self):
        self.limits = {}
        self.replaced = []
        self.filled["x"] = []
        self.filled_deep["k"]["l"].append(1)

    def __copy__(self):
        1 / 0
"""
PER_REQUEST = [
    "made", "on_class", "inherited", "nested", "count", "queue", "by_name", "cycle", "deep",
    "by_lock", "settings", "LIMITS",
]  # fmt: skip
SHARED = ["limits", "replaced", "filled", "filled_deep", "lock"]


async def test_containers_are_a_requests_own_and_what_setup_made_is_shared(plugins: Path) -> None:
    write_agent(plugins, "a", OWN, settings={"list": []})

    async with loaded(plugins) as registry:
        plugin = registry.plugins["a"]
        context: Any = object()
        one: Any = plugin.instance(context, {"k": 1})
        one.made.append(1)
        one.nested["k"][0].append(1)
        one.deep["k"]["l"].append(1)
        one.by_name["x"].append(1)
        one.settings["list"].append(1)
        one.word = "x"
        two: Any = plugin.instance(context, {})

    assert {n: getattr(one, n) is getattr(two, n) for n in PER_REQUEST + SHARED} == {
        **dict.fromkeys(PER_REQUEST, False),
        **dict.fromkeys(SHARED, True),
    }
    assert (two.made, two.nested, two.deep) == ([], {"k": [[]]}, {"k": {"l": []}})
    assert (two.settings, two.by_name["x"], hasattr(two, "word")) == ({"list": []}, [], False)
    assert one.by_lock.default_factory is two.by_lock.default_factory
    assert one.cycle[0] is one.made and one.cycle[1] is one.cycle  # what was one list stays one
    assert (one.context, one.arguments, two.arguments) == (context, {"k": 1}, {})


async def test_what_is_assigned_after_setup_is_shared_too(plugins: Path) -> None:
    """A task that `setup` began replaces what `__init__` made, when it has read its files."""
    code = "class A(BaseAgent):\n    def __init__(self):\n        self.index = {}\n"
    write_agent(plugins, "a", code)

    async with loaded(plugins) as registry:
        plugin = registry.plugins["a"]
        plugin.agent.index = {"read": 1}
        one, two = (plugin.instance(None, {}) for _ in range(2))

    assert one.index == {"read": 1} and one.index is two.index


async def test_always_on_agents_come_by_priority_and_name_for_their_models(plugins: Path) -> None:
    for name, priority, models in (("b", 1, []), ("a", 1, ["m*"]), ("c", 0, []), ("d", 2, ["x"])):
        write_agent(plugins, name, OK, always=True, priority=priority, models=models)
    write_agent(plugins, "asked", OK)
    write_agent(plugins, "bad", "1 / 0", always=True, on_error="abort", models=["other"])

    async with loaded(plugins) as registry:
        assert [p.name for p in registry.always(["m1"])] == ["c", "a", "b"]
        assert [p.name for p in registry.always(["preset", "x"])] == ["c", "b", "d"]
        guards = {str(models): registry.guards(models) for models in (["m"], ["p", "other"], None)}

    assert [[p.name for p in found] for found in guards.values()] == [[], ["bad"], ["bad"]]


def test_the_agents_that_come_with_the_project_have_a_valid_config() -> None:
    files = list(Path("plugins").glob("*/config.json"))

    assert len(files) >= 2
    assert all(json.loads(file.read_text())["description"] for file in files)
