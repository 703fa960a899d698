"""Clients with a key: one that may do everything, one for a preset and an agent, a wrong one.

`node/keys.mjs` and `python/keys.py` ask the same questions with one package after the other. The
command `ollama` sends no key: a proxy beside it does. Coding clients must have one: where no keys
are set, any will do.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import demo
from tests.integration.conftest import HERE, INSTALL, proxy, run_ollama, wait_for
from tests.integration.conftest import running as started
from tests.support import running, turn, write_agent
from tests.test_osp import free_port

# Agents of which one changes what is asked, and one what is answered
CLOCK = """
class Clock(BaseAgent):
    async def on_request(self, payload):
        return add_context(payload, f"typed: {self.context.prompt!r}")
"""
UP = """
class Up(BaseAgent):
    async def on_response(self, response):
        return response.upper()
"""
FREE, KIDS, WRONG = "osp-free-0123456789", "osp-kids-0123456789", "osp-none-0123456789"
KEYS = {"free": {"key": FREE}, "kids": {"key": KIDS, "models": ["notes"], "agents": ["up"]}}
PRESETS = {"notes": {"model": "demo", "agents": "/clock"}}
QUESTIONS = {  # key, model, prompt; and what the answer says or, behind a !, the error
    "free": (FREE, "demo", " /clock who?", "typed: 'who?'"),
    "limited": (KIDS, "notes", " /up who?", "TYPED: 'WHO?'"),
    "unknown": (WRONG, "demo", "who?", "!the key that was sent is none of those in [keys]"),
    "model": (KIDS, "demo", "who?", "!the key kids may ask notes, and not 'demo'"),
    "agent": (KIDS, "notes", " /clock who?", "!the key kids may not use /clock"),
}
LESS = {  # some clients do not show the text of every error
    "ollama-ai-provider-v2": {"unknown": "!Unauthorized", "model": "!Forbid", "agent": "!Forbid"},
    "claude": {"unknown": "!Invalid API key"},
}
COMMANDS = {
    "claude": ["-p", "<PROMPT>", "--model", "<MODEL>"],
    "codex": ["exec", "--skip-git-repo-check", "-m", "<MODEL>", "<PROMPT>"],
    "cn": ["--config", "continue.yaml", "-p", "<PROMPT>"],
}
FILES = {
    ".codex/config.toml": """
model_provider = "osp"
[model_providers.osp]
name = "osp"
base_url = "<URL>/v1"
wire_api = "responses"
env_key = "OSP_SECRET"
request_max_retries = 0
stream_max_retries = 0
""",
    "continue.yaml": """
name: osp
version: 1.0.0
schema: v1
models:
  - {name: osp, provider: ollama, model: <MODEL>, apiBase: "<URL>", apiKey: <KEY>}
""",
}
CADDY = """
{
    admin off
}
http://127.0.0.1:<PORT> {
    reverse_proxy <FAR> {
        header_up Authorization "Bearer {$OSP_SECRET}"
    }
}
"""


@pytest.fixture
def agents(plugins: Path) -> Path:
    write_agent(plugins, "clock", CLOCK)
    write_agent(plugins, "up", UP)
    return plugins


@pytest.fixture
async def url(agents: Path) -> AsyncIterator[str]:
    """A proxy with two keys, a preset and two agents, before a stand-in for Ollama."""
    async with (
        demo.serve(demo.create_app()) as upstream,
        running(upstream, agents, keys=KEYS, presets=PRESETS) as client,
    ):
        client.headers["x-api-key"] = FREE
        async with asyncio.timeout(10):
            while "notes" not in (await client.get("/api/tags")).text:
                pass  # made in the background
        yield str(client.base_url).rstrip("/")


@pytest.fixture(scope="session")
def python_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages that `python/keys.py` imports, some in versions of their own."""
    if not (uv := shutil.which("uv")):
        pytest.skip("no uv on the PATH")
    folder = tmp_path_factory.mktemp("packages")
    command = [uv, "pip", "install", "-q", "--python", sys.executable, "--target", str(folder)]
    command += ["-r", str(HERE / "python" / "requirements.txt")]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=INSTALL)
    except subprocess.SubprocessError as exc:
        pytest.skip(f"uv pip install failed: {exc}")
    return folder


def filled(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"<{name}>", value)
    return text


def check(client: str, question: str, told: str) -> None:
    expected = LESS.get(client, {}).get(question, QUESTIONS[question][-1])

    assert told.startswith("!") == expected.startswith("!"), (client, question, told)
    assert expected.removeprefix("!") in told, (client, question, told)


