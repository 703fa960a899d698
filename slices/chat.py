"""Chat: POST /api/chat and POST /v1/chat/completions, where agents take part.

A request is parsed, and **touched** only if an agent is in play, a known command leads a user
message, or the header or the model's suffix asks for something. All else goes to Ollama as the
client's own bytes. A touched one is read into a `Turn`, its request hooks run, and the answer goes
through the response hooks while it comes (`kernel/editor.py`). Read this file downwards: it is the
way of a request.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import re
from asyncio import create_task, gather
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kernel import relay
from kernel.agent import Context, Message, Payload, Reply, is_user, last_user, set_text, text_of
from kernel.client import OllamaClient
from kernel.commands import EXPLAIN, Command, Grammar, help_text, parse_arguments, unavailable
from kernel.config import ChainConfig, CommandsConfig
from kernel.connection import Answer, Headers
from kernel.dialects import (
    JSON,
    OLLAMA,
    OPENAI,
    Dialect,
    FrameSplitter,
    dumps,
    error_object,
    loads,
)
from kernel.editor import Editor, Stage
from kernel.errors import (
    Aborted,
    BadRequest,
    BrokenAnswer,
    NotAllowed,
    PluginExecutionError,
    UpstreamError,
)
from kernel.log import facts
from kernel.metrics import Metrics
from kernel.models import Presets
from kernel.plugin import Plugin, refusal
from kernel.registry import PluginRegistry
from kernel.run import ALONE, Run, notice, wrong

AGENTS = b"x-osp-agents"
# Headers of a request that no longer fit when its body has changed
REPLACED = (b"content-length", b"accept-encoding", AGENTS)
MODEL = re.compile(rb'"model"\s*:\s*"([^"\\+]+)"')
KNOWN_KEYS = frozenset(
    "model messages stream format keep_alive tools options think logprobs top_logprobs"
    " response_format stream_options role content images tool_calls tool_name tool_call_id".split()
)
Trace = list[tuple["Run", bytes, bytes]]
LONGEST = 300  # signs of what is no text: an image, say


def routes(
    client: OllamaClient,
    registry: PluginRegistry,
    metrics: Metrics,
    presets: Presets,
    chain: ChainConfig,
    commands: CommandsConfig,
) -> list[Route]:
    def typed(name: str) -> bool:
        return name in registry.plugins and registry.plugins[name].config.typed

    grammars = Grammar(commands.prefix, typed), Grammar("/", lambda name: name in registry.plugins)
    routes = []
    for path, dialect in (("/api/chat", OLLAMA), ("/v1/chat/completions", OPENAI)):
        reader = TurnReader(client, registry, metrics, dialect, *grammars, presets, chain.timeout)
        chat = Chat(client, reader, dialect, chain.notice, presets.max_body)
        routes.append(Route(path, chat, name=path))
    return routes


@dataclass(frozen=True, slots=True)
class Chat:
    """The endpoint of one dialect."""

    client: OllamaClient
    reader: TurnReader
    dialect: Dialect
    notice: bool
    max_body: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        upload = relay.Upload(scope, receive)
        turn: Turn | None = None
        try:
            if scope["method"] == "POST":
                turn = await self.read(upload, scope)
            if turn is None:
                return await relay.forward(self.client, scope, upload, receive, send)
            plugins = [run.plugin for run in turn.runs]
            with self.reader.registry.lease(plugins), relay.Watch(receive, after=upload):
                last = await self.answer(turn, scope, send)
            await relay.send_end(send, last)
        except (BadRequest, NotAllowed, Aborted, UpstreamError) as exc:
            await relay.refuse(scope, send, exc, marks(turn, failed=exc.status >= 500))
        finally:
            if turn:
                facts(scope).agents = summary(turn.runs)

    async def read(self, upload: relay.Upload, scope: Scope) -> Turn | None:
        """Return what is asked for; None: the request goes to Ollama as it is."""
        if facts(scope).foreign:
            body = None  # it gets no agent, whatever it asks for
        else:
            body = await upload.read(self.max_body)
        return self.reader.read(body, scope)

    async def answer(self, turn: Turn, scope: Scope, send: Send) -> bytes:
        """Run the request hooks, get an answer, send it, and return its last bytes."""
        if turn.reply is None and turn.runs:
            await self.prepare(turn)
        if turn.reply is not None:
            return await self.send_reply(turn, turn.reply, scope, send)
        self.check_model(turn)
        body = dumps(turn.payload)
        headers = [p for p in relay.request_headers(scope, self.client) if p[0] not in REPLACED]
        headers.append((b"accept-encoding", b"identity"))
        answer = await self.client.forward("POST", relay.target_of(scope), headers, body)
        async with aclosing(answer):
            return await self.send_answer(turn, answer, scope, send)

    def check_model(self, turn: Turn) -> None:
        """Raise NotAllowed where an agent chose a model whose guard has not seen the request."""
        model, seen = turn.payload.get("model"), [run.plugin for run in turn.runs]
        for guard in self.reader.registry.guards(model if isinstance(model, str) else None):
            if turn.runs and guard not in seen:
                raise refusal(guard)

    async def prepare(self, turn: Turn) -> None:
        """Run the request hooks: they change the payload, or reply."""
        trace: Trace = []
        turn.payload, turn.reply = await run_requests(turn.runs, turn.payload, trace)
        if turn.explain:
            turn.reply = explanation(trace, turn.payload, turn.reply)
            for run in turn.runs:
                run.due = False  # the model has said nothing
        elif turn.reply is None and turn.commands and is_bare(turn.payload):
            turn.reply = self.reader.help(turn.commands[0].name)

    async def send_answer(self, turn: Turn, answer: Answer, scope: Scope, send: Send) -> bytes:
        """Relay Ollama's answer, edited where agents have a say in it."""
        kind = answer.header(b"content-type")
        streams = kind.startswith(self.dialect.stream_type)
        editor = self.editor(turn, whole=not streams)
        editable = answer.status == 200 and (streams or kind.startswith(JSON))
        editable = editable and not answer.header(b"content-encoding")
        for run in turn.runs:
            if (
                answer.status == 200
                and not editable
                and run.plugin.is_guard
                and run.plugin.responds
            ):
                raise refusal(run.plugin)
        if editor is None or not editable:
            return await relay.relay(answer, send, marks(turn))
        headers = [p for p in relay.response_headers(answer) if p[0] != b"content-length"]
        if not streams:
            body = b"".join([chunk async for chunk in answer])
            return await send_whole(turn, headers, await editor.edit_whole(body), send)
        await relay.start(send, answer.status, [*headers, *marks(turn)])
        try:
            return await self.send_frames(frames_of(answer, self.dialect), editor, scope, send)
        except UpstreamError as exc:
            raise BrokenAnswer(str(exc)) from exc

    async def send_reply(self, turn: Turn, text: str, scope: Scope, send: Send) -> bytes:
        """Send an answer that no model gave, in the client's dialect."""
        if not turn.takes_replies(self.dialect):
            raise BadRequest(text)
        kind, frames = self.dialect.answer(turn.asked, text)
        headers = [(b"content-type", kind), *facts(scope).cors]
        streams = kind == self.dialect.stream_type
        editor = self.editor(turn, whole=not streams) or Editor(self.dialect, [], [])
        if not streams:
            return await send_whole(turn, headers, await editor.edit_whole(frames[0]), send)
        await relay.start(send, 200, [*headers, *marks(turn)])
        return await self.send_frames(iterate(frames), editor, scope, send)

    async def send_frames(
        self, batches: AsyncIterator[list[bytes]], editor: Editor, scope: Scope, send: Send
    ) -> bytes:
        """Send a stream's frames, edited, and return what stands at its end.

        Frames that came together go together, unless an agent may keep the later ones waiting.
        """
        done: list[bytes] = []
        try:
            async for frames in batches:
                for frame in frames:
                    done += await editor.edit(frame)
                    if editor.waits and done:
                        await relay.send_chunk(send, b"".join(done))
                        done.clear()
                if done:
                    await relay.send_chunk(send, b"".join(done))
                    done.clear()
            done += await editor.end()
        except Aborted as exc:
            # The status is long gone: an error frame, and then the end.
            done.append(self.dialect.encode(error_object(scope["path"], exc.status, str(exc))))
        return b"".join(done)

    def editor(self, turn: Turn, *, whole: bool) -> Editor | None:
        """Return what edits the answer, or None where it must or may stay as it is."""
        order = response_order(turn.runs)
        order = [run for run in order if edits(run.plugin, turn.asked, self.dialect)]
        prose = turn.takes_replies(self.dialect) and not turn.asked.get("logprobs")
        noticed = turn.runs if self.notice and prose else []
        if not order and not notice(noticed):
            return None
        return Editor(self.dialect, [Stage(run, whole=whole) for run in order], noticed)


