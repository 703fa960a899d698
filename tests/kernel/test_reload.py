"""Reloading: what is loaded anew, who keeps the old version, and when that is torn down.

The agents here say which version they are, and note when it was set up (+) and torn down (-).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

import demo
import osp
from kernel.config import Config, build
from kernel.registry import PluginRegistry
from kernel.server import SETTINGS
from tests.kernel.test_registry import loaded
from tests.support import FakeOllama, done, said, turn
from tests.test_osp import LIMIT, Proxy, starting, with_agents

VERSION = """
import threading
from kernel.agent import BaseAgent

class It(BaseAgent):
    '''Version NUMBER.'''

    def note(self, sign):
        with (self.data_dir / "notes").open("a") as file:
            file.write(f"{sign}NUMBER ")

    def setup(self):
        self.note("+")

    async def on_response(self, response):
        return f"{response} <NUMBER"

    def teardown(self):
        self.note("-")
"""
HANGS = VERSION.replace('self.note("+")', 'self.note("+"); threading.Event().wait()')
GATED = VERSION.replace('self.note("+")', 'self.note("+"); (self.data_dir / "gate").read_text()')
BROKEN = "raise RuntimeError('sesame')"
HELPED = """
from kernel.agent import BaseAgent
from .helper import X
from .parts.deep import Y

class It(BaseAgent):
    async def on_response(self, response):
        from .late import Z
        return f"{X}{Y}{Z}"
"""

needs_sighup = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")


@pytest.fixture
def ollama() -> FakeOllama:
    fake = FakeOllama()
    fake.answers(done("y"))
    return fake


def write(plugins: Path, name: str, number: int, code: str = VERSION, **config: Any) -> Path:
    """Write an agent, or the next version of one."""
    folder = plugins / f"{name}_agent"
    folder.mkdir(exist_ok=True)
    (folder / "agent.new").write_text(code.replace("NUMBER", str(number)))
    (folder / "agent.new").replace(folder / "agent.py")  # in one step: nobody reads half of it
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_helpers(folder: Path, x: int, y: int, z: int) -> None:
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "helper.py").write_text(f"X = {x}\n")
    (folder / "parts" / "__init__.py").write_text("")
    (folder / "parts" / "deep.py").write_text(f"Y = {y}\n")
    (folder / "late.py").write_text(f"Z = {z}\n")


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def caches(folder: Path) -> list[Path]:
    return list(folder.rglob("__pycache__"))


def move(folder: Path, name: str) -> Path:
    return folder.rename(folder.with_name(name))


def gate(plugins: Path) -> Callable[[], object]:
    """Make the pipe at whose end `GATED` waits in its setup, and return what opens it."""
    pipe = plugins.parent / "data" / "it" / "gate"
    os.mkfifo(pipe)
    return lambda: pipe.write_text("")


def notes(plugins: Path, name: str = "it") -> list[str]:
    file = plugins.parent / "data" / name / "notes"
    return file.read_text().split() if file.exists() else []


async def until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(LIMIT):
        while not true():
            await anyio.lowlevel.checkpoint()


async def listed(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.get("/plugins")
    assert answer.status_code == 200 and "sesame" not in answer.text
    return {about["name"]: about for about in answer.json()["plugins"]}


async def becomes(
    client: httpx.AsyncClient, true: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Return what GET /plugins says, once it is what is waited for."""
    with anyio.fail_after(LIMIT):
        while not true(agents := await listed(client)):
            pass
    return agents


async def answered(client: httpx.AsyncClient, text: str = "/it x") -> str:
    answer = await client.post("/api/chat", json=turn(text, stream=False))
    assert answer.status_code == 200, answer.text
    return said(answer.content)


