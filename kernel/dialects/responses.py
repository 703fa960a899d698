"""Responses: POST /v1/responses, as OpenAI's newer clients (Codex) speak it with Ollama.

A request's `input` is a text or a list of items, some of them messages. In a stream the text of an
answer stands in five places that must agree: the deltas, three frames that close it, and the whole
response at the end. Frames are numbered without a gap.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from kernel.agent import Message, Payload, Tool, text_of
from kernel.dialects import SSE, AnswerState, Chunk, Place, place_in, split_lead, table
from kernel.dialects.calls import ToolCall, data_url, function_of, joint

CLOSING = [f"response.{part}.done" for part in ("output_text", "content_part", "output_item")]
DELTA = "response.output_text.delta"
BEGINS = ("response.created", "response.in_progress")
ENDS = ("response.completed", "response.incomplete")
ERRORS = ("error", "response.failed")
SPOKEN_ITEMS = ("reasoning", "function_call", "function_call_output")  # of a round with tools
NUMBER: Chunk = {"sequence_number": 0}  # of a new frame, until `settle` numbers it
USAGE: Chunk = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0)  # of a reply
USAGE |= {"input_tokens_details": {"cached_tokens": 0}}
USAGE |= {"output_tokens_details": {"reasoning_tokens": 0}}


class Responses(SSE):
    """`instructions` are the payload's first message, `input` its messages."""

    name = "responses"
    path = "/v1/responses"
    echoes = True  # `instructions`
    begins = BEGINS
    index = "output_index"

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
        added = [item.get("type") for item in items if "role" not in item and item not in own]
        if not {*added} <= {*SPOKEN_ITEMS}:
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
        if kind == "response.output_item.added":
            return "tool_calls" if chunk["item"].get("type") == "function_call" else None
        if kind is not None and kind not in ENDS:
            return None
        response = chunk.get("response", chunk)
        limit, usage = response.get("max_output_tokens"), response.get("usage") or {}
        cut = limit and usage.get("output_tokens", 0) >= limit  # `completed` even then (openai.go)
        return "length" if cut else "stop"

    def piece(self, last: Chunk, text: str) -> Chunk:
        return last | {"delta": text, "logprobs": []}

    def alone(self, end: Chunk, text: str) -> list[Chunk]:
        return block_of(item_that_says(text, f"msg_{secrets.token_hex(6)}"))

    def settle(self, chunk: Chunk, state: AnswerState) -> bool | None:
        changed = super().settle(chunk, state)
        if changed is None:
            return None
        if chunk.get("type") == DELTA:
            state.said.setdefault(chunk["item_id"], []).append(chunk["delta"])
        elif self.settle_repeated(chunk, state):
            changed = True
        if "sequence_number" in chunk:
            number, chunk["sequence_number"] = chunk["sequence_number"], state.frames
            state.frames += 1
            changed = changed or number != chunk["sequence_number"]
        return changed

    def settle_repeated(self, chunk: Chunk, state: AnswerState) -> bool:
        """Make what a frame says once more agree with what was said; tell whether it changed."""
        response, own = chunk.get("response") or chunk, state.asked.get("instructions")
        changed = "response" in chunk and state.continues(response, ("id", "created_at"))
        for key, part in repeated(chunk):
            text = "".join(state.said.get(key, [part["text"]]))
            if part["text"] != text:
                part["text"], changed = text, True
        if chunk.get("type") == "response.output_item.done":
            state.items.append(chunk["item"])
        if chunk.get("type") in ENDS:
            output = response.get("output") or []
            listed = {item["id"] for item in output}
            missing = [item for item in state.items if item["id"] not in listed]
            if missing:
                response["output"], changed = output + missing, True
        if response.get("instructions", own) != own:
            response["instructions"], changed = own, True
        if state.hidden and (tools := response.get("tools")):
            own = [tool for tool in tools if tool.get("name") not in state.hidden]
            response["tools"], changed = own, changed or own != tools
        return changed

    # Tools

    def offer(self, tools: Sequence[Tool]) -> list[Chunk]:
        return [{"type": "function", **function_of(tool, "parameters")} for tool in tools]

    def take(self, chunk: Chunk, calls: dict[Any, ToolCall]) -> Chunk | None:
        response, item = chunk.get("response", chunk), chunk.get("item") or {}
        if "output" in response:
            output = response["output"] or []
            called = [each for each in output if each["type"] == "function_call"]
            if not called:
                return None
            for each in called:
                calls.setdefault(each["id"], call_of(each))
            response["output"] = [each for each in output if each not in called]
            return chunk
        if item.get("type") == "function_call":
            calls[item["id"]] = call_of(item)
            return {}
        return {} if chunk.get("item_id") in calls else None  # the whole item follows

    def thoughts(self, chunk: Chunk) -> str:
        if chunk.get("type") == "response.reasoning_summary_text.delta":
            return str(chunk["delta"])
        items = (chunk.get("output") or []) if "type" not in chunk else []
        return "".join(part["text"] for item in items for part in item.get("summary", ()))

    def merge(self, earlier: Chunk, chunk: Chunk) -> None:
        super().merge(earlier, chunk)
        old, new = earlier.get("response", earlier), chunk.get("response", chunk)
        new["output"] = [*(old.get("output") or []), *(new.get("output") or [])]

    def entry(self, call: ToolCall, number: int) -> Chunk:
        item = {"id": f"fc_{call.id}", "type": "function_call", "status": "completed"} | call.entry
        return item | {"call_id": call.id, "name": call.name, "arguments": call.arguments or "{}"}

    def call(self, last: Chunk, calls: Sequence[ToolCall]) -> list[Chunk]:
        return [chunk for item in self.entries(calls) for chunk in block_of(item)]

    def put(self, chunk: Chunk, calls: Sequence[ToolCall]) -> None:
        chunk.get("response", chunk)["output"] += self.entries(calls)

    def spoken(self, text: str, thinking: str, calls: Sequence[ToolCall]) -> list[Message]:
        items: list[Message] = []
        if thinking:  # Ollama takes it from there (openai/responses.go)
            items.append({"type": "reasoning", "summary": [], "encrypted_content": thinking})
        if text:
            part = {"type": "text", "text": text}
            items.append({"type": "message", "role": "assistant", "content": [part]})
        return items + self.entries(calls)

    def result(self, call: ToolCall, text: str, images: list[Message]) -> Message:
        urls = ({"type": "input_image", "image_url": data_url(image)} for image in images)
        output = joint("input_text", text, urls)
        return {"type": "function_call_output", "call_id": call.id, "output": output}

    def head(self, request: Payload) -> Chunk:
        head: Chunk = {"id": f"resp_{secrets.token_hex(6)}", "object": "response"}
        head |= {"status": "in_progress", "created_at": int(time.time())}
        head |= {"model": request["model"], "output": []}
        head |= {"instructions": request.get("instructions"), "tools": request.get("tools") or []}
        head |= dict.fromkeys(("completed_at", "incomplete_details", "error", "usage"))
        return head | {"tool_choice": "auto", "parallel_tool_calls": True, "metadata": {}}

    def speech(self, head: Chunk, text: str) -> list[Chunk]:
        response = self.whole(head, text)
        return [
            {"response": head, "type": "response.created", **NUMBER},
            {"response": head, "type": "response.in_progress", **NUMBER},
            *block_of(response["output"][0]),
            {"response": response, "type": "response.completed", **NUMBER},
        ]

    def whole(self, head: Chunk, text: str) -> Chunk:
        end = {"status": "completed", "completed_at": int(time.time()), "usage": deepcopy(USAGE)}
        return head | end | {"output": [item_that_says(text, f"msg_{head['id'][5:]}")]}


