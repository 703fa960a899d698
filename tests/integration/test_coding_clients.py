"""Claude Code and Codex, from npm, ask the stand-in through the proxy, with agents in play."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.integration.conftest import CLOCK, UP
from tests.support import running, write_agent

CODEX = """
model = "demo"
model_provider = "osp"
[model_providers.osp]
name = "osp"
base_url = "URL/v1"
wire_api = "responses"
"""


async def ask(command: Sequence[str | Path], url: str, home: Path) -> str:
    """Run a client that asks one thing, and return what it printed."""
    (home / ".codex").mkdir(exist_ok=True)
    (home / ".codex" / "config.toml").write_text(CODEX.replace("URL", url), encoding="utf-8")
    own = {"HOME": str(home), "CODEX_HOME": str(home / ".codex"), "ANTHROPIC_API_KEY": "x"}
    own |= {"ANTHROPIC_BASE_URL": url, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
    client = await asyncio.create_subprocess_exec(
        *command,
        cwd=home,
        env={**os.environ, **own},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        output, _ = await client.communicate()
    return output.decode()


@pytest.mark.parametrize("client", ["claude", "codex"])
async def test_a_command_typed_into_a_coding_client_asks_for_its_agents(
    coding: Callable[[str], Path], demo_url: str, plugins: Path, tmp_path: Path, client: str
) -> None:
    write_agent(plugins, "clock", CLOCK)
    write_agent(plugins, "up", UP)
    options = {
        "claude": ["-p", " /clock /up what day is it?", "--model", "demo"],
        "codex": ["exec", "--skip-git-repo-check", "/clock /up what day is it?"],
    }
    async with running(demo_url, plugins) as proxy:
        url = str(proxy.base_url).rstrip("/")
        output = await ask([coding(client), *options[client]], url, tmp_path)

    assert "TYPED: 'WHAT DAY IS IT?'\n\nWHAT DAY IS IT?" in output
