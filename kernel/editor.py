"""Editor: takes the text of an answer through the agents while it streams.

Each agent is a stage. One with `on_chunk` lets text flow; one with `on_response` alone holds it to
the end, while the frames go on with their text emptied, so that the client sees life. What the
stages add at the end leaves before the frame that ends the text. A whole answer is a stream of one
frame. Thinking, tool calls, usage and unknown keys are never touched.

A frame is also made to agree with those before it (`Dialect.settle`): frames of ours stand between
those of Ollama, and an answer may be made of several rounds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence

from kernel.agent import Payload
from kernel.dialects import AnswerState, Chunk, Dialect
from kernel.errors import PluginExecutionError
from kernel.hooks import Run, text_only
from kernel.registry import refusal

logger = logging.getLogger(__name__)


class Stage:
    """One agent's response hooks; `whole`: the answer comes in one piece."""

    def __init__(self, run: Run, *, whole: bool) -> None:
        self.run = run
        self.flows = run.has("on_chunk", "on_end") and not (whole and run.has("on_response"))
        self._held: list[str] = []

    async def feed(self, text: str) -> str:
        if not text or not self.run.due:
            return text
        if self.flows:
            return await self._call("on_chunk", text, otherwise=text)
        self._held.append(text)
        return ""

    async def end(self, *, broken: bool) -> str:
        """Return what belongs at the end of the text.

        If it broke off nothing is added, and what was held leaves unedited, but for a guard's.
        """
        guards = self.run.plugin.is_guard or self.run.has("on_chunk")
        due = self.run.due and (guards or not broken)
        if self.flows:
            return await self._call("on_end", otherwise="") if due else ""
        text = "".join(self._held)
        self._held.clear()
        return await self._call("on_response", text, otherwise=text) if text and due else text

    async def _call(self, hook: str, *args: str, otherwise: str) -> str:
        """Return the hook's text; after a failure text goes on unedited. Raises Aborted."""
        if hook not in self.run.plugin.hooks:
            return otherwise
        try:
            return await self.run.call(hook, *args, accept=text_only, may_reply=False)
        except PluginExecutionError:
            return otherwise


