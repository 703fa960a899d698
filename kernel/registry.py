"""Registry: finds the plugins, loads each once, and knows which are always on.

The code of a plugin is imported as a package under a private name, so that
`from .helper import ...` works and `sys.path` stays as it is. A plugin that fails is listed with
its error and stops no other. Loading it again is a restart of the proxy.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import secrets
import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Self

from kernel.agent import BaseAgent, Reply
from kernel.config import PluginsConfig, Settings
from kernel.errors import NotAllowed, OSPError, PluginLoadError
from kernel.foreign import load_error, safe_text
from kernel.hooks import HookRunner
from kernel.models import matches
from kernel.plugin import Plugin, owned, scan
from kernel.store import Database, Store
from kernel.tools import offered_by

logger = logging.getLogger(__name__)

CHAT = "send a chat in plain JSON, without logprobs or a format"
HOOKS = ("on_request", "on_response", "on_chunk", "on_end", "on_tool", "on_calls")


class PluginRegistry:
    """The plugins of one app: enter it to load them, leave it to tear them down.

    `agents` are the tables `[agents.NAME]`, `data` the folder for what agents keep, and `environ`
    what a setting `"$NAME"` stands for. Raises ConfigError for an `[agents.NAME]` without a plugin.
    """

    setup_limit = 60.0  # seconds, for the import and for setup
    teardown_limit = 5.0
    database: Database | None = None  # has the stores of agents; without it they are in `data`

    def __init__(
        self, config: PluginsConfig, agents: Settings, data: Path, environ: Mapping[str, str]
    ) -> None:
        self._data = data
        self._prefix = f"osp_{secrets.token_hex(4)}_"  # of the modules: one app's are not another's
        self._set_up: dict[Plugin, BaseAgent] = {}  # whose setup began and did not fail
        self.plugins: Mapping[str, Plugin] = scan(config, agents, environ)
        on = [p for p in self.plugins.values() if p.config.enabled and p.config.always]
        self.always_on = sorted(on, key=attrgetter("config.priority", "name"))

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*map(self._load, self.plugins.values()))
        except BaseException:  # the end came in the middle
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.sleep(0)  # a setup that was cancelled ends before its teardown begins
        await asyncio.gather(*map(self._tear_down, self.plugins.values()))
        if self.database:
            await self.database.close()
        for name in [name for name in sys.modules if name.startswith(self._prefix)]:
            del sys.modules[name]

    def always(self, models: Sequence[str]) -> list[Plugin]:
        """Return the loaded agents that take part in every chat with a model, in their order.

        `models` are the request's model and, for a preset, the model that it stands for.
        """
        return [p for p in self.always_on if p.agent is not None and is_bound(p, models)]

    def guards(self, models: Sequence[str] | None) -> list[Plugin]:
        """Return the guards of a model (None: any), loaded or not."""
        return [p for p in self.always_on if p.is_guard and is_bound(p, models)]

    def check_guards(self, models: Sequence[str] | None) -> None:
        """Raise NotAllowed for a request that no agent sees, if a guard of its model had to."""
        for guard in self.guards(models):
            raise refusal(guard)

    async def _load(self, plugin: Plugin) -> None:
        """Import, construct and set up; what goes wrong ends up in `plugin.error`."""
        try:
            if plugin.error is None and plugin.config.enabled:
                runner = HookRunner(plugin, self.setup_limit)
                agent = await runner.run(self, "_make", (plugin,))
                self._set_up[plugin] = agent
                await runner.run(agent, "setup", (), lambda _: plugin.keep_unchanged(agent))
                plugin.tools = [tool["name"] for tool in offered_by(agent)]
                plugin.agent = agent
        except (OSPError, Reply) as exc:
            self._set_up.pop(plugin, None)
            plugin.error = load_error(exc, plugin.folder)
        if error := plugin.error:
            fields = {"agent": plugin.name, "error": f"{error.kind}: {error}", "where": error.where}
            logger.warning("agent failed to load", extra={"fields": fields})

    def _make(self, plugin: Plugin) -> BaseAgent:
        """Import the plugin's code and return its agent; runs in a thread."""
        name, folder = self._prefix + plugin.name, plugin.folder
        spec = importlib.util.spec_from_file_location(
            name, folder / "agent.py", submodule_search_locations=[str(folder)]
        )
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs: dataclasses look their module up
        spec.loader.exec_module(module)
        kind = agent_class(module)
        agent = kind()
        try:
            object.__new__(kind)
            if getattr(kind, "__slots__", ()):
                raise TypeError("it has __slots__")
            agent.settings = plugin.config.settings
            agent._data_dir = self._data / plugin.name
            agent._store = cache(partial(self._open_store, plugin.name, agent))
            plugin.own = owned(agent)
        except Exception as exc:  # a frozen dataclass, say
            raise PluginLoadError(f"its instances cannot be copied for a request: {exc}") from exc
        plugin.hooks = tuple(h for h in HOOKS if getattr(kind, h) is not getattr(BaseAgent, h))
        doc = safe_text(lambda: kind.__doc__ or "").strip()
        plugin.description = plugin.config.description or doc.partition("\n")[0]
        return agent

    def _open_store(self, name: str, agent: BaseAgent) -> Store:
        if self.database:
            return self.database.store(name, agent.schema)
        from kernel.sqlite import SQLite  # nobody pays for what no agent uses

        return SQLite(name, agent._data_dir, agent.schema)

    async def _tear_down(self, plugin: Plugin) -> None:
        agent, plugin.agent = self._set_up.pop(plugin, None), None
        if agent is not None:
            try:
                await HookRunner(plugin, self.teardown_limit).run(agent, "teardown")
            except (OSPError, Reply) as exc:  # the last word of foreign code
                error = load_error(exc, plugin.folder)
                fields = {"agent": plugin.name, "error": error.kind, "where": error.where}
                logger.warning("agent failed to tear down", extra={"fields": fields})


def is_bound(plugin: Plugin, models: Sequence[str] | None) -> bool:
    """Tell whether an always-on plugin takes part for one of the models (None: any)."""
    patterns = plugin.config.models
    return models is None or any(matches(model, patterns) for model in models)


def refusal(guard: Plugin, path: str = "") -> NotAllowed:
    """Return the error for a request that a guard cannot see; `path` is one that it might allow."""
    why = "is not loaded" if guard.agent is None else "cannot see this request"
    text = f"the agent {guard.name} {why}, and nothing may pass without it"
    if path:
        exempt = f"exempt = [{json.dumps(path)}] under [agents.{guard.name}] in osp.toml"
        return NotAllowed(f"{text}; use a chat endpoint, or allow this path: {exempt}")
    cure = "GET /plugins says why" if guard.agent is None else CHAT
    return NotAllowed(f"{text}; {cure}")


def agent_class(module: ModuleType) -> type[BaseAgent]:
    """Return the one subclass of BaseAgent that a module defines. Raises PluginLoadError."""
    kinds = {kind: None for kind in vars(module).values() if isinstance(kind, type)}
    found = [k for k in kinds if issubclass(k, BaseAgent) and k.__module__ == module.__name__]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise PluginLoadError(f"agent.py must define one subclass of BaseAgent; found: {names}")
    return found[0]
