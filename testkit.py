"""Test kit: what you need beside `kernel.agent` when you write an agent.

    answer = ask(Path(__file__).parent, "/shout hello", model="hi")
    assert answer.text == "HI"

`ask` runs an agent as the proxy does, in all eight ways in which a client can ask for it: in four
dialects, streamed (cut into single characters) and whole. There is no model here: you script what
it says. `python testkit.py check` tries all agents of a configuration, `python testkit.py new NAME`
writes a new one.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import osp  # the first: it says what to type where the packages are not installed

# isort: split

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import demo
from kernel.agent import BaseAgent
from kernel.client import OllamaClient
from kernel.config import HOME, AccessConfig, Config, PluginsConfig, load, parse_upstream
from kernel.dialects import Dialect, dumps
from kernel.dialects.every import DIALECTS
from kernel.errors import ConfigError
from kernel.plugin import NAME, RESERVED, Plugin, scan
from kernel.registry import HOOKS
from kernel.server import SETTINGS

Messages = list[dict[str, Any]]
Model = str | Callable[[Messages], str]  # what it says: always the same, or depending on the chat
Chat = dict[str, Any]  # the body of a request
Pairs = Mapping[str, str]

SAMPLE = HOME / "examples" / "sample_agent"  # what a new agent begins as
MARK = "x-testkit"  # a header of the requests that no agent makes
UNSHOWN = ("request_id", "agent", "seconds")  # log fields that `check` does not print
FORBIDDEN = re.compile(
    r"\s*(from|import)\s+(?!kernel\.agent\b|kernel import agent$)"
    r"(osp|demo|testkit|kernel|slices|plugins|tests)\b"
)
ONLY_AGENT = "of this project an agent imports only kernel.agent"
SWALLOWED = "the answer is empty; does on_end return what on_chunk held back?"
SAYS = "*That* is `all` I know, 1 < 2.\n\nAnything else?"  # the model, while agents are checked
# How the other dialects say what Ollama's `format` says
OBJECT = {"type": "json_object"}
STRUCTURED = {"response_format": OBJECT, "output_format": OBJECT, "text": {"format": OBJECT}}


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of a prompt: the text and status are the same in every way of asking."""

    text: str  # of the answer, or of the error
    status: int
    agents: str  # as X-OSP-Agents says it, without the times: "shout;ok"
    sent: Messages = field(default_factory=list)  # what the model was asked; []: it was not asked
    payload: dict[str, Any] = field(default_factory=dict)  # the whole body of that request


def ask(
    folder: Path,
    prompt: str | Messages,
    *,
    model: Model = "An answer.",
    settings: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    user: str = "",
    data_dir: Path | None = None,
) -> Answered:
    """Return what the agent in `folder` makes of a prompt, or of a whole conversation.

    `model` is what the model says, `settings` override those of config.json, `fields` go into the
    request's body and `headers` beside it. Each `user` has a `context.user` of its own. `data_dir`
    is the agent's, and stays; without it, the agent has an empty folder that is removed at the end.
    The result is that of Ollama's own dialect, not streamed.

    Raises AssertionError if the agent fails, or if the ways of asking do not agree.
    """
    folder = folder.resolve()
    name = folder.name.removesuffix("_agent").lower()
    config = Config(
        plugins=PluginsConfig(dirs=(folder.parent,), only=(name,)),
        agents={name: {"enabled": True, "settings": settings or {}}},
        access=AccessConfig(keys=(user,) if user else ()),
    )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    request = {"messages": messages, **(fields or {})}
    keys = {"x-api-key": user} if user else {}
    with complaints() as records, tempfile.TemporaryDirectory() as data:
        if data_dir:
            data_dir.mkdir(parents=True, exist_ok=True)
            os.symlink(data_dir.resolve(), Path(data, name))
        sent = {**keys, **(headers or {})}
        *_, answers, problem = asyncio.run(trial(config, model, Path(data), {}, request, sent))
    assert not records, "\n".join(described(records))
    assert not problem, problem
    return answers[0]


async def trial(
    config: Config, model: Model, data: Path, environ: Pairs, request: Chat, headers: Pairs
) -> tuple[Plugin, BaseAgent | None, list[Answered], str]:
    """Run one agent before a scripted model, and ask in all ways. Raises ConfigError."""
    trying = Trial(model)
    async with demo.serve(trying.upstream) as url:
        server, upstream = replace(config.server, data=data), replace(config.upstream, url=url)
        config = replace(config, server=server, upstream=upstream)
        registry = osp.create_registry(config, environ)
        async with demo.serve(osp.create_app(config, registry), **SETTINGS) as url:
            async with OllamaClient(parse_upstream(url), 5.0) as trying.client:
                plugin = registry.plugins[config.plugins.only[0]]
                return plugin, plugin.agent, *await trying.compared(request, headers)


