"""Rounds: makes the answers to several requests one, as if a model had called tools by itself.

The calls in an answer are taken out, and its end is kept back. Either another round follows, whose
frames continue the same answer, or the answer ends here, with those calls that are the client's.
The counters of all rounds are added up. A whole answer is a stream of one frame, which is its end.
What begins each round, and the numbers of frames, are left as they came: the editor settles that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kernel.agent import Message
from kernel.dialects import Chunk, Dialect
from kernel.dialects.calls import Result, ToolCall


class Rounds:
    """The answer that is made of rounds, and what the model said in the present one."""

    def __init__(self, dialect: Dialect, *, whole: bool, unread: Callable[[], None]) -> None:
        self._dialect = dialect
        self._unread = unread  # called for a frame that may hold calls which cannot be read
        self._whole = whole
        self._earlier: list[Chunk] = []  # the end of the rounds before this one
        self._last: Chunk = {}  # the last frame: others are made of it
        self._broken = False
        self._begin()

    def _begin(self) -> None:
        self.calls: dict[Any, ToolCall] = {}
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._ending: list[tuple[bytes, Chunk | None]] = []

    @property
    def is_complete(self) -> bool:
        """The answer of this round has come to its end."""
        return bool(self._ending) and not self._broken

    def take(self, frame: bytes) -> list[bytes]:
        """Return the frames that take the place of `frame`, but for calls and the end."""
        if self._broken:
            return [frame]
        chunk = self._dialect.parse(frame)
        try:
            if chunk is not None:
                return self._take(frame, chunk)
        except (LookupError, TypeError, AttributeError):
            pass  # it is not of the dialect's form
        if chunk is not None or not self._dialect.bare.fullmatch(frame):
            self._unread()
        if chunk is None and self._ending:
            self._ending.append((frame, None))
            return []
        return [frame]

    def _take(self, frame: bytes, chunk: Chunk) -> list[bytes]:
        dialect = self._dialect
        if dialect.is_error(chunk):
            self._broken = True
            return [frame]
        places = dialect.places(chunk)
        self._text += [holder[key] for holder, key in places]
        self._thinking.append(dialect.thoughts(chunk))
        self._last = chunk
        left = dialect.take(chunk, self.calls)
        if left == {}:
            return []
        if dialect.ends(chunk):
            said = [] if self._whole else places  # a text beside the end does not wait with it
            frames = [dialect.encode(dialect.piece(chunk, holder[key])) for holder, key in said]
            for holder, key in said:
                holder[key] = ""
            self._ending.append((dialect.edit(frame, chunk) if said else frame, chunk))
            return frames
        return [frame if left is None else dialect.edit(frame, chunk)]

    def history(self, results: Sequence[Result]) -> list[Message]:
        """Return this round as messages of the payload: what the model wrote, and the results."""
        calls = [*self.calls.values()]
        for call in calls:  # Ollama reads no other arguments
            call.arguments = call.arguments if call.values() else "{}"
        said = self._dialect.spoken("".join(self._text), "".join(self._thinking), calls)
        return said + self._dialect.results(list(zip(calls, results, strict=True)))

    def go_on(self) -> None:
        """Begin the next round."""
        ends = [chunk for _, chunk in self._ending if chunk is not None]
        for end in ends:
            self._merge(end)
        self._earlier = ends
        self._begin()

    def finish(self, calls: Sequence[ToolCall]) -> list[bytes]:
        """Return what ends the answer, with these calls for the client."""
        dialect = self._dialect
        frames: list[bytes] = []
        if calls and not (self._whole or self._broken):
            frames += map(dialect.encode, dialect.call(self._last, calls))
        for frame, chunk in self._ending:
            if chunk is None or not (self._earlier or self.calls):
                frames.append(frame)
                continue
            self._merge(chunk)
            if self.calls and not calls:
                dialect.stop(chunk)
            if calls and self._whole:
                dialect.put(chunk, calls)
            frames.append(dialect.edit(frame, chunk))
        return frames

    def _merge(self, end: Chunk) -> None:
        for earlier in self._earlier:
            self._dialect.merge(earlier, end)
