"""Chat: the chat endpoints of every dialect, where agents take part.

A request is **touched** if an agent is in play: always on for its model, or asked for by a preset,
the header X-OSP-Agents or a command. All other requests go to Ollama as the client's own bytes. A
touched one is read into a `Turn`; its request hooks run, it is written and sent, and the answer
goes through the response hooks while it comes (`kernel/editor.py`). Where agents offer tools, and
the model calls them, the request is sent again with what they returned, and the answer goes on
(`kernel/rounds.py`). Read this file downwards: it is the way of a request.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import aclosing, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kernel import client as upstream
from kernel import dialects, errors, relay, tools
from kernel.access import check_model, may_use
from kernel.agent import (
    REMINDER,
    RUNNER_FIELDS,
    RUNNER_OPTIONS,
    Context,
    Message,
    Payload,
    Reply,
    Tool,
    is_user,
    last_user,
    put_before,
    text_of,
    text_parts,
    typed_part,
    user_texts,
)
from kernel.client import OllamaClient
from kernel.commands import (
    EXPLAIN,
    HELP,
    Command,
    Grammar,
    help_text,
    parse_arguments,
    unavailable,
)
from kernel.config import ChainConfig, CommandsConfig
from kernel.connection import Answer, Headers
from kernel.dialects import Dialect
from kernel.dialects.calls import Made, Result, ToolCall
from kernel.dialects.every import DIALECTS
from kernel.editor import Editor, FrameSplitter, Stage
from kernel.guards import NO_TEXT, is_loading
from kernel.hooks import Run, wrong
from kernel.log import WAITING, RequestInfo, Step, info
from kernel.metrics import Metrics
from kernel.plugin import Plugin
from kernel.presets import Presets
from kernel.registry import PluginRegistry, refusal
from kernel.rounds import Rounds
from kernel.tools import Consent, Shown

logger = logging.getLogger(__name__)

AGENTS = b"x-osp-agents"
REPLACED = (b"content-length", b"accept-encoding")  # they no longer fit when the body has changed
ALONE = "agents joined by & may only add system messages, and text before the prompt"
FOREIGN = "no agent takes part in what a page of another origin asks; see access.origins"
UNREAD = "no agent takes part: the body is too long, or not plain JSON; see server.max_body"
PAUSE = 0.2  # seconds behind its head after which a stream's own head does not wait for a frame
LONGEST = 300  # characters that /explain shows of a value without text: an image, say
T = TypeVar("T")
OLLAMA = Dialect()  # the dialect in which agents ask

Spoken = str | AsyncIterator[str]  # a reply, whole or in pieces
Trace = list[tuple[Run, bytes, bytes]]  # an agent's run, and the payload before and after it


def routes(
    client: OllamaClient,
    registry: PluginRegistry,
    chain: ChainConfig,
    commands: CommandsConfig,
    consent: Consent,
    *,
    metrics: Metrics | None = None,
    presets: Presets | None = None,
    max_body: int = 2**25,
) -> list[Route]:
    """Return one route for each dialect; chats of more than `max_body` bytes are not read."""
    known = registry.plugins.__contains__
    grammars = Grammar(commands.prefix, known), Grammar("/", known)
    parts = client, registry, metrics or Metrics(), presets or Presets({}), *grammars
    chats = [Chat(dialect, *parts, chain, consent, max_body) for dialect in DIALECTS]
    return [Route(chat.dialect.path, chat, name=chat.dialect.path) for chat in chats]


@dataclass(frozen=True, slots=True)
class Chat:
    """The endpoint of one dialect."""

    dialect: Dialect
    client: OllamaClient
    registry: PluginRegistry
    metrics: Metrics
    presets: Presets
    typed: Grammar
    slashes: Grammar  # of the header and of presets
    chain: ChainConfig
    consent: Consent
    max_body: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        turn: Turn | None = None
        try:
            found = await self.read(scope, receive)
            if not isinstance(found, Turn):
                return await relay.forward(self.client, scope, receive, send, found)
            turn = found
            await self.answer(turn, send)
        except (errors.BadRequest, errors.NotAllowed, errors.Aborted, errors.UpstreamError) as exc:
            if turn:
                turn.stop()  # an agent that has not run yet never will
            await relay.refuse(scope, send, exc, turn.headers(exc) if turn else [])
        finally:
            if turn:
                info(scope).agents = turn.summary()
                turn.close()

    # 1. What does the request ask for?

    async def read(self, scope: Scope, receive: Receive) -> Turn | bytes | None:
        """Return the turn of a touched request, None for one that is forwarded as it is.

        Bytes are the body of one that no agent touches, with what its preset says. Raises
        BadRequest for an unknown agent or a wrong argument in header or preset, and NotAllowed
        where a guard would not see the whole request.
        """
        if scope["method"] in NO_TEXT:
            return None
        known = info(scope)
        body, strict = None, bool(self.registry.guards(None) or known.key.models)
        if scope["method"] == "POST" and not info(scope).foreign:
            body = await relay.Upload.of(scope, receive).read(self.max_body)
        request, payload = self.parse(body, strict=strict)
        if payload is None:
            info(scope).hint(FOREIGN if info(scope).foreign else UNREAD)
            self.registry.check_guards(None)
            check_model(known, None)
            return None
        model = known.model = request["model"]
        check_model(known, model)
        preset = self.presets.find(model)
        filled = self.dialect.missing(request, preset.think, preset.keep_alive) if preset else {}
        if self.dialect.is_load(payload):
            if strict and not is_loading(request):
                self.registry.check_guards(self.presets.names(model))
            return self.fill(body, filled) if strict or filled else None
        header = self.spelled("X-OSP-Agents", info(scope).commands)
        standing = self.spelled(f"the preset {model}", preset.agents) if preset else []
        always = self.registry.always(self.presets.names(model))
        if not (header or standing or always or strict or self.is_typed(payload, scope)):
            return self.fill(body, filled) if filled else None
        request, payload = self.parse(body, strict=True)
        if payload is None:
            return None
        request |= filled
        payload |= filled
        self.check_guards(request)
        turn = Turn(self, request, payload, scope)
        if body and tools.MARK.encode() in body:
            waiting = tools.unload(payload["messages"], partial(told, self.dialect))
            turn.waiting = [("", call) for call in waiting]
        return self.turn(turn, header, standing, always)

    def fill(self, body: bytes | None, fields: Payload) -> bytes | None:
        """Return a body with these fields; None: Ollama could interpret it differently."""
        request, payload = self.parse(body, strict=True)
        return None if payload is None else dialects.dumps(request | fields)

    def parse(self, body: bytes | None, *, strict: bool) -> tuple[Payload, Payload | None]:
        """Return a request and its payload; None: Ollama could interpret it differently than we do.

        Whether a command may stand in it is seen without the strict checks, which cost time.
        """
        try:
            request = (dialects.loads_once if strict else dialects.loads)(body or b"")
            payload = self.dialect.read(request)
            if strict:
                self.dialect.check(payload)
            if not (isinstance(request["model"], str) and is_list(payload.get("messages"))):
                return {}, None
            return request, payload
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}, None

    def spelled(self, source: str, text: str | None) -> list[Command]:
        """Return the commands of a header or a preset. Raises BadRequest for anything else."""
        commands, rest = self.slashes.split(text or "")
        if rest.strip():
            names = ", ".join(f"/{name}" for name in self.registry.plugins) or "none"
            raise errors.BadRequest(f"{source}: {rest!r} is no known agent; known are: {names}")
        return commands

    def is_typed(self, payload: Payload, scope: Scope) -> bool:
        """Tell whether a command leads a text of the user; log a near miss."""
        text = ""
        for text in user_texts(payload):
            if self.typed.split(text)[1] != text:
                return True
        if near := self.typed.near(text):
            info(scope).hint(f"did you mean {self.typed.prefix}{near}?")
        return False

    def check_guards(self, request: Payload) -> None:
        """Raise NotAllowed unless each guard is loaded and may edit the answer if it wants to."""
        for guard in self.registry.guards(self.presets.names(request["model"])):
            if guard.agent is None or (guard.responds and not self.may_edit(request, guard)):
                raise refusal(guard)

    def may_edit(self, request: Payload, plugin: Plugin | None = None) -> bool:
        """Tell whether the answer stays true when its text changes, by a plugin that can say so."""
        keeps_json = plugin is not None and plugin.config.structured
        structured = self.dialect.is_structured(request) and not keeps_json
        return not (structured or request.get("logprobs") or request.get("top_logprobs"))

    def turn(
        self, turn: Turn, header: list[Command], standing: list[Command], always: list[Plugin]
    ) -> Turn:
        """Fill in who takes part, or what the proxy itself answers; `standing` are the preset's."""
        try:
            self.agree(turn)
        except errors.NotAllowed as exc:
            turn.say(str(exc))
            return turn
        typed = self.strip(turn)
        turn.asked = {command.name for command in [*header, *typed]}
        if barred := [n for n in turn.asked - {EXPLAIN, HELP} if not may_use(info(turn.scope), n)]:
            raise errors.NotAllowed(f"the key {info(turn.scope).user} may not use /{min(barred)}")
        commands = [*header, *standing, *typed]
        turn.explain = any(command.name == EXPLAIN for command in commands)
        turn.commands = unique([c for c in commands if c.name not in (EXPLAIN, HELP)])
        about = [command.arguments for command in commands if command.name == HELP]
        if about:
            turn.say(self.help(turn, about[0]))
        else:
            self.enlist(turn, always, {(c.name, c.arguments) for c in [*header, *standing]})
        return turn

    def agree(self, turn: Turn) -> None:
        """Take the proxy's questions and the user's yes out of the history.

        Where the last message says yes, the calls that were shown wait, and the message of the user
        before the question counts as the last. Raises NotAllowed if those are not what was shown.
        """
        user, last = info(turn.scope).user, last_user(turn.payload)
        kept: list[Message] = []
        shown: Shown | None = None
        for message in turn.payload["messages"]:
            if message.get("role") == "assistant":
                parts = text_parts(message)
                asking = [(part, self.consent.shown(user, part["text"])) for part in parts]
                part, shown = next((pair for pair in asking if pair[1]), ({}, None))
                if shown and shown.calls:
                    part["text"] = shown.rest
                    replace_texts(message, parts)
                    if not text_of(message):
                        continue
            elif shown and is_user(message):
                calls, shown = shown.calls, None
                yes = self.typed.agrees((typed_part(message) or {}).get("text", ""))
                if yes and message is last:
                    if not calls:
                        raise errors.NotAllowed(tools.ALTERED)
                    turn.agreed, turn.waiting = True, calls
                    continue
                if yes and calls:
                    kept += told(self.dialect, [(call, tools.LOST) for _, call in calls])
                    continue
            kept.append(message)
        turn.payload["messages"] = kept

    def strip(self, turn: Turn) -> list[Command]:
        """Take the commands out of every text of the user; return those of the last message.

        The model never learns to type them, and its prompt cache keeps hitting.
        """
        last, messages = last_user(turn.payload), turn.payload["messages"]
        commands: list[Command] = []
        for message in filter(is_user, messages):
            parts = text_parts(message)
            split = [self.typed.split(part["text"]) for part in parts]
            leads = next((n for n, (found, _) in enumerate(split) if found), None)
            if message is last:
                commands = split[leads][0] if leads is not None else []
                turn.prompt = joined(split[leads or 0 :])
            for part, (_, rest) in zip(parts, split, strict=True):
                part["text"] = rest
            replace_texts(message, parts)
        speaking = [m for m in messages if str(m.get("role")) not in ("system", "developer")]
        turn.continuation = turn.agreed or not speaking or not is_user(speaking[-1])
        return commands

    def enlist(self, turn: Turn, always: list[Plugin], spelled: set[tuple[str, str]]) -> None:
        """Fill in the runs, or the reply where a command cannot be obeyed."""
        commands = {command.name: command for command in turn.commands}
        asked = [self.registry.plugins[name] for name in commands]
        plugins = [*always, *(plugin for plugin in asked if plugin not in always)]
        for plugin in sorted(plugins, key=order):
            command = commands.get(plugin.name)
            try:
                arguments = arguments_of(plugin, command)
            except errors.BadRequest as exc:
                if command and (command.name, command.arguments) in spelled:
                    raise
                turn.say(f"{exc}\n\n{self.help(turn, plugin.name)}")
                return turn.runs.clear()  # no other agent changes this
            turn.enlist(plugin, arguments, command, always)
        for run in turn.runs:
            run.context.agents = tuple(each.plugin.name for each in turn.runs)

    def help(self, turn: Turn, name: str) -> str:
        plugins, known = self.registry.plugins, info(turn.scope)
        meant = [name] if name else [name for name in plugins if may_use(known, name)]
        return help_text([plugins[name] for name in meant], self.typed.prefix)

    # 2. Run the request hooks, and get an answer

    async def answer(self, turn: Turn, send: Send) -> None:
        if turn.reply is None:
            await self.prepare(turn)
        if turn.reply is not None:
            return await self.send_reply(turn, turn.reply, send)
        async with aclosing(await self.request(turn)) as answer:
            await self.send_answer(turn, answer, send)

    async def prepare(self, turn: Turn) -> None:
        """Run the request hooks: they change the payload, or reply. Raises Aborted."""
        trace: Trace = []
        try:
            turn.payload = await run_requests(turn, trace)
        except Reply as reply:
            turn.reply = reply.text
            trace += [(run, b"", b"") for run in turn.runs if run.outcome == "reply"]
            for run in turn.runs:  # an agent whose request hook has not run edits nothing
                run.due = run.due and (run.outcome == "ok" or not run.has("on_request"))
        info(turn.scope).steps += tuple(step_of(info(turn.scope), *each) for each in trace)
        for run, before, after in trace:
            turn.tell("agent", agent=run.plugin.name, before=before, after=after)
        if turn.explain:
            answer = None if turn.reply is None else await said(turn.reply)
            turn.say(await asyncio.to_thread(explanation, trace, turn, answer))
        elif turn.reply is None and turn.commands and is_bare(turn.payload):
            turn.say(self.help(turn, turn.commands[0].name))
        elif turn.reply is None and turn.waiting and turn.continuation:
            await self.resume(turn)

    async def resume(self, turn: Turn) -> None:
        """Make the calls that wait since the answer before, or ask the user whether to."""
        for agent, call in turn.waiting:
            run, _ = turn.tools.get(call.name, (None, None))
            if run is None or agent not in ("", run.plugin.name):
                call.name = f"{agent} {call.name}".strip()  # which no tool is called
        calls = await judge(turn, [call for _, call in turn.waiting], may_change=False)
        if question := turn.question_about(calls):
            return turn.say(question)
        turn.payload["messages"] += told(self.dialect, await use(turn, calls))
        turn.payload = await run_again(turn)

    async def request(self, turn: Turn) -> Answer:
        """Send the payload to Ollama."""
        self.check_model(turn)
        body = dialects.dumps(self.dialect.write(turn.payload, turn.request))
        headers = relay.request_headers(turn.scope, self.client)
        headers = [pair for pair in headers if pair[0] not in REPLACED]
        headers.append((b"accept-encoding", b"identity"))
        turn.tell("sent to the model", request=turn.payload)
        info(turn.scope).enter(WAITING)
        target, known = relay.target_of(turn.scope), info(turn.scope)
        return await self.client.forward("POST", target, headers, body, known)

    def check_model(self, turn: Turn) -> None:
        """Raise NotAllowed where an agent chose a model whose guard has not seen the request."""
        seen = [run.plugin for run in turn.runs]
        for guard in self.registry.guards(self.presets.names(turn.payload["model"])):
            if turn.runs and guard not in seen:
                raise refusal(guard)

    # 3. Send the answer

    async def send_answer(self, turn: Turn, answer: Answer, send: Send) -> None:
        """Relay Ollama's answer, edited where agents have a part in it."""
        editor = turn.editor()
        is_zipped = bool(answer.header(b"content-encoding"))
        if answer.status == 200 and is_zipped:
            editor.unread()
        if answer.status != 200 or is_zipped or (editor.is_idle and not turn.sees_calls):
            return await relay.relay(answer, turn.scope, send, turn.headers())
        batches = frames_of(answer, self.dialect, whole=editor.whole)
        if turn.sees_calls:
            batches = self.rounds(turn, answer, editor)
        headers = [p for p in relay.response_headers(answer) if p[0] != b"content-length"]
        info(turn.scope).relayed = True
        flows = not (editor.guarded or await answer.arrives(PAUSE))
        async with aclosing(batches):
            await self.send(turn, editor, headers, batches, send, flows=flows)

    async def rounds(
        self, turn: Turn, answer: Answer, editor: Editor
    ) -> AsyncGenerator[list[bytes]]:
        """Yield the frames of the answer, and of those that follow when tools were called.

        In the last round that may be, the model has none of our tools.
        """
        joint = Rounds(self.dialect, whole=editor.whole, unread=turn.unread)
        for left in range(self.chain.rounds, -1, -1):
            async with aclosing(answer):
                async for batch in frames_of(answer, self.dialect, whole=editor.whole):
                    yield [each for frame in batch for each in joint.take(frame)]
            calls = await judge(turn, joint.calls.values())
            ours = [call for call in calls if call.name in turn.tools]
            theirs = [call for call in calls if call.name not in turn.tools and not call.refused]
            if theirs:
                tools.carry(theirs[0], turn.made, [call for call in ours if not call.refused])
            if not calls or theirs or not left or not joint.is_complete:
                break
            turn.question = turn.question_about(calls)
            if turn.question:
                break
            results = [result for _, result in await use(turn, calls)]
            turn.payload["messages"] += joint.history(results)
            joint.go_on()
            editor.go_on()
            if left == 1:
                turn.withdraw()
            turn.payload = await run_again(turn)
            answer = await self.request(turn)
            info(turn.scope).enter("streaming")
            if answer.status != 200:
                text = (await upstream.whole(answer))[:500].decode(errors="replace")
                raise errors.Aborted(f"Ollama answered {answer.status}: {text}", answer.status)
        yield joint.finish(theirs)

    async def send_reply(self, turn: Turn, reply: Spoken, send: Send) -> None:
        """Send an answer that no model gave. What the proxy itself says no agent changes."""
        if self.dialect.is_structured(turn.request):
            raise errors.BadRequest(await said(reply))
        editor = turn.editor()
        kind = self.dialect.whole_type if editor.whole else self.dialect.stream_type
        batches = reply_frames(self.dialect, turn.request, reply, whole=editor.whole)
        await self.send(turn, editor, [(b"content-type", kind)], batches, send)

    async def send(
        self,
        turn: Turn,
        editor: Editor,
        headers: Headers,
        batches: AsyncIterator[list[bytes]],
        send: Send,
        *,
        flows: bool = False,
    ) -> None:
        """Send frames, edited. The head leaves at once (`flows`) or with the first of them: what a
        guard must see, or an agent says, can be refused until then.

        Frames that came together go together, unless an agent makes the later ones wait. Raises
        BrokenAnswer.
        """
        done: list[bytes] = []
        started = False

        async def flush() -> None:
            nonlocal started
            if not started:
                started = True
                length = [(b"content-length", b"%d" % len(done[0]))] if editor.whole else []
                await relay.start(send, 200, [*headers, *length, *turn.headers()])
            if done and not editor.whole:
                chunk = b"".join(done)
                done.clear()
                await relay.send_chunk(send, chunk)

        for run in turn.runs:
            run.waiting = None if editor.whole else flush
        if flows and not editor.whole:
            await flush()
        try:
            async for batch in batches:
                for frame in batch:
                    done += await editor.edit(frame)
                if done:
                    await flush()
            done += await editor.end()
        except (errors.Aborted, errors.NotAllowed, errors.UpstreamError) as exc:
            if not started:
                raise
            if isinstance(exc, errors.UpstreamError):
                done += await editor.release()
                await flush()
                raise errors.BrokenAnswer(str(exc)) from exc
            info(turn.scope).forget()
            error = dialects.error_object(turn.scope["path"], exc.status, str(exc))
            done.append(self.dialect.encode_error(error))  # the status is long gone
        if not started:
            await flush()
        await relay.send_end(send, b"".join(done))

    # What agents ask on their own: Ollama's dialect, through the guards

    async def ask(self, turn: Turn, path: str, body: Payload) -> Any:
        """POST `body` to Ollama for an agent, through the guards; return the JSON of the answer."""
        texts = body.get("input")
        if texts is not None:
            body = {k: v for k, v in body.items() if k != "input"} | {"messages": as_users(texts)}
        inner, known = self.guarded_turn(turn, body), info(turn.scope)
        await self.prepare(inner)
        if inner.reply is not None:
            return OLLAMA.whole(OLLAMA.head(body), await said(inner.reply))
        if texts is not None:
            seen = [text_of(message) for message in inner.payload.pop("messages")]
            return await self.client.ask(path, inner.payload | {"input": seen}, known)
        joint = Rounds(OLLAMA, whole=True, unread=inner.unread)
        frames = joint.take(dialects.dumps(await self.client.ask(path, inner.payload, known)))
        calls = await judge(inner, joint.calls.values())
        frames += joint.finish([call for call in calls if not call.refused])
        return dialects.loads((await inner.editor().edit(frames[0]))[0])

    async def listen(self, turn: Turn, body: Payload) -> AsyncIterator[str]:
        """Ask as `ask` does, and yield the pieces of the text."""
        inner = self.guarded_turn(turn, body)
        await self.prepare(inner)
        if inner.reply is not None:
            async for piece in pieces(inner.reply):
                yield piece
            return
        editor = inner.editor()
        asked = self.client.stream("/api/chat", inner.payload, info(turn.scope))
        async with aclosing(await asked) as answer:
            async for frames in frames_of(answer, OLLAMA, whole=False):
                for edited in [each for frame in frames for each in await editor.edit(frame)]:
                    chunk = OLLAMA.parse(edited) or {}
                    if "error" in chunk:
                        raise errors.UpstreamError(str(chunk["error"]))
                    for holder, key in OLLAMA.places(chunk):
                        yield holder[key]

    def guarded_turn(self, turn: Turn, body: Payload) -> Turn:
        """Return a turn for what an agent asks, with the guards of its model and nobody else."""
        chat = replace(self, dialect=OLLAMA)
        inner = Turn(chat, body, body, turn.scope, nested=True)
        if not turn.nested:  # a guard's own questions go straight to Ollama
            chat.check_guards(body)
            guards = self.registry.guards(self.presets.names(body["model"]))
            for guard in sorted(guards, key=order):
                inner.enlist(guard, arguments_of(guard, None), None, guards)
            turn.inner += inner.runs
        return inner