def marks(turn: Turn | None, *, failed: bool = False) -> Headers:
    """Return our own headers: what the agents did, and that SDKs shall not repeat a failure."""
    if turn is None or not turn.runs:
        return []
    said = [(AGENTS, summary(turn.runs).encode())]
    return [*said, (b"x-should-retry", b"false")] if failed else said


async def send_whole(turn: Turn, headers: Headers, body: bytes, send: Send) -> bytes:
    await relay.start(send, 200, [*headers, (b"content-length", b"%d" % len(body)), *marks(turn)])
    return body


async def frames_of(answer: Answer, dialect: Dialect) -> AsyncIterator[list[bytes]]:
    """Yield the frames of a stream that complete together, and what stands behind the last one."""
    splitter = FrameSplitter(dialect.end)
    async for data in answer:
        yield splitter.feed(data)
    if rest := splitter.rest():
        yield [rest]


async def iterate(frames: list[bytes]) -> AsyncIterator[list[bytes]]:
    yield frames


@dataclass(slots=True)
class Turn:
    """One touched request: the payload without its commands, and the agents in play."""

    payload: Payload
    asked: Payload  # as the client meant it, whatever agents make of it
    commands: list[Command] = field(default_factory=list)  # asked for, each agent once
    runs: list[Run] = field(default_factory=list)  # always-on agents first
    explain: bool = False  # what the agents do is asked for, not the model's answer
    reply: str | None = None  # answered without the model

    def takes_replies(self, dialect: Dialect) -> bool:
        """Tell whether prose is a possible answer: the client wants no JSON and no tool call."""
        return not (dialect.is_structured(self.asked) or self.asked.get("tools"))


