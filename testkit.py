"""Test kit: what you need beside `kernel.agent` when you write an agent.

    answer = ask(Path(__file__).parent, "/shout hello", model="hi")
    assert answer.text == "HI"

`ask` runs an agent as the proxy does, in all eight ways in which a client can ask for it: in four
dialects, streamed (cut into single characters) and whole. There is no model here: you script what
it says, and which tools it calls. `python testkit.py check` tries all agents of a configuration,
`python testkit.py new NAME` writes a new one. (`osp-testkit` in an installed copy.)
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
from kernel.agent import BaseAgent, text_of
from kernel.client import OllamaClient
from kernel.config import (
    HOME,
    AccessConfig,
    Config,
    Key,
    PluginsConfig,
    load,
    parse_upstream,
    places,
)
from kernel.dialects import AnswerState, Chunk, Dialect, dumps
from kernel.dialects.calls import ToolCall
from kernel.dialects.every import DIALECTS
from kernel.dialects.responses import CLOSING
from kernel.errors import ConfigError
from kernel.plugin import NAME, RESERVED, Plugin, scan
from kernel.registry import HOOKS
from kernel.server import SETTINGS

Messages = list[dict[str, Any]]
Chat = dict[str, Any]  # the body of a request
# What it says, as `ask` has it: always the same, one after the other, or depending on the chat
Model = str | dict[str, Any] | Sequence[Any] | Callable[[Messages], Any]
Pairs = Mapping[str, str]

# What a new agent begins as, without `--tools` and with it, and what to ask it
SAMPLE = HOME / "examples" / "sample_agent", "hello"
TOOLS = HOME / "examples" / "tools" / "sample_agent", "how many r are in strawberry?"
MARK = "x-testkit"  # a header of the requests that no agent makes
UNSHOWN = ("request_id", "agent", "seconds")  # log fields that `check` does not print
FORBIDDEN = re.compile(
    r"\s*(from|import)\s+(?!kernel\.agent\b|kernel import agent$)"
    r"(osp|demo|testkit|kernel|slices|plugins|tests)\b"
)
ONLY_AGENT = "of this project an agent imports only kernel.agent"
SWALLOWED = "the answer is empty; does on_end return what on_chunk held back?"
SAYS = "*That* is `all` I know, 1 < 2.\n\nAnything else?"  # the model, while agents are checked
BLOCK = {"index", "output_index"}  # keys of the frames that belong to a block of an answer
CALLING = {"finish_reason": "tool_calls", "stop_reason": "tool_use"}  # how an answer ends
# How the other dialects say what Ollama's `format` says
OBJECT = {"type": "json_object"}
STRUCTURED = {"response_format": OBJECT, "output_format": OBJECT, "text": {"format": OBJECT}}


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of a prompt: the text and status are the same in every way of asking."""

    text: str  # of the answer, or of the error
    status: int
    agents: str  # as X-OSP-Agents says it, without the times: "shout;ok"
    sent: Messages = field(default_factory=list)  # what the model was asked last; []: not at all
    payload: dict[str, Any] = field(default_factory=dict)  # the whole body of that request
    results: list[str] = field(default_factory=list)  # what tools told the model, in order


def ask(
    folder: Path,
    prompt: str | Sequence[Any],
    *,
    model: Model = "An answer.",
    settings: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    user: str = "",
    data_dir: Path | None = None,
) -> Answered:
    """Return what the agent in `folder` makes of a prompt, or of a whole conversation.

    A conversation is a list of messages, and of texts that the user types one after the other: each
    is answered, the answer stands behind it, and the last answer is returned.

    `model` is what the model says. In a list each entry is for one time that it is asked, the last
    one for every further time. An entry is a text, a call {"name", "arguments"}, or a list of these
    that are said at once. A function gets the messages and returns an entry.

    `settings` override those of config.json, `fields` go into the request's body and `headers`
    beside it. Each `user` has a `context.user` of its own. `data_dir` is the agent's, and stays;
    without it, the agent has an empty folder that is removed at the end. The result is that of
    Ollama's own dialect, not streamed.

    Raises AssertionError if the agent fails, if the model calls a tool that it was not offered, or
    if the ways of asking do not agree.
    """
    folder = folder.resolve()
    name = folder.name.removesuffix("_agent").lower()
    config = Config(
        plugins=PluginsConfig(dirs=(folder.parent,), only=(name,)),
        agents={name: {"enabled": True, "settings": settings or {}}},
        keys={user: Key(user)} if user else {},
    )
    request = {"messages": [prompt] if isinstance(prompt, str) else prompt, **(fields or {})}
    sent = {**({"x-api-key": user} if user else {}), **(headers or {})}
    with complaints() as records, tempfile.TemporaryDirectory() as data:
        if data_dir:
            data_dir.mkdir(parents=True, exist_ok=True)
            os.symlink(data_dir.resolve(), Path(data, name))
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
        server = replace(config.server, data=data, store="")  # never what real users keep
        upstream = replace(config.upstream, url=url)
        config = replace(config, server=server, upstream=upstream)
        registry = osp.create_registry(config, environ)
        async with demo.serve(osp.create_app(config, registry), **SETTINGS) as url:
            async with OllamaClient(parse_upstream(url), 5.0) as trying.client:
                plugin = registry.plugins[config.plugins.only[0]]
                return plugin, plugin.agent, *await trying.compared(request, headers)


