"""Plugin: a folder with an agent: its settings, and what became of it when it was loaded.

`scan` reads the folders and their `config.json`, with the operator's tables over it; nothing is
imported here. A plugin that fails keeps its command and says why.
"""

from __future__ import annotations

import asyncio
import copy
import os
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import getmembers_static
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

from kernel.agent import BaseAgent, Context
from kernel.config import PluginsConfig, Seconds, Settings, build, convert, resolved
from kernel.dialects import loads
from kernel.errors import ConfigError, PluginLoadError

RESERVED = ("help", "explain", "yes")  # commands that the proxy answers itself
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
THREADS = 2  # of one plugin at the same time: hooks that hang fill its own places only
CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter)


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """The keys of `config.json`, all optional; `[agents.NAME]` in `osp.toml` mirrors them."""

    description: str = ""  # default: the first line of the class's docstring
    enabled: bool = True
    always: bool = False  # in play without being asked for
    priority: Annotated[float, "finite", isfinite] = 0.0  # of those: lowest first
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
    tools: list[str] = field(default_factory=list)  # names of those that it offered last
    own: dict[str, list[Any]] = field(default_factory=dict)  # `contents` that requests get anew
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

    def keep_unchanged(self, agent: BaseAgent) -> None:
        """Forget the containers that `setup` replaced or filled: those are shared by requests."""
        after = owned(agent)
        for name, found in [*self.own.items()]:
            if [*map(id, found)] != [*map(id, after.get(name, ()))]:
                del self.own[name]

    def instance(self, context: Context, arguments: Settings) -> BaseAgent:
        """Return a copy of the agent for one request.

        What its hooks assign to `self` stays in the request. Lists, dicts and sets (and those in
        them) that `__init__` or the class made are copied, too. All else is shared: what `setup`
        assigned, a container that it filled, and objects of other types. Runs no code of the agent.
        """
        assert self.agent is not None
        shared = vars(self.agent)
        # One that was replaced later is the same for all requests.
        own = {n: made for n, (made, *_) in self.own.items() if shared.get(n, made) is made}
        # What `deepcopy` finds here it takes as it is.
        kept = {id(item): item for item in contents(own) if type(item) not in CONTAINERS}
        agent = object.__new__(type(self.agent))
        vars(agent).update(shared | copy.deepcopy(own, kept))
        vars(agent).update(context=context, arguments=arguments)
        return agent


def owned(agent: BaseAgent) -> dict[str, list[Any]]:
    """Return the `contents` of the lists, dicts and sets of an agent and its class, by name."""
    members = getmembers_static(agent)
    return {n: contents(made) for n, made in members if type(made) in CONTAINERS and n[:2] != "__"}


def contents(value: Any) -> list[Any]:
    """Return a container, what is in it and in the containers in it, always in the same order."""
    found, seen = [value], set()
    for item in found:
        if type(item) in CONTAINERS and id(item) not in seen:
            seen.add(id(item))
            found += [*item, *item.values()] if isinstance(item, dict) else item
            found.append(getattr(item, "default_factory", None))
    return found


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
        config = layered(AgentConfig(), read_json(folder), file, folder)
    with located(place):
        config = layered(config, table, place, folder)
    settings = dict(config.settings)
    for key, value in settings.items():
        with located(place if key in table.get("settings", ()) else file):
            settings[key] = resolved(value, environ, "settings")
    return replace(config, settings=settings)


def layered(below: AgentConfig, table: Any, where: str, folder: Path) -> AgentConfig:
    """Return the settings in a table over those `below`. Raises ConfigError."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: the settings of an agent must be a table")
    over = build(AgentConfig, table, where, folder)
    merged = {key: getattr(over, key) for key in table}
    for what in ("settings", "arguments"):
        known = getattr(below, what)
        merged[what] = {**known, **getattr(over, what)}
        if known and (unknown := merged[what].keys() - known):
            text = f"unknown {what[:-1]} {min(unknown)!r}; known are {', '.join(known)}"
            raise ConfigError(f"{where}: {text}")
    for key, value in over.arguments.items():
        place = f"{where}: arguments: {key}"
        convert(value, type(below.arguments.get(key, value)), place, folder)
        if not (isinstance(value, str | int) or (isinstance(value, float) and isfinite(value))):
            text = f"{value!r} is wrong here, it must be text, true, false or a finite number"
            raise ConfigError(f"{place}: {text}")
    return replace(below, **merged)


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


def guess(folder: Path, over: Any) -> AgentConfig:
    """Guess from settings that are wrong whether they are a guard's: in doubt they are."""
    try:
        table = read_json(folder)
    except (OSError, ValueError, RecursionError) as exc:  # no JSON: "abort" anywhere makes a guard
        unread = isinstance(exc, OSError)
        text = b"" if unread else (folder / "config.json").read_bytes().replace(b"\0", b"").lower()
        table = {"always": unread or b"abort" in text, "on_error": "abort"}
    found = {key: value for t in (table, over) if isinstance(t, dict) for key, value in t.items()}
    return AgentConfig(
        enabled=found.get("enabled") is not False,
        always=found.get("always", False) is not False,
        on_error="skip" if found.get("on_error", "skip") == "skip" else "abort",
    )


def loaded(plugins: Mapping[str, Plugin]) -> list[str]:
    """Return the names of those that can be asked for."""
    return [name for name, plugin in plugins.items() if plugin.agent is not None]
