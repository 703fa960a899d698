"""MCP: offers the model the tools of MCP servers (https://modelcontextprotocol.io).

`/mcp` offers the tools of all servers that the operator has set up, `/mcp:time` those of one:
every tool costs tokens, and a small context has no room for a hundred. Here is what one request
offers and calls; `rules.py` reads settings, tools and results, `servers.py` keeps servers running.
The SDK costs 25 MB of memory, so `servers.py` is imported only where a server is set up.

What a server says of its tools, and what they return, is a stranger's text, which the model reads;
nothing else is done with it. No prompt can name a command, a URL or a variable.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from kernel.agent import Abort, BaseAgent, Message, Payload, Reply, fold

from .rules import ToolError, check_server, contents, tool_name

if TYPE_CHECKING:
    from .servers import Server

USAGE = """No MCP server is set up. In osp.toml, one begins with [agents.mcp.settings.servers.NAME]
and has the keys of an mcpServers file, like command = "uvx" and args = ["mcp-server-time"]."""
SHARE = 0.9  # of the hook's time: how long a request waits for servers that are starting


class MCP(BaseAgent):
    """Offers the model the tools of MCP servers."""

    servers: dict[str, Server]  # by their names as `fold` has them; shared by all requests
    offered: dict[str, tuple[Server, str]]  # this request's tools: their server and its own name

    async def setup(self) -> None:
        self.servers = {}
        for name, config in self.settings["servers"].items():
            check_server(name, config)
            from .servers import Server, silence

            silence()
            self.servers[fold(name)] = Server(name, config, self.settings["start_timeout"])

    @property
    def progress(self) -> str:  # type: ignore[override]
        """What each server does, for GET /plugins."""
        return "; ".join(f"{server.name}: {server.status}" for server in self.servers.values())

    async def on_request(self, payload: Payload) -> Payload:
        if not self.servers and self.context.asked:
            raise Reply(USAGE)
        names, _, tool = self.arguments["server"].partition("=")
        servers = await self.answering(names)
        self.offer(servers, self.arguments["tool"] or tool or "*")
        return payload

    async def answering(self, names: str) -> list[Server]:
        """Return the servers that `time+fetch` names ("": all), started and with their tools.

        Raises Abort for a name that there is not, or where a server that was named, or every one,
        does not answer.
        """
        keys = [fold(name.strip()) for name in names.split("+")] if names else [*self.servers]
        if unknown := set(keys) - self.servers.keys():
            known = ", ".join(server.name for server in self.servers.values())
            raise Abort(400, f"there is no MCP server {min(unknown)!r}; known are: {known}")
        servers = [self.servers[key] for key in dict.fromkeys(keys)]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.context.clock.left() * SHARE):
                await asyncio.gather(*(s.refresh() for s in servers), return_exceptions=True)
        silent = [f"{s.name}: {s.status}" for s in servers if not s.session]
        if silent and (names or len(silent) == len(servers)):
            text = f"no answer from the MCP server {'; '.join(silent)}"
            raise Abort(502, text) if self.context.asked else ToolError(text)
        return [server for server in servers if server.session]

    def offer(self, servers: list[Server], pattern: str) -> None:
        """Set the tools of this request; raise Abort if the pattern fits none."""
        self.tools, self.offered = [], {}
        for server, own in ((each, own) for each in servers for own in each.tools):
            if fnmatchcase(own, pattern):
                name = tool_name(server.name, own)
                while name in self.offered:  # two that differ only in signs, or in length
                    name += "_"
                self.offered[name] = server, own
                self.tools.append({"name": name, **server.tools[own]})
        if pattern != "*" and not self.tools:
            known = ", ".join(own for server in servers for own in server.tools)
            raise Abort(400, f"there is no tool {pattern!r}; known are: {known[:1000]}")

    async def on_tool(self, name: str, arguments: dict[str, Any]) -> str | list[Message]:
        server, own = self.offered[name]
        result = await server.call(own, arguments)
        return contents(result, self.settings["max_chars"], images=self.settings["images"])

    async def teardown(self) -> None:
        await asyncio.gather(*(server.stop() for server in self.servers.values()))