@dataclass(frozen=True, slots=True)
class TurnReader:
    """Reads the turns of one dialect."""

    client: OllamaClient
    registry: PluginRegistry
    metrics: Metrics
    dialect: Dialect
    typed: Grammar
    spelled: Grammar  # of header, suffix and presets, whatever is typed
    presets: Presets
    timeout: float  # of a hook whose plugin says nothing else

    def read(self, body: bytes | None, scope: Scope) -> Turn | None:
        """Return what is asked for, or None for a request that is forwarded as it is.

        A body of None is one that may not be read, or is too large.
        Raises BadRequest for an unknown agent or a wrong argument in header, suffix or preset, and
        NotAllowed where a guard would not see all of it.
        """
        if body and (model := self.passing(body, scope)):
            facts(scope).model = model
            return None
        payload = parse(body, self.dialect) if body else None
        if payload is None:
            self.registry.check_guards(None)
            return None
        facts(scope).model = payload["model"]
        headers = [v.decode("latin-1") for k, v in scope["headers"] if k == AGENTS]
        header = " ".join(headers) if headers else None
        named, suffix = split_model(payload["model"])
        preset = self.presets.find(named)
        payload["model"] = preset.model if preset else named
        marked = header is not None or suffix is not None or preset is not None
        strict = [*self.listed("X-OSP-Agents", header), *self.listed("the model's suffix", suffix)]
        if preset:
            strict += self.listed(f"the preset {named}", preset.agents)
        if not payload.get("messages"):  # it loads or unloads a model: nobody's turn
            return Turn(payload, payload) if marked else None
        guards = self.registry.guards(payload["model"])
        for guard in guards:
            blind = guard.responds and not edits(guard, payload, self.dialect)
            if guard.agent is None or blind:
                raise refusal(guard)
        about = self.typed.help_wanted(text_of(last_user(payload) or {}))
        typed, stripped = self.strip(payload)
        always = self.registry.always(payload["model"])
        if not (marked or stripped or always or about is not None):
            return None
        commands = [*strict, *typed]
        agents = [command for command in commands if command.name != EXPLAIN]
        turn = Turn(payload, payload, unique(agents), explain=len(agents) < len(commands))
        if about is not None:
            turn.reply = self.help(about)
        else:
            self.enlist(turn, always, strict, scope)
        return turn

    def passing(self, body: bytes, scope: Scope) -> str:
        """Return the model of a chat in which, at a glance, nothing can ask for an agent, else "".

        The sign of commands does not stand in it, nor an escape that might hide one, nor a +. To
        parse it would cost a good part of what forwarding it costs.
        """
        sign = self.typed.prefix.encode()
        if (sign and sign in body) or b"\\u" in body or body.count(b'"model"') != 1:
            return ""
        asked = any(name == AGENTS for name, _ in scope["headers"])
        if asked or self.presets.named or self.registry.always_on():
            return ""
        model = MODEL.search(body)
        return model[1].decode(errors="replace") if model else ""

    def listed(self, where: str, text: str | None) -> list[Command]:
        """Return the commands of a header or a suffix, which holds nothing else."""
        if not text:
            return []
        commands, rest = self.spelled.split(text)
        if rest:
            known = ", ".join(f"/{name}" for name in self.registry.plugins) or "none"
            raise BadRequest(f"{where}: {rest!r} is no known agent; known are: {known}")
        return commands

    def strip(self, payload: Payload) -> tuple[list[Command], bool]:
        """Take the commands out of every user message; those of the last one count.

        So the model never learns to type them, and its prompt cache keeps hitting.
        """
        commands: list[Command] = []
        stripped = False
        for message in filter(is_user, payload["messages"]):
            text = text_of(message)
            commands, rest = self.typed.split(text)
            if rest != text:
                set_text(message, rest)
                stripped = True
        return commands, stripped

    def enlist(
        self, turn: Turn, always: list[Plugin], strict: Sequence[Command], scope: Scope
    ) -> None:
        """Fill in the runs, or the reply where a command cannot be obeyed."""
        commands = {command.name: command for command in turn.commands}
        spelled = {(command.name, command.arguments) for command in strict}
        asked = [self.registry.plugins[name] for name in commands]
        state: dict[str, Any] = {}
        plugins = [*always, *(plugin for plugin in asked if plugin not in always)]
        for plugin in sorted(plugins, key=place):
            command = commands.get(plugin.name)
            try:
                arguments = self.arguments(plugin, command)
            except BadRequest as exc:
                if command and (command.name, command.arguments) in spelled:
                    raise
                turn.reply = f"{exc}\n\n{self.help(plugin.name)}"
                return turn.runs.clear()  # nobody else has a say in this
            known = facts(scope)
            context = Context(
                request_id=known.request_id,
                dialect=self.dialect.name,
                stream=self.dialect.wants_stream(turn.payload),
                asked=command is not None,
                user=known.user,
                state=state,
                log=agent_log(plugin.name, known.request_id),
                payload=turn.payload,
                client=self.client,
            )
            agent = plugin.instance(context, arguments)
            limit = plugin.config.timeout or self.timeout
            before = turn.runs[-1].plugin if turn.runs else plugin
            together = command.together if command and before not in always else ()
            joined = before.name in together and not (agent.innermost or agent.last)
            turn.runs.append(Run(plugin, agent, limit, self.metrics, joined))

    def arguments(self, plugin: Plugin, command: Command | None) -> dict[str, Any]:
        if plugin.agent is None:
            raise BadRequest(f"the agent {plugin.name} {unavailable(plugin)}")
        try:
            return parse_arguments(command.arguments if command else "", plugin.config.arguments)
        except BadRequest as exc:
            raise BadRequest(f"{plugin.name}: {exc}") from exc

    def help(self, name: str) -> str:
        plugins = self.registry.plugins
        return help_text([plugins[name]] if name else plugins.values(), self.typed.prefix)


