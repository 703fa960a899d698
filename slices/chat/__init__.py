"""Chat: POST /api/chat and POST /v1/chat/completions, where agents take part.

A request is parsed, and **touched** only if an agent is in play, a known command leads a user
message, or the header or the model's suffix asks for something. All else goes to Ollama as the
client's own bytes. A touched one is read into a `Turn` (`turn.py`, `commands.py`), its request
hooks run (`chain.py`), and the answer goes through the response hooks while it comes
(`editor.py`). This file is the way of a request: read `Chat` downwards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kernel import relay
from kernel.client import OllamaClient
from kernel.config import ChainConfig, CommandsConfig
from kernel.dialects import JSON, OLLAMA, OPENAI, Dialect, FrameSplitter, dumps, error_object
from kernel.errors import Aborted, BadRequest, BrokenAnswer, NotAllowed, UpstreamError
from kernel.log import facts
from kernel.metrics import Metrics
from kernel.models import Presets
from kernel.plugin import refusal
from kernel.registry import PluginRegistry
from kernel.transport import Answer, Headers
from slices.chat.chain import Trace, notice, response_order, run_requests, summary
from slices.chat.commands import Grammar
from slices.chat.editor import Editor, Stage
from slices.chat.explain import explanation
from slices.chat.turn import AGENTS, Turn, TurnReader, edits, is_bare

# Headers of a request that no longer fit when its body has changed
REPLACED = (b"content-length", b"accept-encoding", AGENTS)


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
