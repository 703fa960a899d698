"""Loading plugins: what is found, what fails alone, and what a loader must not do."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from kernel.config import PluginsConfig
from kernel.errors import ConfigError
from kernel.registry import PluginRegistry
from tests.support import write_agent

OK = "class Ok(BaseAgent):\n    '''Does nothing.\n\n    More.'''\n"


@asynccontextmanager
async def loaded(
    *dirs: Path, agents: Any = None, environ: Any = None, **config: Any
) -> AsyncIterator[PluginRegistry]:
    data = dirs[0].parent / "data"
    settings = PluginsConfig(dirs=dirs, **config)
    async with PluginRegistry(settings, agents or {}, data, environ or {}) as registry:
        yield registry


async def test_a_folder_without_config_is_an_agent_named_after_it(plugins: Path) -> None:
    write_agent(plugins, "Ok", OK)
    (plugins / "notes").mkdir()
    (plugins / "README.md").write_text("text")

    async with loaded(plugins) as registry:
        (plugin,) = registry.plugins.values()

        assert (plugin.name, plugin.status, plugin.description) == ("ok", "loaded", "Does nothing.")


@pytest.mark.parametrize(
    ("code", "kind", "line"),
    [
        ("def broken(:\n", "SyntaxError", 4),
        ("x = 1 / 0", "ZeroDivisionError", 4),
        ("import nowhere", "ModuleNotFoundError", 4),
        ("raise SystemExit", "SystemExit", 4),
        ("from .helper import x", "ZeroDivisionError", 1),
        ("class A(BaseAgent):\n    def __init__(self):\n        raise OSError", "OSError", 6),
        ("class A(BaseAgent):\n    def setup(self):\n        raise OSError", "OSError", 6),
        ("class A(BaseAgent):\n    async def setup(self):\n        raise Reply('x')", "Reply", 6),
        (
            "class A(BaseAgent):\n    async def setup(self):\n        raise SystemExit",
            "SystemExit",
            6,
        ),
    ],
)
async def test_a_plugin_that_fails_is_listed_with_file_and_line_and_stops_nobody(
    plugins: Path, code: str, kind: str, line: int
) -> None:
    bad = write_agent(plugins, "bad", code)
    (bad / "helper.py").write_text("x = 1 / 0")
    write_agent(plugins, "good", OK)

    async with loaded(plugins) as registry:
        error = registry.plugins["bad"].error

        assert error and error.kind == kind
        name = "helper.py" if "helper" in code else "agent.py"
        assert error.where == f"{bad / name}:{line}"
        assert registry.plugins["good"].status == "loaded"


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("", "must define one subclass of BaseAgent; found: none"),
        (OK + OK.replace("Ok", "Two"), "must define one subclass of BaseAgent; found: Ok, Two"),
        (
            "from dataclasses import dataclass\n"
            "@dataclass(frozen=True)\nclass A(BaseAgent):\n    x: int = 1",
            "cannot be copied for a request",
        ),
        (
            "class A(BaseAgent):\n    async def setup(self):\n        await asyncio.Event().wait()",
            "took longer than 0.1 seconds",
        ),
        (
            "import threading\nthreading.Event().wait()",
            "took longer than 0.1 seconds",
        ),
    ],
)
async def test_what_cannot_be_an_agent_says_why(plugins: Path, code: str, complaint: str) -> None:
    write_agent(plugins, "bad", code)

    with anyio.fail_after(3):
        async with loaded(plugins, setup_timeout=0.1) as registry:
            assert complaint in str(registry.plugins["bad"].error)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("{", "Expecting property name"),
        ("[]", "must be a table"),
        ('{"descripton": "x"}', "unknown key 'descripton'; known are command, description"),
        ('{"always": "yes"}', "always: 'yes' is wrong here, it must be true or false"),
        ('{"on_error": "ignore"}', "it must be one of 'skip', 'abort'"),
        ('{"arguments": {"x": []}}', "arguments: x must be a string, a number or a boolean"),
        ('{"settings": {"key": "$OSP_NO"}}', "$OSP_NO is not set in the environment"),
        ('{"command": "a b"}', "'a b' cannot be a command"),
        ('{"command": "help"}', "'help' cannot be a command"),
        ('{"timeout": "1"}', "it must be a number"),
    ],
)
async def test_a_wrong_config_names_the_key_and_what_is_right(
    plugins: Path, config: str, complaint: str
) -> None:
    (write_agent(plugins, "bad", OK) / "config.json").write_text(config)

    async with loaded(plugins) as registry:
        plugin = registry.plugins["bad"]

        assert plugin.status == "failed" and complaint in str(plugin.error)


async def test_helpers_beside_an_agent_are_imported_from_their_source(plugins: Path) -> None:
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

    async with loaded(plugins) as registry:
        agent: Any = registry.plugins["ok"].agent
        assert (agent.note.text, agent.number) == ("hello", 7)

    assert not [file for file in walk(plugins) if "__pycache__" in file]
    assert sys.path == path and {n for n in set(sys.modules) - names if "ok" in n} == set()


async def test_an_edit_within_the_same_second_is_seen(plugins: Path) -> None:
    folder = write_agent(plugins, "ok", "from .helper import X\n" + OK + "    x = X\n")
    seen = []

    for x in ("1", "2"):
        (folder / "helper.py").write_text(f"X = {x}")
        async with loaded(plugins) as registry:
            seen.append(registry.plugins["ok"].agent.x)  # type: ignore[union-attr]

    assert seen == [1, 2]


async def test_two_registries_do_not_share_their_modules(plugins: Path) -> None:
    write_agent(plugins, "ok", OK)

    async with loaded(plugins) as one, loaded(plugins) as two:
        kinds = [type(registry.plugins["ok"].agent) for registry in (one, two)]

    assert kinds[0] is not kinds[1]


async def test_a_folder_cannot_take_a_command_of_the_proxy(plugins: Path) -> None:
    folder = write_agent(plugins, "help", OK)

    async with loaded(plugins) as registry:
        (listed,) = registry.plugins

    assert listed == f"help ({folder})"


async def test_the_first_folder_with_a_command_wins(tmp_path: Path) -> None:
    write_agent(tmp_path / "one", "ok", OK)
    second = write_agent(tmp_path / "two", "ok", OK)

    async with loaded(tmp_path / "one", tmp_path / "two") as registry:
        assert registry.plugins["ok"].folder == tmp_path / "one" / "ok_agent"
        other = registry.plugins[f"ok ({second})"]
        assert other.status == "failed" and "is " in str(other.error)


async def test_folders_of_one_name_may_have_different_commands(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = write_agent(tmp_path / name, "ok", OK + "    x = __file__", command=name)
        assert folder.name == "ok_agent"

    async with loaded(tmp_path / "one", tmp_path / "two") as registry:
        files = {name: plugin.agent.x for name, plugin in registry.plugins.items()}  # type: ignore[union-attr]

    assert files == {n: str(tmp_path / n / "ok_agent" / "agent.py") for n in ("one", "two")}


async def test_settings_and_arguments_of_the_operator_come_over_those_of_the_plugin(
    plugins: Path,
) -> None:
    settings = {"folder": "a", "key": "$SECRET", "n": 1}
    write_agent(plugins, "ok", OK, settings=settings, arguments={"k": 1, "l": 2}, priority=3)
    said = {"settings": {"folder": "b"}, "arguments": {"k": 5}, "always": True}

    async with loaded(plugins, agents={"ok": said}, environ={"SECRET": "s"}) as registry:
        plugin = registry.plugins["ok"]

        assert plugin.agent and plugin.agent.settings == {"folder": "b", "key": "s", "n": 1}
        assert plugin.config.arguments == {"k": 5, "l": 2}
        assert (plugin.config.always, plugin.config.priority) == (True, 3.0)


async def test_an_unknown_setting_of_the_operator_is_named(plugins: Path) -> None:
    write_agent(plugins, "ok", OK, settings={"folder": "a"})

    async with loaded(plugins, agents={"ok": {"settings": {"foldr": "b"}}}) as registry:
        complaint = str(registry.plugins["ok"].error)

    assert complaint == "unknown setting 'foldr'; known are folder"


async def test_a_table_for_no_plugin_stops_the_start(plugins: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[agents.rga\]: there is no such plugin in"):
        async with loaded(plugins, agents={"rga": {}}):
            pass


async def test_a_folder_of_plugins_that_is_none_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plugins.dirs: .*nowhere is no folder"):
        async with loaded(tmp_path / "nowhere"):
            pass


async def test_disabled_plugins_keep_their_name_and_are_not_imported(plugins: Path) -> None:
    write_agent(plugins, "off", "raise OSError", enabled=False)

    async with loaded(plugins) as registry:
        assert registry.plugins["off"].status == "disabled"


@pytest.mark.parametrize(("only", "names"), [(("off",), set()), (("a", "c"), {"a", "c"})])
async def test_plugins_that_are_left_out_own_no_name(
    plugins: Path, only: tuple[str, ...], names: set[str]
) -> None:
    for name in ("a", "b", "c"):
        write_agent(plugins, name, OK)

    async with loaded(plugins, only=only) as registry:
        assert set(registry.plugins) == names


async def test_setup_runs_once_and_teardown_at_the_end_whatever_it_does(plugins: Path) -> None:
    code = """
    class A(BaseAgent):
        def write(self, name):
            with (self.data_dir / name).open("a") as file:
                file.write("x")

        async def setup(self):
            self.write("setup")

        async def teardown(self):
            self.write("teardown")
            raise SystemExit
    """
    write_agent(plugins, "a", code)
    write_agent(plugins, "b", code)
    data = plugins.parent / "data"

    async with loaded(plugins):
        assert sorted(file.name for file in data.rglob("*")) == ["a", "b", "setup", "setup"]

    files = {str(f.relative_to(data)): f.read_text() for f in data.rglob("*") if f.is_file()}
    assert files == {f"{agent}/{hook}": "x" for agent in "ab" for hook in ("setup", "teardown")}


async def test_data_is_written_nowhere_before_its_first_use(plugins: Path) -> None:
    write_agent(plugins, "ok", OK)

    async with loaded(plugins):
        assert not (plugins.parent / "data").exists()


async def test_a_folder_named_like_an_agent_without_agent_py_is_a_failure(plugins: Path) -> None:
    (plugins / "empty_agent").mkdir()

    async with loaded(plugins) as registry:
        error = registry.plugins["empty"].error

        assert error and error.kind == "FileNotFoundError"


def test_the_agents_that_come_with_the_project_have_a_valid_config() -> None:
    files = list(Path("plugins").glob("*/config.json"))

    assert len(files) >= 2
    assert all(json.loads(file.read_text())["description"] for file in files)


def walk(folder: Path) -> list[str]:
    return [str(file) for file in folder.rglob("*")]