async def output(
    command: Sequence[str | Path], folder: Path, stdin: str = "", **environ: str
) -> tuple[int | None, str]:
    """Run a client; return its exit status, and all that it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={**os.environ, **environ},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(50):
        printed, _ = await process.communicate(stdin.encode())
    return process.returncode, printed.decode()


async def check_packages(command: Sequence[str | Path], url: str, folder: Path, count: int) -> None:
    questions = [question[:-1] for question in QUESTIONS.values()]
    more = {"PYTHONPATH": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "true"}
    _, printed = await output(command, folder, json.dumps([url, questions]), **more)
    told = json.loads(printed)

    assert len(told) == count
    for client, texts in told.items():
        for question, text in zip(QUESTIONS, texts, strict=True):
            check(client, question, text)


@pytest.mark.parametrize("question", QUESTIONS)
async def test_curl_comes_in_with_a_key(url: str, tmp_path: Path, question: str) -> None:
    key, model, prompt, _ = QUESTIONS[question]
    body = json.dumps(turn(prompt, stream=False) | {"model": model})

    command = ["curl", "-s", "-u", f":{key}", f"{url}/api/chat", "-d", body]
    _, printed = await output(command, tmp_path)

    told = json.loads(printed)
    check("curl", question, f"!{told['error']}" if "error" in told else told["message"]["content"])


async def test_node_packages_come_in_with_a_key(packages: Path, url: str) -> None:
    await check_packages(["node", packages / "keys.mjs"], url, packages, count=11)


async def test_python_packages_come_in_with_a_key(python_packages: Path, url: str) -> None:
    command = [sys.executable, "-W", "ignore", str(HERE / "python" / "keys.py")]

    await check_packages(command, url, python_packages, count=15)


async def ask_coding_client(
    command: Path, client: str, folder: Path, **values: str
) -> tuple[int | None, str]:
    (folder / ".codex").mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(filled(text, values), encoding="utf-8")
    environ = {"HOME": str(folder), "CODEX_HOME": str(folder / ".codex")}
    environ |= {"ANTHROPIC_BASE_URL": values["URL"], "ANTHROPIC_API_KEY": values["KEY"]}
    environ |= {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "OSP_SECRET": values["KEY"]}
    flags = [filled(part, values) for part in COMMANDS[client]]
    return await output([command, *flags], folder, **environ)


@pytest.mark.parametrize("question", ["limited", "unknown", "agent"])
@pytest.mark.parametrize("client", COMMANDS)
async def test_coding_clients_come_in_with_a_key(
    coding: Callable[[str], Path], url: str, tmp_path: Path, client: str, question: str
) -> None:
    key, model, prompt, _ = QUESTIONS[question]
    values = {"URL": url, "KEY": key, "MODEL": model, "PROMPT": prompt}

    status, printed = await ask_coding_client(coding(client), client, tmp_path, **values)

    check(client, question, f"!{printed}" if status else printed)


@pytest.mark.parametrize(("client", "blank"), [("claude", " "), ("codex", "")])
async def test_where_there_are_no_keys_a_coding_client_sends_any(
    coding: Callable[[str], Path],
    demo_url: str,
    agents: Path,
    tmp_path: Path,
    client: str,
    blank: str,
) -> None:
    values = {"KEY": "x", "MODEL": "demo", "PROMPT": f"{blank}/clock /up what day is it?"}

    async with running(demo_url, agents) as proxy:
        values["URL"] = str(proxy.base_url).rstrip("/")
        _, printed = await ask_coding_client(coding(client), client, tmp_path, **values)

    assert "TYPED: 'WHAT DAY IS IT?'\n\nWHAT DAY IS IT?" in printed


@contextmanager
def proxy_with_a_key(kind: str, far: str, folder: Path) -> Iterator[str]:
    """Run what stands beside the command `ollama` and sends a key; give its URL."""
    if kind == "osp":
        with proxy(folder, far, OSP_UPSTREAM_AUTHORIZATION=f"Bearer {FREE}") as (url, _):
            yield url
        return
    if not (caddy := shutil.which("caddy")):
        pytest.skip("no caddy on the PATH")
    port, file = free_port(), folder / "Caddyfile"
    values = {"PORT": str(port), "FAR": far.removeprefix("http://")}
    file.write_text(filled(CADDY, values), encoding="utf-8")
    command, log = [caddy, "run", "--config", str(file)], folder / "caddy.log"
    with started(command, folder, {"OSP_SECRET": FREE}, log) as process:
        wait_for(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("kind", ["osp", "caddy"])
def test_the_command_ollama_comes_in_through_a_proxy_that_sends_the_key(
    binary: str, direct: str, tmp_path: Path, kind: str
) -> None:
    far, near = tmp_path / "far", tmp_path / "near"
    for folder in (far, near):
        folder.mkdir()
    settings = f'[keys.laptop]\nkey = "{FREE}"\n'

    with proxy(far, direct, settings) as (url, _), proxy_with_a_key(kind, url, near) as own:
        answered, refused, expected = [
            run_ollama(binary, near, at, "run", "tiny", "hello") for at in (own, url, direct)
        ]

    assert answered.stdout == expected.stdout != "" and answered.returncode == 0
    assert refused.returncode == 1 and "something went wrong" in refused.stderr
    logs = [file.read_text(encoding="utf-8") for file in tmp_path.glob("*/*.log")]
    assert '"user": "laptop"' in "".join(logs) and FREE not in "".join(logs)
