"""Plugin: a folder with an agent: its settings, and what became of it when it was loaded.

`scan` reads the folders and their `config.json`, with the operator's tables over it; nothing is
imported here. A plugin that fails keeps its command and says why.
"""

from __future__ import annotations

import asyncio
import copy
import math
import os
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kernel.agent import BaseAgent, Context
from kernel.config import PluginsConfig, Seconds, Settings, build, convert
from kernel.dialects import loads
from kernel.errors import ConfigError, PluginLoadError

RESERVED = ("help", "explain")  # commands that the proxy answers itself
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
THREADS = 2  # of one plugin at the same time: hooks that hang fill its own places only
CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter)


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """The keys of `config.json`, all optional; `[agents.NAME]` in `osp.toml` mirrors them."""

    description: str = ""  # default: the first line of the class's docstring
    enabled: bool = True
    always: bool = False  # in play without being asked for
    priority: float = 0.0  # of those: lowest first
    models: tuple[str, ...] = ()  # of those: patterns of the models meant; empty: all
    on_error: Literal["skip", "abort"] = "skip"  # a failure: go on without it, or refuse
    timeout: Seconds = 0.0  # for each hook; 0, which cannot be said: chain.timeout
    structured: bool = False  # its response hooks keep JSON valid
    exempt: tuple[str, ...] = ()  # of a guard: paths, with all below, that pass without it
    settings: Settings = field(default_factory=dict)  # the operator's
    arguments: Settings = field(default_factory=dict)  # a prompt's, with their defaults


@dataclass(slots=True, eq=False)
class Plugin:
    """One plugin, loaded or not: it always owns its name."""

    name: str
    folder: Path
    config: AgentConfig = field(default_factory=AgentConfig)
    agent: BaseAgent | None = None  # set up; requests get copies
    error: PluginLoadError | None = None
    description: str = ""
    hooks: tuple[str, ...] = ()  # those that it overrides
    own: Settings = field(default_factory=dict)  # the containers that each request gets anew
    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(THREADS))
    left_behind: set[asyncio.Task[Any]] = field(default_factory=set)  # hooks that took too long

    @property
    def status(self) -> Literal["loaded", "failed", "disabled"]:
        return "failed" if self.error else "disabled" if self.agent is None else "loaded"

    @property
    def is_guard(self) -> bool:
        """Tell whether it is a promise: always on, and nothing may pass without it."""
        return self.config.enabled and self.config.always and self.config.on_error == "abort"

    @property
    def responds(self) -> bool:
        return not set(self.hooks).isdisjoint(("on_response", "on_chunk", "on_end"))

    def instance(self, context: Context, arguments: Settings) -> BaseAgent:
        """Return a copy of the agent for one request.

        What its hooks assign to `self` stays in the request. Lists, dicts and sets (and those in
        them) that `__init__` or the class made are copied, too. All else is shared: what `setup`
        assigned, a container that it filled, and objects of other types. Runs no code of the agent.
        """
        assert self.agent is not None
        shared = vars(self.agent)
        copies: dict[int, Any] = {}
        own = {
            name: fresh(made, copies)
            for name, made in self.own.items()
            if shared.get(name, made) is made  # else it was replaced later, for all requests
        }
        agent = object.__new__(type(self.agent))
        vars(agent).update({**shared, **own, "context": context, "arguments": arguments})
        return agent


def classes(agent: BaseAgent) -> list[type]:
    """Return the agent's classes, bases first, without those of the contract."""
    return [kind for kind in reversed(type(agent).__mro__) if kind not in BaseAgent.__mro__]


def containers(agent: BaseAgent) -> dict[str, Any]:
    """Return the lists, dicts and sets that an agent and its classes hold, by attribute."""
    tables = [*map(vars, classes(agent)), vars(agent)]
    found = {name: value for table in tables for name, value in table.items()}
    return {k: v for k, v in found.items() if type(v) in CONTAINERS and not k.startswith("__")}


def contents(value: Any) -> list[Any]:
    """Return a container, what is in it and in the containers in it: two lists can be compared."""
    found, waiting, seen = [], [value], set()
    while waiting:
        item = waiting.pop()
        found.append(item)
        if type(item) in CONTAINERS and id(item) not in seen:
            seen.add(id(item))
            waiting += [*item, *item.values()] if isinstance(item, dict) else item
    return found


def fresh(value: Any, copies: dict[int, Any]) -> Any:
    """Copy a container and the containers in it; `copies` maps the id of each to its copy."""
    if type(value) not in CONTAINERS:
        return value
    if id(value) not in copies:
        made = copies[id(value)] = copy.copy(value)
        if not isinstance(made, set):
            for key, item in list(made.items() if isinstance(made, dict) else enumerate(made)):
                made[key] = fresh(item, copies)
    return copies[id(value)]