class Trial:
    """A stand-in for Ollama, whose model says what it is told to say, and a proxy before it.

    A `request` is a chat in Ollama's dialect.
    """

    client: OllamaClient

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sent: Chat = {}  # what the request became, if the proxy did not answer it itself
        chats = [Route(d.path, partial(self.chat, d), methods=["POST"]) for d in DIALECTS]
        self.upstream = Starlette(routes=[Route("/api/embed", embed, methods=["POST"]), *chats])

    async def chat(self, dialect: Dialect, request: Request) -> Response:
        payload = await request.json()
        if MARK in request.headers:
            self.sent = payload
        messages = dialect.read(payload)["messages"]
        text = self.model if isinstance(self.model, str) else self.model(messages)
        return answer_of(dialect, payload, text)

    async def compared(self, request: Chat, headers: Pairs) -> tuple[list[Answered], str]:
        """Ask in all ways; return the answers, and how they differ ("": they do not).

        An answer that changes when it is asked for again depends on what `setup` made: that is
        right.
        """
        answers = await self.in_all_ways(request, headers)
        texts = {way: answer.text for way, answer in answers.items()}
        if len({*texts.values()}) > 1:
            again = await self.in_all_ways(request, headers)
            texts = {way: text for way, text in texts.items() if text == again[way].text}
        differ = len({*texts.values()}) > 1
        problem = f"the answer depends on the way of asking: {texts}" if differ else ""
        return [*answers.values()], problem

    async def in_all_ways(self, request: Chat, headers: Pairs) -> dict[str, Answered]:
        """Ask in each dialect that can say the request, streamed and not."""
        answers = {}
        for dialect in DIALECTS:
            for stream in (False, True):
                with suppress(ValueError):  # a content in parts is not for Ollama's own dialect
                    body = body_of(dialect, request | {"stream": stream})
                    way = f"{dialect.name} {'in single characters' if stream else 'whole'}"
                    answers[way] = await self.one(dialect, body, headers)
        assert answers, f"no dialect can say this: {request}"
        return answers

    async def one(self, dialect: Dialect, body: bytes, headers: Pairs) -> Answered:
        self.sent = {}
        headers = {"content-type": "application/json", **headers, MARK: "1"}
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        answer = await self.client.forward("POST", dialect.path.encode(), pairs, body)
        text = text_of(dialect, b"".join([chunk async for chunk in answer]))
        summary = answer.header(b"x-osp-agents").decode()
        outcomes = ", ".join(part.rpartition(";")[0] for part in summary.split(", "))
        messages = dialect.read(self.sent)["messages"] if self.sent else []
        return Answered(text, answer.status, outcomes, messages, self.sent)


async def embed(request: Request) -> Response:
    texts = (await request.json())["input"]  # the proxy sends a list
    return Response(dumps({"embeddings": [demo.vector(text) for text in texts]}))


def body_of(dialect: Dialect, request: Chat) -> bytes:
    """Return a chat in a dialect. Raises ValueError for what the dialect cannot say."""
    payload = {"model": "scripted", **request}
    if payload.get("format") and not dialect.is_structured(payload):
        payload |= STRUCTURED
    return dumps(dialect.write(payload, {"messages": [], "input": []}))


def text_of(dialect: Dialect, data: bytes) -> str:
    """Return the text of an answer, or of the error in it."""
    chunks = [chunk for chunk in map(dialect.parse, dialect.end.split(data)) if chunk]
    for error in (chunk["error"] for chunk in chunks if dialect.is_error(chunk)):
        return str(error if isinstance(error, str) else error["message"])
    return "".join(holder[key] for chunk in chunks for holder, key in dialect.places(chunk))


def answer_of(dialect: Dialect, payload: Chat, text: str) -> Response:
    """Return an answer that says `text`; in a stream each character has a frame of its own."""
    head = dialect.head(payload)
    if not dialect.wants_stream(payload):
        data = dialect.encode_whole(dialect.whole(head, text))
        return Response(data, media_type=dialect.whole_type.decode())
    at = [bool(dialect.places(chunk)) for chunk in dialect.speech(head, "word")].index(True)
    chunks = dialect.speech(head, text)
    chunks[at : at + 1] = [dialect.piece(chunks[at], sign) for sign in text]
    frames = [dialect.encode(dialect.numbered(chunk, n)) for n, chunk in enumerate(chunks)]
    return Response(b"".join([*frames, dialect.done()]), media_type=dialect.stream_type.decode())


@contextmanager
def complaints() -> Iterator[list[logging.LogRecord]]:
    """Collect what is logged as a warning inside the block."""
    handler = BufferingHandler(sys.maxsize)
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda record: record.name.startswith(("kernel.", "slices.")))
    logging.root.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        logging.root.removeHandler(handler)


def described(records: Sequence[logging.LogRecord]) -> list[str]:
    """Return each different complaint once."""
    found = {}
    for record in records:
        fields = vars(record).get("fields", {}).items()
        details = ", ".join(f"{key}: {value}" for key, value in fields if key not in UNSHOWN)
        found[f"{record.getMessage()} ({details})"] = record
    return [*found]


# python testkit.py check


