"""Traces: what runs, what the latest requests did, and who may see of it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.support import (
    BY_PATH,
    CHAT,
    COMPLETIONS,
    PATHS,
    TAG,
    FakeOllama,
    House,
    calling,
    chat,
    done,
    frames,
    line,
    said,
)

TEXTS = {"page": {"bodies": True}}
SLOW = """
class It(BaseAgent):
    tools = [{"name": "wait"}]
    async def on_request(self, payload):
        if "hook" in prompt(payload):
            await asyncio.Event().wait()
        return payload
    async def on_tool(self, name, arguments):
        await asyncio.Event().wait()
"""


async def traces(client: httpx.AsyncClient, **filters: Any) -> dict[str, Any]:
    answer = await client.get("/traces", params=filters)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def one(client: httpx.AsyncClient, trace: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"/traces/{trace['id']}")).json()
    return found


@pytest.mark.parametrize("path", PATHS)
async def test_a_request_is_kept_with_what_it_took(house: House, path: str) -> None:
    house.add("tag", TAG)
    async with house.open() as client:
        await house.post(client, path, "/tag hello", stream=True)
        [trace] = (await traces(client))["finished"]
        detail = await one(client, trace)

    assert trace["path"] == path and trace["dialect"] == BY_PATH[path].name
    assert trace["model"] == "demo" and trace["status"] == 200 and trace["outcome"] == "ok"
    assert trace["client"].startswith("python-httpx") and trace["phase"] == "done"
    names = [phase["name"] for phase in trace["phases"]]
    assert names == ["reading", "agent tag", "waiting for the model", "streaming"]
    assert abs(sum(phase["ms"] for phase in trace["phases"]) - trace["ms"]) < 1
    assert 0 < trace["first_ms"] <= trace["ms"] and trace["pieces"] > 0
    assert [agent["name"] for agent in trace["agents"]] == ["tag"]
    [step] = detail["steps"]
    assert step["after"] == step["before"] + len(" <tag") and step["outcome"] == "ok"
    assert "before_text" not in step and "request" not in detail
    assert detail["curl"].endswith(f"{path} -d @body.json")


async def test_tokens_and_their_speed_are_ollamas_own(house: House) -> None:
    end = done(prompt_eval_count=3, eval_count=8, eval_duration=2 * 10**9)
    house.ollama.answers(line("y"), end)
    async with house.open() as client:
        await house.post(client, CHAT, "hello")
        [trace] = (await traces(client))["finished"]

    assert (trace["prompt_tokens"], trace["answer_tokens"]) == (3, 8)
    assert trace["tokens_per_second"] == 4.0


async def test_the_latest_are_kept_and_no_more(house: House) -> None:
    async with house.open(page={"requests": 3}) as client:
        for number in range(5):
            await house.post(client, CHAT, "hello", model=f"m{number}")
        found = (await client.get("/traces")).json()["finished"]

    assert [trace["model"] for trace in found] == ["m4", "m3", "m2"]


FILTERS: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["b", "a"]),
    ({"model": "a"}, ["a"]),
    ({"model": "B*"}, ["b"]),
    ({"agent": "tag"}, ["a"]),
    ({"agent": "rag"}, []),
    ({"status": "200"}, ["a"]),
    ({"status": "4xx"}, ["b"]),
    ({"status": "ok", "model": "b"}, ["b"]),
    ({"since": "9999999999"}, []),
]


async def test_filters_name_what_is_wanted(house: House) -> None:
    house.add("tag", TAG)
    async with house.open() as client:
        await house.post(client, CHAT, "/tag hello", model="a")
        house.ollama.answers(b"{}", status=404)
        await house.post(client, CHAT, "hello", model="b")

        for filters, models in FILTERS:
            found = (await traces(client, **filters))["finished"]
            assert [trace["model"] for trace in found if trace["model"]] == models, filters
        wrong = await client.get("/traces?modle=a")

    assert wrong.status_code == 400
    assert "unknown filter 'modle'; known are model, agent" in wrong.json()["error"]


@asynccontextmanager
async def asking(house: House, client: httpx.AsyncClient, **body: Any) -> AsyncIterator[Any]:
    """Ask in a task of its own, which is left at the end."""
    task = asyncio.create_task(client.post(body.pop("path", CHAT), json=body))
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def phase(client: httpx.AsyncClient, wanted: str) -> Any:
    """Wait until a request runs and is in a phase; return its trace."""
    async with asyncio.timeout(5):
        while True:
            for trace in (await traces(client))["running"]:
                if trace["phase"] == wanted:
                    return trace


PS = {"models": [{"name": "demo:latest", "model": "demo:latest", "context_length": 64}]}
PHASES: list[tuple[str, Any, str]] = [
    ("hello", [b""], "waiting for the model"),
    ("hello", [b""], "loading the model"),
    ("/slow hook", [b""], "agent slow"),
    ("hello", [line("a"), FakeOllama.pause], "streaming"),
    ("/slow go", [calling(CHAT, "", ("wait", {}))], "tool slow: wait"),
]


@pytest.mark.parametrize(("typed", "steps", "wanted"), PHASES)
@pytest.mark.parametrize("stop", [True, False])
async def test_what_runs_has_a_phase_and_can_be_stopped(
    house: House, typed: str, steps: list[Any], wanted: str, stop: bool
) -> None:
    house.write("slow", SLOW)
    bound = [step.__get__(house.ollama) if callable(step) else step for step in steps]
    before = house.ollama.pause if wanted.endswith("the model") else None
    house.ollama.memory = PS if wanted.startswith("waiting") else {"models": []}
    house.ollama.answers(*bound, before=before)

    async with house.open() as client, asking(house, client, **chat(CHAT, typed)) as task:
        trace = await phase(client, wanted)
        assert trace["ms"] >= 0 and trace["model"] == "demo"
        if not stop:
            task.cancel()
        else:
            answer = await client.post(f"/traces/{trace['id']}/stop")
            assert answer.json() == {"stopped": trace["id"]}
        result: Any = (await asyncio.gather(task, return_exceptions=True))[0]
        async with asyncio.timeout(5):
            while not (ended := (await traces(client))["finished"]):
                pass
        again = await client.post(f"/traces/{trace['id']}/stop")

    assert ended[0]["outcome"] == ("stopped" if stop else "client_closed")
    assert again.status_code == 404
    if stop and wanted in ("streaming", "tool slow: wait"):
        assert isinstance(result, httpx.RemoteProtocolError)
    elif stop:
        assert isinstance(result, httpx.Response) and result.status_code == 503
        assert "stopped at the proxy" in result.text


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_that_is_stopped_ends_with_an_error_and_is_never_whole(
    house: House, path: str
) -> None:
    first = frames(path, "a", "b")[:-2]
    kind = BY_PATH[path].stream_type.decode()
    house.ollama.answers(*first, house.ollama.pause, kind=kind)

    async with house.open() as client:
        got = b""
        with pytest.raises(httpx.RemoteProtocolError):
            body = chat(path, "hello", stream=True)
            async with client.stream("POST", path, json=body) as answer:
                async for data in answer.aiter_bytes():
                    if not got:
                        trace = await phase(client, "streaming")
                        await client.post(f"/traces/{trace['id']}/stop")
                    got += data

    assert got.startswith(b"".join(first)) and b"stopped at the proxy" in got
    assert not [end for end in (b"[DONE]", b"message_stop", b"response.completed") if end in got]


# Texts


async def test_texts_are_kept_where_the_operator_wants_them(house: House) -> None:
    house.add("tag", TAG)
    async with house.open(**TEXTS) as client:
        await house.post(client, CHAT, "/tag it's", stream=False)
        [trace] = (await traces(client))["finished"]
        detail = await one(client, trace)

    assert json.loads(detail["request"])["messages"][0]["content"] == "/tag it's"
    assert json.loads(detail["steps"][0]["after_text"])["messages"][0]["content"] == "it's <tag"
    assert said(detail["answer"].encode()) == "y"
    assert '-d \'{"model"' in detail["curl"] and "it'\"'\"'s" in detail["curl"]


async def test_200_traces_of_the_largest_bodies_stay_within_bounds(house: House) -> None:
    async with house.open(**TEXTS) as client:
        for _ in range(3):
            await house.post(client, CHAT, "x" * 10**6)
        found = (await traces(client))["finished"]
        details = [await one(client, trace) for trace in found]

    sizes = [len(d["request"]) + len(d["answer"]) for d in details]
    assert all(0 < size <= 2**22 // 200 for size in sizes)


GUARD = """
class It(BaseAgent):
    async def on_request(self, payload):
        raise Abort(403, "no")
