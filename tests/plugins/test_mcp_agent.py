"""The agent mcp before real servers: of the SDK, of the registries, and `raw.py`, which misbehaves.

The tests use the agent as the proxy does: `setup` once, and a copy of it for each request.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import demo
from kernel.agent import Abort, Clock, Reply
from plugins.mcp_agent.agent import MCP
from plugins.mcp_agent.rules import ToolError
from testkit import ask
from tests.integration.conftest import npm_install
from tests.plugins.context import a_context

pytest.importorskip("mcp")
HERE = Path(__file__).parent / "mcp_servers"
ROOT = HERE.parents[2]
SETTINGS = json.loads((ROOT / "plugins/mcp_agent/config.json").read_text("utf-8"))["settings"]
BIN = Path(sys.executable).parent
SDK = {"command": sys.executable, "args": [str(HERE / "sdk.py")]}
SOON = 4.0  # seconds in which a machine that has much to do can end a process


def raw(mode: str = "old", tools: Any = None, **config: Any) -> dict[str, Any]:
    """Return the settings of a server that misbehaves in one way."""
    env = {"TOOLS": json.dumps(tools)} if tools else {}
    env |= {"STARTS": config.pop("starts")} if "starts" in config else {}
    return {"command": sys.executable, "args": [str(HERE / "raw.py"), mode], "env": env, **config}


@asynccontextmanager
async def agent(servers: dict[str, Any], **settings: Any) -> AsyncIterator[MCP]:
    """Set an agent up, and tear it down."""
    made = MCP()
    made.settings = {**SETTINGS, "servers": servers, **settings}
    await made.setup()
    try:
        yield made
    finally:
        await made.teardown()


async def request(made: MCP, server: str = "", tool: str = "", **context: Any) -> MCP:
    """Return the agent's part in one request, after its `on_request`."""
    one = copy.copy(made)
    one.arguments = {"server": server, "tool": tool}
    fields: dict[str, Any] = {"asked": True, "clock": Clock(20), **context}
    one.context = a_context("what time is it?", **fields)
    assert await one.on_request({"messages": []}) == {"messages": []}
    return one


def a_tool(name: str, **fields: Any) -> dict[str, Any]:
    """Return a tool as a server lists it."""
    return {"name": name, "inputSchema": {"type": "object"}, **fields}


def names(one: MCP) -> list[str]:
    return [tool["name"] for tool in one.tools]


def pids(starts: Path) -> list[int]:
    """Return the ids of the processes that were started, in their order."""
    return [int(line) for line in starts.read_text().split()] if starts.exists() else []


