"""Bare: the proxy without its two outer layers, to measure what they cost.

    python bare.py HOST:PORT UPSTREAM

`AccessLog` (the line per request, its id, the metrics) and `Access` are taken off; what they cost a
forwarded request is the difference to `osp.py`. Chats need what they leave behind: ask it none.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import osp
from kernel.access import Access
from kernel.config import Config, PluginsConfig, UpstreamConfig
from kernel.log import AccessLog
from kernel.server import SETTINGS, Server, listen


def create_app(upstream: str) -> ASGIApp:
    config = replace(
        Config(), upstream=UpstreamConfig(url=upstream), plugins=PluginsConfig(dirs=())
    )
    log = osp.create_app(config)
    assert isinstance(log, AccessLog) and isinstance(log.app, Access)
    return log.app.app


def main(address: str, upstream: str) -> None:
    host, _, port = address.rpartition(":")
    config = uvicorn.Config(create_app(upstream), **SETTINGS)
    with listen(host, int(port)) as listener:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main(*sys.argv[1:])