@dataclass(slots=True)
class Turn:
    """One touched request: the payload without its commands, and the agents in play."""

    chat: Chat
    request: Payload  # the body as the client sent it
    payload: Payload
    scope: Scope
    nested: bool = False  # an agent asks
    commands: list[Command] = field(default_factory=list)  # each agent once
    asked: set[str] = field(default_factory=set)  # names that the client itself gave
    runs: list[Run] = field(default_factory=list)  # always-on agents first
    inner: list[Run] = field(default_factory=list)  # guards of what the agents ask
    prompt: str = ""  # what the user typed, without commands
    continuation: bool = False
    explain: bool = False  # the client wants to see what the agents do
    reply: Spoken | None = None  # an answer without the model
    tools: dict[str, tuple[Run, Tool]] = field(default_factory=dict)  # offered, by the model's name
    own_tools: Any = None  # what the request offered without us
    waiting: list[tuple[str, ToolCall]] = field(default_factory=list)  # agent ("": any) and call
    agreed: bool = False  # the user said yes to what waits
    made: list[Made] = field(default_factory=list)  # calls of our tools in this answer
    question: str = ""  # whether calls may be made
    state: dict[str, Any] = field(default_factory=dict)  # shared by the agents

    def say(self, text: str) -> None:
        """Answer with a text of the proxy's own, which no agent changes."""
        self.reply = text
        self.stop()

    def tell(self, event: str, *, agent: str = "", **payloads: Payload | bytes) -> None:
        """Log at debug what the request became, without its texts."""
        if logger.isEnabledFor(logging.DEBUG):
            fields = {"request_id": info(self.scope).request_id, "agent": agent}
            fields |= {name: outline(payload) for name, payload in payloads.items()}
            logger.debug(event, extra={"fields": fields})

    def stop(self) -> None:
        """Let no response hook run from here on."""
        for run in self.runs:
            run.due = False

    def close(self) -> None:
        """Count the runs, and let go of them: each refers to this turn, by way of its context."""
        for run in self.runs + self.inner:
            run.count()
            run.waiting = None
        self.runs, self.inner, self.tools = [], [], {}

    def enlist(
        self, plugin: Plugin, arguments: Payload, command: Command | None, always: list[Plugin]
    ) -> None:
        """Add the run of one agent, with an instance and a context of its own."""
        chat, known = self.chat, info(self.scope)
        fields = {"fields": {"agent": plugin.name, "request_id": known.request_id}}
        context = Context(
            request_id=known.request_id,
            model=self.payload["model"],
            dialect=chat.dialect.name,
            streams=chat.dialect.wants_stream(self.request),
            asked=plugin.name in self.asked,
            continuation=self.continuation,
            user=known.user,
            prompt=self.prompt,
            explaining=self.explain,
            state=self.state,
            log=logging.LoggerAdapter(logging.getLogger(f"plugins.{plugin.name}"), fields),
            runner=runner_of(self.payload),
            ask=partial(chat.ask, self),
            listen=partial(chat.listen, self),
        )
        agent = plugin.instance(context, arguments)
        limit = plugin.config.timeout or chat.chain.timeout
        before = self.runs[-1].plugin if self.runs else plugin
        together = command.together if command and before not in always else ()
        joined = before.name in together and not (agent.innermost or agent.last)
        run = Run(plugin, agent, limit, chat.metrics, known, command is not None, joined)
        self.runs.append(run)

    def offer(self, body: bytes) -> bytes:
        """Return a request with the tools of the agents; the client's keep their names."""
        offering = [run for run, _ in self.tools.values()]
        runs = [r for r in self.runs if r.due and r.has("on_tool") and r not in offering]
        if self.nested or not runs:
            return body
        payload, new = json.loads(body), []
        given = payload.get("tools") or []
        if not isinstance(given, list):  # Ollama says what is wrong
            return body
        tables = [dialects.table(tool) for tool in given]
        taken = {dialects.table(tool.get("function", tool)).get("name") for tool in tables}
        for run in runs:
            for tool in run.tools():
                name, run.outcome = tool["name"], run.outcome or "ok"
                while name in taken:
                    name = f"{run.plugin.name}_{name}"
                taken.add(name)
                self.tools[name] = run, tool
                new.append(tool | {"name": name})
        self.own_tools = self.own_tools if offering else payload.get("tools")
        payload["tools"] = [*given, *self.chat.dialect.offer(new)]
        return dialects.dumps(payload) if new else body

    def withdraw(self) -> None:
        """Take our tools out of the request."""
        self.payload.pop("tools", None)
        self.payload |= {"tools": self.own_tools} if self.own_tools is not None else {}

    @property
    def sees_calls(self) -> bool:
        """The calls in the answer concern an agent."""
        judged = any(run.due and run.has("on_calls") for run in self.runs)
        return bool(self.tools or (judged and self.payload.get("tools")))

    def unread(self) -> None:
        """Raise NotAllowed if a guard had to see calls that cannot be read."""
        for run in self.runs:
            if run.plugin.is_guard and run.has("on_calls"):
                raise refusal(run.plugin)

    def question_about(self, calls: Iterable[ToolCall]) -> str:
        """Return what the user is asked before calls are made, or ""."""
        agreed, self.agreed = self.agreed, False
        ours = [call for call in calls if call.name in self.tools and not call.refused]
        offers = [self.tools[call.name] for call in ours]
        if agreed or not any(run.needs_consent(tool) for run, tool in offers):
            return ""
        names = [run.plugin.name for run, _ in offers]
        return self.chat.consent.ask(info(self.scope).user, zip(names, ours, strict=True))

    def responding(self) -> list[Run]:
        """Return the runs whose response hooks are due, in the order in which text goes through."""
        due = [r for r in self.runs if r.due and r.plugin.responds]
        return outward([r for r in due if self.chat.may_edit(self.request, r.plugin)])

    def editor(self) -> Editor:
        """Return what edits the answer, or the reply."""
        dialect, whole = self.chat.dialect, not self.chat.dialect.wants_stream(self.request)
        noticed = self.chat.chain.notice and self.chat.may_edit(self.request)
        stages = [Stage(run, whole=whole) for run in self.responding()]
        notice = partial(self.notice, noticed)
        return Editor(dialect, stages, self.request, notice, whole=whole, hidden=self.tools)

    def notice(self, noticed: bool, said: bool) -> str:
        """Return what stands under the answer: a question, and which agents asked for failed."""
        failed = [r.plugin.name for r in self.runs if r.asked and r.outcome in ("error", "timeout")]
        text = f"\n\n[without {', '.join(failed)}: it failed, the proxy's log says why]"
        question, self.question = self.question, ""
        parts = [text] if failed and noticed and said else []
        parts += ["\n\n" * said + question] if question else []
        return "".join(parts)

    def summary(self) -> str:
        """Return the value of X-OSP-Agents: `rag;ok;12ms, translate;error;3ms`."""
        due = self.responding()
        ran = [(r, r.outcome or "ok") for r in self.runs if r.outcome or r in due]
        return ", ".join(f"{r.plugin.name};{what};{r.seconds * 1000:.0f}ms" for r, what in ran)

    def headers(self, failure: Exception | None = None) -> Headers:
        """Return our headers: what the agents did, and that clients shall not repeat a failure."""
        if not self.runs:
            return []
        headers = [(AGENTS, self.summary().encode())]
        if isinstance(failure, errors.Aborted):
            headers += failure.headers
        if isinstance(failure, errors.OSPError) and failure.status >= 500:
            headers.append((b"x-should-retry", b"false"))
        return headers


