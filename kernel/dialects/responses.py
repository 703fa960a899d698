"""Responses: POST /v1/responses, as OpenAI's newer clients (Codex) speak it with Ollama.

A request's `input` is a text or a list of items, some of them messages. In a stream the text of an
answer stands in five places that must agree: the deltas, three frames that close it, and the whole
response at the end. Frames are numbered without a gap.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from kernel.agent import Message, Payload, text_of
from kernel.dialects import SSE, AnswerState, Chunk, Place, place_in, split_lead

CLOSING = (
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
)
ENDS = ("response.completed", "response.incomplete")
ERRORS = ("error", "response.failed")
USAGE = {  # of a reply of our own
    **dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0),
    "input_tokens_details": {"cached_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 0},
}


class Responses(SSE):
    """`instructions` are the payload's first message, `input` its messages."""

    name = "responses"
    path = "/v1/responses"

    def read(self, body: Payload) -> Payload:
        items, instructions = body.get("input") or [], body.get("instructions")
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        if not all(isinstance(item, dict) for item in items):
            raise ValueError("an item must be an object")
        if any(part.get("type") == "text" for item in items for part in parts_of(item)):
            raise ValueError("a part's type must be input_text or output_text, not text")
        lifted = isinstance(instructions, str) and bool(instructions)
        lead = [{"role": "system", "content": instructions}] if lifted else []
        dropped = ("input", "instructions") if lifted else ("input",)
        payload = {key: value for key, value in body.items() if key not in dropped}
        return payload | {"messages": [*lead, *(renamed(item, read=True) for item in items)]}

    def write(self, payload: Payload, body: Payload) -> Payload:
        self.check(payload)
        given = body.get("input") or []
        own = given if isinstance(given, list) else []
        lead, rest = split_lead(payload["messages"], own)
        items: Any = [renamed(item, read=False) for item in rest]
        if any("role" not in item and item not in own for item in items):
            raise ValueError("an item that is no message cannot be added in this dialect")
        plain = [{"role": "user", "content": item.get("content")} for item in items]
        if isinstance(given, str) and plain == items and isinstance(plain[0]["content"], str):
            items = plain[0]["content"] if len(plain) == 1 else items
        written = {key: value for key, value in payload.items() if key != "messages"}
        if "input" in body or items:
            written["input"] = items or body.get("input")
        said = {"instructions": "\n\n".join(map(text_of, lead))}
        return written | (said if lead else {})

    def is_structured(self, payload: Payload) -> bool:
        text = payload.get("text")
        form = text.get("format") if isinstance(text, dict) else None
        return isinstance(form, dict) and form.get("type") != "text"

    def places(self, chunk: Chunk) -> list[Place]:
        if "type" in chunk:
            is_text = chunk["type"] == "response.output_text.delta"
            return place_in(chunk, "delta") if is_text else []
        return [place for _, part in text_parts(chunk) for place in place_in(part, "text")]

    def is_error(self, chunk: Chunk) -> bool:
        return chunk.get("type") in ERRORS or bool(chunk.get("error"))

    def encode_error(self, error: Chunk) -> bytes:
        return self.encode({**error["error"], **error, "type": "error"})

    def echoes(self, request: Payload) -> bool:
        return True  # `instructions`

    def closes(self, chunk: Chunk, last: Chunk) -> bool:
        return chunk.get("type") in CLOSING and item_id(chunk) == last.get("item_id")

    def finish(self, chunk: Chunk) -> str | None:
        kind = chunk.get("type")
        if kind == "response.output_item.added":  # another item begins: the text has ended
            return "tool_calls" if chunk["item"].get("type") == "function_call" else ""
        if kind is not None and kind not in ENDS:
            return None
        response = chunk.get("response", chunk)
        return "length" if was_cut(response) else "stop"

    def piece(self, last: Chunk, text: str) -> Chunk:
        return last | {"delta": text, "logprobs": []}

    def numbered(self, chunk: Chunk, number: int) -> Chunk:
        return chunk | {"sequence_number": number}

    def settle(self, chunk: Chunk, state: AnswerState) -> bool:
        changed = bool(state.added)
        if "sequence_number" in chunk:
            state.number = chunk["sequence_number"]
            chunk["sequence_number"] += state.added
        for key, part in repeated(chunk):
            text = "".join(state.said.get(key, [part.get("text", "")]))
            if part.get("text") != text:
                part["text"], changed = text, True
        response = chunk.get("response", chunk)
        own = state.asked.get("instructions")
        if response.get("instructions", own) != own:
            response["instructions"], changed = own, True
        return changed

    def head(self, request: Payload) -> Chunk:
        head: Chunk = {"id": f"resp_{secrets.token_hex(6)}", "object": "response"}
        head |= {"status": "in_progress", "created_at": int(time.time())}
        head |= {"model": request["model"], "output": []}
        head |= {"instructions": request.get("instructions"), "tools": request.get("tools") or []}
        head |= dict.fromkeys(("completed_at", "incomplete_details", "error", "usage"))
        return head | {"tool_choice": "auto", "parallel_tool_calls": True, "metadata": {}}

    def speech(self, head: Chunk, text: str) -> list[Chunk]:
        item = message_of(head, text)
        at = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        begun = {"item": item | {"status": "in_progress", "content": []}, "output_index": 0}
        events: list[tuple[str, Chunk]] = [
            ("response.created", {"response": head}),
            ("response.in_progress", {"response": head}),
            ("response.output_item.added", begun),
            ("response.content_part.added", {"part": part("")} | at),
            ("response.output_text.delta", {"delta": text, "logprobs": []} | at),
            ("response.output_text.done", {"text": text, "logprobs": []} | at),
            ("response.content_part.done", {"part": part(text)} | at),
            ("response.output_item.done", {"item": item, "output_index": 0}),
            ("response.completed", {"response": self.whole(head, text)}),
        ]
        return [{**e, "sequence_number": n, "type": kind} for n, (kind, e) in enumerate(events)]

    def whole(self, head: Chunk, text: str) -> Chunk:
        end = {"status": "completed", "completed_at": int(time.time()), "usage": USAGE}
        return head | end | {"output": [message_of(head, text)]}


