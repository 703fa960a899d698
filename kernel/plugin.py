"""Plugin: a folder with an agent, as it is before and after its code was run.

`scan` reads the folders and their `config.json`, with the operator's tables over it; nothing is
imported here. A plugin that fails keeps its command, and says why: its error has the file, the line
and, for the usual mistakes, the cure.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kernel import agent as contract
from kernel.agent import BaseAgent, Context
from kernel.config import PluginsConfig, Settings, build, convert
from kernel.errors import ConfigError, NotAllowed, PluginExecutionError, PluginLoadError
from kernel.hooks import HookRunner

logger = logging.getLogger(__name__)

RESERVED = ("help", "explain")  # commands that the proxy answers itself
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """The keys of `config.json`, all optional; `[agents.NAME]` in `osp.toml` mirrors them."""

    command: str = ""  # default: the folder's name without _agent
    description: str = ""  # default: the first line of the class's docstring
    enabled: bool = True
    always: bool = False  # in play without being asked for
    priority: float = 0.0  # of those: lowest first
    models: tuple[str, ...] = ()  # of those: patterns of the models meant; empty: all
    typed: bool = True  # false: not by the prompt, only by header, model suffix or preset
    on_error: Literal["skip", "abort"] = "skip"  # a failure: go on without it, or refuse
    timeout: float | None = None  # seconds for each hook; default: chain.timeout
    structured: bool = False  # its response hooks keep JSON valid
    settings: Settings = field(default_factory=dict)  # the operator's
    arguments: Settings = field(default_factory=dict)  # a prompt's, with their defaults


@dataclass(slots=True, eq=False)
class Plugin:
    """One plugin as it was loaded, or was not: it always owns its name."""

    name: str
    folder: Path
    config: AgentConfig = field(default_factory=AgentConfig)
    agent: BaseAgent | None = None
    error: PluginLoadError | None = None
    hooks: tuple[str, ...] = ()  # those that it overrides
    runner: HookRunner = field(default_factory=HookRunner)
    module: str = ""  # the name of its package
    leases: int = 0  # requests that it takes part in

    @property
    def status(self) -> Literal["loaded", "failed", "disabled"]:
        return "loaded" if self.agent else "failed" if self.error else "disabled"

    @property
    def is_guard(self) -> bool:
        return self.config.enabled and self.config.always and self.config.on_error == "abort"

    @property
    def responds(self) -> bool:
        return not set(self.hooks).isdisjoint(("on_response", "on_chunk", "on_end"))

    @property
    def description(self) -> str:
        doc = (type(self.agent).__doc__ or "") if self.agent else ""
        return self.config.description or doc.strip().partition("\n")[0]

    def instance(self, context: Context, arguments: Settings) -> BaseAgent:
        """Return a copy for one request: what its hooks assign to `self` stays there."""
        agent = copy.copy(self.agent)
        assert agent is not None
        agent.context = context
        agent.arguments = arguments
        return agent


def scan(
    config: PluginsConfig,
    agents: Settings,
    environ: Mapping[str, str],
    names: Mapping[Path, str] | None = None,
) -> dict[str, Plugin]:
    """Return the plugins by command, read from their folders; nothing is imported yet.

    `names` are the commands that folders had before, for those that cannot be read any more.
    """
    plugins: dict[str, Plugin] = {}
    unused = set(agents)
    for folder in folders(config.dirs):
        name = folder.name.removesuffix("_agent").lower()
        plugin = Plugin(name, folder)
        unused.discard(name)
        try:
            plugin.config = read_config(folder, agents.get(name, {}), environ)
            plugin.name = command_of(name, plugin)
        except PluginLoadError as exc:
            plugin.error = exc
            plugin.name = (names or {}).get(folder, name)
            plugin.config = promised(folder, agents.get(name))
        if plugin.name in plugins:
            where = plugins[plugin.name].folder
            plugin.error = PluginLoadError(f"/{plugin.name} is {where} already")
            plugin.config = AgentConfig()  # whatever it promised, the other one is what is meant
        if not config.only or plugin.name in config.only:
            # The second of a command is listed under a name that nobody can type.
            taken = plugin.name in plugins or plugin.name in RESERVED
            plugins[f"{plugin.name} ({folder})" if taken else plugin.name] = plugin
    if unused:
        dirs = ", ".join(map(str, config.dirs))
        raise ConfigError(f"[agents.{min(unused)}]: there is no such plugin in {dirs}")
    return plugins


def folders(dirs: Sequence[Path]) -> Iterator[Path]:
    """Yield every folder that is a plugin, or is named like one. Raises ConfigError."""
    for directory in dirs:
        if not directory.is_dir():
            raise ConfigError(f"plugins.dirs: {directory} is no folder")
        for folder in sorted(directory.iterdir()):
            if (folder / "agent.py").is_file() or folder.name.endswith("_agent"):
                yield folder


def read_config(folder: Path, overrides: Settings, environ: Mapping[str, str]) -> AgentConfig:
    """Return `config.json` with what `osp.toml` says over it. Raises PluginLoadError."""
    file = folder / "config.json"
    try:
        table = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if not isinstance(table, dict) or not isinstance(overrides, dict):
            raise ConfigError("what is said of an agent must be a table")
        declared = build(AgentConfig, table, str(file), folder)
        said = build(AgentConfig, overrides, f"[agents] {folder.name}", folder)
        check_known(said.settings, declared.settings, "setting")
        check_known(said.arguments, declared.arguments, "argument")
        for key in set(said.arguments) & set(declared.arguments):
            kind = type(declared.arguments[key])
            convert(said.arguments[key], kind, f"[agents] {folder.name}: arguments: {key}", folder)
        settings = {**declared.settings, **said.settings}
        arguments = {**declared.arguments, **said.arguments}
        for key, default in arguments.items():
            if not isinstance(default, str | int | float):
                raise ConfigError(f"arguments: {key} must be a string, a number or a boolean")
        settings = {key: resolved(value, environ) for key, value in settings.items()}
    except (OSError, ValueError, ConfigError, RecursionError) as exc:
        raise PluginLoadError(str(exc), type(exc).__name__, str(file)) from exc
    top = {key: getattr(said, key) for key in overrides}
    return replace(declared, **{**top, "settings": settings, "arguments": arguments})


def check_known(said: Settings, declared: Settings, what: str) -> None:
    """Raise ConfigError for a key that config.json, which has such keys, does not have."""
    for key in said:
        if declared and key not in declared:
            known = ", ".join(declared)
            raise ConfigError(f"unknown {what} {key!r}; known are {known}")


def refusal(guard: Plugin) -> NotAllowed:
    why = "cannot see this request" if guard.agent else "is not loaded"
    return NotAllowed(f"the agent {guard.name} {why}, and nothing may pass without it")


def promised(folder: Path, overrides: Any) -> AgentConfig:
    """Return what can be made out of settings that are wrong: are they those of a guard?"""
    file = folder / "config.json"
    text = ""
    with suppress(OSError):  # there may be none, or it may not be read
        text = file.read_text(encoding="utf-8", errors="replace")
    table = overrides if isinstance(overrides, dict) else {}

    enabled = table.get("enabled", not re.search(r'"enabled"\s*:\s*false', text))
    always = table.get("always", bool(re.search(r'"always"\s*:\s*true', text)))
    on_error = table.get("on_error", "abort" if '"abort"' in text else "skip")
    return AgentConfig(
        enabled=enabled is not False,
        always=always is not False,
        on_error="skip" if on_error == "skip" else "abort",
    )


def resolved(value: Any, environ: Mapping[str, str]) -> Any:
    """Return the environment's value for `"$NAME"`, and any other value as it is."""
    if not isinstance(value, str) or not re.fullmatch(r"\$[A-Za-z_]\w*", value):
        return value
    if value[1:] not in environ:
        raise ConfigError(f"settings: {value} is not set in the environment")
    return environ[value[1:]]


