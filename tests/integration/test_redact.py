"""The agent redact before a real model: what it was sent, and what is refused."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support import said

PATHS = ["/api/chat", "/v1/chat/completions"]
TEXT = "Write to bob@example.org or call +49 30 1234567, bob@example.org is better."
SENT = "Write to [EMAIL_1] or call [PHONE_1], [EMAIL_1] is better."


def body(text: str, **fields: Any) -> dict[str, Any]:
    """Return a chat that both dialects understand."""
    options = {"temperature": 0, "seed": 7, "num_predict": 12}
    v1 = {"temperature": 0, "seed": 7, "max_tokens": 12}
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "options": options, **v1, **fields}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
def test_the_model_answers_as_if_it_had_been_asked_with_placeholders(
    http: httpx.Client, direct: str, proxied: str, path: str, stream: bool
) -> None:
    plain = http.post(direct + path, json=body(SENT, stream=stream))
    answer = http.post(proxied + path, json=body(f"/redact {TEXT}", stream=stream))

    assert answer.headers["x-osp-agents"].startswith("redact;ok")
    assert said(answer.content) == said(plain.content) != ""


@pytest.mark.parametrize("path", PATHS)
def test_the_model_reads_the_placeholders(
    http: httpx.Client, direct: str, proxied: str, path: str
) -> None:
    def tokens(url: str, text: str) -> int:
        answer = http.post(url + path, json=body(text, stream=False)).json()
        count: int = answer.get("prompt_eval_count") or answer["usage"]["prompt_tokens"]
        return count

    assert tokens(proxied, f"/redact {TEXT}") == tokens(direct, SENT) != tokens(direct, TEXT)


def test_structured_output_has_the_values(http: httpx.Client, proxied: str) -> None:
    """The schema is redacted, too, and so its one possible answer is the placeholder."""
    form = {
        "type": "object",
        "properties": {"to": {"enum": ["bob@example.org"]}},
        "required": ["to"],
    }
    asked = body(f"/redact {TEXT}", stream=False, format=form)
    asked["options"]["num_predict"] = 60

    answer = http.post(f"{proxied}/api/chat", json=asked)

    assert "".join(said(answer.content).split()).startswith('{"to":"bob@example.org"')


@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_be_searched_does_not_reach_the_model(
    http: httpx.Client, proxied: str, path: str
) -> None:
    function = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]

    answer = http.post(proxied + path, json=body("/redact x", tools=tools))

    assert answer.status_code == 403
    assert "redact cannot restore the arguments of tool calls" in answer.text