def message_of(head: Chunk, text: str) -> Chunk:
    item = {"id": f"msg_{head['id'][5:]}", "type": "message", "status": "completed"}
    return item | {"role": "assistant", "content": [part(text)]}


def part(text: str) -> Chunk:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def parts_of(item: Message) -> list[Message]:
    content = item.get("content") if "role" in item else None
    parts = content if isinstance(content, list) else []
    return parts if all(isinstance(part, dict) for part in parts) else []


def renamed(item: Message, *, read: bool) -> Message:
    """Return an item with the usual type of its text parts (`read`), or with the dialect's own."""
    own = "output_text" if item.get("role") == "assistant" else "input_text"
    old, new = (own, "text") if read else ("text", own)
    parts = [p | {"type": new} if p.get("type") == old else p for p in parts_of(item)]
    return item | {"content": parts} if parts else item


def text_parts(response: Chunk) -> Iterator[tuple[str, Chunk]]:
    """Yield item id and part of each text in a response's output."""
    for item in response.get("output") or []:
        if item.get("type") == "message":
            yield from ((item.get("id", ""), p) for p in item["content"] if "text" in p)


def repeated(chunk: Chunk) -> Iterator[tuple[str, Chunk]]:
    """Yield item id and holder of each text that a frame repeats."""
    kind = chunk.get("type")
    if kind == "response.output_text.done":
        yield chunk["item_id"], chunk
    elif kind == "response.content_part.done":
        yield chunk["item_id"], chunk["part"]
    elif kind == "response.output_item.done" and chunk["item"].get("type") == "message":
        yield from ((chunk["item"]["id"], part) for part in chunk["item"]["content"])
    elif kind in ENDS:
        yield from text_parts(chunk["response"])


def item_id(chunk: Chunk) -> str | None:
    return chunk.get("item_id") or (chunk.get("item") or {}).get("id")


def was_cut(response: Chunk) -> bool:
    """Tell whether the limit was reached: Ollama says `completed` even then (openai.go)."""
    limit, usage = response.get("max_output_tokens"), response.get("usage") or {}
    return bool(limit) and usage.get("output_tokens", 0) >= limit
