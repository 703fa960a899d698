"""Registry: finds the plugins, loads them, and says what failed and why.

A plugin is a folder with an `agent.py`, and perhaps a `config.json`. Its code is imported as a
package under a name of its own, so that `from .helper import ...` works and `sys.path` stays as it
is; from source each time, without bytecode, because a loader reads and never writes. A plugin that
fails is listed with its error, file and line, keeps its command, and stops nobody.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import itertools
import json
import logging
import re
import secrets
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal, Self

from kernel import agent as contract
from kernel.agent import BaseAgent, Clock, Context
from kernel.config import PluginsConfig, Settings, build
from kernel.errors import ConfigError, NotAllowed, PluginExecutionError, PluginLoadError
from kernel.hooks import HookRunner

logger = logging.getLogger(__name__)

HOOKS = ("on_request", "on_response", "on_chunk", "on_end")
RESERVED = ("help", "explain")  # commands that the proxy answers itself
POLL = 0.5  # seconds between two looks at the files, where they are watched
TEARDOWN = 5.0  # seconds: somebody waits for the end
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


class PluginRegistry:
    """The plugins of one app: enter it to load them, leave it to tear them down.

    `agents` are the tables `[agents.NAME]`, `data` the folder for what agents keep, and `environ`
    what a setting `"$NAME"` stands for. Raises ConfigError for an `[agents.NAME]` without a plugin.
    """

    def __init__(
        self, config: PluginsConfig, agents: Settings, data: Path, environ: Mapping[str, str]
    ) -> None:
        self._config = config
        self._data = data
        self._finder = SourceFinder(f"osp_{secrets.token_hex(4)}_")
        self._numbers = itertools.count(1)
        self._scan = partial(scan, config, agents, environ)
        self._reloading = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._burying: set[asyncio.Task[None]] = set()
        self._loading: list[Plugin] = []
        self._retired: set[Plugin] = set()  # replaced, but requests are under way with them
        self.plugins: Mapping[str, Plugin] = self._scan()

    async def __aenter__(self) -> Self:
        sys.meta_path.insert(0, self._finder)  # the ordinary finder would leave bytecode
        before = stamps(self._config.dirs)
        await asyncio.gather(*(self._load(plugin) for plugin in self.plugins.values()))
        if self._config.watch:
            self._watching = asyncio.create_task(self._watch(before))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._watching:
            self._watching.cancel()
        everyone = {*self.plugins.values(), *self._loading, *self._retired}
        await asyncio.gather(*self._burying, *(self._teardown(plugin) for plugin in everyone))
        sys.meta_path.remove(self._finder)

    async def reload(self, unchanged: Collection[Path] = ()) -> None:
        """Load all plugins again, but for those in the folders that are `unchanged`.

        One that fails keeps its last good version. Requests under way go on with what they began
        with, which is torn down when the last of them has ended.
        """
        async with self._reloading:
            try:
                found = self._scan()
            except (ConfigError, OSError) as exc:
                fields = {"error": str(exc)}
                return logger.warning("plugins stay as they are", extra={"fields": fields})
            before = {plugin.folder: (name, plugin) for name, plugin in self.plugins.items()}
            plugins = {}
            for name, plugin in found.items():
                old_name, old = before.get(plugin.folder, (name, plugin))
                won = found.get(plugin.name) is plugin  # else another folder has its command
                if won and old.agent and plugin.folder in unchanged:
                    plugins[old_name] = old
                    continue
                self._loading.append(plugin)
                await self._load(plugin)
                if won and plugin.error and old.agent:
                    old.error = plugin.error
                    plugins[old_name] = old
                else:
                    plugins[name] = plugin
            self._retired |= set(self.plugins.values()) - set(plugins.values())
            self.plugins = plugins
            self._loading.clear()
            self._bury()
        fields = {"agents": " ".join(loaded(self.plugins)) or "none"}
        logger.info("agents loaded", extra={"fields": fields})

    @contextmanager
    def lease(self, plugins: Sequence[Plugin]) -> Iterator[None]:
        """Keep plugins from being torn down inside the block, in which a request is served."""
        for plugin in plugins:
            plugin.leases += 1
        try:
            yield
        finally:
            for plugin in plugins:
                plugin.leases -= 1
            if self._retired:
                self._bury()

    def _bury(self) -> None:
        """Tear down what was replaced and is not in use any more."""
        for plugin in [plugin for plugin in self._retired if not plugin.leases]:
            self._retired.discard(plugin)
            task = asyncio.create_task(self._teardown(plugin))
            self._burying.add(task)
            task.add_done_callback(self._burying.discard)

    async def _watch(self, before: Stamps) -> None:
        while True:
            await asyncio.sleep(POLL)
            now = await asyncio.to_thread(stamps, self._config.dirs)
            if now != before:
                unchanged = [folder for folder in now if now[folder] == before.get(folder)]
                before = now
                await self.reload(unchanged)

    def always(self, model: str) -> list[Plugin]:
        """Return the loaded agents that take part in every chat with a model, in their order."""
        found = [p for p in self._bound(model) if p.agent]
        return sorted(found, key=lambda plugin: (plugin.config.priority, plugin.name))

    def guards(self, model: str | None = None) -> list[Plugin]:
        """Return the agents that must see what a model (None: any) is asked, loaded or not.

        Those are always on, and nothing may go on without them: `on_error = "abort"`.
        """
        return [plugin for plugin in self._bound(model) if plugin.is_guard]

    def check_guards(self, model: str | None) -> None:
        """Raise NotAllowed for a request that no agent sees, if a guard of its model had to."""
        for guard in self.guards(model):
            raise refusal(guard)

    def _bound(self, model: str | None) -> list[Plugin]:
        """Return what is always on for a model, or for any."""
        on = [p for p in self.plugins.values() if p.config.always and p.config.enabled]
        return [p for p in on if model is None or matches(model, p.config.models)]

    async def _load(self, plugin: Plugin) -> None:
        """Import, construct and set up; what goes wrong ends up in `plugin.error`."""
        limit = self._config.setup_timeout
        try:
            if plugin.error is None and plugin.config.enabled:
                agent = await plugin.runner.run(self._make, plugin, clock=Clock(limit))
                await plugin.runner.run(agent.setup, clock=Clock(limit))
                plugin.agent = agent
        except Exception as exc:  # a plugin is foreign code, and may even raise Reply here
            plugin.error = load_error(exc, plugin.folder)
            self._forget(plugin)
        if plugin.error:
            complain("agent failed to load", plugin, plugin.error)

    def _make(self, plugin: Plugin) -> BaseAgent:
        """Import the plugin's code and return its agent; runs in a thread."""
        folder = plugin.folder
        name = plugin.module = f"{self._finder.prefix}{next(self._numbers)}_{folder.name}"
        loader = SourceOnly(name, str(folder / "agent.py"))
        spec = importlib.util.spec_from_loader(name, loader, is_package=True)
        assert spec
        spec.submodule_search_locations = [str(folder)]
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs: dataclasses look their module up
        loader.exec_module(module)
        kind = agent_class(module)
        shared = [k for k, v in vars(kind).items() if is_state(k, v)]
        if shared:
            cure = "make it in on_request, or in setup if hooks only read it"
            fields = {"agent": plugin.name, "attributes": " ".join(shared), "cure": cure}
            logger.warning("agent's class is shared by all requests", extra={"fields": fields})
        agent = kind()
        plugin.hooks = tuple(h for h in HOOKS if getattr(kind, h) is not getattr(BaseAgent, h))
        try:
            agent.settings = plugin.config.settings
            agent._data_dir = self._data / plugin.name
            copy.copy(agent).arguments = {}
        except Exception as exc:  # whatever a class does about copies and assignments
            raise PluginLoadError(f"its instances cannot be copied for a request: {exc}") from exc
        return agent

    async def _teardown(self, plugin: Plugin) -> None:
        agent, plugin.agent = plugin.agent, None
        try:
            if agent:
                await plugin.runner.run(agent.teardown, clock=Clock(TEARDOWN))
        except Exception as exc:  # the last word of foreign code; nothing depends on it
            complain("agent failed to tear down", plugin, load_error(exc, plugin.folder))
        self._forget(plugin)

    def _forget(self, plugin: Plugin) -> None:
        name = plugin.module
        for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[key]


