# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "httptools>=0.7",
#     "starlette>=1.0",
#     "uvicorn>=0.50",
#     "uvloop>=0.21; sys_platform != 'win32'",
# ]
# ///
"""Ollama Smart Proxy: the composition root and the command line.

`create_app` is the architecture: it makes one client and one registry and hands them to the slices.
`main` reads the settings and serves; what is process-wide (signals, logging, `sys` settings, the
environment) belongs to it. Python 3.8 must be able to parse this file, to say what is missing.
"""

import sys
from importlib.util import find_spec

if sys.version_info < (3, 11) or not all(map(find_spec, ("httptools", "starlette", "uvicorn"))):
    python = "python3.11" if sys.version_info < (3, 11) else "python3"
    sys.stderr.write(
        f"{sys.argv[0]} needs Python 3.11, starlette and uvicorn; type: {python} -m venv .venv "
        f'&& .venv/bin/pip install -q ".[agents]" && .venv/bin/python {sys.argv[0]}\n'
    )
    sys.exit(2)

import asyncio
import json
import logging
import math
import os
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from socket import socket
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

import demo
from kernel import log
from kernel.access import Access, fresh_key, is_loopback
from kernel.client import OllamaClient
from kernel.config import HOME, Config, UpstreamConfig, load, parse_upstream, places, resolved
from kernel.errors import ConfigError, StoreError, UpstreamConnectionError, UpstreamError
from kernel.foreign import cure
from kernel.guards import Guards
from kernel.metrics import Metrics
from kernel.plugin import loaded
from kernel.presets import LEFT, Presets
from kernel.queue import FairQueue
from kernel.registry import PluginRegistry
from kernel.reload import Reloader
from kernel.server import SETTINGS, Paths, Server, check_loop, listen, url_of
from kernel.systemd import inherited
from kernel.tools import Consent
from kernel.traces import Traces
from slices import (
    chat,
    embeddings,
    generate,
    health,
    metrics,
    page,
    passthrough,
    plugins,
    tags,
    traces,
)

logger = logging.getLogger("osp")

VERSION = "0.1.0"  # as in pyproject.toml
HEALTH = 10.0  # seconds for an answer to the command `health`


def create_registry(config: Config, environ: Mapping[str, str]) -> PluginRegistry:
    """Return the agents; `environ` is what settings like "$NAME" mean. Raises ConfigError."""
    registry = PluginRegistry(config.plugins, config.agents, config.server.data, environ)
    if store := resolved(config.server.store, environ, "server.store"):
        try:
            from kernel.postgres import Postgres
        except ModuleNotFoundError as exc:
            raise ConfigError(f"server.store: {exc}{cure(exc, HOME)}") from exc
        registry.database = Postgres(store)
    return registry


def client_of(upstream: UpstreamConfig, queue: FairQueue | None = None) -> OllamaClient:
    """Return what asks the upstream of these settings."""
    address, credentials = parse_upstream(upstream.url), upstream.authorization
    return OllamaClient(address, upstream.connect_timeout, queue=queue, credentials=credentials)


def create_app(
    config: Config,
    registry: PluginRegistry | None = None,
    *,
    loopback: bool = True,
    write: log.Write = log.record,
) -> ASGIApp:
    """Return the proxy as an ASGI application. Raises ConfigError.

    `loopback` says that only this machine can connect; `write` writes the line of each request.
    To remove a slice, or the metrics, traces, presets or access rules, delete their lines here.
    """
    parallel = config.upstream.parallel
    collector = Metrics()
    queue = FairQueue(parallel, collector) if parallel else None
    client = client_of(config.upstream, queue)
    registry = registry or create_registry(config, {})
    kept = Traces(config.page, client)
    presets = Presets(config.presets, config.server.data)
    limit = config.server.max_body
    guards = Guards(registry, limit, presets=presets)
    consent = Consent(config.server.data, config.commands.prefix)

    @asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        async with client, registry, presets.kept(client):
            await announce(client, registry, config.commands.prefix)
            yield

    chats = partial(chat.routes, metrics=collector, presets=presets, max_body=limit)
    own = [
        *health.routes(client, registry, keys=bool(config.keys)),
        *plugins.routes(registry, metrics=collector),
        *metrics.routes(collector),
        *traces.routes(kept),
        *page.routes(kept, config.commands.prefix, keys=bool(config.keys)),
    ]
    routes = [
        *chats(client, registry, config.chain, config.commands, consent),
        *generate.routes(client, guards),
        *embeddings.routes(client, guards),
        *tags.routes(client, guards),
        *own,
    ]
    rest = passthrough.endpoint(client, guards)
    app: ASGIApp = Paths(routes, default=rest, redirect_slashes=False, lifespan=lifespan)
    ours = [route.path for route in own]
    keyless = [*page.KEYLESS, *health.KEYLESS]
    app = Access(app, config.access, config.keys, loopback, ours, keyless)
    paths = [route.path for route in routes]
    return log.AccessLog(app, paths, write, metrics=collector, traces=kept.without(ours))


