"""Registry: loads the plugins, loads them again, and lends them to requests.

Their code is imported as a package under a name of its own, so that `from .helper import ...` works
and `sys.path` stays as it is; from source each time, without bytecode, because a loader reads and
never writes. What fails stops nobody, and keeps its last good version if it had one.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import itertools
import logging
import secrets
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Self

from kernel.agent import BaseAgent, Clock
from kernel.config import PluginsConfig, Settings
from kernel.errors import ConfigError, PluginLoadError
from kernel.models import matches
from kernel.plugin import Plugin, complain, load_error, loaded, refusal, scan

logger = logging.getLogger(__name__)

HOOKS = ("on_request", "on_response", "on_chunk", "on_end")
POLL = 0.5  # seconds between two looks at the files, where they are watched
TEARDOWN = 5.0  # seconds: somebody waits for the end


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
        self._reloads: set[asyncio.Task[None]] = set()  # one works, the others wait for it
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
        under_way = [*self._reloads, *filter(None, [self._watching])]
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        everyone = {*self.plugins.values(), *self._loading, *self._retired}
        await asyncio.gather(*self._burying, *(self._teardown(plugin) for plugin in everyone))
        sys.meta_path.remove(self._finder)

    async def reload(self, unchanged: Collection[Path] = ()) -> None:
        """Load all plugins again, but for those in the folders that are `unchanged`.

        One that fails keeps its last good version. Requests under way go on with what they began
        with, which is torn down when the last of them has ended.
        """
        task = asyncio.create_task(self._reload(unchanged))
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)
        await task

    async def _reload(self, unchanged: Collection[Path]) -> None:
        async with self._reloading:
            try:
                await self._replace(unchanged)
            except (ConfigError, OSError) as exc:
                fields = {"error": str(exc)}
                return logger.warning("plugins stay as they are", extra={"fields": fields})
        fields = {"agents": " ".join(loaded(self.plugins)) or "none"}
        logger.info("agents loaded", extra={"fields": fields})

    async def _replace(self, unchanged: Collection[Path]) -> None:
        found = self._scan({plugin.folder: plugin.name for plugin in self.plugins.values()})
        before = {plugin.folder: (name, plugin) for name, plugin in self.plugins.items()}
        plugins: dict[str, Plugin] = {}
        for name, plugin in found.items():
            old = before.get(plugin.folder, (name, plugin))[1]
            lost = found.get(plugin.name) is not plugin  # another folder has its command
            if lost or not old.agent or plugin.folder not in unchanged:
                self._loading.append(plugin)
        await asyncio.gather(*(self._load(plugin) for plugin in self._loading))
        for name, plugin in found.items():
            old_name, old = before.get(plugin.folder, (name, plugin))
            lost = found.get(plugin.name) is not plugin
            if plugin not in self._loading:
                plugins[old_name] = old
            elif plugin.error and old.agent and not lost:
                plugins[old_name], old.error = old, plugin.error
            else:
                plugins[name] = plugin
        self._retired |= set(self.plugins.values()) - set(plugins.values())
        self.plugins = plugins
        self._loading.clear()
        self._bury()

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

    def always_on(self) -> bool:
        """Tell whether some agent takes part without being asked, loaded or not."""
        return any(p.config.always and p.config.enabled for p in self.plugins.values())

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
    return not name.isupper() and not name.startswith("__") and isinstance(value, list | dict | set)


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