def place(plugin: Plugin) -> int:
    """Return 0 for agents in their own order, 1 for one that is last, 2 for an innermost one."""
    agent = plugin.agent
    return 0 if agent is None else 2 if agent.innermost else int(agent.last)


def agent_log(name: str, request_id: str) -> logging.LoggerAdapter[logging.Logger]:
    fields = {"fields": {"agent": name, "request_id": request_id}}
    return logging.LoggerAdapter(logging.getLogger(f"plugins.{name}"), fields)


def parse(body: bytes, dialect: Dialect) -> Payload | None:
    """Return the JSON of a chat, or None if Ollama may read it otherwise than we would.

    Go's decoder is more lenient in some ways (the case of keys) and stricter in others (NaN).
    """
    try:
        payload = loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(payload, dict) or not isinstance(payload.get("model"), str):
        return None
    messages = payload.get("messages") or []
    options = payload.get("options") or {}
    if not isinstance(messages, list) or not isinstance(options, dict) or misspelt(payload):
        return None
    if not all(is_message(message) and not misspelt(message) for message in messages):
        return None
    parts = any(isinstance(message.get("content"), list) for message in messages)
    return None if parts and dialect is not OPENAI else payload


def misspelt(table: Mapping[str, Any]) -> bool:
    """Tell whether a known key stands there in another case, which Go would take for it."""
    strange = table.keys() - KNOWN_KEYS
    return bool(strange) and any(key.casefold() in KNOWN_KEYS for key in strange)


