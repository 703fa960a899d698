"""The chain: agents one after the other, each of which may fail alone."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from tests.support import FakeOllama, done, running, said, turn, write_agent

PATHS = ["/api/chat", "/v1/chat/completions"]
SENT = "I am the demo model. I was sent:\n"

TAG = """
class Tag(BaseAgent):
    async def on_request(self, payload):
        return set_prompt(payload, f"{prompt(payload)} <NAME")
"""
ANSWER = """
class Answer(BaseAgent):
    async def on_response(self, response):
        return f"{response} NAME>"
"""
BOTH = """
class Both(BaseAgent):
    async def on_request(self, payload):
        return set_prompt(payload, f"{prompt(payload)} <NAME")

    async def on_response(self, response):
        return f"{response} NAME>"
"""
INNER = BOTH.replace("(BaseAgent):", "(BaseAgent):\n    innermost = True\n")
FAILURES = {
    "raises": "raise ValueError('secret')",
    "exits": "raise SystemExit(3)",
    "interrupts": "raise KeyboardInterrupt",
    "cancels": "raise asyncio.CancelledError",
    "hangs": "await asyncio.Event().wait()",
    "returns_nothing": "return None",
    "returns_nonsense": "return {'messages': []}",
    "returns_a_set": "return {'messages': [{'role': 'user', 'content': {1, 2}}]}",
    "returns_strings": "return {'messages': ['hello']}",
    "swallows": """
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if self.context.state.get('released'):
                    raise
                self.context.state['released'] = True""",
}


def write(folder: Path, code: str, *names: str, **config: Any) -> None:
    for name in names:
        write_agent(folder, name, code.replace("NAME", name), **config)


@pytest.mark.parametrize(
    ("typed", "request_order", "response_order"),
    [
        ("/a /b x", "x <on1 <on2 <a <b", "on2> on1> last>"),
        ("/b /a x", "x <on1 <on2 <b <a", "on2> on1> last>"),
        ("/one /two x", "x <on1 <on2", "one> two> on2> on1> last>"),
        ("/mask /one x", "x <on1 <on2 <mask", "one> mask> on2> on1> last>"),
        ("/mask /veil x", "x <on1 <on2 <mask <veil", "veil> mask> on2> on1> last>"),
        ("/on2 x", "x <on1 <on2", "on2> on1> last>"),
        ("/last /one x", "x <on1 <on2", "one> on2> on1> last>"),
    ],
)
async def test_agents_pipe_wrap_and_the_always_on_have_the_last_word(
    ollama: FakeOllama,
    ollama_url: str,
    plugins: Path,
    typed: str,
    request_order: str,
    response_order: str,
) -> None:
    write(plugins, TAG, "a", "b")
    write(plugins, ANSWER, "one", "two")
    write(plugins, BOTH, "mask", "veil")
    write(plugins, BOTH, "on2", always=True, priority=2)
    write(plugins, BOTH, "on1", always=True, priority=-1.5)
    write(plugins, ANSWER, "last", always=True, priority=-9)
    write(plugins, ANSWER, "elsewhere", always=True, models=["other*"])
    ollama.answers(done("y"))

    async with running(ollama_url, plugins) as client:
        answer = await client.post("/api/chat", json=turn(typed))

    assert ollama.asked[0].json["messages"][0]["content"] == request_order
    assert said(answer.content) == f"y {response_order}"


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize(
    ("typed", "request_order", "response_order"),
    [
        ("/inner /mask /one x", "x <mask <inner", "inner> one> mask>"),
        ("/one /a /inner /b x", "x <a <b <inner", "inner> one>"),
        ("/inner&/b x", "x <b <inner", "inner>"),
    ],
)
async def test_an_innermost_agent_stands_next_to_the_model_whatever_was_typed(
    ollama: FakeOllama,
    ollama_url: str,
    plugins: Path,
    always: bool,
    typed: str,
    request_order: str,
    response_order: str,
) -> None:
    write(plugins, TAG, "a", "b")
    write(plugins, ANSWER, "one")
    write(plugins, BOTH, "mask")
    write(plugins, INNER, "inner", always=always)
    ollama.answers(done("y"))

    async with running(ollama_url, plugins) as client:
        answer = await client.post("/api/chat", json=turn(typed))

    assert ollama.asked[0].json["messages"][0]["content"] == request_order
    assert said(answer.content) == f"y {response_order}"


@pytest.mark.parametrize("typed", ["/a&/inner&/b x", "/inner&/a&/b x", "/a&/b&/inner x"])
async def test_an_innermost_agent_is_in_no_group(
    ollama: FakeOllama, ollama_url: str, plugins: Path, typed: str
) -> None:
    code = """
    class Adds(BaseAgent):
        async def on_request(self, payload):
            return add_context(payload, f"NAME sees {prompt(payload)!r};")
    """
    inner = "class Inner(BaseAgent):\n    innermost = True\n    on_request = seen"
    seen = "async def seen(self, payload):\n    raise Reply(prompt(payload))\n"
    write(plugins, code, "a", "b", "c")
    write_agent(plugins, "inner", seen + inner)

    async with running(ollama_url, plugins) as client:
        answer = await client.post("/api/chat", json=turn(f"/c {typed}"))

    together = "a sees \"c sees 'x';\\n\\nx\";\n\nb sees \"c sees 'x';\\n\\nx\";\n\n"
    assert said(answer.content) == f"{together}c sees 'x';\n\nx"


@pytest.mark.parametrize(
    ("model", "patterns", "meant"),
    [
        ("demo", ["demo"], True),
        ("demo:latest", ["demo"], True),
        ("demo", ["demo:latest"], True),
        ("demo:1b", ["demo"], False),
        ("demo:1b", ["demo:*", "x"], True),
        ("demo", [], True),
        ("demo", ["other"], False),
    ],
)
async def test_an_always_on_agent_may_be_bound_to_models(
    ollama: FakeOllama,
    ollama_url: str,
    plugins: Path,
    model: str,
    patterns: list[str],
    meant: bool,
) -> None:
    write(plugins, ANSWER, "on", always=True, models=patterns)
    ollama.answers(done("y"))

    async with running(ollama_url, plugins) as client:
        answer = await client.post("/api/chat", json=turn("x") | {"model": model})

    assert said(answer.content) == ("y on>" if meant else "y")


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("path", PATHS)
async def test_a_request_hook_that_fails_is_skipped_and_said_under_the_answer(
    demo_url: str, plugins: Path, how: str, path: str
) -> None:
    code = (
        f"class Bad(BaseAgent):\n    async def on_request(self, payload):\n        {FAILURES[how]}"
    )
    write_agent(plugins, "bad", code, timeout=0.1)
    write(plugins, BOTH, "good")

    async with running(demo_url, plugins) as client:
        with anyio.fail_after(5):
            answer = await client.post(path, json=turn("/bad /good x"))

    notice = "\n\n[without bad: it failed, the proxy's log says why]"
    assert said(answer.content) == f"{SENT}[user] x <good good>{notice}"


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("hook", ["on_response", "on_chunk", "on_end"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_response_hook_that_fails_leaves_the_text_as_it_was(
    demo_url: str, plugins: Path, how: str, hook: str, stream: bool
) -> None:
    signature = "self" if hook == "on_end" else "self, text"
    code = f"class Bad(BaseAgent):\n    async def {hook}({signature}):\n        {FAILURES[how]}"
    write_agent(plugins, "bad", code, timeout=0.1)

    async with running(demo_url, plugins, chain={"notice": False}) as client:
        with anyio.fail_after(5):
            answer = await client.post("/api/chat", json=turn("/bad x", stream=stream))

    assert said(answer.content) == f"{SENT}[user] x"


@pytest.mark.parametrize("how", ["raises", "hangs"])
async def test_what_failed_is_in_the_header_and_in_the_metrics_but_its_text_only_in_the_log(
    demo_url: str, plugins: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        f"class Bad(BaseAgent):\n    async def on_request(self, payload):\n        {FAILURES[how]}"
    )
    write_agent(plugins, "bad", code, timeout=0.1)
    outcome = {"raises": "error", "hangs": "timeout"}[how]

    async with running(demo_url, plugins) as client:
        answer = await client.post("/api/chat", json=turn("/bad x", stream=False))
        metrics = (await client.get("/metrics")).text

    assert answer.headers["x-osp-agents"].startswith(f"bad;{outcome};")
    assert 'osp_agent_failures_total{agent="bad"} 1' in metrics
    fields = next(r.fields for r in caplog.records if r.message == "agent failed")  # type: ignore[attr-defined]
    assert "secret" not in answer.text
    assert (
        fields["error"]
        == {
            "raises": "ValueError: secret",
            "hangs": "took longer than 0.1 seconds",
        }[how]
    )


async def test_a_failure_of_an_always_on_agent_needs_no_notice(
    demo_url: str, plugins: Path
) -> None:
    code = (
        "class Bad(BaseAgent):\n    async def on_request(self, payload):\n        raise ValueError"
    )
    write_agent(plugins, "bad", code, always=True)

    async with running(demo_url, plugins) as client:
        answer = await client.post("/api/chat", json=turn("x"))

    assert said(answer.content) == f"{SENT}[user] x"
    assert answer.headers["x-osp-agents"].startswith("bad;error;")


@pytest.mark.parametrize("fields", [{"format": "json"}, {"tools": [{"type": "function"}]}])
async def test_there_is_no_notice_where_it_would_break_the_answer(
    demo_url: str, plugins: Path, fields: dict[str, Any]
) -> None:
    code = (
        "class Bad(BaseAgent):\n    async def on_request(self, payload):\n        raise ValueError"
    )
    write_agent(plugins, "bad", code)

    async with running(demo_url, plugins) as client:
        answer = await client.post("/api/chat", json=turn("/bad x", **fields))

    assert "without bad" not in said(answer.content)


async def test_an_agent_works_on_a_copy(demo_url: str, plugins: Path) -> None:
    code = """
    class Bad(BaseAgent):
        async def on_request(self, payload):
            payload["messages"].clear()
            raise ValueError
    """
    write_agent(plugins, "bad", code)

    async with running(demo_url, plugins, chain={"notice": False}) as client:
        answer = await client.post("/api/chat", json=turn("/bad x"))

    assert said(answer.content) == f"{SENT}[user] x"


async def test_an_agent_may_change_the_model_but_not_the_stream(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    code = """
    class Changes(BaseAgent):
        async def on_request(self, payload):
            return payload | {"model": "other", "stream": "nonsense"}
    """
    write_agent(plugins, "changes", code)
    ollama.answers(done("ok"))

    async with running(ollama_url, plugins) as client:
        await client.post("/api/chat", json=turn("/changes x"))
        await client.post("/api/chat", json=turn("/changes x", stream=True))

    assert ollama.asked[0].json == turn("x") | {"model": "other"}
    assert ollama.asked[1].json == turn("x", stream=True) | {"model": "other"}


@pytest.mark.parametrize(("path", "shape"), [(PATHS[0], str), (PATHS[1], dict)])
async def test_on_error_abort_refuses_before_the_answer_in_the_dialect(
    demo_url: str, plugins: Path, path: str, shape: type
) -> None:
    code = (
        "class Bad(BaseAgent):\n    async def on_request(self, payload):\n        raise ValueError"
    )
    write_agent(plugins, "bad", code, on_error="abort")

    async with running(demo_url, plugins) as client:
        answer = await client.post(path, json=turn("/bad x"))

    assert answer.status_code == 500
    assert isinstance(answer.json()["error"], shape) and "bad failed" in answer.text
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", PATHS)
async def test_on_error_abort_ends_a_stream_with_an_error_frame(
    demo_url: str, plugins: Path, path: str
) -> None:
    code = "class Bad(BaseAgent):\n    async def on_response(self, text):\n        raise ValueError"
    write_agent(plugins, "bad", code, on_error="abort")

    async with running(demo_url, plugins) as client:
        answer = await client.post(path, json=turn("/bad x", stream=True))

    last = answer.text.strip().splitlines()[-1].removeprefix("data: ")
    assert list(json.loads(last)) == ["error"]
    assert said(answer.content) == ""


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_reply_answers_without_the_model_and_response_agents_still_see_it(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str, stream: bool
) -> None:
    code = """
    class Cache(BaseAgent):
        async def on_request(self, payload):
            raise Reply("known: " + prompt(payload))
    """
    write_agent(plugins, "cache", code)
    write(plugins, ANSWER, "shout")
    write(plugins, BOTH, "before", "after")

    async with running(ollama_url, plugins) as client:
        body = turn("/before /cache /after /shout x", stream=stream)
        answer = await client.post(path, json=body)

    assert said(answer.content) == "known: x <before shout> before>"
    assert ollama.asked == []


@pytest.mark.parametrize(("path", "shape"), [(PATHS[0], str), (PATHS[1], dict)])
async def test_an_abort_refuses_with_the_agents_own_words(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str, shape: type
) -> None:
    code = """
    class Policy(BaseAgent):
        async def on_request(self, payload):
            raise Abort(403, "not here")
    """
    write_agent(plugins, "policy", code, always=True)

    async with running(ollama_url, plugins) as client:
        answer = await client.post(path, json=turn("x"))

    assert answer.status_code == 403 and isinstance(answer.json()["error"], shape)
    assert "not here" in answer.text
    assert answer.headers["x-osp-agents"].startswith("policy;abort;")
    assert ollama.asked == []


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_a_hook_may_be_def_or_async_def(demo_url: str, plugins: Path, kind: str) -> None:
    code = f"""
    class Shout(BaseAgent):
        {kind} on_request(self, payload):
            self.mark = "!"
            return payload

        {kind} on_response(self, response):
            return response.upper() + self.mark
    """
    write_agent(plugins, "shout", code)

    async with running(demo_url, plugins) as client:
        answer = await client.post("/api/chat", json=turn("/shout x"))

    assert said(answer.content) == f"{SENT}[user] x!".upper().replace("X!", "X") + "!"


async def test_a_def_hook_that_blocks_for_ever_holds_nobody_else(
    demo_url: str, plugins: Path
) -> None:
    code = """
    import threading

    class Stuck(BaseAgent):
        def on_request(self, payload):
            threading.Event().wait()
    """
    write_agent(plugins, "stuck", code, timeout=0.1)
    write(plugins, ANSWER, "good")

    async with running(demo_url, plugins, chain={"notice": False}) as client:
        with anyio.fail_after(8):
            for _ in range(3):  # one more than it has threads
                answer = await client.post("/api/chat", json=turn("/stuck /good x"))
                assert said(answer.content) == f"{SENT}[user] x good>"


async def test_the_clock_of_a_hook_stands_still_while_it_asks_the_model(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    """A model that takes longer than the limit to load is waited for."""
    code = """
    class Asks(BaseAgent):
        async def on_request(self, payload):
            answer = await self.context.chat([{"role": "user", "content": "q"}], temperature=0)
            return add_context(payload, answer)
    """
    write_agent(plugins, "asks", code, timeout=0.05)
    ollama.answers(done("aside"), kind="application/json", before=ollama.pause)

    async with running(ollama_url, plugins) as client:
        asking = asyncio.create_task(client.post("/api/chat", json=turn("/asks x")))
        await ollama.arrived.wait()
        asyncio.get_running_loop().call_later(0.3, ollama.go.set)
        await asking

    assert ollama.asked[1].json["messages"][0]["content"] == "aside\n\nx"


async def test_what_an_agent_asks_of_the_model_does_not_make_it_load_anew(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    code = """
    class Asks(BaseAgent):
        async def on_request(self, payload):
            messages = [{"role": "user", "content": "q"}]
            await self.context.chat(messages, temperature=0, format="json", think=True)
            await self.context.chat(messages, model="other")
            return payload
    """
    write_agent(plugins, "asks", code)
    ollama.answers(done("ok"), kind="application/json")
    options = {"num_ctx": 8192, "seed": 1}

    async with running(ollama_url, plugins) as client:
        await client.post("/api/chat", json=turn("/asks x", options=options, keep_alive=-1))

    own, other, _ = (asked.json for asked in ollama.asked)
    assert own["options"] == {"num_ctx": 8192, "temperature": 0} and own["keep_alive"] == -1
    assert (own["format"], own["think"], own["stream"]) == ("json", True, False)
    assert (other["model"], other["options"], "keep_alive" in other) == ("other", {}, False)


@pytest.mark.parametrize(("path", "status"), [(PATHS[0], 502), (PATHS[1], 502)])
async def test_an_agent_that_cannot_reach_its_model_fails_with_502(
    demo_url: str, plugins: Path, path: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    code = """
    class Asks(BaseAgent):
        async def on_request(self, payload):
            return add_context(payload, await self.context.chat([], model="nope"))
    """
    write_agent(plugins, "asks", code, on_error="abort")

    async with running(demo_url, plugins) as client:
        answer = await client.post(path, json=turn("/asks x"))

    assert answer.status_code == status and "asks failed" in answer.text
    assert "not found" in str([vars(record) for record in caplog.records])


async def test_embeddings_come_as_vectors(demo_url: str, plugins: Path) -> None:
    code = """
    class Embeds(BaseAgent):
        async def on_request(self, payload):
            a, b = await self.context.embed(["sea", "sea"], model="demo-embed")
            return add_context(payload, f"{a == b} {len(a)}")
    """
    write_agent(plugins, "embeds", code)

    async with running(demo_url, plugins) as client:
        answer = await client.post("/api/chat", json=turn("/embeds x"))

    assert said(answer.content) == f"{SENT}[user] True 256\n\nx"


async def test_what_a_hook_assigns_stays_in_its_request(demo_url: str, plugins: Path) -> None:
    """Two requests at once: the second one enters while the first is inside."""
    code = """
    class Keeps(BaseAgent):
        async def setup(self):
            self.inside, self.both = [], asyncio.Event()

        async def on_request(self, payload):
            self.prompt = prompt(payload)
            self.inside.append(self.prompt)
            if len(self.inside) == 2:
                self.both.set()
            await self.both.wait()
            return payload

        async def on_response(self, response):
            return self.prompt
    """
    write_agent(plugins, "keeps", code)
    answers: dict[str, str] = {}

    async with running(demo_url, plugins) as client:

        async def ask(text: str) -> None:
            answer = await client.post("/api/chat", json=turn(f"/keeps {text}"))
            answers[text] = said(answer.content)

        async with anyio.create_task_group() as group:
            group.start_soon(ask, "one")
            group.start_soon(ask, "two")

    assert answers == {"one": "one", "two": "two"}


async def test_agents_of_a_request_share_their_state(demo_url: str, plugins: Path) -> None:
    write_agent(plugins, "first", """
    class First(BaseAgent):
        async def on_request(self, payload):
            self.context.state["word"] = "hello"
            return payload
    """)  # fmt: skip
    write_agent(plugins, "second", """
    class Second(BaseAgent):
        async def on_request(self, payload):
            self.context.log.info("seen", extra={"fields": {"n": 1}})
            return add_context(payload, self.context.state["word"])
    """)  # fmt: skip

    async with running(demo_url, plugins) as client:
        answer = await client.post("/api/chat", json=turn("/first /second x"))

    assert said(answer.content) == f"{SENT}[user] hello\n\nx"


@pytest.mark.parametrize("state", ["broken", "off"])
@pytest.mark.parametrize("path", PATHS)
async def test_an_agent_that_is_not_there_answers_why(
    ollama: FakeOllama, ollama_url: str, plugins: Path, path: str, state: str
) -> None:
    write_agent(plugins, "broken", "raise RuntimeError('secret')")
    write(plugins, ANSWER, "off", enabled=False)

    async with running(ollama_url, plugins) as client:
        answer = await client.post(path, json=turn(f"/{state} x"))

    why = {"broken": "failed to load: RuntimeError at", "off": "is disabled by the operator"}
    assert why[state] in said(answer.content) and "secret" not in answer.text
    assert ollama.asked == []


async def test_a_client_that_leaves_stops_the_chain(
    ollama: FakeOllama, ollama_url: str, plugins: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = """
    class Slow(BaseAgent):
        async def on_request(self, payload):
            (self.data_dir / "entered").touch()
            try:
                await asyncio.Event().wait()
            finally:
                (self.data_dir / "left").touch()
    """
    write_agent(plugins, "slow", code)
    write(plugins, TAG, "later")
    caplog.set_level(logging.INFO)

    async with running(ollama_url, plugins) as client:
        asking = asyncio.create_task(client.post("/api/chat", json=turn("/slow /later x")))
        with anyio.fail_after(3):
            await appears(plugins.parent / "data" / "slow" / "entered")
            asking.cancel()
            await appears(plugins.parent / "data" / "slow" / "left")

    assert ollama.asked == []
    outcomes = [r.fields["outcome"] for r in caplog.records if r.message == "request"]  # type: ignore[attr-defined]
    assert outcomes == ["client_closed"]


async def appears(file: Path) -> None:
    while not await anyio.Path(file).exists():
        await anyio.lowlevel.checkpoint()


async def test_an_agent_knows_whether_it_was_asked_for(demo_url: str, plugins: Path) -> None:
    code = """
    class It(BaseAgent):
        async def on_request(self, payload):
            return add_context(payload, f"asked: {self.context.asked}")
    """
    write_agent(plugins, "it", code, always=True)

    async with running(demo_url, plugins) as client:
        answers = [await client.post("/api/chat", json=turn(t)) for t in ("hello", "/it hello")]

    said_so = [said(answer.content) for answer in answers]
    assert ["asked: False" in said_so[0], "asked: True" in said_so[1]] == [True, True]


async def test_an_agent_can_tell_users_apart_but_sees_no_key(demo_url: str, plugins: Path) -> None:
    code = """
    class It(BaseAgent):
        async def on_request(self, payload):
            raise Reply(self.context.user)
    """
    write_agent(plugins, "it", code)

    async def user(client: httpx.AsyncClient, key: str) -> str:
        headers = {"authorization": f"Bearer {key}"}
        return said((await client.post("/api/chat", json=turn("/it"), headers=headers)).content)

    async with running(demo_url, plugins, access={"keys": ["sesame", "poppy"]}) as client:
        users = [await user(client, key) for key in ("sesame", "poppy", "sesame")]

    assert users[0] == users[2] != users[1]
    assert users[0] and "sesame" not in users[0]


@pytest.mark.parametrize("always", [True, False])
async def test_what_is_last_sees_what_all_others_made_of_request_and_answer(
    demo_url: str, plugins: Path, always: bool
) -> None:
    write(
        plugins,
        BOTH.replace("async def on_request", "last = True\n\n    async def on_request", 1),
        "end",
        always=always,
    )
    write(plugins, BOTH, "a", "b")

    async with running(demo_url, plugins) as client:
        typed = "/a /b x" if always else "/a /end /b x"
        answer = await client.post("/api/chat", json=turn(typed, stream=False))

    assert said(answer.content) == f"{SENT}[user] x <a <b <end b> a> end>"
