"""Clients of which a model calls tools: the packages for Node, and the `ollama` command.

The upstream is scripted: see tests/scenarios.py. `node/tools.mjs` goes on with an answer as the
users of each package do.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

import demo
from tests.integration.test_command_line import converse as type_in
from tests.scenarios import ASKS, LOOK, MUST, SCENARIOS, SEEN, THINK, Answer
from tests.support import CHAT, COMPLETIONS, MESSAGES, RESPONSES, FakeOllama, House, running

# Dialect, the words for an end without calls and for one with some, and habits of the package
STREAMS, HIDES, DROPS = "always streams", "hides thinking", "drops the ids of calls"
AI, OPENAI, STATUS = ("stop", "tool-calls"), ("stop", "tool_calls"), ("completed", "completed")
CLIENTS: dict[str, tuple[str, tuple[str, str], set[str]]] = {
    "ollama": (CHAT, ("stop", "stop"), set()),
    "ai-sdk-ollama": (CHAT, AI, {DROPS}),
    "@ai-sdk/openai-compatible": (COMPLETIONS, AI, set()),
    "@ai-sdk/openai": (RESPONSES, AI, set()),
    "@ai-sdk/anthropic": (MESSAGES, AI, set()),
    "@langchain/ollama": (CHAT, ("stop", "stop"), {STREAMS, DROPS}),
    "@langchain/openai": (COMPLETIONS, OPENAI, {HIDES}),
    "@langchain/openai responses": (RESPONSES, STATUS, {HIDES}),
}
WAYS = [(client, stream) for client in CLIENTS for stream in (True, False)]
WAYS.remove(("@ai-sdk/anthropic", False))  # it wants thinking to be signed, and Ollama's is not


@pytest.fixture(scope="session")
def node(packages: Path) -> Iterator[subprocess.Popen[str]]:
    """The packages, which converse as they are told, one line for each conversation."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(packages)}  # nobody's HTTP_PROXY
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(["node", "tools.mjs"], cwd=packages, env=environ, **pipes) as process:
        yield process


def converse(node: subprocess.Popen[str], **conversation: Any) -> list[Answer]:
    assert node.stdin and node.stdout
    print(json.dumps(conversation), file=node.stdin, flush=True)
    answers = json.loads(node.stdout.readline())
    assert isinstance(answers, list), answers
    return answers


@pytest.mark.parametrize(("client", "stream"), WAYS)
@pytest.mark.parametrize("name", SCENARIOS)
async def test_every_package_reads_an_answer_of_rounds_with_tools(
    node: subprocess.Popen[str], house: House, name: str, client: str, stream: bool
) -> None:
    path, ends, habits = CLIENTS[client]

    async def talk(url: str, prompts: tuple[str, ...]) -> list[Answer]:
        fields = {"client": client, "url": url, "prompts": prompts, "stream": stream}
        return await asyncio.to_thread(converse, node, **fields)

    streams = stream or STREAMS in habits
    answers = await SCENARIOS[name].play(house, path, streams, talk)

    expected = SCENARIOS[name].expected(path, streams, ends)
    for answer in expected if HIDES in habits else []:
        answer[1] = ""  # thinking
    assert answers == expected
    SCENARIOS[name].check(house.ollama, drops_ids=DROPS in habits)


@pytest.mark.parametrize("name", ["rounds", "consent"])
async def test_the_command_shows_an_answer_of_rounds_with_tools(
    binary: str, ollama: FakeOllama, plugins: Path, name: str
) -> None:
    scenario, stand_in = SCENARIOS[name], demo.create_app()
    scenario.prepare(ollama, plugins, CHAT, stream=True)

    async def upstream(scope: Scope, receive: Receive, send: Send) -> None:
        await (ollama if scope.get("path") in (CHAT, None) else stand_in)(scope, receive, send)

    async with demo.serve(upstream) as url, running(url, plugins) as proxy:
        await proxy.post("/api/create", json={"model": "tiny", "from": "demo"})
        lines = [f" {prompt}" for prompt in scenario.prompts]
        screens = await asyncio.to_thread(type_in, binary, plugins, str(proxy.base_url), *lines)

    # It marks the first thoughts of an answer; what it is told of later ones it shows as text
    said = [f"{thinking}...done thinking.\n\n{text}" for text, thinking, _, _ in scenario.answers]
    if name == "rounds":
        said = [f"{THINK}...done thinking.\n\n{SEEN}{MUST}{LOOK}{THINK}{SEEN}"]
    for line, screen, text in zip(lines, screens, said, strict=True):
        expected = f"{line}\nThinking...\n{text}".replace("\r", "").rstrip()
        assert re.sub(ASKS, "?", screen).removesuffix(">>> ").rstrip() == expected
    scenario.check(ollama)