def edits(plugin: Plugin, payload: Payload, dialect: Dialect) -> bool:
    """Tell whether response hooks may change the answer: they must not make it false."""
    structured = dialect.is_structured(payload) and not plugin.config.structured
    return not (structured or payload.get("logprobs"))


def split_model(model: str) -> tuple[str, str | None]:
    """Split `llama3.2:3b+rag+translate:de` into the model and its suffix, as commands."""
    name, plus, suffix = model.partition("+")  # + is no legal character of a model's name
    return name, f"/{suffix}".replace("&+", "&/").replace("+", " /") if plus else None


def unique(commands: Sequence[Command]) -> list[Command]:
    """Keep each agent's first place and last arguments."""
    last = {command.name: command for command in commands}
    first = {command.name: command for command in reversed(commands)}
    return [replace(first[name], arguments=last[name].arguments) for name in last]


def is_bare(payload: Payload) -> bool:
    """Tell whether the last user message says nothing and shows nothing."""
    message = last_user(payload)
    if message is None:
        return False
    content = message.get("content")
    shows = isinstance(content, list) and any(part.get("type") != "text" for part in content)
    return not (text_of(message).strip() or message.get("images") or shows)


async def run_requests(
    runs: Sequence[Run], payload: Payload, trace: Trace
) -> tuple[Payload, str | None]:
    """Return the payload as the hooks changed it, and the text of a Reply. Raises Aborted.

    `trace` is filled with each run, and the body as it came to the agent and as that left it.
    """
    for run in runs:
        run.metrics.activated(run.plugin.name)
    body = dumps(payload)
    waiting = groups(runs)
    while waiting:
        try:
            if len(waiting[0]) == 1:
                left = await ask(waiting[0][0], body, partial(encoded, payload))
                trace.append((waiting[0][0], body, left))
            else:
                left = await ask_together(waiting[0], body, payload, trace)
        except Reply as reply:
            for run in chain.from_iterable(waiting):
                run.due = False
            return json.loads(body), reply.text
        body = left
        del waiting[0]
    return json.loads(body), None


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs with a request hook, in order, those that run at the same time together."""
    together: list[list[Run]] = []
    for run in runs:
        if not run.joined:
            together.append([])
        if run.has("on_request"):
            together[-1].append(run)
    return [group for group in together if group]


async def ask(
    run: Run, body: bytes, accept: Callable[[Any], bytes], *, may_reply: bool = True
) -> bytes:
    """Return the body as an agent leaves it: after a failure as it was. Raises Reply, Aborted."""
    try:
        payload = json.loads(body)
        left = await run.call("on_request", payload, accept=accept, may_reply=may_reply)
        return bytes(left)
    except PluginExecutionError:
        return body


async def ask_together(group: Sequence[Run], body: bytes, original: Payload, trace: Trace) -> bytes:
    """Return the body with what each of a group added, as typed; the first Aborted ends all."""

    def mergeable(result: Any) -> bytes:
        left = encoded(original, result)
        Additions(body, left)
        return left

    tasks = [create_task(ask(run, body, mergeable, may_reply=False)) for run in group]
    try:
        bodies = await gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    trace += [(run, body, left) for run, left in zip(group, bodies, strict=True)]
    return merged(body, [Additions(body, left) for left in bodies])


class Additions:
    """What an agent added to a body: messages, and text before that of the last user message.

    Raises PluginExecutionError where it changed anything else.
    """

    def __init__(self, body: bytes, left: bytes) -> None:
        before, after = json.loads(body), json.loads(left)
        old, new = before.pop("messages"), after.pop("messages")
        user = last_user({"messages": old})
        self.inserted: defaultdict[int, list[Message]] = defaultdict(list)  # by what they precede
        self.text = ""
        at = len(old)
        for message in reversed(new):  # what is added is mostly older than what was asked
            if at and message == old[at - 1]:
                at -= 1
            elif at and old[at - 1] is user and (text := text_added(message, user)):
                self.text = text
                at -= 1
            else:
                self.inserted[at].insert(0, message)
        if before != after or at:
            raise PluginExecutionError(f"changed more than can be merged: {ALONE}")


def text_added(message: Message, user: Message) -> str:
    """Return what stands before the text of `user` in a message that is the same but for that."""
    text, old = text_of(message), text_of(user)
    same = copy.deepcopy(user)
    set_text(same, text)
    return text.removesuffix(old) if text.endswith(old) and same == message else ""


def merged(body: bytes, parts: Sequence[Additions]) -> bytes:
    payload = json.loads(body)
    if user := last_user(payload):
        if text := "".join(part.text for part in parts):
            set_text(user, text + text_of(user))
    old: list[Message] = payload["messages"]
    messages = payload["messages"] = []
    for at in range(len(old) + 1):
        for part in parts:
            messages += part.inserted[at]
        messages += old[at : at + 1]
    return dumps(payload)


def encoded(original: Payload, result: Any) -> bytes:
    """Return an agent's payload as bytes; `stream` stays what the client wanted."""
    if not isinstance(result, dict):
        raise wrong(result, "on_request must return the payload")
    messages = result.get("messages")
    if not isinstance(messages, list) or not messages:
        raise PluginExecutionError("returned a payload without a list of messages")
    if not isinstance(result.get("model"), str):
        raise PluginExecutionError("returned a payload without a model's name")
    for message in messages:
        if not isinstance(message, dict):
            raise PluginExecutionError("returned a message that is not a dict")
        if not is_message(message):
            raise wrong(message["content"], "a message's content is text or a list of parts")
    if "stream" in original:
        result["stream"] = original["stream"]
    else:
        result.pop("stream", None)
    try:
        return dumps(result)
    except (TypeError, ValueError, RecursionError) as exc:
        raise PluginExecutionError(f"returned what is no JSON: {exc}") from exc


