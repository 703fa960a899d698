"""The Python packages `ollama` and `openai`, pointed at Ollama and at the proxy.

Their asynchronous clients, which send the same, are those of tests/test_sdks.py.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import ollama
import openai
import pytest

from tests.integration.conftest import shared

SAME = {"temperature": 0, "seed": 7, "num_predict": 12}
STORY = [{"role": "user", "content": "tell me a story"}]
CHAT = {"model": "tiny", "messages": STORY, "options": SAME}
GENERATE = {"model": "tiny", "prompt": "once", "options": SAME}
V1_CHAT = {"model": "tiny", "messages": STORY, "temperature": 0, "max_tokens": 12}
V1_TEXT = {"model": "tiny", "prompt": "once", "temperature": 0, "max_tokens": 12}
STREAM = {"stream": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
CALLS: list[tuple[str, str, dict[str, Any]]] = [
    *(("ollama", "chat", CHAT | more) for more in ({}, STREAM)),
    *(("ollama", "generate", GENERATE | more) for more in ({}, STREAM)),
    ("ollama", "embed", {"model": "tiny-embed", "input": ["the sea", "a tree"]}),
    ("ollama", "embeddings", {"model": "tiny-embed", "prompt": "the sea"}),
    ("ollama", "list", {}),
    ("ollama", "show", {"model": "tiny-tools"}),
    *(("openai", "chat.completions.create", V1_CHAT | more) for more in ({}, USAGE)),
    *(("openai", "completions.create", V1_TEXT | more) for more in ({}, STREAM)),
    ("openai", "embeddings.create", {"model": "tiny-embed", "input": "the sea"}),
    ("openai", "models.list", {}),
    ("openai", "models.retrieve", {"model": "tiny"}),
]
NOT_FOUND = {"ollama": ollama.ResponseError, "openai": openai.NotFoundError}


def ask(package: str, url: str, method: str, fields: dict[str, Any]) -> Any:
    """Return what a call gives, without what no two answers share; a stream as a list."""
    client: Any = ollama.Client(host=url)
    if package == "openai":
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with client:
        return shared(attrgetter(method)(client)(**fields))


@pytest.mark.parametrize(("package", "method", "fields"), CALLS)
def test_a_client_gets_the_same(
    direct: str, proxied: str, package: str, method: str, fields: dict[str, Any]
) -> None:
    expected = ask(package, direct, method, fields)

    assert expected
    assert ask(package, proxied, method, fields) == expected


@pytest.mark.parametrize(
    ("package", "method", "fields"), [call for call in CALLS if "model" in call[2]]
)
def test_a_missing_model_raises_the_same(
    direct: str, proxied: str, package: str, method: str, fields: dict[str, Any]
) -> None:
    errors = []
    for url in (direct, proxied):
        with pytest.raises(NOT_FOUND[package]) as caught:
            ask(package, url, method, fields | {"model": "none"})
        error: Any = caught.value
        errors.append((error.status_code, str(error)))

    assert errors[0][0] == 404
    assert errors[0] == errors[1]