class Trial:
    """A stand-in for Ollama, whose model says what it is told to say, and a proxy before it.

    A `request` is a chat in Ollama's dialect; a text in place of a message is typed and answered.
    """

    client: OllamaClient

    def __init__(self, model: Model) -> None:
        self.model = [model] if isinstance(model, str | dict) else model
        self.asked = 0  # how often the model was, in one way of asking
        self.tools, self.called = set[str](), set[str]()  # their names
        self.sent: Chat = {}  # what the request became, if the proxy did not answer it itself
        chats = [Route(d.path, partial(self.chat, d), methods=["POST"]) for d in DIALECTS]
        self.upstream = Starlette(routes=[Route("/api/embed", embed, methods=["POST"]), *chats])

    async def chat(self, dialect: Dialect, request: Request) -> Response:
        payload = await request.json()
        if MARK in request.headers:
            self.sent = payload
        self.tools |= {t.get("function", t)["name"] for t in payload.get("tools") or []}
        text, calls = self.says(dialect.read(payload)["messages"])
        self.called |= {call["name"] for call in calls}
        return answer_of(dialect, payload, text, calls)

    def says(self, messages: Messages) -> tuple[str, Messages]:
        """Return the text that the model says next, and its calls."""
        script = [self.model(messages)] if callable(self.model) else self.model
        said = script[min(self.asked, len(script) - 1)]
        self.asked += 1
        parts = [said] if isinstance(said, str | dict) else said
        calls = [part for part in parts if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str)), calls

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
        problem = f"the answer depends on the way of asking: {texts}" * (len({*texts.values()}) > 1)
        return [*answers.values()], problem

    async def in_all_ways(self, request: Chat, headers: Pairs) -> dict[str, Answered]:
        """Ask in each dialect that can say the request, streamed and not."""
        answers = {}
        for dialect in DIALECTS:
            for stream in (False, True):
                with suppress(ValueError):  # a content in parts is not for Ollama's own dialect
                    way = f"{dialect.name} {'in single characters' if stream else 'whole'}"
                    answers[way] = await self.talk(dialect, request | {"stream": stream}, headers)
        assert answers, f"no dialect can say this: {request}"
        assert self.called <= self.tools, f"the model calls {self.called}; its tools: {self.tools}"
        return answers

    async def talk(self, dialect: Dialect, request: Chat, headers: Pairs) -> Answered:
        """Return the last answer of a conversation. Raises ValueError as `body_of` does."""
        self.asked, messages = 0, list[Chat]()
        for number, each in enumerate(request["messages"], 1):
            messages.append(each if isinstance(each, dict) else {"role": "user", "content": each})
            if isinstance(each, str) or number == len(request["messages"]):
                answer = await self.one(dialect, request | {"messages": messages}, headers)
                messages.append({"role": "assistant", "content": answer.text})
        return answer

    async def one(self, dialect: Dialect, request: Chat, headers: Pairs) -> Answered:
        self.sent, body = {}, body_of(dialect, request)
        headers = {"content-type": "application/json", **headers, MARK: "1"}
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        answer = await self.client.forward("POST", dialect.path.encode(), pairs, body)
        text = spoken(dialect, b"".join([chunk async for chunk in answer]))
        summary = answer.header(b"x-osp-agents").decode()
        outcomes = ", ".join(part.rpartition(";")[0] for part in summary.split(", "))
        messages = dialect.read(self.sent)["messages"] if self.sent else []
        results = [result for message in messages for result in results_of(message)]
        return Answered(text, answer.status, outcomes, messages, self.sent, results)


async def embed(request: Request) -> Response:
    texts = (await request.json())["input"]  # the proxy sends a list
    return Response(dumps({"embeddings": [demo.vector(text) for text in texts]}))


