"""The command line, as a real process: how it starts, what it says, how it stops."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from kernel.config import HOME, load
from tests.support import FakeOllama, House, line, said, turn, write_agent

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OSP_")}
READY = "ready: type /help in any chat"
LIMIT = 20  # seconds that nothing here takes, on the slowest machine
LEAVES = """
class Leaves(BaseAgent):
    async def teardown(self):
        (self.data_dir / "left").touch()
"""
WORKS = """
class Works(BaseAgent):
    def setup(self):
        self.progress = "reading /notes"
"""
STUCK = """
import sys, threading
class Stuck(BaseAgent):
    {}(self, *given):
        sys.stderr.write("hanging\\n")
        {}
"""
SWALLOWS = """while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass"""
HANGS = {  # in which hook, and how
    "a def hook that blocks": ("def on_request", "threading.Event().wait()"),
    "a thread of its own pool": (
        "async def on_request",
        "await asyncio.to_thread(threading.Event().wait)",
    ),
    "a hook that swallows its cancellation": ("async def on_request", SWALLOWS),
    "a teardown that hangs": ("async def teardown", "await asyncio.Event().wait()"),
}


@dataclass
class Proxy:
    """A running osp.py or another program, and what it has said on stderr so far."""

    process: Process
    lines: list[str] = field(default_factory=list)

    async def says(self, text: str) -> str:
        """Return the first line with `text` in it, waiting for it."""
        assert self.process.stderr
        with anyio.fail_after(LIMIT):
            while not (hits := [line for line in self.lines if text in line]):
                got = (await self.process.stderr.readline()).decode()
                assert got, f"it ended, and never said {text!r}:\n{''.join(self.lines)}"
                self.lines.append(got)
        return hits[0]

    async def event(self, name: str) -> dict[str, Any]:
        """Return the fields of the first such line of the log."""
        found: dict[str, Any] = json.loads(await self.says(f'"event": "{name}"'))
        return found

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Yield a client of it, once it answers."""
        url = (await self.event("listening"))["url"]
        await self.says("ready: type ")
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT) as client:
            await client.get("/plugins")  # from here on it obeys signals
            yield client

    async def stop(self, sig: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        return await self.ended()

    async def ended(self) -> int:
        """Return the exit status, or minus the signal that ended it."""
        with anyio.fail_after(LIMIT):
            _, rest = await self.process.communicate()
        self.lines += rest.decode().splitlines(keepends=True)
        assert self.process.returncode is not None
        return self.process.returncode


@asynccontextmanager
async def spawning(*command: str | Path, **options: Any) -> AsyncIterator[Proxy]:
    """Run a program in a session of its own, so that its processes can all be stopped."""
    process = await asyncio.create_subprocess_exec(
        *command, **{"stderr": PIPE, **options}, start_new_session=True
    )
    try:
        yield Proxy(process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@asynccontextmanager
async def starting(
    *flags: str,
    script: Path = HOME / "osp.py",
    cwd: Path = HOME,
    env: Mapping[str, str] = CLEAN,
    pass_fds: Collection[int] = (),
    python: Path = Path(sys.executable),
) -> AsyncIterator[Proxy]:
    """Start osp.py on any free port and without agents, if `flags` and `env` say nothing else."""
    env = {**CLEAN, "OSP_SERVER_PORT": "0", "OSP_PLUGINS": "off", "PYTHONPATH": "", **env}
    async with spawning(python, script, *flags, cwd=cwd, env=env, pass_fds=pass_fds) as proxy:
        yield proxy


def with_agents(plugins: Path) -> Mapping[str, str]:
    """Return the environment that makes the agents in `plugins` the only ones."""
    data = str(plugins.parent / "data")
    return {"OSP_PLUGINS_DIRS": str(plugins), "OSP_PLUGINS": "", "OSP_SERVER_DATA": data}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def vendored(tmp_path: Path) -> Path:
    """A copy below another repository, which has a `kernel` of its own."""
    copy = tmp_path / "vendor" / "osp"
    for folder in ("kernel", "slices", "plugins"):
        shutil.copytree(HOME / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("osp.py", "demo.py", "demo.json"):
        shutil.copy(HOME / name, copy)
    (tmp_path / "kernel.py").write_text("raise ImportError('not this one')")
    return copy


async def test_a_copy_below_another_repository_runs_on_its_own(vendored: Path) -> None:
    host = vendored.parent.parent
    env = {"PYTHONPATH": str(host), "OSP_PLUGINS": ""}
    script = (vendored / "osp.py").relative_to(host)

    async with starting("--demo", "0", cwd=host, script=script, env=env) as proxy:
        async with proxy.client() as client:
            health = (await client.get("/health")).json()
            listed = (await client.get("/plugins")).json()["plugins"]

    shipped = "cache calc files mcp rag redact remember summarize time translate".split()
    assert health["agents"] == shipped
    assert listed[0]["folder"] == str(vendored / "plugins" / "audit_agent")
    assert (vendored / "data").exists()


async def test_it_says_what_it_read_where_it_listens_what_is_upstream_and_which_agents_there_are(
    plugins: Path, tmp_path: Path
) -> None:
    write_agent(plugins, "leaves", LEAVES)
    write_agent(plugins, "works", WORKS)
    write_agent(plugins, "wrong", "raise RuntimeError('no such thing')")
    write_agent(plugins, "lacks", "import no_such_package")
    file = tmp_path / "some.toml"
    file.write_text("", encoding="utf-8")

    async with starting("--demo", "0", "--config", str(file), env=with_agents(plugins)) as proxy:
        assert (await proxy.event("settings"))["file"] == str(file)
        assert (await proxy.event("listening"))["url"].startswith("http://127.0.0.1:")
        assert (await proxy.event("upstream answers"))["version"] == "0.33.0-demo"
        assert "-m pip install" in await proxy.says('"agent": "lacks"')
        failed = json.loads(await proxy.says('"agent": "wrong"'))
        assert failed["event"] == "agent failed to load"
        assert failed["error"] == "RuntimeError: no such thing"
        assert failed["where"] == f"{plugins}/wrong_agent/agent.py:4"
        assert (await proxy.event("agents loaded"))["agents"] == "leaves works"
        assert (await proxy.event("agent"))["progress"] == "reading /notes"
        assert await proxy.event("ready: type /help in any chat")


async def test_with_reload_a_change_counts_in_a_moment_and_the_port_stays_open(
    plugins: Path, tmp_path: Path
) -> None:
    file = tmp_path / "osp.toml"
    flags = ("--demo", "0", "--reload", "--config", str(file))
    file.write_text("", encoding="utf-8")

    async with starting(*flags, env=with_agents(plugins)) as proxy, proxy.client() as client:

        async def until(agents: list[str]) -> None:
            found = None
            with anyio.fail_after(LIMIT):
                while found != agents:
                    with suppress(httpx.RemoteProtocolError):  # it ended with its process
                        found = (await client.get("/health")).json()["agents"]

        await until([])
        write_agent(plugins, "leaves", LEAVES)
        await until(["leaves"])
        file.write_text("[agents.leaves]\nenabled = false\n", encoding="utf-8")
        await until([])
        file.write_text("[agents.leaves]\nenabled = 1\n[serv", encoding="utf-8")
        assert str(file) in await proxy.says(f"osp.py: {file}: ")
        file.write_text("", encoding="utf-8")
        await until(["leaves"])
        status = await proxy.stop(signal.SIGINT)

    assert status == 0 and (plugins.parent / "data" / "leaves" / "left").exists()


OLDER = sorted(Path.home().glob(".pyenv/versions/3.[89].*/bin/python"))


@pytest.mark.parametrize("python", OLDER, ids=[path.parts[-3] for path in OLDER])
def test_an_older_python_says_in_one_line_what_to_type(python: Path) -> None:
    for name in ("osp.py", "testkit.py"):
        done = subprocess.run([python, name, "x"], cwd=HOME, capture_output=True, text=True)

        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "needs Python 3.11, starlette and uvicorn; type: python3.11 -m venv" in done.stderr


def test_without_the_packages_it_says_in_one_line_what_to_type() -> None:
    command = [sys.executable, "-S", "osp.py"]  # without site-packages
    done = subprocess.run(command, cwd=HOME, env=CLEAN, capture_output=True, text=True)

    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert 'python3 -m venv .venv && .venv/bin/pip install -q ".[agents]" && ' in done.stderr


def test_uv_is_told_the_same_dependencies_as_pip() -> None:
    block = re.search(r"\A# /// script\n(.*?)# ///\n", (HOME / "osp.py").read_text(), re.DOTALL)
    assert block
    script = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
    project = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]

    assert script["dependencies"] == project["dependencies"]
    assert script["requires-python"] == project["requires-python"]


async def test_it_starts_without_ollama_and_says_so() -> None:
    upstream = f"127.0.0.1:{free_port()}"

    async with starting("--upstream", upstream) as proxy:
        said = await proxy.event("upstream does not answer yet")
        async with proxy.client() as client:
            assert (await client.get("/health")).status_code == 503

    assert said["url"] == f"http://{upstream}" and upstream in said["error"]


async def test_a_break_of_the_upstream_is_a_line_of_the_log_and_no_traceback(
    ollama: FakeOllama, ollama_url: str
) -> None:
    ollama.answers(line("Hel"), ollama.breaks)

    async with starting("--upstream", ollama_url) as proxy:
        async with proxy.client() as client:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post("/api/chat", json=turn("x"))
        await proxy.stop()

    events = [json.loads(line)["event"] for line in proxy.lines]
    start = ["settings", "listening", "upstream answers", "agents loaded", READY]
    assert events == [*start, "request", "request"]


async def test_a_flag_counts_more_than_the_environment_and_that_more_than_the_file(
    tmp_path: Path,
) -> None:
    by_env, by_flag = free_port(), free_port()
    (tmp_path / "osp.toml").write_text('[server]\nhost = "localhost"\nport = 1\n')
    flags = ("--config", "osp.toml", "--demo", "0")
    env = {"OSP_SERVER_PORT": str(by_env)}

    for more, port in ((), by_env), (("--host", "127.0.0.1", "--port", str(by_flag)), by_flag):
        async with starting(*flags, *more, cwd=tmp_path, env=env) as proxy:
            assert (await proxy.event("listening"))["url"] == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("toml", "flags", "complaint"),
    [
        ("[server]\nprot = 1", "", "{file}: server: unknown key 'prot'; known are host, port,"),
        ("[server]\n\nport = =", "", "{file}: Invalid value (at line 3, column 8)"),
        ("[agents.nope]", "", "[agents.nope]: there is no such plugin in "),
        ("[plugins]\ndirs = ['nope']", "", "plugins.dirs: {tmp}/nope is no folder"),
        ("", "--config {tmp}/nope.toml", "{tmp}/nope.toml: [Errno 2] No such file"),
        ("", "--port 99999", "--port: 99999 is wrong here, it must be 0 to 65535"),
        ("", "--port {taken}", "cannot listen on 127.0.0.1:{taken}: Address already in use"),
        ("", "--port {p} --upstream 127.0.0.1:{p}", "upstream.url: http://127.0.0.1:{p} is this"),
        ("", "--port {p} --upstream localhost:{p}", "upstream.url: http://localhost:{p} is this"),
        ("", "--port {p} --upstream 0.0.0.0:{p}", "upstream.url: http://127.0.0.1:{p} is this"),
        ("", "--host 0.0.0.0 --port {p} --upstream 127.0.0.2:{p}", "upstream.url: http://127.0."),
    ],
)
async def test_a_wrong_setting_ends_the_start_with_one_line(
    tmp_path: Path, toml: str, flags: str, complaint: str
) -> None:
    file = tmp_path / "osp.toml"
    file.write_text(toml, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = busy.getsockname()[1]
        facts = {"file": file, "tmp": tmp_path, "p": free_port(), "taken": taken}
        given = flags.format(**facts).split()
        async with starting("--config", str(file), *given) as proxy:
            status = await proxy.ended()

    (said,) = proxy.lines
    assert status == 2 and said.startswith(f"osp.py: {complaint.format(**facts)}")


async def told(*arguments: str, **env: str) -> tuple[int, str, str]:
    """Run a command; return its exit status and what it said on stdout and stderr."""
    command = [sys.executable, str(HOME / "osp.py"), *arguments]
    async with spawning(*command, env={**CLEAN, **env}, stdout=PIPE) as proxy:
        with anyio.fail_after(LIMIT):
            out, err = await proxy.process.communicate()
    assert proxy.process.returncode is not None
    return proxy.process.returncode, out.decode(), err.decode()


async def test_an_unknown_flag_ends_the_start_with_what_is_known() -> None:
    status, _, text = await told("--prot")

    assert status == 2 and text.startswith("usage: osp.py [-h] [--config")
    assert text.endswith("\nosp.py: error: unrecognized arguments: --prot\n")


async def test_it_tells_its_version() -> None:
    project = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert await told("--version") == (0, f"{project['version']}\n", "")


async def test_a_fresh_key_comes_with_the_lines_for_osp_toml(tmp_path: Path) -> None:
    """Also where the settings name keys that this shell does not have."""
    file = tmp_path / "osp.toml"
    file.write_text('[keys.a]\nkey = "$OSP_KEY_A"\n', encoding="utf-8")
    made = [await told("--config", str(file), "key", "laptop") for _ in range(2)]
    (status, lines, _), (_, others, _) = made
    file.write_text(lines, encoding="utf-8")

    key = load(file, {}, {}).keys["laptop"].key
    assert status == 0 and len(key) > 30 and key not in others
    for name in ("my laptop", "ä", "a.b", ""):
        assert (await told("key", name))[::2] == (
            2,
            f"osp.py: {name!r} is no name: letters, digits, _ and - can name a key\n",
        )


async def test_health_is_0_while_ollama_answers_and_live_is_0_while_the_proxy_does(
    tmp_path: Path, demo_url: str
) -> None:
    file = tmp_path / "osp.toml"
    file.write_text('[keys.me]\nkey = "secret-12"\n', encoding="utf-8")
    for upstream, whole in ((demo_url, (0, '{"status": "ok"}\n', "")), ("http://127.0.0.1:1", 1)):
        async with starting("--config", str(file), "--upstream", upstream) as proxy:
            async with proxy.client() as client:
                env = {"OSP_SERVER_PORT": str(client.base_url.port)}
                for settings in ((), ("--config", str(file))):
                    answered = await told(*settings, "health", **env)
                    assert whole in (answered, answered[0]), answered
                    assert (await told("health", "--live", **env)) == (0, '{"status": "ok"}\n', "")

    status, _, text = await told("health", **env)
    assert status == 1
    assert text.startswith(f"osp.py: no proxy answers at http://127.0.0.1:{client.base_url.port}; ")


LOOKS_UP = """
import httpx
class LooksUp(BaseAgent):
    async def on_request(self, payload):
        async with httpx.AsyncClient() as client:
            await client.get(self.settings["url"] + "?q=sesame", headers={"x-api-key": "sesame"})
        return add_system(payload, "sesame")
"""


async def test_at_debug_the_log_says_what_a_request_became_and_no_text(
    house: House, plugins: Path
) -> None:
    house.ollama.answers()
    write_agent(plugins, "looks", LOOKS_UP, settings={"url": house.url})
    env = {**with_agents(plugins), "OSP_LOG_LEVEL": "debug"}

    async with starting("--upstream", house.url, env=env) as proxy, proxy.client() as client:
        await client.post("/api/chat", json=turn("/looks sesame"))
        agent, sent = await proxy.event("agent"), await proxy.event("sent to the model")
        await proxy.stop()

    assert agent["before"] == "user 6, model" and agent["agent"] == "looks"
    assert agent["after"] == sent["request"] == "system 6, user 6, model"
    assert not [text for text in proxy.lines if "sesame" in text or "httpcore" in text]


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("pace", "whole"), [("0.1", True), ("60", False)])
async def test_after_a_signal_an_open_answer_may_end_agents_leave_and_the_status_is_0(
    plugins: Path, sig: signal.Signals, pace: str, whole: bool
) -> None:
    write_agent(plugins, "leaves", LEAVES)
    env = {**with_agents(plugins), "OSP_SERVER_SHUTDOWN": "5" if whole else "1"}

    async with starting("--demo", pace, env=env) as proxy:
        async with (
            proxy.client() as client,
            client.stream("POST", "/api/chat", json=turn("hello")) as answer,
        ):
            chunks = answer.aiter_bytes()
            body = await anext(chunks)
            proxy.process.send_signal(sig)
            assert "open_answers" in await proxy.says("stopping")
            with nullcontext() if whole else pytest.raises(httpx.RemoteProtocolError):
                body += b"".join([chunk async for chunk in chunks])
        status = await proxy.ended()

    assert (said(body).endswith("[user] hello") and b'"done":true' in body) is whole
    assert status == 0 and (plugins.parent / "data" / "leaves" / "left").exists()


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
async def test_a_second_signal_ends_it_at_once(plugins: Path, sig: signal.Signals) -> None:
    write_agent(plugins, "stuck", STUCK.format(*HANGS["a teardown that hangs"]))

    async with starting("--demo", "0", env=with_agents(plugins)) as proxy:
        async with proxy.client():
            pass
        proxy.process.send_signal(sig)
        await proxy.says("hanging")
        assert await proxy.stop(sig) == -sig


@pytest.mark.parametrize("how", HANGS)
async def test_an_agent_that_is_stuck_does_not_keep_the_process(plugins: Path, how: str) -> None:
    write_agent(plugins, "stuck", STUCK.format(*HANGS[how]), always=True)
    env = {"OSP_SERVER_SHUTDOWN": "1", **with_agents(plugins)}

    async with starting("--demo", "0", env=env) as proxy, proxy.client() as client:
        asking = asyncio.create_task(client.post("/api/chat", json=turn("x")))
        if how == "a teardown that hangs":
            await asking
        else:
            await proxy.says("hanging")
        status = await proxy.stop()
        asking.cancel()
        await asyncio.wait({asking})

    assert status == 0


IN_A_TERMINAL = """
import os, pty, signal, sys
pid, terminal = pty.fork()
if not pid:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    os.execv(sys.argv[1], sys.argv[1:])
shown = b""
while b"listening" not in shown or b"agents loaded" not in shown:
    shown += os.read(terminal, 4096)
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
async def test_closing_the_terminal_stops_what_was_started_in_it() -> None:
    command = [sys.executable, str(HOME / "osp.py"), "--demo", "0", "--port", "0"]

    with anyio.fail_after(LIMIT):
        done = await anyio.run_process([sys.executable, "-c", IN_A_TERMINAL, *command], check=False)

    assert done.returncode == 0, done.stderr