def outward(runs: list[Run]) -> list[Run]:
    """Return runs in the order in which an answer goes through their hooks.

    Those with response hooks alone are a pipe, left to right; those with both hooks wrap around it
    and close in reverse; always-on ones with response hooks alone come behind those.
    """
    inner = [r for r in reversed(runs) if r.agent.innermost]
    end = [r for r in reversed(runs) if r.agent.last and not r.agent.innermost]
    rest = [r for r in runs if not (r.agent.innermost or r.agent.last)]
    wraps = [r for r in reversed(rest) if r.has("on_request")]
    pipe = [r for r in rest if not r.has("on_request")]
    always = [r for r in pipe if r.plugin.config.always]
    return [*inner, *(r for r in pipe if r not in always), *wraps, *always, *end]


# The chain: each agent works on a payload of its own, parsed from the bytes that the one before it
# left. Its result counts only if it came in time and can be sent.


async def run_requests(turn: Turn, trace: Trace) -> Payload:
    """Return the payload as the request hooks changed it. Raises Reply and Aborted.

    `trace` gets each run, with the payload before and after it.
    """
    for run in turn.runs:
        run.metrics.activated(run.plugin.name)
    body, accept = dialects.dumps(turn.payload), partial(encoded, turn)
    for group in groups(turn.runs):
        if group[0].agent.last or group[0].agent.innermost:  # they see what the others offer
            body = turn.offer(body)
        if len(group) > 1:
            body = await ask_together(group, body, accept, trace)
        else:
            left = await ask(group[0], body, accept)
            trace.append((group[0], body, left))
            body = left
    payload: Payload = json.loads(turn.offer(body))
    return payload