async def check(config: Config, environ: Pairs, data: Path | None, prompt: str | None) -> int:
    """Load every plugin, try each alone, and say what is wrong and how to mend it.

    Agents work on a copy of the folder `data`, and are asked `prompt`. Return the exit status: 1 if
    anything failed, 0 also with warnings. Raises ConfigError.
    """
    status = 0
    for name, plugin in scan(config.plugins, config.agents, environ).items():
        only = replace(config.plugins, only=(name,))
        alone = replace(config, plugins=only, access=AccessConfig(), presets={})
        with tempfile.TemporaryDirectory() as copy:
            if data and (data / name).is_dir():
                shutil.copytree(data / name, Path(copy, name))
            failures, warnings = await tried(plugin, alone, environ, Path(copy), prompt)
        good = "ok" if plugin.config.enabled else "disabled"
        verdict = "FAILED" if failures else "warning" if warnings else good
        found = "".join(f"         {each}\n" for each in failures + warnings)
        sys.stdout.write(f"{verdict:9}{name}\n{found}")
        status |= bool(failures)
    return status


async def tried(
    plugin: Plugin, alone: Config, environ: Pairs, data: Path, prompt: str | None
) -> tuple[list[str], list[str]]:
    """Return what is wrong with an agent, and what may be wrong."""
    request: Chat = {"messages": [{"role": "user", "content": prompt or "what is one?"}]}
    header = {"x-osp-agents": f"/{plugin.name}"}
    with complaints() as records:
        if not plugin.error:
            found = await trial(alone, SAYS, data, environ, request, header)
            plugin, agent, answers, problem = found
    if error := plugin.error:
        return [f"{error.kind}: {error} ({error.where})"], []
    if not agent:  # disabled
        return [], []
    failures = forbidden_imports(plugin.folder) + [problem] * bool(problem)
    if plugin.responds and any(answer.payload and not answer.text for answer in answers):
        failures.append(SWALLOWED)
    warnings = doubtful_hooks(agent)
    for complaint in described(records):
        (failures if complaint.startswith("agent failed") else warnings).append(complaint)
    return failures, warnings


def forbidden_imports(folder: Path) -> list[str]:
    """Return the lines by which an agent would depend on more than its contract."""
    files = [file for file in sorted(folder.rglob("*.py")) if not file.name.startswith("test_")]
    return [
        f"{file}:{number}: {line.strip()}: {ONLY_AGENT}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN.match(line) and file.parent.name != "bench"
    ]


def doubtful_hooks(agent: BaseAgent) -> list[str]:
    """Return the methods that are nearly hooks, or that there are no hooks."""
    kind, hooks = type(agent), [*HOOKS, "setup", "teardown"]
    own = [name for name in dir(kind) if name[0] != "_" and not hasattr(BaseAgent, name)]
    near = [n for n in own if n.startswith("on_") or get_close_matches(n.lower(), hooks, 1, 0.8)]
    found = [f"{name} is no hook; hooks are {', '.join(hooks)}" for name in near]
    idle = all(getattr(kind, hook) is getattr(BaseAgent, hook) for hook in HOOKS)
    return found + ["it has no hook: it changes nothing"] * idle


# python testkit.py new NAME


def new_agent(name: str, config: Config) -> int:
    """Copy the sample agent under a new name; return the exit status.

    Raises ConfigError for a name that cannot be one, or is taken: nothing is overwritten.
    """
    folder = config.plugins.dirs[0] / f"{name}_agent"
    if not NAME.fullmatch(name) or name in RESERVED:
        raise ConfigError(f"{name!r} cannot be a command: small letters, digits, _ and - can")
    if name in scan(config.plugins, {}, {}) or folder.exists():
        raise ConfigError(f"/{name} is there already: {folder}")
    folder.mkdir(parents=True)
    title = "My" + "".join(part.capitalize() for part in re.split("[-_]", name))
    for file in SAMPLE.glob("*.*"):
        text = file.read_text(encoding="utf-8").replace("Sample", title).replace("sample", name)
        (folder / file.name).write_text(text, encoding="utf-8")
    sys.stdout.write(f"{os.path.relpath(folder)} is there; try it: /{name} hello\n")
    return 0


def main() -> int:
    """Run the command line and return the exit status; 1: an agent failed, 2: bad settings."""
    parser = argparse.ArgumentParser("testkit.py", description="For authors of agents.")
    parser.add_argument("command", choices=("check", "new"), help="try all agents, or begin one")
    parser.add_argument("text", nargs="?", help="check: a prompt to try; new: the command's name")
    file = next(HOME.glob("osp.toml"), None)
    parser.add_argument("--config", type=Path, default=file, help="settings (default: osp.toml)")
    parser.add_argument("--data", type=Path, help="check: agents get copies of the folders in it")
    flags = parser.parse_args()
    sys.dont_write_bytecode = True
    try:
        config = load(flags.config, os.environ, {})
        if flags.command == "check":
            return asyncio.run(check(config, os.environ, flags.data, flags.text))
        return new_agent(flags.text or "", config)
    except ConfigError as exc:
        sys.stderr.write(f"testkit.py: {exc}\n")
        return 2


if __name__ == "__main__":
    osp.leave(main())
