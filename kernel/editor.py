"""Editor: takes the text of an answer through the agents while it streams.

Each agent is a stage. One with `on_chunk` lets text flow; one with `on_response` alone holds it to
the end, while the frames go on with their text emptied, so that the client sees life. What the
stages add at the end leaves before the frame that ends the text. A whole answer goes through the
same stages as one piece. Thinking, tool calls, usage and unknown keys are never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernel.agent import Reply
from kernel.dialects import Chunk, Dialect, dumps
from kernel.errors import PluginExecutionError
from kernel.run import Run, notice, wrong

DONE = b"data: [DONE]"


class Stage:
    """One agent's response hooks; `whole` means that the answer comes in one piece."""

    def __init__(self, run: Run, *, whole: bool) -> None:
        flows = run.has("on_chunk", "on_end")
        self._run = run
        self._holds = run.has("on_response") and (whole or not flows)
        self._held: list[str] = []

    @property
    def waits(self) -> bool:
        """Tell whether a piece of text may have to wait here."""
        return not self._holds and self._run.waits("on_chunk")

    async def feed(self, text: str) -> str:
        if not text or not self._run.due:
            return text
        if self._holds:
            self._held.append(text)
            return ""
        return await self._call("on_chunk", text, otherwise=text)

    async def end(self) -> str:
        if not self._run.due:
            return ""
        if not self._holds:
            return await self._call("on_end", otherwise="")
        text = "".join(self._held)
        self._held.clear()
        return await self._call("on_response", text, otherwise=text) if text else ""

    async def _call(self, hook: str, *args: str, otherwise: str) -> str:
        """Return the hook's text; after a failure all text goes unedited. Raises Aborted."""
        try:
            return str(await self._run.call(hook, *args, accept=text_only))
        except Reply as reply:
            return reply.text
        except PluginExecutionError:
            return otherwise


def text_only(result: Any) -> str:
    if not isinstance(result, str):
        raise wrong(result, "a response hook must return text")
    return result


class Editor:
    """Edits the frames of one answer; in the end a notice says which of `noticed` failed."""

    def __init__(self, dialect: Dialect, stages: Sequence[Stage], noticed: Sequence[Run]) -> None:
        self._dialect = dialect
        self._stages = stages
        self._noticed = noticed
        self._last = b""  # the last one with text
        self._open = False  # text came since the last end
        self._broken = False  # an error came: what follows is none of our business
        self.waits = any(stage.waits for stage in stages)  # a frame may have to wait for an agent

    async def edit(self, frame: bytes) -> list[bytes]:
        """Return the frames that take the place of `frame` in a stream."""
        if not self._broken and (parts := self._dialect.split(frame)):
            before, text, behind = parts
            self._last = frame
            edited = await self._feed(text)
            return [frame if edited == text else before + dumps(edited)[1:-1] + behind]
        chunk = self._dialect.parse(frame)
        if chunk is None:
            return [*await self.end(), frame] if frame.startswith(DONE) else [frame]
        if self._broken or self._dialect.is_error(chunk):
            self._broken = True
            return [frame]
        ends = self._dialect.ends_text(chunk)
        text = self._dialect.text(chunk)
        if not text:
            return [*await self.end(), frame] if ends else [frame]
        self._last = frame
        edited = await self._feed(text) + (await self._tail() if ends else "")
        return [self._edited(frame, chunk, text, edited)]

    async def edit_whole(self, frame: bytes) -> bytes:
        """Return a whole answer with its text edited."""
        chunk = self._dialect.parse(frame)
        text = self._dialect.text(chunk) if chunk else ""
        if chunk is None or not text or self._dialect.is_error(chunk):
            return frame
        return self._edited(frame, chunk, text, await self._feed(text) + await self._tail())

    async def end(self) -> list[bytes]:
        """Return the frames that belong before the end of the text, once after each text."""
        last = None if self._broken else self._dialect.parse(self._last)
        text = await self._tail() if last else ""
        return [self._dialect.encode(self._dialect.with_text(last, text))] if last and text else []

    def _edited(self, frame: bytes, chunk: Chunk, text: str, edited: str) -> bytes:
        if edited == text:
            return frame
        self._dialect.message(chunk)["content"] = edited
        return self._dialect.edit(frame, chunk)

    async def _feed(self, text: str) -> str:
        self._open = True
        for stage in self._stages:
            text = await stage.feed(text)
        return text

    async def _tail(self) -> str:
        if not self._open:
            return ""
        self._open = False
        text = ""
        for stage in self._stages:
            text = await stage.feed(text) + await stage.end()
        text += notice(self._noticed)
        self._noticed = []  # said once
        return text