async def run_again(turn: Turn) -> Payload:
    """Return the payload with what tools brought in, as guards and `last` agents changed it."""
    body = dialects.dumps(turn.payload)
    for run in turn.runs:
        run.context.continuation = True
        if run.due and run.has("on_request") and (run.plugin.is_guard or run.agent.last):
            body = await ask(run, body, partial(encoded, turn), may_reply=False)
    payload: Payload = json.loads(body)
    return payload


# Tools


async def judge(
    turn: Turn, given: Iterable[ToolCall], *, may_change: bool = True
) -> list[ToolCall]:
    """Return copies of calls as agents changed them, the refused ones marked.

    `may_change` is false for calls that went through this before the client, or the user, saw them.
    """
    calls, owners = (
        [replace(call) for call in given],
        {n: r.plugin.name for n, (r, _) in turn.tools.items()},
    )
    shown = [tools.seen(call, n, owners.get(call.name, "")) for n, call in enumerate(calls)]
    for run in outward([run for run in turn.runs if run.due and run.has("on_calls")]):
        accept = partial(tools.judged, known=[call["id"] for call in shown])
        with suppress(errors.PluginExecutionError):
            shown = await run.call("on_calls", deepcopy(shown), accept=accept, may_reply=False)
    left = {call["id"]: call for call in shown}
    for number, call in enumerate(calls):
        call.refused = str(number) not in left
        if may_change and not call.refused:
            tools.change(call, left[str(number)])
    return calls