def is_message(message: Any) -> bool:
    """Tell whether something is a message, as either dialect knows it."""
    content = message.get("content") if isinstance(message, dict) else 0
    if isinstance(content, list):
        return all(isinstance(p, dict) and isinstance(p.get("text", ""), str) for p in content)
    return content is None or isinstance(content, str)


def response_order(runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose response hooks are due, in the order in which text goes through."""
    responding = [run for run in runs if run.due and run.plugin.responds]
    inner = [run for run in reversed(responding) if run.agent.innermost]
    end = [run for run in reversed(responding) if run.agent.last and not run.agent.innermost]
    due = [run for run in responding if not (run.agent.innermost or run.agent.last)]
    wraps = [run for run in reversed(due) if run.has("on_request")]
    rest = [run for run in due if not run.has("on_request")]
    pipe = [run for run in rest if not run.plugin.config.always]
    last = [run for run in rest if run.plugin.config.always]
    return [*inner, *pipe, *wraps, *last, *end]


def summary(runs: Sequence[Run]) -> str:
    """Return what X-OSP-Agents says: `rag;ok;12ms, translate;error;3ms`."""
    return ", ".join(f"{r.plugin.name};{r.outcome};{r.seconds * 1000:.0f}ms" for r in runs)


def explanation(trace: Trace, payload: Payload, reply: str | None) -> str:
    """Return the answer to `/explain`; `reply` is what an agent answered without the model."""
    parts = [part_of(run, before, after) for run, before, after in trace]
    if reply is None:
        sent = "\n".join(lines_of(dumps(payload)))
        end = f"The model would have been sent:\n{sent}"
    else:
        end = f"The model would not have been asked. The answer would have been:\n{reply}"
    return "\n\n".join([*parts, end])


def part_of(run: Run, before: bytes, after: bytes) -> str:
    title = f"/{run.plugin.name} ({run.outcome}, {run.seconds * 1000:.0f} ms)"
    changes = difflib.unified_diff(list(lines_of(before)), list(lines_of(after)), n=0, lineterm="")
    shown = [line[0] + " " + line[1:] for line in list(changes)[2:] if not line.startswith("@@")]
    return "\n".join([title, *(shown or ["changed nothing"])])


def lines_of(body: bytes) -> Iterator[str]:
    payload = json.loads(body)
    for message in payload.pop("messages"):
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        for part in parts:
            text = part.get("text") if part.get("type") == "text" else short(part)
            yield from f"[{message.get('role')}] {text}".splitlines()
        rest = {k: v for k, v in message.items() if k not in ("role", "content")}
        yield from (f"    {key}: {short(value)}" for key, value in rest.items())
    yield from (f"{key}: {short(value)}" for key, value in payload.items())


def short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"
