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
from kernel.dialects import SSE, AnswerState, Chunk, Place, place_in, split_lead, table

CLOSING = [f"response.{part}.done" for part in ("output_text", "content_part", "output_item")]
DELTA = "response.output_text.delta"
ENDS = ("response.completed", "response.incomplete")
ERRORS = ("error", "response.failed")
USAGE: Chunk = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0)  # of a reply
USAGE |= {"input_tokens_details": {"cached_tokens": 0}}
USAGE |= {"output_tokens_details": {"reasoning_tokens": 0}}


class Responses(SSE):
    """`instructions` are the payload's first message, `input` its messages."""

    name = "responses"
    path = "/v1/responses"
    echoes = True  # `instructions`

    def read(self, body: Payload) -> Payload:
        items, system = body.get("input") or [], body.get("instructions")
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        if any(part.get("type") == "text" for item in items for part in parts_of(item)):
            raise ValueError("a part's type must be input_text or output_text, not text")
        lead = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
        dropped = ("input", "instructions") if lead else ("input",)
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
        match items:
            case [{"role": "user", "content": str(text), **more}] if given != own and not more:
                items = text  # as it came
        written = {key: value for key, value in payload.items() if key != "messages"}
        if items or "input" in body:
            written["input"] = items or body["input"]
        if lead:
            written["instructions"] = "\n\n".join(map(text_of, lead))
        return written

    def is_structured(self, payload: Payload) -> bool:
        form = table(table(payload.get("text")).get("format"))
        return bool(form.get("type", "text") != "text")

    def places(self, chunk: Chunk) -> list[Place]:
        if "type" not in chunk:
            return [place for _, part in repeated(chunk) for place in place_in(part, "text")]
        return place_in(chunk, "delta") if chunk["type"] == DELTA else []

    def is_error(self, chunk: Chunk) -> bool:
        return chunk.get("type") in ERRORS or bool(chunk.get("error"))

    def encode_error(self, error: Chunk) -> bytes:
        return self.encode({**error["error"], **error, "type": "error"})

    def closes(self, chunk: Chunk, last: Chunk) -> bool:
        return chunk.get("type") in CLOSING and bool(item_of(chunk)["id"] == last["item_id"])

    def finish(self, chunk: Chunk) -> str | None:
        kind = chunk.get("type")
        if kind == "response.output_item.added":  # another item begins: the text has ended
            return "tool_calls" if chunk["item"].get("type") == "function_call" else ""
        if kind is not None and kind not in ENDS:
            return None
        response = chunk.get("response", chunk)
        limit, usage = response.get("max_output_tokens"), response.get("usage") or {}
        cut = limit and usage.get("output_tokens", 0) >= limit  # `completed` even then (openai.go)
        return "length" if cut else "stop"

    def piece(self, last: Chunk, text: str) -> Chunk:
        return last | {"delta": text, "logprobs": []}

    def numbered(self, chunk: Chunk, number: int) -> Chunk:
        return chunk | {"sequence_number": number}

    def settle(self, chunk: Chunk, state: AnswerState) -> bool:
        changed = bool(state.added)
        if "sequence_number" in chunk:
            state.number = chunk["sequence_number"]
            chunk["sequence_number"] += state.added
        if chunk.get("type") == DELTA:
            state.said.setdefault(chunk["item_id"], []).append(chunk["delta"])
        for key, part in repeated(chunk):
            text = "".join(state.said.get(key, [part["text"]]))
            if part["text"] != text:
                part["text"], changed = text, True
        response, own = chunk.get("response") or chunk, state.asked.get("instructions")
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
        response = self.whole(head, text)
        [item] = response["output"]
        [part] = item["content"]
        at = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        begun = {"item": item | {"status": "in_progress", "content": []}, "output_index": 0}
        events: list[tuple[str, Chunk]] = [
            ("response.created", {"response": head}),
            ("response.in_progress", {"response": head}),
            ("response.output_item.added", begun),
            ("response.content_part.added", {"part": part | {"text": ""}} | at),
            (DELTA, {"delta": text, "logprobs": []} | at),
            ("response.output_text.done", {"text": text, "logprobs": []} | at),
            ("response.content_part.done", {"part": part} | at),
            ("response.output_item.done", {"item": item, "output_index": 0}),
            ("response.completed", {"response": response}),
        ]
        return [{**e, "sequence_number": n, "type": kind} for n, (kind, e) in enumerate(events)]

    def whole(self, head: Chunk, text: str) -> Chunk:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        item: Chunk = {"id": f"msg_{head['id'][5:]}", "type": "message", "status": "completed"}
        item |= {"role": "assistant", "content": [part]}
        end = {"status": "completed", "completed_at": int(time.time()), "usage": USAGE}
        return head | end | {"output": [item]}


def parts_of(item: Any) -> list[Message]:
    content = table(item).get("content") if "role" in item else None
    parts = content if isinstance(content, list) else []
    return parts if all(isinstance(part, dict) for part in parts) else []


def renamed(item: Message, *, read: bool) -> Message:
    """Return an item with the usual type of its text parts (`read`), or with the dialect's own."""
    parts = parts_of(item)
    if not parts:
        return item
    own = "output_text" if item["role"] == "assistant" else "input_text"
    old, new = (own, "text") if read else ("text", own)
    return item | {"content": [p | {"type": new} if p.get("type") == old else p for p in parts]}


def item_of(chunk: Chunk) -> Chunk:
    """Return the item that a frame closes, or of which it closes a part."""
    parts = [chunk.get("part", chunk)]
    return chunk.get("item") or {"type": "message", "id": chunk["item_id"], "content": parts}


def repeated(chunk: Chunk) -> Iterator[tuple[str, Chunk]]:
    """Yield item id and holder of each text that closing frames and a whole response hold."""
    kind = chunk.get("type")
    items = [item_of(chunk)] if kind in CLOSING else []
    if kind is None or kind in ENDS:
        items = chunk.get("response", chunk).get("output") or []
    for item in items:
        if item["type"] == "message":
            yield from ((item["id"], part) for part in item["content"] if "text" in part)