def scan(config: PluginsConfig, agents: Settings, environ: Mapping[str, str]) -> dict[str, Plugin]:
    """Return the plugins by command, read from their folders; nothing is imported yet.

    Raises ConfigError for a table without a plugin.
    """
    plugins: dict[str, Plugin] = {}
    unused = set(agents)
    for folder in folders(config.dirs):
        name = folder.name.removesuffix("_agent").lower()
        plugin = Plugin(name, folder)
        unused.discard(name)
        taken = name in plugins
        try:
            if taken:
                raise PluginLoadError(f"/{name} is {plugins[name].folder} already")
            plugin.config = read_config(plugin, agents.get(name, {}), environ)
        except PluginLoadError as exc:
            plugin.error = exc
            plugin.config = AgentConfig() if taken else guess(folder, agents.get(name))
        plugin.description = plugin.config.description
        if not config.only or name in config.only:
            # The second of a command is listed under a name that nobody can type.
            plugins[f"{name} ({folder})" if taken or name in RESERVED else name] = plugin
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


def read_config(plugin: Plugin, table: Any, environ: Mapping[str, str]) -> AgentConfig:
    """Return `config.json` with the operator's table over it.

    Raises PluginLoadError, whose `where` is the file in which the wrong key stands.
    """
    name, folder = plugin.name, plugin.folder
    file, place = str(folder / "config.json"), f"osp.toml: [agents.{name}]"
    with located(file):
        if name in RESERVED or not NAME.fullmatch(name):
            raise ConfigError(f"{name!r} cannot be a command: letters, digits, _ and - can")
        declared = checked(read_json(folder), file, folder)
    with located(place):
        over = checked(table, place, folder)
        for what in ("settings", "arguments"):
            known = getattr(declared, what)
            for key in getattr(over, what):
                if known and key not in known:
                    text = f"{place}: unknown {what[:-1]} {key!r}; known are {', '.join(known)}"
                    raise ConfigError(text)
        for key in over.arguments.keys() & declared.arguments.keys():
            kind = type(declared.arguments[key])
            convert(over.arguments[key], kind, f"{place}: arguments: {key}", folder)
    settings = {**declared.settings, **over.settings}
    for key, value in settings.items():
        with located(place if key in over.settings else file):
            settings[key] = resolved(value, environ)
    merged = {key: getattr(over, key) for key in table}
    merged |= {"settings": settings, "arguments": {**declared.arguments, **over.arguments}}
    return replace(declared, **merged)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Raise what is wrong with settings as a PluginLoadError that says where they stand."""
    try:
        yield
    except (OSError, ValueError, ArithmeticError, RecursionError, ConfigError) as exc:
        raise PluginLoadError(str(exc), type(exc).__name__, where) from exc


def read_json(folder: Path) -> Any:
    file = folder / "config.json"
    return loads(file.read_bytes()) if os.path.lexists(file) else {}


def checked(table: Any, where: str, folder: Path) -> AgentConfig:
    """Return the settings in a table. Raises ConfigError for what cannot work."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: the settings of an agent must be a table")
    config = build(AgentConfig, table, where, folder)
    for key, value in {"priority": config.priority, **config.arguments}.items():
        if not isinstance(value, str | int | float):
            raise ConfigError(f"{where}: arguments: {key} must be a string, a number or a boolean")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {key}: {value} is wrong here, it must be finite")
    return config


def guess(folder: Path, over: Any) -> AgentConfig:
    """Guess from settings that are wrong whether they are a guard's: in doubt they are."""
    try:
        table = read_json(folder)
    except (ValueError, RecursionError):  # no JSON: "abort" anywhere in it makes a guard
        text = (folder / "config.json").read_bytes().replace(b"\0", b"").lower()
        table = {"always": b"abort" in text, "on_error": "abort"}
    except OSError:
        table = {"always": True, "on_error": "abort"}
    found: dict[str, Any] = {}
    for each in (table, over):
        found |= each if isinstance(each, dict) else {}
    return AgentConfig(
        enabled=found.get("enabled") is not False,
        always=found.get("always", False) is not False,
        on_error="skip" if found.get("on_error", "skip") == "skip" else "abort",
    )


def resolved(value: Any, environ: Mapping[str, str]) -> Any:
    """Return the environment's value for `"$NAME"`, and any other value as it is."""
    if not isinstance(value, str) or not re.fullmatch(r"\$[A-Za-z_]\w*", value):
        return value
    if value[1:] not in environ:
        raise ConfigError(f"settings: {value} is not set in the environment")
    return environ[value[1:]]


def loaded(plugins: Mapping[str, Plugin]) -> list[str]:
    """Return the names of those that can be asked for."""
    return [name for name, plugin in plugins.items() if plugin.agent is not None]
