"""Test kit: what you need beside `kernel.agent` when you write an agent.

    answer = ask(Path(__file__).parent, "/shout hello", model="hi")
    assert answer.text == "HI"

`ask` runs an agent as the proxy does, and in every way in which a client can ask for it: in both
dialects, streamed (cut into single characters) and not. `check` looks over a whole configuration,
and `new_agent` begins an agent; `python osp.py` has them as commands. There is no model here: what
it says is yours to script.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import demo
import osp
from kernel.client import OllamaClient
from kernel.config import AccessConfig, Config, PluginsConfig, UpstreamConfig, parse_upstream
from kernel.dialects import OLLAMA, OPENAI, Dialect, FrameSplitter, dumps
from kernel.errors import ConfigError, PluginLoadError
from kernel.plugin import NAME, RESERVED, Plugin, scan
from kernel.registry import PluginRegistry
from kernel.server import SETTINGS

Messages = list[dict[str, Any]]
Model = str | Callable[[Messages], str]  # what it says, whatever it is asked or depending on that

WAYS = [(dialect, stream) for dialect in (OLLAMA, OPENAI) for stream in (False, True)]
KNOWN = ("request_id", "agent", "seconds")  # to whoever reads what `check` says, or no matter
PATHS = {OLLAMA: "/api/chat", OPENAI: "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of a prompt: the same in every way of asking."""

    text: str  # of the answer, or of the error
    status: int
    agents: str  # as X-OSP-Agents says it, without the times: "shout;ok"
    sent: Messages = field(default_factory=list)  # to the model; empty if it was not asked