def results_of(message: Chat) -> Iterator[str]:
    """Yield the texts of the results of tools in a message of any dialect."""
    content = message.get("content")
    for each in [message, *(content if isinstance(content, list) else [])]:
        if each.get("role") == "tool" or {"tool_use_id", "output"} & each.keys():
            yield text_of({"content": each.get("output", each.get("content"))})


def body_of(dialect: Dialect, request: Chat) -> bytes:
    """Return a chat in a dialect. Raises ValueError for what the dialect cannot say."""
    payload = {"model": "scripted", **request}
    if payload.get("format") and not dialect.is_structured(payload):
        payload |= STRUCTURED
    return dumps(dialect.write(payload, {"messages": [], "input": []}))


def spoken(dialect: Dialect, data: bytes) -> str:
    """Return the text of an answer, or of the error in it."""
    chunks = [chunk for chunk in map(dialect.parse, dialect.end.split(data)) if chunk]
    for error in (chunk["error"] for chunk in chunks if dialect.is_error(chunk)):
        return str(error if isinstance(error, str) else error["message"])
    return "".join(holder[key] for chunk in chunks for holder, key in dialect.places(chunk))


def answer_of(dialect: Dialect, payload: Chat, text: str, calls: Messages) -> Response:
    """Return an answer that says `text`, in a stream in single characters, and calls tools."""
    head, whole = dialect.head(payload), not dialect.wants_stream(payload)
    chunks = [dialect.whole(head, text)] if whole else dialect.speech(head, text)
    if not whole:
        at = [bool(dialect.places(chunk)) for chunk in dialect.speech(head, "word")].index(True)
        chunks[at : at + 1] = [dialect.piece(chunks[at], sign) for sign in text or [""]]
    chunks = let_call(dialect, chunks, text) if calls else chunks
    made = [ToolCall(c["name"], dumps(c.get("arguments", {})).decode()) for c in calls]
    if made and whole:
        dialect.put(chunks[0], made)
    elif made:
        at = [dialect.ends(chunk) for chunk in chunks].index(True)
        chunks[at:at] = dialect.call(chunks[0], made)
    state = AnswerState(payload)
    for chunk in chunks:
        dialect.settle(chunk, state)
    encode, kind = dialect.encode, dialect.stream_type
    if whole:
        encode, kind = dialect.encode_whole, dialect.whole_type
    body = b"".join([*map(encode, chunks), b"" if whole else dialect.done()])
    return Response(body, media_type=kind.decode())


def let_call(dialect: Dialect, chunks: list[Chunk], text: str) -> list[Chunk]:
    """Return an answer's frames as Ollama has them where calls follow.

    It closes no text before a call, and begins none that is empty.
    """
    ends: Chunk = CALLING if text else CALLING | {"content": [], "output": []}
    for end in filter(dialect.ends, chunks):
        for part in (end, end.get("delta", {}), end.get("response", {}), *end.get("choices", [])):
            part |= {key: ends[key] for key in ends.keys() & part.keys()}
    return [c for c in chunks if not (c.get("type") in CLOSING if text else BLOCK & c.keys())]


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
        alone = replace(config, plugins=only, access=AccessConfig(), keys={}, presets={})
        with tempfile.TemporaryDirectory() as copy:
            if data and (data / name).is_dir():
                shutil.copytree(data / name, Path(copy, name))
            failures, warnings, tools = await tried(plugin, alone, environ, Path(copy), prompt)
        good = "ok" if plugin.config.enabled else "disabled"
        verdict = "FAILED" if failures else "warning" if warnings else good
        cost = f" (tools: {len(tools)}, about {len(dumps(tools)) // 4} tokens)" * bool(tools)
        found = "".join(f"         {each}\n" for each in failures + warnings)
        sys.stdout.write(f"{verdict:9}{name}{cost}\n{found}")
        status |= bool(failures)
    return status