def told(dialect: Dialect, made: Sequence[Made]) -> list[Message]:
    return dialect.spoken("", "", [call for call, _ in made]) + dialect.results(made)


async def use(turn: Turn, calls: Sequence[ToolCall]) -> list[Made]:
    """Return calls with their results; what a tool cannot do is a result, too."""
    results = await gathered([result_of(turn, call) for call in calls])
    made = list(zip(calls, results, strict=True))
    turn.made += made
    return made


async def result_of(turn: Turn, call: ToolCall) -> Result:
    if call.refused:
        return "refused: this call is not allowed"
    if call.name not in turn.tools:
        return f"failed: there is no tool {call.name!r}"
    run, tool = turn.tools[call.name]
    arguments = call.values()
    if arguments is None:
        return "failed: the arguments are no JSON object"
    return await run.use(tool["name"], arguments)


async def gathered(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return what coroutines return that run at once; the first exception cancels the others."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def step_of(known: RequestInfo, run: Run, before: bytes, after: bytes) -> Step:
    sizes = len(before), len(after)
    return Step(
        run.plugin.name, run.outcome, run.seconds, sizes, known.kept(before), known.kept(after)
    )


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs with a request hook, in order; those that run at once stand together."""
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
        return await run.call("on_request", payload, accept=accept, may_reply=may_reply)
    except errors.PluginExecutionError:
        return body


async def ask_together(
    group: Sequence[Run], body: bytes, accept: Callable[[Any], bytes], trace: Trace
) -> bytes:
    """Return the body with what each of a group added, as typed; the first Aborted ends all."""

    def mergeable(result: Any) -> bytes:
        left = accept(result)
        additions(body, left)
        return left

    bodies = await gathered(ask(run, body, mergeable, may_reply=False) for run in group)
    trace += [(run, body, left) for run, left in zip(group, bodies, strict=True)]
    added = [additions(body, left) for left in bodies]
    systems = [message for messages, _ in added for message in messages]
    return dialects.dumps(with_additions(body, systems, "".join(text for _, text in added)))


def additions(body: bytes, left: bytes) -> tuple[list[Message], str]:
    """Return the system messages at the front, and the text before the prompt, that were added.

    Raises PluginExecutionError where anything else changed.
    """
    before, after = json.loads(body), json.loads(left)
    count = max(len(after["messages"]) - len(before["messages"]), 0)
    systems = after["messages"][:count]
    text = typed_text(after).removesuffix(typed_text(before))
    if dialects.leading(systems) < count or with_additions(body, systems, text) != after:
        raise errors.PluginExecutionError(f"changed more than can be merged: {ALONE}")
    return systems, text


def with_additions(body: bytes, systems: list[Message], text: str) -> Payload:
    payload: Payload = json.loads(body)
    if text:
        put_before(payload, text)
    payload["messages"][:0] = systems
    return payload


def encoded(turn: Turn, result: Any) -> bytes:
    """Return an agent's payload as bytes; `stream` stays as the client wanted it."""
    if not isinstance(result, dict):
        raise wrong(result, "on_request must return the payload")
    if not isinstance(result.get("messages"), list) or not result["messages"]:
        raise errors.PluginExecutionError("returned a payload without a list of messages")
    if not isinstance(result.get("model"), str):
        raise errors.PluginExecutionError("returned a payload without a model's name")
    result.pop("stream", None)
    if "stream" in turn.request:
        result["stream"] = turn.request["stream"]
    try:
        body = dialects.dumps(result)
        turn.chat.dialect.write(json.loads(body), turn.request)
    except (TypeError, ValueError, RecursionError) as exc:
        hint = "; is an `await` missing?" if "type coroutine" in str(exc) else ""
        raise errors.PluginExecutionError(f"returned what cannot be sent: {exc}{hint}") from exc
    return body


# The pieces of an answer


async def frames_of(
    answer: Answer, dialect: Dialect, *, whole: bool
) -> AsyncGenerator[list[bytes]]:
    """Yield the frames of a stream that complete together, and what stands behind the last one.

    A whole answer is one frame.
    """
    if whole:
        yield [await upstream.whole(answer)]
        return
    splitter = FrameSplitter(dialect.end)
    async for data in answer:
        yield splitter.feed(data)
    if rest := splitter.rest():
        yield [rest]


async def pieces(reply: Spoken) -> AsyncIterator[str]:
    """Yield a reply piece by piece, a text word by word."""
    if isinstance(reply, str):
        for word in dialects.words(reply):
            yield word
    else:
        async for piece in reply:
            yield piece


async def said(reply: Spoken) -> str:
    return "".join([piece async for piece in pieces(reply)])


async def reply_frames(
    dialect: Dialect, request: Payload, reply: Spoken, *, whole: bool
) -> AsyncIterator[list[bytes]]:
    """Yield the frames of a reply, with every event that the dialect's clients wait for."""
    head = dialect.head(request)
    if whole:
        yield [dialect.encode_whole(dialect.whole(head, await said(reply)))]
        return
    chunks = dialect.speech(head, "word")
    at = next(n for n, chunk in enumerate(chunks) if dialect.places(chunk))
    spoken: list[str] = []
    yield [*map(dialect.encode, chunks[:at])]
    async for piece in pieces(reply):
        yield [dialect.encode(dialect.piece(chunks[at], piece))]
        spoken.append(piece)
    rest = dialect.speech(head, "".join(spoken))[at + 1 :]
    yield [*map(dialect.encode, rest), dialect.done()]


# What a command needs


def order(plugin: Plugin) -> int:
    """Return 0 for agents in their own order, 1 for one that is last, 2 for an innermost one."""
    agent = plugin.agent
    return 0 if agent is None else 2 if agent.innermost else int(agent.last)


def arguments_of(plugin: Plugin, command: Command | None) -> dict[str, Any]:
    """Return the arguments of a command, defaults filled in. Raises BadRequest."""
    if plugin.agent is None:
        raise errors.BadRequest(f"the agent {plugin.name} {unavailable(plugin)}")
    try:
        return parse_arguments(command.arguments if command else "", plugin.config.arguments)
    except errors.BadRequest as exc:
        raise errors.BadRequest(f"{plugin.name}: {exc}") from exc


def unique(commands: Sequence[Command]) -> list[Command]:
    """Keep each agent's first place and last arguments."""
    last = {command.name: command for command in commands}
    first = {command.name: command for command in reversed(commands)}
    return [replace(first[name], arguments=last[name].arguments) for name in last]


def is_list(value: Any) -> bool:
    return value is None or isinstance(value, list)


def runner_of(payload: Payload) -> Payload:
    """Return a copy of the fields that decide whether Ollama loads the model anew."""
    options = payload.get("options") or {}
    fields = {key: payload[key] for key in RUNNER_FIELDS if key in payload}
    return fields | {"options": {key: options[key] for key in RUNNER_OPTIONS if key in options}}


def as_users(texts: Iterable[str]) -> list[Message]:
    return [{"role": "user", "content": text} for text in texts]


def typed_text(payload: Payload) -> str:
    """Return the text of the part that the user typed."""
    message = last_user(payload)
    part = typed_part(message) if message else None
    return str(part["text"]) if part else ""


def joined(split: Sequence[tuple[list[Command], str]]) -> str:
    return "\n\n".join(rest for _, rest in split if rest and not REMINDER.fullmatch(rest))


def replace_texts(message: Message, parts: list[Message]) -> None:
    """Put the texts of `parts` back into a message; a part that became empty goes."""
    if not isinstance(message.get("content"), list):
        message["content"] = parts[0]["text"]
        return
    empty = [part for part in parts if not part["text"]]
    if len(empty) < len(parts):
        message["content"] = [p for p in message["content"] if all(p is not e for e in empty)]


def is_bare(payload: Payload) -> bool:
    """Tell whether the last user message says nothing and shows nothing."""
    message = last_user(payload)
    if message is None:
        return False
    content = message.get("content")
    shows = isinstance(content, list) and any(part.get("type") != "text" for part in content)
    return not (text_of(message).strip() or message.get("images") or shows)


# /explain: the request is shown as lines, what an agent added behind a +, what it removed behind -


def explanation(trace: Trace, turn: Turn, reply: str | None) -> str:
    """Return the answer to `/explain`; `reply` is what an agent answered without the model."""
    shown = [part_of(run, before, after) for run, before, after in trace]
    if turn.tools:
        shown.append(offered(turn))
    if reply is None:
        sent = "\n".join(line for entry in entries(turn.payload) for line in entry)
        end = f"The model would have been sent:\n{sent}"
    else:
        end = f"The model would not have been asked. The answer would have been:\n{reply}"
    return "\n\n".join([*shown, end])


def offered(turn: Turn) -> str:
    """Return the tools of agents, and what they cost in every round."""
    forms = turn.chat.dialect.offer([tool for _, tool in turn.tools.values()])
    cost = len(dialects.dumps(forms)) // 4  # about four characters a token
    lines = [f"{name} (/{run.plugin.name})" for name, (run, _) in turn.tools.items()]
    return "\n".join([f"The model would be offered these tools, about {cost} tokens:", *lines])


def outline(sent: Payload | bytes) -> str:
    """Return a payload without its texts: who speaks how many characters, and the other keys."""
    payload = dict(sent) if isinstance(sent, dict) else json.loads(sent or "{}")
    said = [
        f"{m.get('role', m.get('type'))} {len(text_of(m))}" for m in payload.pop("messages", [])
    ]
    return ", ".join([*said, *payload])


def part_of(run: Run, before: bytes, after: bytes) -> str:
    title = f"/{run.plugin.name} ({run.outcome}, {run.seconds * 1000:.0f} ms)"
    if before == after:
        return f"{title}\nchanged nothing"
    old, new = entries(json.loads(before)), entries(json.loads(after))
    lines = [f"- {line}" for entry in old if entry not in set(new) for line in entry]
    return "\n".join(
        [title, *lines, *(f"+ {line}" for e in new if e not in set(old) for line in e)]
    )


def entries(payload: Payload) -> list[tuple[str, ...]]:
    """Return a payload as tuples of lines: one for each message, and one for each other field."""
    messages = [tuple(message_lines(message)) for message in payload["messages"]]
    return [*messages, *((f"{k}: {short(v)}",) for k, v in payload.items() if k != "messages")]


def message_lines(message: Message) -> Iterator[str]:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    for part in parts if "role" in message else ():
        text = part["text"] if "text" in part else short(part)
        yield from f"[{message['role']}] {text}".splitlines()
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    yield from (f"    {key}: {short(value)}" for key, value in rest.items())


def short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"
