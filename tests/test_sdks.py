"""Clients' own libraries read what an agent changed, and what the proxy says itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anthropic
import httpx
import ollama
import openai
import pytest

from tests.support import running, write_agent

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


async def ask_ollama(url: str, prompt: str, stream: bool) -> str:
    messages = [{"role": "user", "content": prompt}]
    async with ollama.AsyncClient(host=url) as client:
        if not stream:
            return (await client.chat("demo", messages)).message.content or ""
        parts = [part async for part in await client.chat("demo", messages, stream=True)]
    assert [part.done for part in parts].count(True) == 1 and parts[-1].done
    return "".join(part.message.content or "" for part in parts)


async def ask_completions(url: str, prompt: str, stream: bool) -> str:
    asked = {"model": "demo", "messages": [{"role": "user", "content": prompt}]}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:
        if not stream:
            whole = await client.chat.completions.create(**asked)  # type: ignore[call-overload]
            return str(whole.choices[0].message.content)
        async with client.chat.completions.stream(**asked) as events:  # type: ignore[arg-type]
            final = await events.get_final_completion()
    return str(final.choices[0].message.content)


async def ask_responses(url: str, prompt: str, stream: bool) -> str:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:
        if not stream:
            return (await client.responses.create(model="demo", input=prompt)).output_text
        async with client.responses.stream(model="demo", input=prompt) as events:
            deltas = [e.delta async for e in events if e.type == "response.output_text.delta"]
            final = await events.get_final_response()
    assert final.output_text == "".join(deltas)
    return final.output_text


async def ask_messages(url: str, prompt: str, stream: bool) -> str:
    asked = {"model": "demo", "max_tokens": 999, "messages": [{"role": "user", "content": prompt}]}
    async with anthropic.AsyncAnthropic(base_url=url, api_key="x") as client:
        if not stream:
            whole = await client.messages.create(**asked)  # type: ignore[call-overload]
            return str(whole.content[0].text)
        async with client.messages.stream(**asked) as events:  # type: ignore[arg-type]
            text = "".join([text async for text in events.text_stream])
            message = await events.get_final_message()
    assert [block.text for block in message.content if block.type == "text"] == [text]
    return text


@pytest.mark.parametrize("ask", [ask_ollama, ask_completions, ask_responses, ask_messages])
@pytest.mark.parametrize("stream", [False, True])
async def test_every_library_reads_an_edited_answer_a_reply_and_help(
    demo_url: str, plugins: Path, ask: object, stream: bool
) -> None:
    async with proxied(demo_url, plugins) as url:
        texts = {name: await ask(url, f"/{name} hi", stream) for name in EXPECTED}  # type: ignore[operator]
        help_text = await ask(url, "/help says", stream)  # type: ignore[operator]

    assert {name: text[-len(EXPECTED[name]) :] for name, text in texts.items()} == EXPECTED
    assert texts["says"] == texts["spells"] == "one two"
    assert help_text == "/says: no description"


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