def ask(
    folder: Path,
    prompt: str | Messages,
    *,
    model: Model = "An answer.",
    settings: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Answered:
    """Return what the agent in `folder` makes of a prompt, or of a whole conversation.

    `model` is what the model says, `settings` go over those of config.json, `fields` into the
    request. Raises AssertionError where the agent fails, or the ways of asking do not agree.
    """
    folder = folder.resolve()
    plugins = PluginsConfig(dirs=(folder.parent,))
    (name,) = (p.name for p in scan(plugins, {}, {}).values() if p.folder == folder)
    agents = {folder.name.removesuffix("_agent").lower(): {"settings": settings or {}}}
    config = Config(plugins=replace(plugins, only=(name,)), agents=agents)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return asyncio.run(asked_in_all_ways(config, messages, Script(model), fields))


async def asked_in_all_ways(
    config: Config, messages: Messages, script: Script, fields: Mapping[str, Any]
) -> Answered:
    with complaints() as problems:
        async with proxied(config, script) as (client, _):
            answers = [await one(client, script, messages, way, fields) for way in WAYS]
    assert not problems, "\n".join(problems)
    texts = [answer.text for answer in answers]
    assert len(set(texts)) == 1, f"the answer depends on the way of asking: {texts}"
    return answers[-1]


async def one(
    client: OllamaClient,
    script: Script,
    messages: Messages,
    way: tuple[Dialect, bool],
    fields: Mapping[str, Any],
    agents: str = "",
) -> Answered:
    """Ask once, in one way; `agents` is what the header X-OSP-Agents says."""
    dialect, stream = way
    body = {"model": "scripted", "messages": messages, "stream": stream, **fields}
    headers = [(b"content-type", b"application/json"), (b"x-osp-agents", agents.encode())]
    script.sent = []
    answer = await client.forward("POST", PATHS[dialect].encode(), headers, dumps(body))
    data = b"".join([chunk async for chunk in answer])
    frames = [*(splitter := FrameSplitter(dialect.end)).feed(data), splitter.rest()]
    chunks = [chunk for chunk in map(dialect.parse, frames) if chunk]
    text = "".join(map(dialect.text, chunks))
    if answer.status != 200:
        error = json.loads(data)["error"]
        text = error if isinstance(error, str) else error["message"]
    summary = answer.header(b"x-osp-agents").decode()
    outcomes = ", ".join(part.rpartition(";")[0] for part in summary.split(", "))
    return Answered(text, answer.status, outcomes, script.sent)


class Script:
    """A stand-in for Ollama whose model says what it is told to, one character in a frame."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sent: Messages = []  # with the last chat, but for what agents asked on their own
        self.app = Starlette(
            routes=[
                Route("/api/version", self.version),
                Route("/api/embed", self.embed, methods=["POST"]),
                *(Route(path, self.chat, methods=["POST"]) for path in PATHS.values()),
            ]
        )

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": demo.VERSION})

    async def embed(self, request: Request) -> Response:
        texts = (await request.json())["input"]
        texts = [texts] if isinstance(texts, str) else texts
        return JSONResponse({"embeddings": [demo.vector(text) for text in texts]})

    async def chat(self, request: Request) -> Response:
        asked = await request.json()
        dialect = OLLAMA if request.url.path == PATHS[OLLAMA] else OPENAI
        text = self.model if isinstance(self.model, str) else self.model(asked["messages"])
        if "think" not in asked:  # which `context.chat` always says
            self.sent = asked["messages"]
        if not dialect.wants_stream(asked):
            kind, frames = dialect.answer(asked, text)
            return Response(frames[0], media_type=kind.decode())
        kind, frames = dialect.answer(asked, "word")  # one frame, whose text is then replaced
        first = dialect.parse(frames[0]) or {}
        pieces = (dialect.encode(dialect.with_text(first, sign)) for sign in text)
        return StreamingResponse(flowing([*pieces, *frames[1:]]), media_type=kind.decode())


async def flowing(frames: list[bytes]) -> AsyncIterator[bytes]:
    for frame in frames:
        yield frame
        await asyncio.sleep(0)  # others have their turn in between


@asynccontextmanager
async def proxied(
    config: Config, script: Script, environ: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[OllamaClient, PluginRegistry]]:
    """Run the proxy before a script, with a data folder of its own; yield a client of it."""
    with tempfile.TemporaryDirectory() as data:
        async with demo.serve(script.app) as upstream:
            server = replace(config.server, data=Path(data), host="127.0.0.1")
            config = replace(
                config,
                server=server,
                upstream=UpstreamConfig(url=upstream),
                access=AccessConfig(),
            )
            registry = osp.create_registry(config, environ or {})
            app = osp.create_app(config, registry)
            async with demo.serve(app, **SETTINGS) as url:
                async with OllamaClient(parse_upstream(url), 5.0) as client:
                    yield client, registry


class Complaints(logging.Handler):
    """Collects what the proxy says of agents."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.problems: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = {k: v for k, v in getattr(record, "fields", {}).items() if k not in KNOWN}
        said = ", ".join(f"{key}: {value}" for key, value in fields.items())
        problem = f"{record.getMessage()} ({said})"
        if problem not in self.problems:
            self.problems.append(problem)


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Collect, inside the block, what the log says of agents that failed."""
    handler = Complaints()
    loggers = [logging.getLogger(name) for name in ("kernel", "slices")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield handler.problems
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


async def check(config: Config, environ: Mapping[str, str]) -> int:
    """Load every plugin, try each alone, and say what is wrong and how to mend it.

    Return the exit status: 1 if anything failed, 0 also with warnings. Raises ConfigError.
    """
    status = 0
    for name, plugin in scan(config.plugins, config.agents, environ).items():
        failures, warnings = await tried(name, plugin, config, environ)
        verdict = "FAILED" if failures else "warning" if warnings else plugin_verdict(plugin)
        sys.stdout.write(f"{verdict:9}{name}\n")
        for problem in failures + warnings:
            sys.stdout.write(f"         {problem}\n")
        status = status or int(bool(failures))
    return status


def plugin_verdict(plugin: Plugin) -> str:
    return "ok" if plugin.config.enabled else "disabled"


async def tried(
    name: str, plugin: Plugin, config: Config, environ: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Return what is wrong with an agent, and what may be."""
    if plugin.error:
        return [told(plugin.error)], []
    if not plugin.config.enabled:
        return [], []
    alone = replace(config, plugins=replace(config.plugins, only=(name,)))
    with complaints() as problems:
        script = Script(echo)
        async with proxied(alone, script, environ) as (client, registry):
            agent, error = registry.plugins[name].agent, registry.plugins[name].error
            if error or agent is None:
                return [told(error)], []
            before = shared_state(agent)
            found, doubts = await asked_about(client, script, f"/{name}")
            after = shared_state(agent)
    for key in sorted(key for key in before | after if before.get(key) != after.get(key)):
        doubts.append(f"{key} changed while requests ran, and all share it: make it in on_request")
    found += [problem for problem in problems if problem.startswith("agent failed")]
    return found, doubts + [problem for problem in problems if problem not in found]


def told(error: PluginLoadError | None) -> str:
    return f"{error.kind}: {error} ({error.where})" if error else "it did not load"


async def asked_about(
    client: OllamaClient, script: Script, agents: str
) -> tuple[list[str], list[str]]:
    """Ask two things, one after the other and at once, in all ways; return what did not agree."""
    prompts = [[{"role": "user", "content": text}] for text in ("what is one?", "what is two?")]

    async def asked(prompt: Messages, way: tuple[Dialect, bool]) -> str:
        return (await one(client, script, prompt, way, {}, agents)).text

    apart = [[await asked(prompt, way) for way in WAYS] for prompt in prompts]
    jobs = [asyncio.gather(*(asked(prompt, way) for way in WAYS)) for prompt in prompts]
    together = [list(texts) for texts in await asyncio.gather(*jobs)]
    failures, doubts = [], []
    if any(len(set(texts)) > 1 for texts in apart):
        failures.append(f"the answer depends on how it was cut, or on the dialect: {apart}")
    if together != apart:
        doubts.append("two requests at once got other answers than one after the other")
    return failures, doubts


def echo(messages: Messages) -> str:
    said = messages[-1].get("content")
    return f"You said: {said}.\n\n*That* is `all` I know, 1 < 2."


def shared_state(agent: object) -> dict[str, str]:
    """Return what all requests share of an agent, as text."""
    on_class = {f"{type(agent).__name__}.{k}": v for k, v in vars(type(agent)).items()}
    on_self = {f"self.{k}": v for k, v in vars(agent).items() if k != "progress"}
    return {key: repr(value) for key, value in (on_class | on_self).items()}


AGENT = '''\
"""{title}: tells the model how to answer, and signs the answer."""

from kernel.agent import BaseAgent, Payload, add_system


class {title}(BaseAgent):
    """Asks for a short answer, and signs it."""

    async def on_request(self, payload: Payload) -> Payload:
        return add_system(payload, self.settings["rule"])

    async def on_response(self, response: str) -> str:
        return f"{{response}} ({{self.arguments['sign']}})"
'''
SETTINGS_OF_ONE = """\
{{
  "description": "Asks for a short answer, and signs it.",
  "settings": {{"rule": "Answer in one sentence."}},
  "arguments": {{"sign": "{name}"}}
}}
"""
TEST = '''\
"""Run it with: python -m pytest {folder}"""

from pathlib import Path

from testkit import ask


def test_it_asks_for_a_short_answer_and_signs_it() -> None:
    answer = ask(Path(__file__).parent, "/{name}:sign=me what is a proxy?", model="A go-between.")

    assert answer.text == "A go-between. (me)"
    assert answer.sent[0] == {{"role": "system", "content": "Answer in one sentence."}}
'''


def new_agent(name: str, config: Config) -> int:
    """Write an agent that works, its config.json and its test; return the exit status.

    Raises ConfigError for a name that cannot be one, or is taken: nothing is overwritten.
    """
    plugins = scan(config.plugins, {}, {})
    folder = config.plugins.dirs[0] / f"{name}_agent"
    if not NAME.fullmatch(name) or name in RESERVED:
        raise ConfigError(f"{name!r} cannot be a command: small letters, digits, _ and - can")
    if name in plugins or folder.exists():
        raise ConfigError(f"/{name} is there already: {folder}")
    folder.mkdir(parents=True)
    title = "".join(part.capitalize() for part in re.split("[-_]", name))
    title = title if title[0].isalpha() else f"Agent{title}"
    files = {"agent.py": AGENT, "config.json": SETTINGS_OF_ONE, "test_agent.py": TEST}
    for file, text in files.items():
        said = text.format(name=name, title=title, folder=os.path.relpath(folder))
        (folder / file).write_text(said, encoding="utf-8")
    sys.stdout.write(f"{os.path.relpath(folder)} is there; try it: /{name} hello\n")
    return 0