async def tried(
    plugin: Plugin, alone: Config, environ: Pairs, data: Path, prompt: str | None
) -> tuple[list[str], list[str], list[Chat]]:
    """Return what is wrong with an agent, what may be wrong, and the tools that it offered."""
    request: Chat = {"messages": [{"role": "user", "content": prompt or "what is one?"}]}
    header = {"x-osp-agents": f"/{plugin.name}"}
    with complaints() as records:
        if not plugin.error:
            found = await trial(alone, SAYS, data, environ, request, header)
            plugin, agent, answers, problem = found
    if error := plugin.error:
        return [f"{error.kind}: {error} ({error.where})"], [], []
    if not agent:  # disabled
        return [], [], []
    failures = forbidden_imports(plugin.folder) + [problem] * bool(problem)
    if plugin.responds and any(answer.payload and not answer.text for answer in answers):
        failures.append(SWALLOWED)
    tools = answers[0].payload.get("tools", [])
    warnings = doubtful_hooks(agent, plugin, asked=bool(answers[0].payload))
    for complaint in described(records):
        (failures if complaint.startswith("agent failed") else warnings).append(complaint)
    return failures, warnings, tools


def forbidden_imports(folder: Path) -> list[str]:
    """Return the lines by which an agent would depend on more than its contract."""
    files = [file for file in sorted(folder.rglob("*.py")) if not file.name.startswith("test_")]
    return [
        f"{file}:{number}: {line.strip()}: {ONLY_AGENT}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN.match(line) and file.parent.name != "bench"
    ]


def doubtful_hooks(agent: BaseAgent, plugin: Plugin, *, asked: bool) -> list[str]:
    """Return the methods that are nearly hooks, and the hooks or tools that are missing.

    `asked`: the model was, so that all tools are known.
    """
    kind, hooks = type(agent), [*HOOKS, "setup", "teardown"]
    own = [name for name in dir(kind) if name[0] != "_" and not hasattr(BaseAgent, name)]
    near = [n for n in own if n.startswith("on_") or get_close_matches(n.lower(), hooks, 1, 0.8)]
    found = [f"{name} is no hook; hooks are {', '.join(hooks)}" for name in near]
    found += ["it has no hook: it changes nothing"] * (not plugin.hooks)
    if "on_tool" in plugin.hooks:
        return found + ["it has on_tool, and offered no tools"] * (asked and not plugin.tools)
    return found + ["it has tools, and no on_tool: they are not offered"] * bool(plugin.tools)


# python testkit.py new NAME


def new_agent(name: str, config: Config, sample: tuple[Path, str]) -> int:
    """Copy a sample agent under a new name; return the exit status.

    Raises ConfigError for a name that cannot be one, or is taken: nothing is overwritten.
    """
    folder = config.plugins.dirs[0] / f"{name}_agent"
    if not NAME.fullmatch(name) or name in RESERVED:
        raise ConfigError(f"{name!r} cannot be a command: small letters, digits, _ and - can")
    if name in scan(config.plugins, {}, {}) or folder.exists():
        raise ConfigError(f"/{name} is there already: {folder}")
    folder.mkdir(parents=True)
    title = "My" + "".join(part.capitalize() for part in re.split("[-_]", name))
    for file in sample[0].glob("*.*"):
        text = file.read_text(encoding="utf-8").replace("Sample", title).replace("sample", name)
        (folder / file.name).write_text(text, encoding="utf-8")
    made = os.path.relpath(folder)
    _, installed = places(os.environ)  # without pytest
    test = "osp-testkit check" if installed else f"python -m pytest {made}"
    sys.stdout.write(f"{made} is there; test it: {test}\n")
    sys.stdout.write(f"Start the proxy again, and try it: /{name} {sample[1]}\n")
    return 0


def main() -> int:
    """Run the command line and return the exit status; 1: an agent failed, 2: bad settings."""
    parser = argparse.ArgumentParser(description="For authors of agents.")
    parser.add_argument("command", choices=("check", "new"), help="try all agents, or begin one")
    parser.add_argument("text", nargs="?", help="check: a prompt to try; new: the command's name")
    usual, installed = places(os.environ)
    file = usual if os.path.exists(usual) else None
    parser.add_argument("--config", type=Path, default=file, help="settings (default: osp.toml)")
    parser.add_argument("--data", type=Path, help="check: agents get copies of the folders in it")
    parser.add_argument("--tools", action="store_true", help="new: the agent has a tool")
    flags = parser.parse_args()
    sys.dont_write_bytecode = True
    if flags.command == "new" and installed:  # not among the files that pip removes
        (flags.config or usual).with_name("plugins").mkdir(parents=True, exist_ok=True)
    try:
        config = load(flags.config, os.environ, {})
        if flags.command == "check":
            return asyncio.run(check(config, os.environ, flags.data, flags.text))
        return new_agent(flags.text or "", config, TOOLS if flags.tools else SAMPLE)
    except ConfigError as exc:
        sys.stderr.write(f"{parser.prog}: {exc}\n")
        return 2


if __name__ == "__main__":
    osp.leave(main())