@asynccontextmanager
async def process(
    upstream: str, plugins: Path, *flags: str, **env: str
) -> AsyncIterator[tuple[Proxy, httpx.AsyncClient]]:
    """Run osp.py as a process with the agents in `plugins`."""
    env = {**with_agents(plugins), **env}
    async with starting("--upstream", upstream, *flags, env=env) as proxy:
        async with proxy.client() as client:
            yield proxy, client


async def says_again(proxy: Proxy, event: str, begin: Callable[[], object]) -> Mapping[str, Any]:
    """Return the fields of the next such line of the log after `begin`."""
    lines = len(proxy.lines)
    assert proxy.process.stderr
    begin()
    with anyio.fail_after(LIMIT):
        while not (hits := [line for line in proxy.lines[lines:] if f'"event": "{event}"' in line]):
            got = (await proxy.process.stderr.readline()).decode()
            assert got, f"it ended:\n{''.join(proxy.lines)}"
            proxy.lines.append(got)
    fields: Mapping[str, Any] = json.loads(hits[0])
    return fields


async def hang_up(proxy: Proxy, event: str = "agents loaded") -> Mapping[str, Any]:
    return await says_again(proxy, event, lambda: proxy.process.send_signal(signal.SIGHUP))


# A real process, and SIGHUP


