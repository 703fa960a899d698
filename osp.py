"""Ollama Smart Proxy: the composition root and the command line.

`create_app` is the architecture: it makes one client, one registry and one collector and hands them
to the slices. `main` reads the settings and serves; what is process-wide (signals, logging,
`sys` settings, the environment) belongs to it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

import demo
from kernel import log
from kernel.access import Access
from kernel.client import OllamaClient
from kernel.config import HOME, Config, load, parse_upstream
from kernel.errors import ConfigError, UpstreamError
from kernel.log import AccessLog
from kernel.metrics import Metrics
from kernel.models import Presets
from kernel.plugin import loaded
from kernel.registry import PluginRegistry
from kernel.server import SETTINGS, Paths, Server, check_loop, listen, url_of
from slices import (
    chat,
    embeddings,
    generate,
    health,
    metrics,
    passthrough,
    plugins,
    tags,
)

logger = logging.getLogger("osp")

COMMANDS = ("serve", "check", "new-agent")
HELP = "serve (the default); check settings and agents; begin a new-agent NAME"


def create_registry(config: Config, environ: Mapping[str, str]) -> PluginRegistry:
    """Return the agents; `environ` is what settings like "$NAME" mean. Raises ConfigError."""
    return PluginRegistry(config.plugins, config.agents, config.server.data, environ)


def create_app(config: Config, registry: PluginRegistry | None = None) -> ASGIApp:
    """Return the proxy as an ASGI application. Raises ConfigError.

    Removing a slice is deleting its file and its lines here.
    """
    client = OllamaClient(parse_upstream(config.upstream.url), config.upstream.connect_timeout)
    collector = Metrics()
    registry = registry or create_registry(config, {})
    presets = Presets(config.presets, config.server.max_body)

    @asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[dict[str, Any]]:
        async with client, registry:
            await announce(client, registry)
            yield {"reload": registry.reload}  # what kernel/server.py does at SIGHUP

    own = [
        *health.routes(client, registry),
        *plugins.routes(registry, collector),
        *metrics.routes(collector),
    ]
    routes = [
        *chat.routes(client, registry, collector, presets, config.chain, config.commands),
        *generate.routes(client, registry, presets),
        *embeddings.routes(client, presets),
        *tags.routes(client, presets),
        *own,
    ]
    router = Paths(
        routes,
        default=passthrough.endpoint(client),
        redirect_slashes=False,
        lifespan=lifespan,
    )
    guard = Access(router, config.access, config.server.host, [route.path for route in own])
    return AccessLog(guard, collector, [route.path for route in routes])


async def announce(client: OllamaClient, registry: PluginRegistry) -> None:
    """Say at the start whether Ollama answers and which agents there are."""
    fields = {"url": client.upstream.url}
    try:
        fields["version"] = await client.version()
        logger.info("upstream answers", extra={"fields": fields})
    except UpstreamError as exc:
        fields["error"] = str(exc)
        logger.warning("upstream does not answer yet", extra={"fields": fields})
    fields = {"agents": " ".join(loaded(registry.plugins)) or "none"}
    logger.info("agents loaded", extra={"fields": fields})


async def serve(
    config: Config, environ: Mapping[str, str], listener: socket.socket, pace: float | None
) -> None:
    """Serve until a signal comes; with a `pace`, before a stand-in for Ollama that speaks at it."""
    async with AsyncExitStack() as stack:
        if pace is not None:
            url = await stack.enter_async_context(demo.serve(demo.create_app(pace)))
            config = replace(config, upstream=replace(config.upstream, url=url))
        grace = math.ceil(config.server.shutdown)
        app = create_app(config, create_registry(config, environ))
        proxy = Server(uvicorn.Config(app, timeout_graceful_shutdown=grace, **SETTINGS))
        logger.info("listening", extra={"fields": {"url": url_of(listener)}})
        await proxy.serve(sockets=[listener])


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "osp.py", description="Slash-command agents in front of Ollama, for every client."
    )
    parser.add_argument("command", nargs="?", default="serve", help=HELP)
    parser.add_argument("name", nargs="?", help="of the new agent")
    parser.add_argument("--config", type=Path, help="a settings file (default: osp.toml beside it)")
    parser.add_argument("--host", help="the address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="the port to listen on (default: 11435)")
    upstream = parser.add_mutually_exclusive_group()
    upstream.add_argument("--upstream", metavar="URL", help="Ollama (default: 127.0.0.1:11434)")
    upstream.add_argument(
        "--demo",
        metavar="SECONDS",
        nargs="?",
        type=float,
        const=0.03,
        help="use a built-in stand-in for Ollama, with so many seconds between two words",
    )
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if flags.command not in COMMANDS:
        parser.error(f"{flags.command!r} is no command; known are {', '.join(COMMANDS)}")
    if (flags.command == "new-agent") != (flags.name is not None):
        parser.error("new-agent needs a NAME, and nothing else takes one")
    return flags


def read_config(flags: argparse.Namespace, environ: Mapping[str, str]) -> Config:
    """Return the settings of file, environment and flags. Raises ConfigError."""
    if flags.demo is not None and not 0 <= flags.demo < 1e6:
        raise ConfigError(f"--demo: {flags.demo} is no time between two words, in seconds")
    beside = HOME / "osp.toml"
    file = flags.config or (beside if beside.exists() else None)
    given = {
        "server": {"host": flags.host, "port": flags.port},
        "upstream": {"url": flags.upstream},
    }
    said = {name: {k: v for k, v in keys.items() if v is not None} for name, keys in given.items()}
    return load(file, environ, said)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status.

    0 after a clean stop, 2 for bad settings; 1 where `check` found something wrong.
    """
    flags = parse_flags(arguments)
    environ = dict(os.environ)
    try:
        config = read_config(flags, environ)
        if flags.command != "serve":
            return author(flags, config, environ)
        log.configure(config.log.level, config.log.format)
        with listen(config.server.host, config.server.port) as listener:
            if flags.demo is None:
                check_loop(listener, parse_upstream(config.upstream.url))
            loop_factory = uvicorn.Config(create_app, log_config=None).get_loop_factory()
            # Not closed: what an agent left running and swallows its cancellation would hold it.
            asyncio.Runner(loop_factory=loop_factory).run(
                serve(config, environ, listener, flags.demo)
            )
    except ConfigError as exc:
        sys.stderr.write(f"osp.py: {exc}\n")
        return 1 if flags.command == "check" else 2
    return 0


def author(flags: argparse.Namespace, config: Config, environ: Mapping[str, str]) -> int:
    """Run a command for those who write agents, and return the exit status."""
    import testkit  # imports this file, and nobody else needs it

    if flags.command == "check":
        return asyncio.run(testkit.check(config, environ))
    return testkit.new_agent(flags.name, config)


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    os._exit(status)  # sys.exit would wait for the threads that agents left behind