async def announce(client: OllamaClient, registry: PluginRegistry, prefix: str) -> None:
    """Log whether Ollama answers, which agents are loaded, and what to type to see them."""
    try:
        say("upstream answers", url=client.upstream.url, version=await client.version())
    except UpstreamError as exc:
        say("upstream does not answer yet", url=client.upstream.url, error=str(exc))
    if registry.database:
        try:
            await registry.database.check()
        except StoreError as exc:
            say("store does not answer yet", error=str(exc))
    say("agents loaded", agents=" ".join(loaded(registry.plugins)) or "none")
    for name, plugin in registry.plugins.items():
        progress = getattr(plugin.agent, "progress", "")
        if type(progress) is str and progress:
            say("agent", name=name, progress=progress)
    if prefix:
        say(f"ready: type {prefix}help in any chat")


def say(event: str, **fields: str) -> None:
    level = logging.WARNING if "error" in fields else logging.INFO
    logger.log(level, event, extra={"fields": fields})


async def serve(config: Config, flags: Namespace, sockets: list[socket], write: log.Write) -> None:
    """Serve until a signal comes; with --demo, before a stand-in for Ollama."""
    stand_in = None if flags.demo is None else demo.serve(demo.create_app(flags.demo))
    async with stand_in or nullcontext(config.upstream.url) as url:
        config = replace(config, upstream=replace(config.upstream, url=url))
        registry, loopback = create_registry(config, os.environ), all(map(is_loopback, sockets))
        app = create_app(config, registry, loopback=loopback, write=write)
        say("settings", file=str(flags.config or "none"), data=str(config.server.data))
        for listener in sockets:
            say("listening", url=url_of(listener))
        grace = math.ceil(config.server.shutdown)
        settings = uvicorn.Config(app, timeout_graceful_shutdown=grace, **SETTINGS)
        await Server(settings, os.environ.pop("NOTIFY_SOCKET", "")).serve(sockets)