Stamps = dict[Path, list[tuple[str, int, int]]]


def stamps(dirs: Sequence[Path]) -> Stamps:
    """Return name, time and size of the files of each plugin that a reload would read anew."""
    found: Stamps = {}
    for folder in (folder for directory in dirs for folder in directory.glob("*/")):
        files = [*folder.rglob("*.py"), folder / "config.json"]
        with suppress(OSError):  # it may be gone again
            known = [(str(file), file.stat()) for file in files if file.exists()]
            found[folder] = sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in known)
    return found


def scan(config: PluginsConfig, agents: Settings, environ: Mapping[str, str]) -> dict[str, Plugin]:
    """Return the plugins by command, read from their folders; nothing is imported yet."""
    plugins: dict[str, Plugin] = {}
    unused = set(agents)
    for folder in folders(config.dirs):
        name = folder.name.removesuffix("_agent").lower()
        plugin = Plugin(name, folder)
        unused.discard(name)
        try:
            plugin.config = read_config(folder, agents.get(name, {}), environ)
            plugin.name = command_of(name, plugin.config)
        except PluginLoadError as exc:
            plugin.error = exc
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
        for key in said.settings:
            if declared.settings and key not in declared.settings:
                known = ", ".join(declared.settings)
                raise ConfigError(f"unknown setting {key!r}; known are {known}")
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