class Editor:
    """Edits the frames of one answer.

    `notice(said)` gives what the proxy itself adds at the end, or ""; `said`: the answer has text.
    `hidden` are the names of tools that the client does not know.
    """

    def __init__(
        self,
        dialect: Dialect,
        stages: Sequence[Stage],
        asked: Payload,
        notice: Callable[[bool], str],
        *,
        whole: bool,
        hidden: Iterable[str] = (),
    ) -> None:
        self._dialect = dialect
        self._stages = stages
        self._notice = notice
        self.whole = whole
        self.guarded = any(stage.run.plugin.is_guard for stage in stages)
        self._state = AnswerState(asked, frozenset(hidden))
        self._open = False  # the last text may go on
        self._closing: list[tuple[bytes, Chunk]] = []  # they wait for how the answer finished
        self._broken = False  # an error frame was seen: the rest passes unchanged

    @property
    def is_idle(self) -> bool:
        """Nothing would be edited."""
        return not (self._stages or self._notice(True) or self._dialect.echoes)

    async def edit(self, frame: bytes) -> list[bytes]:
        """Return the frames that take the place of `frame`."""
        if self._broken:
            return [frame]
        chunk = self._dialect.parse(frame)
        if chunk is None and self._dialect.bare.fullmatch(frame):
            return [*await self.end(), frame] if b"[DONE]" in frame else [frame]
        try:
            if chunk is not None:
                return await self._edit(frame, chunk)
        except (LookupError, TypeError, AttributeError):
            pass  # it is not of the dialect's form
        self.unread()
        self._state.frames += 1  # it has a number, too
        return [frame]

    def unread(self) -> None:
        """Note that a part of the answer cannot be read. Raises NotAllowed if a guard had to."""
        for run in (stage.run for stage in self._stages):
            if run.plugin.is_guard:
                raise refusal(run.plugin)
            if run.outcome in ("", "ok"):
                run.outcome = "unread"
                logger.info("answer unread", extra={"fields": {"agent": run.plugin.name}})

    def go_on(self) -> None:
        """Note that the frames of another round follow."""
        self._state.round += 1

    async def end(self) -> list[bytes]:
        """Return the frames that belong at the end of the text, once."""
        return await self._end("", None)

    async def release(self) -> list[bytes]:
        """Return what is left of an answer that broke off; nothing is added to it."""
        return await self._end(None, None)

    async def _edit(self, frame: bytes, chunk: Chunk) -> list[bytes]:
        dialect, last = self._dialect, self._state.last
        if dialect.is_error(chunk):
            self._broken = True
            return [*await self.release(), *self._settled(chunk, frame, frame)]
        if last is not None and dialect.closes(chunk, last):
            self._closing.append((frame, chunk))
            return []
        finish, places = dialect.finish(chunk), dialect.places(chunk)
        if self.whole or not frame.endswith(b"\n"):  # nothing comes behind it
            finish = finish or ""
        edited: bytes | None = frame
        ended: list[bytes] = []
        if finish is None or places:
            ended = self._closed()
        elif not self.whole:
            ended = await self._end(finish, chunk)
        elif tail := await self._tail(finish):  # of an answer without a text
            edited, empty = None, chunk
            chunk = dialect.whole(dialect.head(self._state.asked), tail)
            dialect.merge(empty, chunk)
        for holder, key in places:
            self._state.last, self._open = {**chunk}, True  # as it is before `settle`
            old = new = holder[key]
            for stage in self._stages:
                new = await stage.feed(new)
            if finish is not None and holder is places[-1][0]:
                new += await self._tail(finish)
            if new != old:
                edited = dialect.swap(frame, old, new) if len(places) == 1 else None
                holder[key] = new
        return [*ended, *self._settled(chunk, frame, edited)]

    async def _end(self, finish: str | None, before: Chunk | None) -> list[bytes]:
        """Return frames with the tail of the text, and those that close it; `before`: the end."""
        state, dialect = self._state, self._dialect
        last, tail, chunks = state.last, await self._tail(finish), []
        if tail and last and self._open:
            chunks = [dialect.piece(last, tail)]
        elif tail:
            chunks = dialect.alone(before or last or {}, tail)
        for chunk in chunks:
            dialect.settle(chunk, state)
        return [*map(dialect.encode, chunks), *self._closed()]

    def _closed(self) -> list[bytes]:
        """Return the frames that close a text: another one may follow in the same answer."""
        frames = [e for frame, chunk in self._closing for e in self._settled(chunk, frame, frame)]
        self._open = self._open and not frames
        self._closing.clear()
        return frames

    async def _tail(self, finish: str | None) -> str:
        """Return what the stages and the proxy add at the end of the text; None: it broke off."""
        said, self._state.last = self._state.last is not None, None
        text, broken = "", finish is None
        for stage in self._stages if said else ():
            stage.run.context.finish = finish or ""
            text = await stage.feed(text) + await stage.end(broken=broken)
        return text if broken else text + self._notice(said)

    def _settled(self, chunk: Chunk, frame: bytes, edited: bytes | None) -> list[bytes]:
        """Return `edited`, or where that is not enough the frame with the chunk as it is now."""
        changed = self._dialect.settle(chunk, self._state)
        if changed is None:
            self._open = False  # another round begins
            return []
        return [self._dialect.edit(frame, chunk) if changed or edited is None else edited]


class FrameSplitter:
    """Cuts a stream into frames, however its bytes are split."""

    OVERLAP = 3  # how much of an end (\r\n\r\n at most) may already have come

    def __init__(self, end: re.Pattern[bytes]) -> None:
        self._end = end
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the frames that `data` completes, each with its end."""
        cut, frames, searched = 0, [], max(0, len(self._buffer) - self.OVERLAP)
        self._buffer += data
        for found in self._end.finditer(self._buffer, searched):
            frames.append(bytes(self._buffer[cut : found.end()]))
            cut = found.end()
        del self._buffer[:cut]
        return frames

    def rest(self) -> bytes:
        """Return what came behind the last end."""
        return bytes(self._buffer)
