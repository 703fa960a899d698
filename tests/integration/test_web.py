"""The agent web before a real model: a page from a server on this machine, opened on purpose."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import ollama
import openai
import pytest

from tests.integration.conftest import ROOT, free_port, running, wait_for
from tests.support import said

PATHS = ["/api/chat", "/v1/chat/completions"]
PAGE = "<!doctype html><title>Otters</title><p>" + "The water is good and the day is long. " * 20


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a web server, as Python brings one, that has one page."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "otters.html").write_text(PAGE, encoding="utf-8")
    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browsing(direct: str, site: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a proxy whose operator opened that server to the agent."""
    home = tmp_path_factory.mktemp("browsing")
    port, page_port = free_port(), int(site.rpartition(":")[2])
    opened = {"hosts": ["127.0.0.1"], "ports": [page_port], "private": ["127.0.0.0/8"]}
    settings = "".join(f"{key} = {json.dumps(value)}\n" for key, value in opened.items())
    config = f"[agents.web]\nenabled = true\n[agents.web.settings]\n{settings}"
    (home / "osp.toml").write_text(config, encoding="utf-8")
    flags = ["--config", str(home / "osp.toml"), "--port", str(port), "--upstream", direct]
    command = [sys.executable, str(ROOT / "osp.py"), *flags]
    with running(command, home, {"OSP_SERVER_DATA": str(home / "data")}, home / "log") as process:
        wait_for(f"http://127.0.0.1:{port}", process, home / "log")
        yield f"http://127.0.0.1:{port}"


def body(text: str, **fields: Any) -> dict[str, Any]:
    """Return a chat that both dialects understand."""
    options = {"temperature": 0, "seed": 7, "num_predict": 12, "num_ctx": 4096}
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "options": options, "max_tokens": 12, **fields}


@pytest.mark.parametrize("path", PATHS)
def test_a_model_is_sent_the_page_and_the_answer_names_it(
    http: httpx.Client, direct: str, browsing: str, site: str, path: str
) -> None:
    def tokens(url: str, text: str) -> int:
        answer = http.post(url + path, json=body(text, stream=False)).json()
        count: int = answer.get("prompt_eval_count") or answer["usage"]["prompt_tokens"]
        return count

    asked = f"/web:{site}/otters.html how is the water?"

    for stream in (True, False):
        answer = http.post(browsing + path, json=body(asked, stream=stream))
        text, _, source = said(answer.content).rpartition("\n\nSource: ")
        assert answer.headers["x-osp-agents"].startswith("web;ok;")
        assert text.strip() and source == f"{site}/otters.html"
    assert tokens(browsing, asked) > tokens(direct, "how is the water?") + 100


@pytest.mark.parametrize("path", PATHS)
def test_another_agent_has_its_part_in_it(
    http: httpx.Client, browsing: str, site: str, path: str
) -> None:
    asked = f"/web:{site}/otters.html /time how is the water?"

    answer = http.post(browsing + path, json=body(asked, stream=True))

    text, _, source = said(answer.content).rpartition("\n\nSource: ")
    assert text.strip() and source == f"{site}/otters.html"


@pytest.mark.parametrize("stream", [True, False])
def test_both_clients_raise_what_is_wrong_with_the_page(
    browsing: str, site: str, stream: bool
) -> None:
    messages: Any = [{"role": "user", "content": f"/web:{site}/none.html how is the water?"}]
    with ollama.Client(host=browsing) as native, pytest.raises(ollama.ResponseError) as error:
        list(native.chat("tiny", messages, stream=stream))  # a stream begins when it is read

    assert (error.value.status_code, "its server answered 404" in str(error.value)) == (422, True)

    with openai.OpenAI(base_url=f"{browsing}/v1", api_key="none") as client:
        with pytest.raises(openai.UnprocessableEntityError, match="its server answered 404"):
            client.chat.completions.create(model="tiny", messages=messages, stream=stream)


@pytest.mark.parametrize("path", PATHS)
def test_the_agent_is_off_as_it_comes(
    http: httpx.Client, proxied: str, site: str, path: str
) -> None:
    asked = body(f"/web:{site}/otters.html how is the water?", stream=False)

    answer = http.post(proxied + path, json=asked)

    assert "is disabled by the operator" in said(answer.content)