def refusal(guard: Plugin) -> NotAllowed:
    why = "cannot see this request" if guard.agent else "is not loaded"
    return NotAllowed(f"the agent {guard.name} {why}, and nothing may pass without it")


def promised(folder: Path, overrides: Any) -> AgentConfig:
    """Return what can be made out of settings that are wrong: are they those of a guard?"""
    file = folder / "config.json"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    table = overrides if isinstance(overrides, dict) else {}

    enabled = table.get("enabled", not re.search(r'"enabled"\s*:\s*false', text))
    always = table.get("always", bool(re.search(r'"always"\s*:\s*true', text)))
    on_error = table.get("on_error", "abort" if '"abort"' in text else "skip")
    return AgentConfig(
        enabled=enabled is not False,
        always=always is not False,
        on_error="skip" if on_error == "skip" else "abort",
    )


def canonical(model: str) -> str:
    """Return a model's name as Ollama takes it (ParseName in its types/model/name.go).

    A scheme, the registry, the library and the tag may be left out or be there, newer ones take
    `:local` for where it is, and no case is told from another.
    """
    name = model.strip().lower().removesuffix(":local")
    name = re.sub(r"^(?:.*?://)?(?:registry\.ollama\.ai/)?(?:library/)?", "", name)
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def matches(model: str, patterns: Sequence[str]) -> bool:
    """Tell whether one of the patterns means a model; none at all means every one."""
    name = canonical(model)
    names = {model.lower(), name, name.removesuffix(":latest")}
    exact = {canonical(pattern) for pattern in patterns if not set(pattern) & set("*?[")}
    meant = exact | {pattern.lower() for pattern in patterns}
    return not patterns or any(fnmatchcase(n, pattern) for n in names for pattern in meant)


def resolved(value: Any, environ: Mapping[str, str]) -> Any:
    """Return the environment's value for `"$NAME"`, and any other value as it is."""
    if not isinstance(value, str) or not re.fullmatch(r"\$[A-Za-z_]\w*", value):
        return value
    if value[1:] not in environ:
        raise ConfigError(f"settings: {value} is not set in the environment")
    return environ[value[1:]]


def command_of(name: str, config: AgentConfig) -> str:
    command = (config.command or name).lower()
    if command in RESERVED or not NAME.fullmatch(command):
        raise PluginLoadError(f"{command!r} cannot be a command: letters, digits, _ and - can")
    return command


def agent_class(module: ModuleType) -> type[BaseAgent]:
    """Return the one subclass of BaseAgent that a module defines. Raises PluginLoadError."""
    kinds = {kind: None for kind in vars(module).values() if isinstance(kind, type)}
    found = [k for k in kinds if issubclass(k, BaseAgent) and k.__module__ == module.__name__]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise PluginLoadError(f"agent.py must define one subclass of BaseAgent; found: {names}")
    return found[0]


def is_state(name: str, value: object) -> bool:
    """Tell whether a class's attribute looks like what hooks change: no constant, no dunder."""
    return name.islower() and not name.startswith("__") and isinstance(value, list | dict | set)


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
        if (folder / f"{first}.py").exists() or (folder / first).is_dir():
            return f"; what is beside agent.py is imported with a dot: from .{first} import ..."
        if inner:
            return f"; there is no {name.rpartition('.')[2]}.py there"
        return f"; install it for the Python that runs the proxy: {sys.executable} -m pip install"
    if isinstance(exc, TypeError) and "__init__() missing" in str(exc):
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


class SourceOnly(SourceFileLoader):
    """Compiles the source each time: no stale bytecode is read, and none is written."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class SourceFinder(MetaPathFinder):
    """Finds the helpers beside an `agent.py`, for the packages whose name begins with `prefix`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is None or not fullname.startswith(self.prefix):
            return None
        return FileFinder(next(iter(path)), (SourceOnly, [".py"])).find_spec(fullname)