def item_that_says(text: str, name: str) -> Chunk:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    item: Chunk = {"id": name, "type": "message", "status": "completed"}
    return item | {"role": "assistant", "content": [part]}


def block_of(item: Chunk) -> list[Chunk]:
    """Return the frames of an item: a call, or a message with one text."""
    if item["type"] == "function_call":
        text, at = item["arguments"], {"item_id": item["id"]}
        empty: Chunk = {"arguments": ""}
        inner: list[tuple[str, Chunk]] = [("function_call_arguments.delta", {"delta": text})]
        inner += [("function_call_arguments.done", {"arguments": text})]
    else:
        [part], empty = item["content"], {"content": []}
        text, at = part["text"], {"item_id": item["id"], "content_index": 0}
        inner = [("content_part.added", {"part": part | {"text": ""}})]
        inner += [("output_text.delta", {"delta": text, "logprobs": []})]
        inner += [("output_text.done", {"text": text, "logprobs": []})]
        inner += [("content_part.done", {"part": part})]
    begun = {"item": item | empty | {"status": "in_progress"}}
    events: list[tuple[str, Chunk]] = [("output_item.added", begun)]
    events += [(kind, at | fields) for kind, fields in inner]
    events += [("output_item.done", {"item": item})]
    ours = {"output_index": item["id"]} | NUMBER  # a place of its own, which `settle` numbers
    return [{**fields, "type": f"response.{kind}", **ours} for kind, fields in events]


def call_of(item: Chunk) -> ToolCall:
    return ToolCall(item["name"], item["arguments"], item["call_id"], item)


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