@needs_sighup
async def test_a_hangup_loads_what_changed_what_is_new_and_not_what_is_gone(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    write(plugins, "it", 1)
    gone = write(plugins, "gone", 1)

    async with process(ollama_url, plugins) as (proxy, client):
        write(plugins, "it", 2)
        write(plugins, "new", 1)
        remove(gone)
        event = await hang_up(proxy)
        agents = await listed(client)
        texts = [await answered(client, f"/{name} x") for name in ("it", "new", "gone")]
        status = await proxy.stop()

    assert event["agents"] == "it new" and sorted(agents) == ["it", "new"]
    assert agents["it"]["description"] == "Version 2."
    assert texts == ["y <2", "y <1", "y"]
    assert ollama.asked[-1].json["messages"][0]["content"] == "/gone x"  # nobody's command
    assert [notes(plugins, name) for name in ("it", "gone", "new")] == [
        ["+1", "+2", "-1", "-2"],
        ["+1", "-1"],
        ["+1", "-1"],
    ]
    assert status == 0


@needs_sighup
async def test_a_hangup_reads_helpers_anew_whatever_their_time_says_and_writes_nothing(
    ollama_url: str, plugins: Path
) -> None:
    folder = write(plugins, "it", 1, HELPED)
    write_helpers(folder, 1, 1, 1)
    files = sorted(folder.rglob("*"))
    stat = (folder / "helper.py").stat()

    async with process(ollama_url, plugins, PYTHONDONTWRITEBYTECODE="") as (proxy, client):
        before = await answered(client)
        write_helpers(folder, 2, 3, 4)
        for file in folder.rglob("*.py"):
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        await hang_up(proxy)
        after = await answered(client)

    assert (before, after) == ("111", "234")
    assert sorted(folder.rglob("*")) == files


@needs_sighup
async def test_a_hangup_reads_the_config_anew(ollama_url: str, plugins: Path) -> None:
    write(plugins, "it", 1)

    async with process(ollama_url, plugins) as (proxy, client):
        write(plugins, "it", 1, description="Now it is", always=True, arguments={"k": 1})
        await hang_up(proxy)
        about, always = (await listed(client))["it"], await answered(client, "x")
        write(plugins, "it", 1, command="that")
        await hang_up(proxy)
        names = list(await listed(client))
        texts = [await answered(client, text) for text in ("/it x", "/that x")]

    assert (about["description"], about["arguments"]) == ("Now it is", {"k": 1})
    assert always == "y <1"
    assert names == ["that"] and texts == ["y", "y <1"]


@needs_sighup
async def test_a_request_under_way_keeps_its_version_which_is_torn_down_after_it(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    ollama.answers(ollama.pause, done("y"))
    write(plugins, "it", 1)

    async with process(ollama_url, plugins) as (proxy, client):
        old = asyncio.create_task(client.post("/api/chat", json=turn("/it x")))
        await until(lambda: len(ollama.asked) == 1)
        write(plugins, "it", 2)
        await hang_up(proxy)
        new = asyncio.create_task(client.post("/api/chat", json=turn("/it x")))
        await until(lambda: len(ollama.asked) == 2)
        meanwhile = notes(plugins)
        ollama.go.set()
        texts = [said((await asking).content) for asking in (old, new)]
        await until(lambda: "-1" in notes(plugins))
        await proxy.stop()

    assert texts == ["y <1", "y <2"]
    assert meanwhile == ["+1", "+2"] and notes(plugins) == ["+1", "+2", "-1", "-2"]


@needs_sighup
async def test_a_version_that_fails_leaves_the_last_good_one_and_a_mended_one_takes_over(
    ollama_url: str, plugins: Path
) -> None:
    folder = write(plugins, "it", 1)

    async with process(ollama_url, plugins) as (proxy, client):
        write(plugins, "it", 2, BROKEN)
        await hang_up(proxy)
        complaint = await proxy.event("agent failed to load")
        broken, still = await listed(client), await answered(client)
        write(plugins, "it", 3)
        await hang_up(proxy)
        mended, now = await listed(client), await answered(client)
        await proxy.stop()

    assert (complaint["agent"], complaint["error"]) == ("it", "RuntimeError: sesame")
    assert broken["it"]["status"] == "loaded" and still == "y <1"
    where = str(folder / "agent.py")
    assert broken["it"]["error"] == {"type": "RuntimeError", "where": f"{where}:1"}
    assert "error" not in mended["it"] and now == "y <3"
    assert notes(plugins) == ["+1", "+3", "-1", "-3"]


@needs_sighup
async def test_many_hangups_at_once_leave_one_version_and_no_request_fails(
    ollama_url: str, plugins: Path
) -> None:
    write(plugins, "it", 1)

    async with process(ollama_url, plugins) as (proxy, client):
        for _ in range(3):
            asking = [asyncio.create_task(answered(client)) for _ in range(8)]
            proxy.process.send_signal(signal.SIGHUP)
            await hang_up(proxy)
            assert set(await asyncio.gather(*asking)) == {"y <1"}
        status = await proxy.stop()

    counted = Counter(notes(plugins))
    assert counted["+1"] == counted["-1"] >= 4 and status == 0


@needs_sighup
async def test_a_table_for_an_agent_that_is_gone_stops_the_reload_and_says_so(
    ollama_url: str, plugins: Path, tmp_path: Path
) -> None:
    folder = write(plugins, "it", 1)
    file = tmp_path / "osp.toml"
    file.write_text("[agents.it]\npriority = 1\n")

    async with process(ollama_url, plugins, "--config", str(file)) as (proxy, client):
        remove(folder)
        event = await hang_up(proxy, "plugins stay as they are")
        still = await answered(client)
        write(plugins, "it", 2)
        await hang_up(proxy)
        now = await answered(client)

    assert "[agents.it]: there is no such plugin" in event["error"]
    assert (still, now) == ("y <1", "y <2")


@needs_sighup
async def test_the_end_tears_down_old_versions_that_are_still_in_use_too(
    ollama: FakeOllama, ollama_url: str, plugins: Path
) -> None:
    ollama.answers(ollama.pause, done("y"))
    write(plugins, "it", 1)

    async with process(ollama_url, plugins, OSP_SERVER_SHUTDOWN="1") as (proxy, client):
        asking = []
        for number in (2, 3):
            asking.append(asyncio.create_task(client.post("/api/chat", json=turn("/it x"))))
            await until(lambda: len(ollama.asked) == len(asking))
            write(plugins, "it", number)
            await hang_up(proxy)
        status = await proxy.stop()
        await asyncio.wait(asking)

    assert all(isinstance(each.exception(), httpx.HTTPError) for each in asking)
    assert sorted(notes(plugins)) == ["+1", "+2", "+3", "-1", "-2", "-3"] and status == 0


async def test_watching_is_a_setting_of_the_process(ollama_url: str, plugins: Path) -> None:
    write(plugins, "it", 1)

    async with process(ollama_url, plugins, OSP_PLUGINS_WATCH="true") as (proxy, client):
        await says_again(proxy, "agents loaded", lambda: write(plugins, "it", 2))
        text = await answered(client)

    assert text == "y <2"


# An app whose registry is at hand, and watched files


@asynccontextmanager
async def served(
    upstream: str, plugins: Path, **settings: Any
) -> AsyncIterator[tuple[PluginRegistry, httpx.AsyncClient]]:
    """Run a proxy with the agents in `plugins`; `settings` are of the section plugins."""
    sections = {"plugins": settings, "upstream": {"url": upstream}}
    config = build(Config, sections, "test", plugins)
    config = replace(
        config,
        server=replace(config.server, data=plugins.parent / "data"),
        plugins=replace(config.plugins, dirs=(plugins,)),
    )
    registry = osp.create_registry(config, {})
    async with (
        demo.serve(osp.create_app(config, registry), **SETTINGS) as url,
        httpx.AsyncClient(base_url=url, timeout=LIMIT) as client,
    ):
        yield registry, client


@asynccontextmanager
async def watched(upstream: str, plugins: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with served(upstream, plugins, watch=True) as (_, client):
        yield client


async def test_only_the_folder_that_changed_is_loaded_again(ollama_url: str, plugins: Path) -> None:
    write(plugins, "it", 1)
    write(plugins, "other", 1)

    async with watched(ollama_url, plugins) as client:
        for number in (2, 3):
            write(plugins, "it", number)
            await becomes(client, lambda a, n=number: a["it"]["description"] == f"Version {n}.")  # type: ignore[misc]
        texts = [await answered(client, f"/{name} x") for name in ("it", "other")]

    assert texts == ["y <3", "y <1"]
    assert sorted(notes(plugins)) == ["+1", "+2", "+3", "-1", "-2", "-3"]
    assert notes(plugins, "other") == ["+1", "-1"]


async def test_new_folders_are_found_and_gone_ones_forgotten(
    ollama_url: str, plugins: Path
) -> None:
    gone = write(plugins, "gone", 1)
    write(plugins, "other", 1)

    async with watched(ollama_url, plugins) as client:
        write(plugins, "new", 1)
        await becomes(client, lambda agents: sorted(agents) == ["gone", "new", "other"])
        remove(gone)
        await becomes(client, lambda agents: sorted(agents) == ["new", "other"])
        text = await answered(client, "/new x")

    assert text == "y <1"
    assert [notes(plugins, name) for name in ("gone", "new", "other")] == [["+1", "-1"]] * 3


async def test_edits_of_the_same_size_within_the_same_second_are_noticed(
    ollama_url: str, plugins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    folder = write(plugins, "it", 1, HELPED)
    write_helpers(folder, 1, 1, 1)
    seen = []

    async with watched(ollama_url, plugins) as client:
        for name in ("helper.py", "parts/deep.py", "late.py", "agent.py"):
            before, file = await answered(client), folder / name
            stat = file.stat()
            file.write_text(file.read_text().replace("= 1", "= 2").replace("{X}", "{9}"))
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
            with anyio.fail_after(LIMIT):
                while (after := await answered(client)) == before:
                    pass
            seen.append(after)

    assert seen == ["211", "221", "222", "922"]
    assert not caches(plugins)


@pytest.mark.parametrize(
    "text", [b"{", b'{"descripton": "x"}', b'{"timeout": "1"}', b"\xff\xfe", b"[]", b"[" * 10**5]
)
async def test_a_config_that_breaks_leaves_the_last_good_version(
    ollama_url: str, plugins: Path, text: bytes
) -> None:
    folder = write(plugins, "it", 1, command="that", description="Good")
    config = folder / "config.json"

    async with served(ollama_url, plugins) as (registry, client):
        config.write_bytes(text)
        await registry.reload()
        broken, still = await listed(client), await answered(client, "/that x")
        config.write_text('{"command": "that", "description": "Better"}')
        await registry.reload()
        mended = await listed(client)

    assert list(broken) == ["that"] and still == "y <1"
    assert (broken["that"]["status"], broken["that"]["description"]) == ("loaded", "Good")
    assert broken["that"]["error"]["where"].startswith(str(config))
    assert mended["that"]["description"] == "Better" and "error" not in mended["that"]


async def test_an_agent_is_switched_off_and_on(ollama_url: str, plugins: Path) -> None:
    write(plugins, "it", 1)

    async with served(ollama_url, plugins) as (registry, client):
        write(plugins, "it", 1, enabled=False)
        await registry.reload()
        off = await answered(client)
        await until(lambda: "-1" in notes(plugins))
        write(plugins, "it", 2, enabled=True)
        await registry.reload()
        on = await answered(client)

    assert "is disabled by the operator" in off and on == "y <2"
    assert notes(plugins) == ["+1", "-1", "+2", "-2"]


async def test_an_error_is_shown_for_as_long_as_its_file_is_as_it_was(
    ollama_url: str, plugins: Path
) -> None:
    folder = write(plugins, "it", 1)
    write(plugins, "other", 1)

    async with served(ollama_url, plugins) as (registry, client):
        write(plugins, "it", 2, BROKEN)
        await registry.reload()
        write(plugins, "other", 2)
        await registry.reload(unchanged=[folder])
        agents = await listed(client)

    assert agents["other"]["description"] == "Version 2."
    assert agents["it"]["description"] == "Version 1." and "error" in agents["it"]


async def test_what_never_loaded_is_mended(ollama_url: str, plugins: Path) -> None:
    write(plugins, "it", 1, BROKEN)

    async with served(ollama_url, plugins) as (registry, client):
        before = await listed(client)
        write(plugins, "it", 2)
        await registry.reload()
        after, text = await listed(client), await answered(client)

    assert before["it"]["status"] == "failed" and "error" not in after["it"] and text == "y <2"


async def test_who_lost_its_command_to_another_folder_has_it_when_that_is_gone(
    ollama_url: str, plugins: Path
) -> None:
    first = write(plugins, "first", 1, command="it")
    second = write(plugins, "second", 2, command="it")

    async with watched(ollama_url, plugins) as client:
        before = await listed(client)
        remove(first)
        after = await becomes(client, lambda agents: len(agents) == 1)
        text = await answered(client)

    assert [about["status"] for about in before.values()] == ["loaded", "failed"]
    assert after["it"]["folder"] == str(second) and text == "y <2"


async def test_a_new_folder_with_a_taken_command_is_listed_beside_the_old_one(
    ollama_url: str, plugins: Path
) -> None:
    """Whichever has the command: the other says why it has not, and both are torn down."""
    write(plugins, "second", 2, command="it")

    async with watched(ollama_url, plugins) as client:
        write(plugins, "first", 1, command="it")
        agents = await becomes(
            client,
            lambda agents: len(agents) == 2 and any("error" in each for each in agents.values()),
        )

    assert "it" in agents
    signs = Counter(sign[0] for sign in notes(plugins) + notes(plugins, "first"))
    assert signs["+"] == signs["-"]


async def test_an_agent_among_those_that_are_wanted_stays_when_its_config_breaks(
    ollama_url: str, plugins: Path
) -> None:
    folder = write(plugins, "it", 1, command="that")

    async with served(ollama_url, plugins, only=["that"]) as (registry, client):
        (folder / "config.json").write_text("{")
        await registry.reload()
        text = await answered(client, "/that x")

    assert text == "y <1"


# A registry by itself


async def test_modules_do_not_pile_up(plugins: Path) -> None:
    folder = write(plugins, "it", 1, HELPED)
    write_helpers(folder, 1, 1, 1)

    async with loaded(plugins) as registry:
        one = [name for name in sys.modules if "it_agent" in name]
        for number in range(4):
            write(plugins, "it", number, HELPED)
            await registry.reload()
            write(plugins, "it", number, HELPED.replace("Y", "NOTHING"))
            await registry.reload()
        write(plugins, "it", 5, HELPED)
        await registry.reload()
        await until(lambda: len([name for name in sys.modules if "it_agent" in name]) <= len(one))
        many = [name for name in sys.modules if "it_agent" in name]

    assert len(many) == len(one) == 4 and set(many).isdisjoint(one)
    assert not [name for name in sys.modules if "it_agent" in name]


async def test_two_registries_leave_each_other_alone(plugins: Path) -> None:
    folder = write(plugins, "it", 1, HELPED)
    write_helpers(folder, 1, 1, 1)
    finders = list(sys.meta_path)

    async with loaded(plugins) as one:
        kept: Any = one.plugins["it"].agent
        async with loaded(plugins) as two:
            write_helpers(folder, 2, 2, 2)
            await two.reload()
            other: Any = two.plugins["it"].agent
            texts = [await other.on_response(""), (await kept.on_response(""))[:2]]
        # Its last helper is imported only when the hook runs.
        assert (await kept.on_response(""))[:2] == "11" and one.plugins["it"].status == "loaded"

    assert texts == ["222", "11"] and sys.meta_path == finders


async def test_reloads_at_the_same_time_take_their_turns(plugins: Path) -> None:
    write(plugins, "it", 1)

    async with loaded(plugins) as registry:
        await asyncio.gather(*(registry.reload() for _ in range(5)))
        assert registry.plugins["it"].agent
        await until(lambda: notes(plugins).count("-1") == 5)

    assert Counter(notes(plugins)) == {"+1": 6, "-1": 6}


@needs_sighup
async def test_a_later_reload_has_the_last_word(plugins: Path) -> None:
    """The first one has read an older version, and is held in its setup."""
    write(plugins, "it", 1)

    async with loaded(plugins) as registry:
        open_gate = gate(plugins)
        write(plugins, "it", 2, GATED)
        first = asyncio.create_task(registry.reload())
        await until(lambda: "+2" in notes(plugins))
        write(plugins, "it", 3)
        second = asyncio.create_task(registry.reload())
        await asyncio.wait({second}, timeout=0.3)  # it may not overtake
        await asyncio.to_thread(open_gate)
        await asyncio.gather(first, second)

        assert registry.plugins["it"].description == "Version 3."

    assert sorted(notes(plugins)) == ["+1", "+2", "+3", "-1", "-2", "-3"]


@needs_sighup
@pytest.mark.parametrize("times", [1, 2])
async def test_a_reload_does_not_go_on_after_the_end(plugins: Path, times: int) -> None:
    """The end comes while one agent is held in its setup, and another one is ready."""
    write(plugins, "it", 1)
    write(plugins, "next", 1)

    async with loaded(plugins) as registry:
        open_gate = gate(plugins)
        write(plugins, "it", 2, GATED)
        write(plugins, "next", 2, VERSION.replace("def setup", "async def setup"))
        reloading = [asyncio.create_task(registry.reload()) for _ in range(times)]
        await until(lambda: "+2" in notes(plugins))
        write(plugins, "it", 3)
    await asyncio.to_thread(open_gate)
    await asyncio.wait(reloading, timeout=LIMIT)

    signs = Counter(note[0] for note in notes(plugins, "next"))
    assert signs["+"] == signs["-"] and "-1" in notes(plugins)
    assert not [plugin.name for plugin in registry.plugins.values() if plugin.agent]
    assert "+3" not in notes(plugins)


async def test_the_last_of_its_requests_buries_an_old_version_once(plugins: Path) -> None:
    write(plugins, "it", 1)

    async with loaded(plugins) as registry:
        old = registry.plugins["it"]
        with ExitStack() as first:
            first.enter_context(registry.lease([old]))
            with registry.lease([old]), registry.lease([old]):
                write(plugins, "it", 2)
                await registry.reload()
                await registry.reload()
            await until(lambda: notes(plugins).count("-2") == 1)
            assert old.agent and "-1" not in notes(plugins)
        await until(lambda: "-1" in notes(plugins))
        assert registry.plugins["it"].agent

    assert Counter(notes(plugins)) == {"+1": 1, "-1": 1, "+2": 2, "-2": 2}


async def test_a_lease_that_outlives_the_registry_tears_nothing_down_twice(plugins: Path) -> None:
    write(plugins, "it", 1)

    with ExitStack() as requests:
        async with loaded(plugins) as registry:
            for number in (2, 3):
                requests.enter_context(registry.lease([registry.plugins["it"]]))
                write(plugins, "it", number)
                await registry.reload()
            requests.enter_context(registry.lease([registry.plugins["it"]]))
        at_the_end = sorted(notes(plugins))
    await anyio.lowlevel.checkpoint()

    assert at_the_end == ["+1", "+2", "+3", "-1", "-2", "-3"] == sorted(notes(plugins))


@pytest.mark.parametrize("watch", [False, True])
async def test_an_end_in_the_middle_of_a_reload_tears_down_what_that_had_set_up(
    plugins: Path, watch: bool
) -> None:
    write(plugins, "it", 1)
    write(plugins, "slow", 1)

    with anyio.fail_after(LIMIT):
        async with loaded(plugins, watch=watch) as registry:
            write(plugins, "it", 2, VERSION.replace("def setup", "async def setup"))
            write(plugins, "slow", 2, HANGS)
            reloading = None if watch else asyncio.create_task(registry.reload())
            await until(lambda: "+2" in notes(plugins) and "+2" in notes(plugins, "slow"))
    if reloading:
        reloading.cancel()
        await asyncio.wait({reloading})

    assert sorted(notes(plugins)) == ["+1", "+2", "-1", "-2"]
    assert sorted(notes(plugins, "slow")) == ["+1", "+2", "-1"]


async def test_a_setup_that_takes_too_long_leaves_the_last_good_version(plugins: Path) -> None:
    write(plugins, "it", 1)

    async with loaded(plugins, setup_timeout=0.2) as registry:
        write(plugins, "it", 2, HANGS)
        await registry.reload()
        plugin = registry.plugins["it"]

        assert plugin.description == "Version 1." and "took longer than 0.2" in str(plugin.error)

    assert sorted(notes(plugins)) == ["+1", "+2", "-1"]


async def test_a_teardown_that_fails_does_not_stop_the_next_version(
    plugins: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = VERSION.replace('self.note("-")', 'self.note("-"); raise SystemExit("sesame")')
    write(plugins, "it", 1, code)

    async with loaded(plugins) as registry:
        write(plugins, "it", 2)
        await registry.reload()
        await until(lambda: any("tear down" in record.message for record in caplog.records))

        assert registry.plugins["it"].description == "Version 2."


async def test_plugins_stay_when_their_folder_cannot_be_read(plugins: Path) -> None:
    write(plugins, "it", 1)

    async with loaded(plugins) as registry:
        before = registry.plugins["it"]
        away = move(plugins, "away")
        await registry.reload()
        assert registry.plugins == {"it": before} and before.agent
        move(away, plugins.name)
        write(plugins, "it", 2)
        await registry.reload()

        assert registry.plugins["it"].description == "Version 2."