def parse_flags() -> Namespace:
    parser = ArgumentParser(description="Agents for Ollama. For authors: testkit.py (osp-testkit)")
    add, either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    usual, _ = places(os.environ)
    said = f"settings (default: {usual})".replace("%", "%%")
    add("--config", type=Path, default=usual if os.path.exists(usual) else None, help=said)
    add("--host", help="the address to listen on (default: 127.0.0.1)")
    add("--port", help="the port to listen on (default: 11435)")
    add("--reload", action="store_true", help="start again whenever an agent or a setting changes")
    either("--upstream", metavar="URL", help="Ollama (default: 127.0.0.1:11434)")
    demo_help = "use a built-in stand-in for Ollama, with so many seconds between two words"
    either("--demo", metavar="SECONDS", nargs="?", type=float, const=0.03, help=demo_help)
    add("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(metavar="COMMAND", help="without one: serve")
    parser.set_defaults(command=None)
    of_health = commands.add_parser("health", help="ask the proxy that runs; exit status 0 or 1")
    of_health.add_argument("--live", action="store_true", help="whether Ollama answers or not")
    of_health.set_defaults(command=check_health)
    of_key = commands.add_parser("key", help="print a fresh key, and the lines for osp.toml")
    of_key.add_argument("name", metavar="NAME", help="who is to have it: laptop, for example")
    of_key.set_defaults(command=print_key)
    of_presets = commands.add_parser("presets", help="list what OSP made at Ollama")
    of_presets.add_argument("--prune", action="store_true", help="remove what left the settings")
    of_presets.add_argument("--yes", action="store_true", help="without asking")
    of_presets.set_defaults(command=list_presets)
    return parser.parse_args()


def settings_of(flags: Namespace) -> Config:
    """Return the settings of file, environment and flags. Raises ConfigError."""
    given = {"--host": flags.host, "--port": flags.port, "--upstream": flags.upstream}
    return load(flags.config, os.environ, given)


def check_health(flags: Namespace) -> None:
    """Ask the proxy that runs with these settings how it is. Raises UpstreamError."""
    server = settings_of(flags).server
    proxy = replace(parse_upstream(server.host), port=server.port)
    path = "/health?live" if flags.live else "/health"

    async def ask() -> None:
        async with asyncio.timeout(HEALTH), OllamaClient(proxy, HEALTH) as client:
            sys.stdout.write(f"{json.dumps(await client.ask(path))}\n")

    try:
        asyncio.run(ask())
    except (TimeoutError, UpstreamConnectionError) as exc:
        raise UpstreamError(f"no proxy answers at {proxy.url}; see server.host and port") from exc


def print_key(flags: Namespace) -> None:
    """Print a fresh key and the lines for osp.toml. Raises ConfigError for a wrong name."""
    sys.stdout.write(fresh_key(flags.name))


def list_presets(flags: Namespace) -> None:
    """Print the state of each preset; with --prune remove what OSP made and no longer keeps.

    Raises UpstreamError, and ConfigError where --yes is missing and nobody can be asked.
    """
    config = settings_of(flags)
    presets, upstream = Presets(config.presets, config.server.data), config.upstream

    async def ask(removed: Sequence[str] = ()) -> dict[str, str]:
        async with client_of(upstream) as client:
            await presets.remove(client, removed)
            return await presets.states(client)

    states = asyncio.run(ask())
    left = [name for name, state in states.items() if state == LEFT]
    lines = [f"{name}: {states[name]}\n" for name in (left if flags.prune else states)]
    sys.stdout.write("".join(lines) or ("nothing to remove\n" if flags.prune else "no presets\n"))
    if flags.prune and left and (flags.yes or agrees(len(left))):
        asyncio.run(ask(left))
        sys.stdout.write("removed\n")


def agrees(count: int) -> bool:
    """Ask at the terminal whether to remove so many models. Raises ConfigError without one."""
    if not sys.stdin.isatty():
        raise ConfigError("nothing was removed: there is no terminal to ask at; --yes does without")
    sys.stdout.write(f"Remove {count} model{'s' * (count > 1)} from Ollama? [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def run(sockets: list[socket] | None) -> None:
    """Obey a command, or listen and serve; with --reload, another process serves.

    Raises ConfigError, and UpstreamError where a command asks in vain.
    """
    flags = parse_flags()
    if flags.command:
        flags.command(flags)
        return
    config = settings_of(flags)
    journal = os.environ.get("JOURNAL_STREAM", "")
    write = log.configure(config.log.level, config.log.format, journal)
    listeners = sockets or inherited(os.environ) or [listen(config.server.host, config.server.port)]
    if flags.reload and not sockets:
        ours = [HOME / name for name in ("osp.py", "demo.py", "kernel", "slices")]
        watched = [*ours, flags.config or places(os.environ)[0], *config.plugins.dirs]
        return Reloader(main, listeners, watched).run()
    if sockets and hasattr(signal, "pthread_sigmask"):
        # A terminal sends Ctrl-C to both processes; the supervisor then sends SIGTERM to this one.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    if flags.demo is None:
        for listener in listeners:
            check_loop(listener, parse_upstream(config.upstream.url))
    loop_factory = uvicorn.Config(create_app, log_config=None).get_loop_factory()
    # Not closed: Runner.close() would wait for agent tasks that ignore their cancellation.
    asyncio.Runner(loop_factory=loop_factory).run(serve(config, flags, listeners, write))


def main(sockets: list[socket] | None = None) -> NoReturn:
    """Run the command line; exit with 0 after a clean stop, with 1 where the proxy that is asked
    is not well, with 2 for bad settings.

    `sockets` are those of the supervisor, in the process that it started.
    """
    sys.dont_write_bytecode = True  # plugins stay free of __pycache__
    try:
        run(sockets)
    except (ConfigError, UpstreamError) as exc:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {exc}\n")
        leave(2 if isinstance(exc, ConfigError) else 1)
    leave(0)


def leave(status: int) -> NoReturn:
    """End the process, also while threads run that agents left behind."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