def command_of(name: str, plugin: Plugin) -> str:
    command = (plugin.config.command or name).lower()
    if command in RESERVED or not NAME.fullmatch(command):
        text = f"{command!r} cannot be a command: letters, digits, _ and - can"
        raise PluginLoadError(text, where=str(plugin.folder / "config.json"))
    return command


def load_error(exc: BaseException, folder: Path) -> PluginLoadError:
    """Return `exc` as what `GET /plugins` shows: its type, and the plugin's own file and line."""
    cause = exc.__cause__ or exc if isinstance(exc, PluginExecutionError) else exc
    where = place_of(cause, folder) or str(folder / "agent.py")
    kind = "PluginLoadError" if isinstance(cause, PluginExecutionError) else type(cause).__name__
    return PluginLoadError(f"{cause}{cure(cause, folder)}", kind, where)


def cure(exc: BaseException, folder: Path) -> str:
    """Return what would mend the usual mistakes of an agent's author, or nothing."""
    name = getattr(exc, "name", None) or ""
    ours = getattr(vars(contract).get(name), "__module__", "") == contract.__name__
    if isinstance(exc, NameError) and (ours or name in ("Message", "Payload")):
        return f"; is `from kernel.agent import {name}` missing?"
    if isinstance(exc, NameError) and name in sys.stdlib_module_names:
        return f"; is `import {name}` missing?"
    if isinstance(exc, ModuleNotFoundError):
        first, _, inner = name.partition(".")
        if first and ((folder / f"{first}.py").exists() or (folder / first).is_dir()):
            return f"; what is beside agent.py is imported with a dot: from .{first} import ..."
        if inner:
            return f"; there is no {name.rpartition('.')[2]}.py there"
        return f"; install it for the Python that runs the proxy: {sys.executable} -m pip install"
    if (
        isinstance(exc, TypeError)
        and "__init__() missing" in str(exc)
        and not place_of(exc, folder)
    ):
        return "; an agent is made without arguments, what it needs is in self.settings"
    return ""


def place_of(exc: BaseException | None, folder: Path) -> str:
    """Return `file:line`, the last place inside of `folder` that an exception came through."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f"{exc.filename}:{exc.lineno}"
    frames = traceback.extract_tb(exc.__traceback__ if exc else None)
    inside = [f"{f.filename}:{f.lineno}" for f in frames if f.filename.startswith(str(folder))]
    return inside[-1] if inside else ""


def complain(event: str, plugin: Plugin, error: PluginLoadError) -> None:
    fields = {"agent": plugin.name, "error": f"{error.kind}: {error}", "where": error.where}
    logger.warning(event, extra={"fields": fields})


def loaded(plugins: Mapping[str, Plugin]) -> list[str]:
    """Return the names of those that can be asked for."""
    return [name for name, plugin in plugins.items() if plugin.agent]
