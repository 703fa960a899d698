"""Editor: takes the text of an answer through the agents while it streams.

Each agent is a stage. One with `on_chunk` lets text flow; one with `on_response` alone holds it to
the end, while the frames go on with their text emptied, so that the client sees life. What the
stages add at the end leaves before the frame that ends the text. A whole answer is a stream of one
frame. Thinking, tool calls, usage and unknown keys are never touched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from kernel.agent import Payload
from kernel.dialects import AnswerState, Chunk, Dialect
from kernel.errors import PluginExecutionError
from kernel.hooks import Run, text_only
from kernel.registry import refusal

logger = logging.getLogger(__name__)

MALFORMED = (LookupError, TypeError, AttributeError)  # a frame that is not of the dialect's form


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

    async def end(self) -> str:
        """Return what belongs at the end of the text."""
        if not self.run.due:
            return ""
        if self.flows:
            return await self._call("on_end", otherwise="")
        text = self._take()
        return await self._call("on_response", text, otherwise=text) if text else ""

    async def release(self) -> str:
        """Return what was held of an answer that broke off: unedited, but for a guard's."""
        if self.run.plugin.is_guard or self.run.has("on_chunk"):
            return await self.end()
        return self._take()

    def _take(self) -> str:
        text = "".join(self._held)
        self._held.clear()
        return text

    async def _call(self, hook: str, *args: str, otherwise: str) -> str:
        """Return the hook's text; after a failure text goes on unedited. Raises Aborted."""
        if not self.run.has(hook):
            return otherwise
        try:
            return await self.run.call(hook, *args, accept=text_only, may_reply=False)
        except PluginExecutionError:
            return otherwise


class Editor:
    """Edits the frames of one answer; `notice` gives a line for the end of the text, or ""."""

    def __init__(
        self,
        dialect: Dialect,
        stages: Sequence[Stage],
        asked: Payload,
        notice: Callable[[], str],
        *,
        whole: bool,
    ) -> None:
        self._dialect = dialect
        self._stages = stages
        self._notice = notice
        self.whole = whole
        self.guarded = any(stage.run.plugin.is_guard for stage in stages)
        self._state = AnswerState(asked)
        self._closing: list[tuple[bytes, Chunk]] = []  # they wait for how the answer finished
        self._seen = False  # some text came
        self._broken = False  # an error frame was seen: the rest passes unchanged

    async def edit(self, frame: bytes) -> list[bytes]:
        """Return the frames that take the place of `frame`."""
        if self._broken:
            return [frame]
        chunk = self._dialect.parse(frame)
        if chunk is None and not self._dialect.has_json(frame):
            return [*await self.end(), frame] if b"[DONE]" in frame else [frame]
        try:
            if chunk is not None:
                return await self._edit(frame, chunk)
        except MALFORMED:
            pass
        self.unread()
        return [frame]

    def unread(self) -> None:
        """Note that a part of the answer cannot be read. Raises NotAllowed if a guard had to."""
        for run in (stage.run for stage in self._stages):
            if run.plugin.is_guard:
                raise refusal(run.plugin)
            if run.outcome in ("", "ok") and not self._seen:
                run.outcome = "unread"
                logger.info("answer unread", extra={"fields": {"agent": run.plugin.name}})

    async def end(self) -> list[bytes]:
        """Return the frames that belong at the end of the text, once after each text."""
        text = await self._tail("")
        return [*self._piece(text), *self._closed()]

    async def release(self) -> list[bytes]:
        """Return what is left of an answer that broke off; nothing is added to it."""
        text = ""
        for stage in self._stages if self._state.last else ():
            text = await stage.feed(text) + await stage.release()
        return [*self._piece(text), *self._closed()]

    async def _edit(self, frame: bytes, chunk: Chunk) -> list[bytes]:
        dialect, state = self._dialect, self._state
        if dialect.is_error(chunk):
            self._broken = True
            return [*await self.release(), frame]
        if state.last is not None and not self.whole and dialect.closes(chunk, state.last):
            self._closing.append((frame, chunk))
            return []
        finish, places = dialect.finish(chunk), dialect.places(chunk)
        if self.whole or not frame.endswith(b"\n"):  # nothing comes behind it
            finish = finish or ""
        ended: list[bytes] = []
        if self._closing or (finish is not None and not places):
            text = await self._tail(finish or "")
            ended = [*self._piece(text), *self._closed()]
        swapped: bytes | None = frame
        for holder, key in places:
            state.last, self._seen = chunk, True
            old, new = holder[key], await self._feed(holder[key])
            if finish is not None and holder is places[-1][0]:
                new += await self._tail(finish)
            if new != old:
                swapped = dialect.swap(frame, old, new) if len(places) == 1 else None
            holder[key] = new
            self._note(chunk, new)
        if finish is not None:
            state.last = None
        return [*ended, self._settled(chunk, frame, swapped)]

    async def _feed(self, text: str) -> str:
        for stage in self._stages:
            text = await stage.feed(text)
        return text

    async def _tail(self, finish: str) -> str:
        """Return what the stages add at the end of the text that is open."""
        if self._state.last is None:
            return ""
        text = ""
        for stage in self._stages:
            stage.run.context.finish = finish
            text = await stage.feed(text) + await stage.end()
        return text + self._notice()

    def _piece(self, text: str) -> list[bytes]:
        """Return a new frame with text for the end of the open text, which it closes."""
        last, self._state.last = self._state.last, None
        if not text or last is None:
            return []
        self._state.added += 1
        chunk = self._dialect.piece(last, text)
        chunk = self._dialect.numbered(chunk, self._state.number + self._state.added)
        self._note(chunk, text)
        return [self._dialect.encode(chunk)]

    def _closed(self) -> list[bytes]:
        frames = [self._settled(chunk, frame, frame) for frame, chunk in self._closing]
        self._closing.clear()
        return frames

    def _settled(self, chunk: Chunk, frame: bytes, edited: bytes | None) -> bytes:
        """Return `edited`, or where that is not enough the frame with the chunk as it is now."""
        if self._dialect.settle(chunk, self._state) or edited is None:
            return self._dialect.edit(frame, chunk)
        return edited

    def _note(self, chunk: Chunk, text: str) -> None:
        if key := chunk.get("item_id"):
            self._state.said.setdefault(key, []).append(text)