"""


@pytest.mark.parametrize("path", [CHAT, "/api/generate"])
async def test_texts_of_what_a_guard_refused_are_not_kept(house: House, path: str) -> None:
    house.write("guard", GUARD, always=True, on_error="abort")
    async with house.open(**TEXTS) as client:
        answer = await client.post(
            path, json={"model": "m", "prompt": "secret", **chat(CHAT, "secret")}
        )
        [trace] = (await traces(client))["finished"]
        detail = await one(client, trace)

    assert answer.status_code == 403 and trace["status"] == 403
    assert "secret" not in json.dumps(detail)


# Hints, and a full context


async def test_hints_say_why_nothing_happened(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    house.add("rag", TAG)
    async with house.open(server={"max_body": 300}) as client:
        await house.post(client, CHAT, "/rga what?")
        await house.post(client, CHAT, "x" * 999)
        body = chat(CHAT, "/rag x")
        await client.post(CHAT, json=body, headers={"origin": "https://evil.example"})
        found = (await traces(client))["finished"]

    foreign, unread, near = [trace["hints"] for trace in found]
    assert near == ["did you mean /rag?"] and "server.max_body" in unread[0]
    assert "access.origins" in foreign[0]
    logged = [vars(r)["fields"]["hint"] for r in caplog.records if r.getMessage() == "hint"]
    assert [*reversed(logged)] == [*foreign, *unread, *near]


@pytest.mark.parametrize(("prompt", "full"), [(63, False), (64, True), (65, True)])
async def test_a_prompt_that_filled_the_context_is_told(
    house: House, caplog: pytest.LogCaptureFixture, prompt: int, full: bool
) -> None:
    house.ollama.answers(line("y"), done(prompt_eval_count=prompt, eval_count=1))
    house.ollama.memory = PS
    async with house.open() as client, asyncio.timeout(5):
        await house.post(client, CHAT, "hello")
        while not house.ollama.looks:
            await traces(client)
        [trace] = (await traces(client))["finished"]

    warnings = [r for r in caplog.records if "whole context" in r.getMessage()]
    assert trace["full"] is full and bool(warnings) is full
    assert not full or "num_ctx" in trace["hints"][-1] + vars(warnings[0])["fields"]["cure"]


# Who may see


async def test_a_page_of_another_origin_may_neither_read_nor_stop(house: House) -> None:
    evil = {"origin": "https://evil.example"}
    async with house.open() as client:
        await house.post(client, CHAT, "hello")
        [trace] = (await traces(client))["finished"]
        answers = [
            await client.get("/traces", headers=evil),
            await client.get(f"/traces/{trace['id']}", headers=evil),
            await client.post(f"/traces/{trace['id']}/stop", headers=evil),
            await client.get("/traces/stream", headers=evil),
            await client.get("/traces", headers={"host": "rebound.example"}),
            await client.get(f"/traces/{trace['id']}", headers={"host": "rebound.example"}),
        ]

    assert [answer.status_code for answer in answers] == [403] * len(answers)


async def test_the_stream_of_traces_tells_what_has_ended(house: House) -> None:
    async with house.open() as client, asyncio.timeout(8):
        async with client.stream("GET", "/traces/stream") as answer:
            lines = answer.aiter_lines()
            first = json.loads((await anext(lines)).removeprefix("data: "))
            await house.post(client, COMPLETIONS, "hello", stream=True)
            async for text in lines:
                ended = json.loads(text.removeprefix("data: "))["finished"] if text else []
                if ended:
                    break

    assert first["running"] == []
    assert [trace["path"] for trace in ended] == [COMPLETIONS]


HOSTILE = "<img src=x onerror=alert(1)>\u202e"


async def test_what_the_page_looks_up_for_itself_leaves_no_trace(house: House) -> None:
    quiet = {"x-osp-quiet": "1"}
    async with house.open() as client:
        for path in ("/traces", "/plugins", "/health", "/metrics", "/traces/x"):
            await client.get(path)
        await client.get("/api/ps", headers=quiet)
        await client.get("/api/version")
        await client.post(CHAT, json=chat(CHAT, "hello"), headers=quiet)
        found = (await traces(client))["finished"]

    assert [trace["path"] for trace in found] == [CHAT, "/api/version"]
    assert all("x-osp-quiet" not in dict(asked.headers) for asked in house.ollama.asked)


@pytest.mark.parametrize("path", ["/traces", "/plugins", "/health"])
async def test_a_browser_gets_a_page_that_it_can_show_and_that_runs_nothing(
    house: House, path: str
) -> None:
    house.add("note", TAG, description=HOSTILE)
    async with house.open() as client:
        await house.post(client, CHAT, "hello", model=HOSTILE)
        page = await client.get(path, headers={"accept": "text/html,*/*;q=0.8"})
        data = await client.get(path)

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<img" not in page.text and (path == "/health" or "&lt;img" in page.text)
    assert data.headers["content-type"] == "application/json" and data.json()


async def test_a_key_with_limits_sees_and_stops_its_own_requests_alone(house: House) -> None:
    table: dict[str, dict[str, Any]] = {
        "own": {"key": "secret-1"},
        "kid": {"key": "secret-2", "agents": ["note"]},
        "sis": {"key": "secret-3", "deny": ["/api/pull"]},
    }
    own, kid, sis = ({"x-api-key": key["key"]} for key in table.values())
    house.ollama.answers(line("hi"), done())

    async with house.open(keys=table, **TEXTS) as client:
        for key in (own, kid, sis):
            await client.post(CHAT, json=chat(CHAT, "x"), headers=key)
        ids: dict[str, str] = {}
        for name, key, users in (("own", own, ["sis", "kid", "own"]), ("kid", kid, ["kid"])):
            listed = (await client.get("/traces", headers=key)).json()["finished"]
            rows = (await client.get("/osp", headers=key)).text
            assert [trace["user"] for trace in listed] == users, name
            assert [user for user in table if f'">{user}<' in rows] == users[::-1]
            ids |= {trace["user"]: trace["id"] for trace in listed}
        its_own = await client.get(f"/traces/{ids['kid']}", headers=kid)
        theirs = await client.get(f"/traces/{ids['sis']}", headers=kid)
        assert '"x"' in its_own.json()["request"] and theirs.status_code == 404

        house.ollama.answers(line("hi"), before=house.ollama.pause)
        house.ollama.arrived.clear()
        late = asyncio.create_task(client.post(CHAT, json=chat(CHAT, "x"), headers=own))
        await house.ollama.arrived.wait()
        (runs,) = (await client.get("/traces", headers=own)).json()["running"]
        assert (await client.get("/traces", headers=kid)).json()["running"] == []
        stop = f"/traces/{runs['id']}/stop"
        assert (await client.post(stop, headers=kid)).status_code == 404
        assert (await client.post(stop, headers=own)).json() == {"stopped": runs["id"]}
        assert (await late).status_code == 503
