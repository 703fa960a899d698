"""The Python packages `ollama` and `openai`, pointed at Ollama and at the proxy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from operator import attrgetter
from typing import Any

import ollama
import openai
import pytest
from pydantic import BaseModel

SAME = {"temperature": 0, "seed": 7, "num_predict": 12}
STORY = [{"role": "user", "content": "tell me a story"}]
CHAT = {"model": "tiny", "messages": STORY, "options": SAME}
GENERATE = {"model": "tiny", "prompt": "once", "options": SAME}
V1_CHAT = {"model": "tiny", "messages": STORY, "temperature": 0, "max_tokens": 12}
V1_TEXT = {"model": "tiny", "prompt": "once", "temperature": 0, "max_tokens": 12}
USAGE = {"include_usage": True}
CALLS: list[tuple[str, str, dict[str, Any]]] = [
    ("ollama", "chat", CHAT),
    ("ollama", "chat", {**CHAT, "stream": True}),
    ("ollama", "generate", GENERATE),
    ("ollama", "generate", {**GENERATE, "stream": True}),
    ("ollama", "embed", {"model": "tiny-embed", "input": ["the sea", "a tree"]}),
    ("ollama", "embeddings", {"model": "tiny-embed", "prompt": "the sea"}),
    ("ollama", "list", {}),
    ("ollama", "show", {"model": "tiny-tools"}),
    ("openai", "chat.completions.create", V1_CHAT),
    ("openai", "chat.completions.create", {**V1_CHAT, "stream": True, "stream_options": USAGE}),
    ("openai", "completions.create", V1_TEXT),
    ("openai", "completions.create", {**V1_TEXT, "stream": True}),
    ("openai", "embeddings.create", {"model": "tiny-embed", "input": "the sea"}),
    ("openai", "models.list", {}),
    ("openai", "models.retrieve", {"model": "tiny"}),
]
MISSING: list[tuple[str, str, dict[str, Any]]] = [
    ("ollama", "chat", {**CHAT, "model": "none"}),
    ("ollama", "chat", {**CHAT, "model": "none", "stream": True}),
    ("ollama", "embed", {"model": "none", "input": "x"}),
    ("ollama", "show", {"model": "none"}),
    ("openai", "chat.completions.create", {**V1_CHAT, "model": "none"}),
    ("openai", "chat.completions.create", {**V1_CHAT, "model": "none", "stream": True}),
    ("openai", "models.retrieve", {"model": "none"}),
]
NOT_FOUND = {"ollama": ollama.ResponseError, "openai": openai.NotFoundError}
OWN = {"created", "created_at", "expires_at"}  # beside durations and the number of an answer


def client_of(package: str, url: str) -> Any:
    if package == "ollama":
        return ollama.Client(host=url)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def async_client_of(package: str, url: str) -> Any:
    if package == "ollama":
        return ollama.AsyncClient(host=url)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(package: str, url: str, method: str, fields: dict[str, Any]) -> Any:
    """Return what a call gives, without what no two answers share; a stream as a list."""
    with client_of(package, url) as client:
        return shared(attrgetter(method)(client)(**fields))


async def ask_async(package: str, url: str, method: str, fields: dict[str, Any]) -> Any:
    async with async_client_of(package, url) as client:
        answer = await attrgetter(method)(client)(**fields)
        if isinstance(answer, AsyncIterator):
            answer = [part async for part in answer]
        return shared(answer)


def shared(value: Any) -> Any:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in OWN and not k.endswith("_duration")}
        return {k: shared(v) for k, v in kept.items() if "cmpl-" not in str(v)[:9]}
    return [shared(v) for v in value] if isinstance(value, (list, Iterator)) else value


@pytest.mark.parametrize(("package", "method", "fields"), CALLS)
def test_a_client_gets_the_same(
    direct: str, proxied: str, package: str, method: str, fields: dict[str, Any]
) -> None:
    expected = ask(package, direct, method, fields)

    assert expected
    assert ask(package, proxied, method, fields) == expected


@pytest.mark.parametrize(("package", "method", "fields"), CALLS)
async def test_an_async_client_gets_the_same(
    direct: str, proxied: str, package: str, method: str, fields: dict[str, Any]
) -> None:
    expected = await ask_async(package, direct, method, fields)

    assert expected
    assert await ask_async(package, proxied, method, fields) == expected


@pytest.mark.parametrize(("package", "method", "fields"), MISSING)
async def test_a_missing_model_raises_the_same(
    direct: str, proxied: str, package: str, method: str, fields: dict[str, Any]
) -> None:
    errors = []
    for url in (direct, proxied):
        for raises in (ask, ask_async):
            with pytest.raises(NOT_FOUND[package]) as caught:
                answer = raises(package, url, method, fields)
                await answer
            error: Any = caught.value
            errors.append((error.status_code, str(error)))

    assert errors[0][0] == 404
    assert errors == errors[:1] * 4