def lives(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    with suppress(OSError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
    return False


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    """Where servers note that they were started."""
    return tmp_path / "starts"


@pytest.fixture
async def sdk_url() -> AsyncIterator[str]:
    """The URL of the SDK's server over HTTP, without the handshake."""
    from tests.plugins.mcp_servers.sdk import server

    async with demo.serve(server.streamable_http_app()) as url:
        yield f"{url}/mcp"


async def test_without_a_server_it_says_how_to_set_one_up() -> None:
    async with agent({}) as made:
        with pytest.raises(Reply) as reply:
            await request(made)
        always_on = await request(made, asked=False)

    assert "[agents.mcp.settings.servers.NAME]" in str(reply.value.text)
    assert (always_on.tools, made.progress) == ([], "")


def test_without_a_server_the_sdk_is_not_imported() -> None:
    code = """if True:
        import asyncio, sys
        from plugins.mcp_agent.agent import MCP
        made = MCP()
        for servers in ({}, {"a": {"command": "a"}}):
            made.settings = {"servers": servers, "start_timeout": 1}
            asyncio.run(made.setup())
            print("mcp" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert done.stdout.split() == ["False", "True"], done.stderr


WRONG: list[tuple[Any, str]] = [
    ("uvx", "servers.a: must be a table with a command or a url, and not both"),
    ({}, "servers.a: must be a table with a command or a url, and not both"),
    ({"command": "a", "url": "b"}, "servers.a: must be a table with a command or a url, and not"),
    ({"comand": "a"}, "servers.a: unknown key 'comand'; known are command, cwd, url"),
    ({"command": 1}, "servers.a: command must be text"),
    ({"command": "a", "args": "b"}, "servers.a: args must be a list of texts"),
    ({"command": "a", "args": [1]}, "servers.a: args must be a list of texts"),
    ({"command": "a", "env": {"PORT": 1}}, "servers.a: env must be a table of texts"),
    ({"url": "http://a", "headers": ["b"]}, "servers.a: headers must be a table of texts"),
    ({"url": "http://a", "type": "sse"}, "servers.a: sse is not spoken here"),
]


@pytest.mark.parametrize(("config", "text"), WRONG)
async def test_wrong_settings_name_the_server_and_the_key(config: Any, text: str) -> None:
    made = MCP()
    made.settings = {**SETTINGS, "servers": {"a": config}}

    with pytest.raises(ValueError) as error:
        await made.setup()
    assert str(error.value).startswith(text)


REVISIONS = {"old": "2024-11-05", "last": "2025-11-25", "modern": "2026-07-28"}
REVISIONS |= {"quits": "2024-11-05", "wrong": "2024-11-05"}


@pytest.mark.parametrize("mode", REVISIONS)
async def test_servers_of_every_revision_are_understood(mode: str) -> None:
    async with agent({"raw": raw(mode)}) as made:
        one = await request(made, "raw")
        session = made.servers["raw"].session

        assert session and session.protocol_version == REVISIONS[mode]
        assert one.tools == [
            {"name": "raw_echo", "description": "Says it again.", "parameters": {"type": "object"}}
        ]
        assert await one.on_tool("raw_echo", {"text": "hi"}) == "hi"


async def test_of_thirty_servers_only_the_one_that_was_asked_for_is_started(starts: Path) -> None:
    servers = {f"s{n}": raw(starts=str(starts)) for n in range(30)}
    async with agent(servers) as made:
        assert pids(starts) == []
        one = await request(made, "S7")

        assert names(one) == ["s7_echo"]
        assert len(pids(starts)) == 1
        assert made.progress.count("not started") == 29
        assert "s7: answers, 1 tools, about 19 tokens" in made.progress


async def test_requests_at_once_share_one_start(starts: Path) -> None:
    async with agent({"raw": raw(starts=str(starts))}) as made:
        await asyncio.gather(*(request(made) for _ in range(10)))

        assert len(pids(starts)) == 1


def test_the_tools_of_a_server_are_called_in_every_dialect() -> None:
    call = {"name": "raw_echo", "arguments": {"text": "hi"}}
    answer = ask(
        ROOT / "plugins/mcp_agent",
        "/mcp:raw what does it say?",
        settings={"servers": {"raw": raw()}},
        model=[call, "It says hi."],
    )

    assert (answer.text, answer.agents, answer.results) == ("It says hi.", "mcp;ok", ["hi"])


ARGUMENTS: list[tuple[str, str, list[str]]] = [
    ("", "", ["a_echo", "a_add", "b_echo"]),
    ("A", "", ["a_echo", "a_add"]),
    ("a", "add", ["a_add"]),
    ("a=add", "", ["a_add"]),
    ("", "echo", ["a_echo", "b_echo"]),
    ("b + a", "e*", ["b_echo", "a_echo"]),
]


@pytest.mark.parametrize(("server", "tool", "offered"), ARGUMENTS)
async def test_a_prompt_chooses_servers_and_tools(
    server: str, tool: str, offered: list[str]
) -> None:
    two = [a_tool("echo"), a_tool("add")]
    async with agent({"a": raw(tools=two), "b": raw()}) as made:
        assert names(await request(made, server, tool)) == offered


@pytest.mark.parametrize(
    ("server", "tool", "text"),
    [
        ("tim", "", "there is no MCP server 'tim'; known are: time, other"),
        ("time", "now", "there is no tool 'now'; known are: echo"),
    ],
)
async def test_what_there_is_not_is_refused_with_what_there_is(
    server: str, tool: str, text: str
) -> None:
    async with agent({"time": raw(), "other": raw()}) as made:
        with pytest.raises(Abort) as refused:
            await request(made, server, tool)

    assert (refused.value.status, refused.value.why) == (400, text)


async def test_only_what_is_allowed_is_offered_and_some_of_it_asks_first() -> None:
    tools = [a_tool(name) for name in ("read", "read_all", "write", "drop")]
    config = raw(tools=tools, allow=["read*", "write"], ask=["w*", "drop"])
    async with agent({"db": config}) as made:
        one = await request(made)

    assert names(one) == ["db_read", "db_read_all", "db_write"]
    assert [tool.get("consent", False) for tool in one.tools] == [False, False, True]


async def test_a_server_that_died_is_started_again(starts: Path) -> None:
    async with agent({"raw": raw(starts=str(starts))}) as made:
        one = await request(made)
        with pytest.raises(ToolError, match=r"raw: ended \(exit status 3\)"):
            await one.on_tool("raw_echo", {"do": "exit"})

        assert made.progress == "raw: failed: ended (exit status 3)"
        assert await one.on_tool("raw_echo", {"text": "again"}) == "again"
        assert len(pids(starts)) == 2


@pytest.mark.parametrize("transport", ["stdio", "http"])
async def test_a_call_that_is_cancelled_leaves_the_session_to_others(
    transport: str, sdk_url: str
) -> None:
    async with agent({"sdk": SDK if transport == "stdio" else {"url": sdk_url}}) as made:
        one = await request(made)
        session = made.servers["sdk"].session
        calls = [asyncio.create_task(one.on_tool("sdk_everything", {})) for _ in range(20)]
        for turns, call in enumerate(calls):  # each a turn of the loop later than the one before
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
        await asyncio.wait(calls)

        assert any(call.cancelled() for call in calls)
        assert "first" in await one.on_tool("sdk_everything", {})
        assert made.servers["sdk"].session is session


async def test_a_hook_that_is_cancelled_does_not_end_a_start(starts: Path) -> None:
    async with agent({"raw": raw(starts=str(starts))}) as made:
        first = asyncio.create_task(request(made))
        await asyncio.sleep(0)
        first.cancel()
        one = await request(made)

        assert await one.on_tool("raw_echo", {"text": "hi"}) == "hi"
        assert first.cancelled() and len(pids(starts)) == 1


async def test_a_server_that_will_not_end_is_killed_with_its_children(starts: Path) -> None:
    async with agent({"raw": raw("stubborn", starts=str(starts))}) as made:
        await request(made)
        started = pids(starts)
        assert len(started) == 2 and all(map(lives, started))
        began = time.monotonic()
        await made.teardown()

        assert time.monotonic() - began < SOON
        assert not any(map(lives, started))


async def test_what_a_server_says_on_stderr_goes_to_the_log_and_nowhere_else(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    async with agent({"raw": raw()}) as made:
        one = await request(made)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await one.on_tool("raw_echo", {"do": "hang", "text": "psst"})

    said = [r for r in caplog.records if r.getMessage() == "MCP server says"]
    lines = [vars(record)["fields"]["line"] for record in said]
    assert lines[-2:] == ["ready", "psst"]
    assert max(map(len, lines)) <= 4096
    assert all(record.levelno == logging.DEBUG for record in said)
    assert capfd.readouterr().err == ""
    assert [r for r in caplog.records if r not in said and "psst" in r.getMessage()] == []


SILENT: list[tuple[dict[str, Any], str]] = [
    ({"command": "no-such-thing"}, "failed: No such file or directory"),
    ({"command": sys.executable, "args": ["-c", "exit(2)"]}, "failed: ended (exit status 2)"),
    (raw("mute"), "failed: did not answer within 1 seconds"),
    (raw("flood"), "failed: sent more than 2000 lines in a second"),
    ({"url": "http://127.0.0.1:9/"}, "failed: All connection attempts failed"),
    (raw(tools=[1]), "failed: it does not speak MCP: tools.0: Input should be a valid dict"),
    (
        raw(tools=[{"name": "a", "inputSchema": []}]),
        "failed: it does not speak MCP: tools.0.inputS",
    ),
]


@pytest.mark.parametrize(("config", "text"), SILENT)
async def test_a_server_that_cannot_be_used_is_named_and_harms_no_other(
    config: dict[str, Any], text: str
) -> None:
    async with agent({"bad": config, "good": raw()}, start_timeout=1) as made:
        with pytest.raises(Abort) as refused:
            await request(made, "bad+good")
        with pytest.raises(ToolError):  # where it was not asked for, the chat goes on without it
            await request(made, "bad", asked=False)
        one = await request(made)

        assert refused.value.status == 502
        assert refused.value.why.startswith(f"no answer from the MCP server bad: {text}")
        assert names(one) == ["good_echo"]
        assert await one.on_tool("good_echo", {"text": "hi"}) == "hi"


async def test_the_log_has_the_last_words_of_a_server_that_did_not_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = {"command": sys.executable, "args": ["-c", "exit('x' * 999 + '\\nno key')"]}
    async with agent({"bad": config}) as made:
        with pytest.raises(Abort):
            await request(made)

    fields = [vars(record)["fields"] for record in caplog.records]
    assert fields == [{"server": "bad", "error": "ended (exit status 1)", "said": "no key"}]


async def test_a_start_that_failed_is_not_tried_again_at_once(starts: Path) -> None:
    async with agent({"raw": raw("mute", starts=str(starts))}, start_timeout=0.5) as made:
        for _ in range(3):
            with pytest.raises(Abort, match="did not answer within 0.5 seconds"):
                await request(made, "raw")

    assert len(pids(starts)) == 1
    assert not lives(*pids(starts))


async def test_a_server_that_is_busy_is_left_alone(starts: Path) -> None:
    async with agent({"raw": raw(starts=str(starts))}, start_timeout=2) as made:
        one = await request(made)
        busy = asyncio.create_task(one.on_tool("raw_echo", {"do": "hang"}))

        async with asyncio.timeout(SOON):
            assert names(await request(made)) == ["raw_echo"]
        await asyncio.wait({busy}, timeout=1.5)  # longer than a start may take
        assert len(pids(starts)) == 1 and not busy.done()
        assert made.progress.startswith("raw: answers")
        busy.cancel()


async def test_a_request_does_not_wait_longer_than_its_hook_may(starts: Path) -> None:
    async with agent({"slow": raw("mute"), "good": raw()}) as made:
        async with asyncio.timeout(2):
            one = await request(made, clock=Clock(2))

        assert names(one) == ["good_echo"]
        assert made.servers["slow"].status == "is starting"


@pytest.mark.parametrize(
    ("do", "text"),
    [
        ("lines", "sent more than 2000 lines in a second"),
        ("endless", "sent more than 16 MiB in one message"),
    ],
)
async def test_a_flood_ends_the_call_and_the_server_alone(do: str, text: str) -> None:
    async with agent({"raw": raw(), "good": raw()}) as made:
        one = await request(made)
        with pytest.raises(ToolError, match=text):
            await one.on_tool("raw_echo", {"do": do})

        assert await one.on_tool("good_echo", {"text": "hi"}) == "hi"
        assert await one.on_tool("raw_echo", {"text": "back"}) == "back"


async def test_ten_megabytes_are_cut() -> None:
    async with agent({"raw": raw()}, max_chars=1000) as made:
        result = await (await request(made)).on_tool("raw_echo", {"do": "large", "text": "x"})

    assert result == "x" * 1000 + "\n[cut: the first 1000 of 10000000 characters]"


def schema(**values: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": values}}


LIES: list[tuple[Any, list[str]]] = [
    ({"name": ""}, []),
    ({"name": "a b/c\n"}, ["raw_a_b_c_"]),
    ({"name": "x" * 10_000}, ["raw_" + "x" * 60]),
    ({"inputSchema": schema(type=5)}, []),
    ({"inputSchema": schema(type=["string", "null"], description=None)}, ["raw_ok"]),
    ({"inputSchema": schema(anyOf=[{"type": "string"}, 5])}, []),
    ({"inputSchema": schema(default=float("nan"))}, []),
    ({"inputSchema": schema(description="HUGE")}, []),
    ({"inputSchema": {"type": "object"}}, ["raw_ok"]),
]


@pytest.mark.parametrize(("lie", "offered"), LIES)
async def test_a_tool_that_cannot_be_offered_is_left_out(lie: Any, offered: list[str]) -> None:
    async with agent({"raw": raw(tools=[a_tool("ok") | lie, a_tool("good")])}) as made:
        assert names(await request(made)) == [*offered, "raw_good"]


async def test_lies_about_names_and_sizes_are_bounded() -> None:
    tools = [a_tool("a.b", description="HUGE")]
    tools += [a_tool("a/b", description=text) for text in ("second", "third")]
    async with agent({"raw": raw(tools=tools)}) as made:
        one = await request(made)

    assert names(one) == ["raw_a_b", "raw_a_b_"]
    assert one.tools[0]["description"] == "x" * 4000
    assert one.tools[1]["description"] == "second"


async def test_patterns_of_a_server_are_not_run_over_its_results() -> None:
    slow = {"type": "object", "required": ["x"], "properties": {"x": {"pattern": "(a+)+$"}}}
    async with agent({"raw": raw(tools=[a_tool("echo", outputSchema=slow)])}) as made:
        assert await (await request(made)).on_tool("raw_echo", {"text": "a"}) == "a"


async def test_a_list_that_does_not_end_is_ended() -> None:
    async with agent({"raw": raw("pages")}) as made:
        assert len(names(await request(made))) == 50


@pytest.mark.parametrize("config", [raw(), raw("last"), SDK])
async def test_tools_that_come_later_are_offered_in_the_next_request(
    config: dict[str, Any],
) -> None:
    async with agent({"s": config}) as made:
        one = await request(made)
        learn = "s_learn" if config is SDK else "s_echo"
        await one.on_tool(
            learn, {"name": "new"} if config is SDK else {"do": "learn", "text": "new"}
        )

        assert "s_new" not in names(one)
        assert "s_new" in names(await request(made))


async def test_what_is_no_text_is_named() -> None:
    async with agent({"sdk": SDK}) as made:
        one = await request(made)
        result = await one.on_tool("sdk_everything", {})

        assert str(result).splitlines() == [
            "first",
            "[image/png, 0 kB, not shown]",
            "[audio/wav, 3 kB, not shown]",
            "[plan: file:///plan.txt]",
            "of a.txt",
            "[data, 3 kB, not shown]",
        ]
        assert await one.on_tool("sdk_structured", {}) == '{"städte": ["Lima"]}'


async def test_images_are_handed_on_where_the_operator_wants_them() -> None:
    async with agent({"sdk": SDK}, images=True) as made:
        result = await (await request(made)).on_tool("sdk_everything", {})

    assert isinstance(result, list) and result[0]["text"].startswith("first\n[audio/wav")
    image = {"type": "image", "data": "iVBORw0KGgo=", "mimeType": "image/png"}
    assert result[1:] == [image]


async def test_a_tool_that_failed_raises_its_text() -> None:
    async with agent({"sdk": SDK}, max_chars=5) as made:
        one = await request(made)
        with pytest.raises(ToolError, match=r"^no di\n\[cut: the first 5 of 7 characters\]$"):
            await one.on_tool("sdk_fail", {"text": "no disk"})
        with pytest.raises(ToolError, match="^Error"):
            await one.on_tool("sdk_fail", {"text": 5})


async def test_a_server_over_http_gets_the_headers(sdk_url: str) -> None:
    config = {"url": sdk_url, "headers": {"X-Token": "s3cret"}, "type": "http"}
    async with agent({"sdk": config}) as made:
        one = await request(made)

        assert await one.on_tool("sdk_header", {"name": "x-token"}) == "s3cret"


def forgetful(sessions: list[str]) -> Starlette:
    """Return a server of revision 2025-06-18 that knows the last of its sessions only."""

    async def answer(asked: Request) -> Response:
        session = asked.headers.get("mcp-session-id")
        if asked.method == "DELETE":
            sessions.append(f"{session} ended")
            return Response()
        body = await asked.json()
        method = body["method"]
        if "id" not in body:
            return Response(status_code=202)
        if method == "initialize":
            sessions.append(f"{len(sessions)}")
            info = {"name": "http", "version": "1"}
            result: Any = {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": info}
        elif session != sessions[-1]:
            return Response(status_code=404)
        elif method == "tools/list":
            result = {"tools": [a_tool("echo")]}
        else:
            result = {"content": [{"type": "text", "text": f"in session {session}"}]}
        message = {"jsonrpc": "2.0", "id": body["id"], "result": result}
        return JSONResponse(message, headers={"mcp-session-id": sessions[-1]})

    return Starlette(routes=[Route("/", answer, methods=["POST", "DELETE"])])


async def test_a_session_that_an_http_server_forgot_is_begun_again() -> None:
    sessions = ["none"]
    async with demo.serve(forgetful(sessions)) as url, agent({"http": {"url": url}}) as made:
        one = await request(made)
        assert await one.on_tool("http_echo", {}) == "in session 1"
        sessions.append("of its next life")

        with pytest.raises(ToolError, match="http: Session terminated"):
            await one.on_tool("http_echo", {})
        one = await request(made)
        assert await one.on_tool("http_echo", {}) == "in session 4"
    assert sessions[-1] == "4 ended"


async def test_no_secret_is_logged(caplog: pytest.LogCaptureFixture, sdk_url: str) -> None:
    caplog.set_level(logging.DEBUG)
    config = {"url": f"{sdk_url}?token=s3cret", "headers": {"Authorization": "s3cret"}}
    bad = raw("mute") | {"args": ["-c", "exit(1)", "s3cret"], "env": {"KEY": "s3cret"}}
    async with agent({"sdk": config, "bad": bad}) as made:
        one = await request(made)
        with suppress(ToolError):
            await one.on_tool("sdk_header", {"name": "s3cret"})

    assert "MCP server failed" in [record.getMessage() for record in caplog.records]
    assert "s3cret" not in "".join(str(vars(record)) for record in caplog.records)


def installed(name: str) -> dict[str, Any]:
    """Return the settings of a server that is a Python package; skip the test without it."""
    if not (BIN / name).exists():
        pytest.skip(f"{name} is not installed")
    return {"command": str(BIN / name)}


async def test_mcp_server_time() -> None:
    async with agent({"time": installed("mcp-server-time")}) as made:
        one = await request(made, "time", "convert_time")
        there = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "America/Lima"}
        result = json.loads(str(await one.on_tool("time_convert_time", there)))

        assert result["time_difference"] == "-5.0h"
        with pytest.raises(ToolError, match="Mars"):
            await one.on_tool("time_convert_time", {**there, "target_timezone": "Mars"})


async def test_mcp_server_fetch(demo_url: str) -> None:
    flags = {"args": ["--ignore-robots-txt", "--allow-private-ips"]}
    async with agent({"fetch": installed("mcp-server-fetch") | flags}) as made:
        one = await request(made)

        assert names(one) == ["fetch_fetch"]
        assert "0." in await one.on_tool("fetch_fetch", {"url": f"{demo_url}/api/version"})


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the servers that are Node packages lie; skips the test where they cannot be had."""
    folder = tmp_path_factory.mktemp("node")
    packages = ("server-everything", "server-filesystem")
    npm_install(folder, *(f"@modelcontextprotocol/{name}" for name in packages))
    return folder / "node_modules/.bin"


async def test_server_everything(node: Path) -> None:
    config = {"command": str(node / "mcp-server-everything")}
    async with agent({"all": config}, images=True) as made:
        one = await request(made)
        image = await one.on_tool("all_get-tiny-image", {})
        sums = [one.on_tool("all_get-sum", {"a": n, "b": 1}) for n in range(5)]
        ends = [str(text).split()[-1] for text in await asyncio.gather(*sums)]

        assert ends == ["1.", "2.", "3.", "4.", "5."]
        assert isinstance(image, list) and image[1]["mimeType"] == "image/png"


async def test_server_filesystem(node: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    config = {"command": str(node / "mcp-server-filesystem"), "args": [str(tmp_path)]}
    async with agent({"fs": config | {"allow": ["read_*"], "ask": ["*"]}}) as made:
        one = await request(made)

        assert names(one) and all(tool["consent"] for tool in one.tools)
        assert await one.on_tool("fs_read_text_file", {"path": str(tmp_path / "a.txt")}) == "hello"
        with pytest.raises(ToolError, match="Access denied"):
            await one.on_tool("fs_read_text_file", {"path": "/etc/passwd"})
