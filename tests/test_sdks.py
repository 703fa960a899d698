"""Clients' own libraries read what an agent changed, and what the proxy says itself."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from tests.scenarios import OWN, SCENARIOS, SCHEMA, SET, Answer
from tests.support import CHAT, COMPLETIONS, MESSAGES, RESPONSES, House, running, write_agent

AGENTS = {
    "up": "async def on_response(self, response): return response.upper() + ' END'",
    "flow": """async def on_chunk(self, text): return text.upper()
    async def on_end(self): return ' END'""",
    "says": "async def on_request(self, payload): raise Reply('one two')",
    "spells": """async def on_request(self, payload): raise Reply(self.spoken())
    async def spoken(self):
        yield 'one'
        yield ' two'""",
    "no": "def on_request(self, payload): raise Abort(429, 'slowly', headers={'Retry-After': '5'})",
}
EXPECTED = {"says": "one two", "spells": "one two", "up": "[USER] HI END", "flow": "[USER] HI END"}


@asynccontextmanager
async def proxied(demo_url: str, plugins: Path) -> AsyncIterator[str]:
    for name, code in AGENTS.items():
        write_agent(plugins, name, f"class It(BaseAgent):\n    {code}")
    async with running(demo_url, plugins) as client:
        yield str(client.base_url).rstrip("/")


# Each of these asks once, adds the answer to `history` as its users do, and returns what it was
# told (see tests/scenarios.py), and what it sends back for calls of its own tool.

FUNCTION = {"name": OWN, "description": "", "parameters": SCHEMA}
Json = dict[str, Any]
Told = tuple[Answer, list[Any]]


async def ask_ollama(url: str, history: list[Any], stream: bool) -> Told:
    asked: Json = {"model": "demo", "messages": history}
    asked["tools"] = [{"type": "function", "function": FUNCTION}]
    async with ollama.AsyncClient(host=url) as client:
        if stream:
            parts = [part async for part in await client.chat(**asked, stream=True)]
        else:
            parts = [await client.chat(**asked)]
    assert [part.done for part in parts].index(True) == len(parts) - 1
    end, messages = parts[-1], [part.message for part in parts]
    text = "".join(message.content or "" for message in messages)
    thinking = "".join(message.thinking or "" for message in messages)
    calls = [call for message in messages for call in message.tool_calls or []]
    message = {"role": "assistant", "content": text, "thinking": thinking, "tool_calls": calls}
    history.append(message)
    made = [[call.function.name, call.function.arguments] for call in calls]
    answer = [text, thinking, made, [end.prompt_eval_count, end.eval_count], end.done_reason]
    return answer, [{"role": "tool", "content": SET, "tool_name": name} for name, _ in made]


async def ask_completions(url: str, history: list[Any], stream: bool) -> Told:
    tools = [{"type": "function", "function": FUNCTION | {"strict": True}}]
    asked: Json = {"model": "demo", "messages": history, "tools": tools}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:
        if stream:
            asked["stream_options"] = {"include_usage": True}
            async with client.chat.completions.stream(**asked) as events:
                chunks = [event.chunk async for event in events if event.type == "chunk"]
                final: Any = await events.get_final_completion()
            ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
            assert [*filter(None, ends)] == ends[-1:]
        else:
            final = await client.chat.completions.create(**asked)
    [choice], message, usage = final.choices, final.choices[0].message, final.usage
    history.append(message)
    calls, thinking = message.tool_calls or [], getattr(message, "reasoning", "")
    made = [[call.function.name, json.loads(call.function.arguments)] for call in calls]
    counts = [usage.prompt_tokens, usage.completion_tokens]
    answer = [message.content, thinking, made, counts, choice.finish_reason]
    return answer, [{"role": "tool", "tool_call_id": call.id, "content": SET} for call in calls]


async def ask_responses(url: str, history: list[Any], stream: bool) -> Told:
    asked: Json = {"model": "demo", "input": history, "tools": [{"type": "function", **FUNCTION}]}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:
        if stream:
            async with client.responses.stream(**asked) as events:
                seen = [event async for event in events]
                final: Any = await events.get_final_response()
            deltas = [e.delta for e in seen if e.type == "response.output_text.delta"]
            assert "".join(deltas) == final.output_text
            assert [e.type for e in seen].count("response.completed") == 1
        else:
            final = await client.responses.create(**asked)
    history += final.output
    thoughts = [item.summary for item in final.output if item.type == "reasoning"]
    thinking = "".join(part.text for summary in thoughts for part in summary)
    calls = [item for item in final.output if item.type == "function_call"]
    made = [[call.name, json.loads(call.arguments)] for call in calls]
    counts = [final.usage.input_tokens, final.usage.output_tokens]
    result = {"type": "function_call_output", "output": SET}
    answer = [final.output_text, thinking, made, counts, final.status]
    return answer, [result | {"call_id": call.call_id} for call in calls]


async def ask_messages(url: str, history: list[Any], stream: bool) -> Told:
    tools = [{"name": OWN, "description": "", "input_schema": SCHEMA}]
    asked: Json = {"model": "demo", "max_tokens": 999, "messages": history, "tools": tools}
    async with anthropic.AsyncAnthropic(base_url=url, api_key="x") as client:
        if stream:
            async with client.messages.stream(**asked) as events:
                kinds = [event.type async for event in events]
                final: Any = await events.get_final_message()
            assert kinds.count("message_start") == kinds.count("message_stop") == 1
        else:
            final = await client.messages.create(**asked)
    history.append({"role": "assistant", "content": final.content})
    text = "".join(block.text for block in final.content if block.type == "text")
    thinking = "".join(block.thinking for block in final.content if block.type == "thinking")
    calls = [block for block in final.content if block.type == "tool_use"]
    made = [[call.name, call.input] for call in calls]
    counts = [final.usage.input_tokens, final.usage.output_tokens]
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": SET} for call in calls]
    answer = [text, thinking, made, counts, final.stop_reason]
    return answer, [{"role": "user", "content": results}] if results else []


LIBRARIES = [
    (ask_ollama, CHAT, ("stop", "stop")),
    (ask_completions, COMPLETIONS, ("stop", "tool_calls")),
    (ask_messages, MESSAGES, ("end_turn", "tool_use")),
    (ask_responses, RESPONSES, ("completed", "completed")),
]


@pytest.mark.parametrize("ask", [ask for ask, _, _ in LIBRARIES])
@pytest.mark.parametrize("stream", [False, True])
async def test_every_library_reads_an_edited_answer_a_reply_and_help(
    demo_url: str, plugins: Path, ask: Any, stream: bool
) -> None:
    texts = {}
    async with proxied(demo_url, plugins) as url:
        for name, prompt in [*((name, f"/{name} hi") for name in EXPECTED), ("help", "/help says")]:
            answer, _ = await ask(url, [{"role": "user", "content": prompt}], stream)
            texts[name] = answer[0]

    assert texts.pop("help") == "/says: no description"
    assert texts["says"] == texts["spells"] == "one two"
    assert {name: text[-len(EXPECTED[name]) :] for name, text in texts.items()} == EXPECTED


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_an_error_has_the_form_that_libraries_expect(
    demo_url: str, plugins: Path, path: str
) -> None:
    async with proxied(demo_url, plugins) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"model": "demo", "messages": [{"role": "user", "content": "/no hi"}]}
        answer = await client.post(path, json=body)
        anthropics = await client.post("/v1/messages", json={**body, "max_tokens": 9})

    assert answer.status_code == anthropics.status_code == 429
    assert answer.headers["retry-after"] == "5"
    assert anthropics.json()["error"] == {"type": "rate_limit_error", "message": "slowly"}
    assert "slowly" in answer.text


@pytest.mark.parametrize(("ask", "path", "ends"), LIBRARIES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", SCENARIOS)
async def test_every_library_reads_an_answer_of_rounds_with_tools(
    house: House, name: str, ask: Any, path: str, ends: tuple[str, str], stream: bool
) -> None:
    async def talk(url: str, prompts: tuple[str, ...]) -> list[Answer]:
        history, answers = list[Any](), list[Answer]()
        for prompt in prompts:
            results: list[Any] = [{"role": "user", "content": prompt}]
            while results:
                history += results
                answer, results = await ask(url, history, stream)
                answers.append(answer)
        return answers

    answers = await SCENARIOS[name].play(house, path, stream, talk)

    assert answers == SCENARIOS[name].expected(path, stream, ends)
    # It drops the ids of calls, in which the proxy's own travel: the model may call again
    SCENARIOS[name].check(house.ollama, drops_ids=ask is ask_ollama)
