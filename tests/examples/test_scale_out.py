"""examples/scale-out: three proxies with one PostgreSQL behind nginx and HAProxy; docs/scale.md.

Proxies are killed and the database is restarted while questions are asked: OSP_QUESTIONS says how
many.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import re
import shutil
import signal
import subprocess
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import httpx
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import demo
from kernel.config import HOME, Config, load, parse_upstream
from kernel.postgres import PLACES
from tests.examples.test_front import nginx_of
from tests.postgres import Cluster
from tests.support import (
    CHAT,
    COMPLETIONS,
    DONE,
    NOTICE,
    SENT,
    FakeOllama,
    calling,
    chat,
    message,
    outcomes,
    running,
    said,
    write_agent,
)
from tests.test_osp import READY, Proxy, free_port, spawning, starting

FOLDER = HOME / "examples" / "scale-out"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
MANIFESTS = {
    each["kind"]: each for each in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
}
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
ADDRESSES = [f"172.30.35.{n}:11435" for n in (11, 12, 13)]

QUESTIONS = int(os.environ.get("OSP_QUESTIONS", "1000"))
WORKERS = 12
PACE = 0.005  # seconds between two words of the stand-in
LONG = "and on " * 50  # a stream of half a second
SECRET = "anna.mueller@example.org"
FAULTS = ["kill 0", "stop 1", "database", "kill 2", "stop 0"]


def secrets() -> dict[str, str]:
    """Return what the script prints, as proxies get it."""
    script = ["sh", str(FOLDER / "secrets.sh")]
    text = subprocess.run(script, check=True, capture_output=True, encoding="utf-8").stdout
    return dict(line.split("=", 1) for line in text.splitlines())


def haproxy(site: str, folder: Path) -> list[str]:
    (folder / "haproxy.cfg").write_text(site)
    return ["haproxy", "-db", "-f", f"{folder}/haproxy.cfg"]


FRONTS = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}
COMMANDS = {"nginx": nginx_of, "haproxy": haproxy}


@asynccontextmanager
async def front(program: str, site: str, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Run a balancer with the settings `site`, and yield a client of it."""
    if not shutil.which(program):
        pytest.skip(f"needs {program}")
    port = free_port()
    site = re.sub("(listen|bind) :?80", rf"\1 127.0.0.1:{port}", site)
    wire = httpx.AsyncHTTPTransport(retries=5, limits=httpx.Limits(max_connections=None))
    url = f"http://127.0.0.1:{port}"
    with (folder / "front.log").open("wb") as log:
        async with (
            spawning(*COMMANDS[program](site, folder), stderr=log, stdout=log),
            httpx.AsyncClient(base_url=url, transport=wire, timeout=30) as client,
        ):
            yield client


@dataclass
class Team:
    """Proxies as processes with the settings of the example, each with data of its own."""

    folder: Path
    upstream: str
    env: dict[str, str]
    stack: AsyncExitStack
    ports: list[int] = field(default_factory=lambda: [free_port() for _ in range(3)])
    now: dict[int, Proxy] = field(default_factory=dict)
    died: list[Proxy] = field(default_factory=list)  # by SIGKILL
    others: list[Proxy] = field(default_factory=list)
    reading: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self, number: int) -> None:
        data = self.folder / f"data{number}"
        data.mkdir(exist_ok=True)
        (data / "consent.key").write_text(self.env["OSP_CONSENT"])  # as kubernetes.yaml mounts it
        env = {"OSP_SERVER_PORT": str(self.ports[number]), "OSP_SERVER_DATA": str(data)}
        env |= {"OSP_UPSTREAM_URL": self.upstream, "OSP_PLUGINS": "redact,cache,remember"}
        flags = ("--config", str(self.folder / "osp.toml"))
        proxy = await self.stack.enter_async_context(starting(*flags, env=self.env | env))
        await proxy.says(READY)
        self.reading.append(asyncio.create_task(self.read(proxy)))
        self.now[number] = proxy

    async def read(self, proxy: Proxy) -> None:
        """Take what it writes, or a full pipe would hold it up."""
        assert proxy.process.stderr
        async for line in proxy.process.stderr:
            proxy.lines.append(line.decode())

    async def end(self, number: int, sig: signal.Signals) -> None:
        proxy = self.now.pop(number)
        (self.died if sig == signal.SIGKILL else self.others).append(proxy)
        proxy.process.send_signal(sig)
        await proxy.process.wait()

    def client(self, number: int, key: str) -> httpx.AsyncClient:
        url = f"http://127.0.0.1:{self.ports[number]}"
        return httpx.AsyncClient(base_url=url, headers={"x-api-key": key}, timeout=30)

    def finished(self, request: str) -> bool:
        """Tell whether a proxy that was not killed has logged this request."""
        proxies = [*self.others, *self.now.values()]
        return any(f'"{request}"' in line for proxy in proxies for line in proxy.lines)


@dataclass
class Crowd:
    """Asks questions through a balancer, and checks each answer that looks whole."""

    client: httpx.AsyncClient
    keys: list[str]
    noted: dict[tuple[str, str], int] = field(default_factory=dict)  # key and note: its number
    ends: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)  # ids of requests
    over: bool = False  # all faults have happened

    async def ask(self, number: int) -> None:
        key = self.keys[number % 2]
        kinds: list[tuple[str, str]] = [
            ("", f"what is question {number} of {SECRET}?"),
            ("/remember ", f"that fact {number} is of {SECRET}"),
            ("/cache ", f"what is question {number % 50} of {SECRET}?"),
        ]
        command, text = kinds[number // 2 % 3]
        path, stream = (CHAT, COMPLETIONS)[number // 6 % 2], bool(number // 12 % 2)
        name = f"q{number}"
        headers = {"x-api-key": key, "x-request-id": name}
        body = chat(path, command + text, stream=stream)
        try:
            answer = await self.client.post(path, json=body, headers=headers)
        except httpx.TransportError as exc:
            self.failed.append(name)
            self.ends[type(exc).__name__] += 1
            return
        if answer.status_code != 200:
            assert answer.status_code in (502, 503), answer.text
            self.failed.append(name)
            self.ends[str(answer.status_code)] += 1
            return
        self.check(answer, key, path, command, text, stream)

    def check(
        self, answer: httpx.Response, key: str, path: str, command: str, text: str, stream: bool
    ) -> None:
        """Assert that an answer that ended well is whole, to the last sign."""
        if path == CHAT:
            assert json.loads(answer.content.splitlines()[-1])["done"]
        elif stream:
            assert answer.content.endswith(DONE)
        whole, name = said(answer.content), command.strip(" /")
        plain = f"{SENT}[user] {text}"
        if command == "/remember " and (found := re.match(r"Noted as (\d+): ", whole)):
            note = text.removeprefix("that ")
            assert whole == found[0] + note
            self.noted[key, note] = int(found[1])
            self.ends["noted"] += 1
        elif command and whole == plain + NOTICE.format(name):
            self.ends[f"without {name}"] += 1
        else:
            assert whole == plain and name != "remember"
            self.ends[outcomes(answer)] += 1

    async def work(self, numbers: Iterator[int], reached: list[asyncio.Event]) -> None:
        while (number := next(numbers)) < QUESTIONS or not self.over:
            await self.ask(number)
            reached[min(number, QUESTIONS - 1) * len(reached) // QUESTIONS].set()

    async def stream(self, name: str, begun: asyncio.Semaphore) -> bool:
        """Ask for a long answer, and return whether it came to its end."""
        headers = {"x-api-key": self.keys[0], "x-request-id": name}
        body = chat(CHAT, LONG)
        try:
            async with self.client.stream("POST", CHAT, json=body, headers=headers) as answer:
                assert answer.status_code == 200
                pieces = answer.aiter_raw()
                got = await anext(pieces)
                begun.release()
                got += b"".join([piece async for piece in pieces])
        except httpx.TransportError:
            return False
        assert json.loads(got.splitlines()[-1])["done"] and said(got) == f"{SENT}[user] {LONG}"
        return True


async def disturb(
    team: Team, crowd: Crowd, postgres: Cluster, reached: list[asyncio.Event]
) -> Counter[tuple[str, bool]]:
    """Let each fault happen once so many questions were asked, while long streams run.

    Returns how many of them came to their end, by fault.
    """
    ends: Counter[tuple[str, bool]] = Counter()
    for number, fault in enumerate(FAULTS):
        await reached[number].wait()
        begun = asyncio.Semaphore(0)
        names = [f"s{number}-{each}" for each in range(6)]
        streams = [asyncio.create_task(crowd.stream(name, begun)) for name in names]
        for _ in names:
            await begun.acquire()
        what, _, which = fault.partition(" ")
        if what == "database":
            await asyncio.to_thread(postgres.stop)
            await asyncio.to_thread(postgres.start)
        else:
            await team.end(int(which), {"kill": signal.SIGKILL, "stop": signal.SIGTERM}[what])
            await team.start(int(which))
        results = await asyncio.gather(*streams)
        ends.update((what, whole) for whole in results)
        broken = [name for name, whole in zip(names, results, strict=True) if not whole]
        assert not [name for name in broken if team.finished(name)]
    crowd.over = True
    return ends


def watched(app: ASGIApp, bodies: list[bytes]) -> ASGIApp:
    """Return the stand-in, which notes what it is sent."""

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        async def noted() -> Message:
            message = await receive()
            bodies.append(message.get("body", b""))
            return message

        await app(scope, noted, send)

    return noting


@pytest.fixture(params=FRONTS)
def program(request: Any) -> str:
    faulthandler.dump_traceback_later(60 + QUESTIONS // 20, exit=True)  # pytest's says 60
    return str(request.param)


async def test_nothing_is_lost_while_proxies_die_and_the_database_is_restarted(
    program: str, tmp_path: Path, postgres: Cluster, database: str
) -> None:
    bodies: list[bytes] = []
    env = secrets() | {"OSP_STORE": database}
    keys = [env["OSP_KEY_LAPTOP"], env["OSP_KEY_PHONE"]]
    more = "\n[agents.remember.settings]\nmax_notes = 1000000\n"
    (tmp_path / "osp.toml").write_text((FOLDER / "osp.toml").read_text() + more)
    stand_in = watched(demo.create_app(PACE), bodies)

    async with demo.serve(stand_in) as upstream, AsyncExitStack() as stack:
        team = Team(tmp_path, upstream, env, stack)
        await asyncio.gather(*map(team.start, range(3)))
        site = (FOLDER / FRONTS[program]).read_text()
        for address, port in zip(ADDRESSES, team.ports, strict=True):
            site = site.replace(address, f"127.0.0.1:{port}")
        client = await stack.enter_async_context(front(program, site, tmp_path))
        crowd, numbers = Crowd(client, keys), count()
        reached = [asyncio.Event() for _ in range(len(FAULTS) + 1)]
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(crowd.work(numbers, reached))
            streams = await disturb(team, crowd, postgres, reached)

        print(crowd.ends, streams, len(team.died))  # noqa: T201
        kept = {key: [await notes(team, n, key) for n in range(3)] for key in keys}
        await check_cache(team, keys[0], bodies)

    assert not [name for name in crowd.failed if team.finished(name)]
    assert len(crowd.failed) <= WORKERS * len(team.died)
    assert streams["kill", True] and not streams["stop", False] and not streams["database", False]
    for key, (first, *rest) in kept.items():
        assert rest == [first, first]
        acknowledged = {note: number for (k, note), number in crowd.noted.items() if k == key}
        assert acknowledged.items() <= first.items() and acknowledged
        assert len(set(first.values())) == len(first)
    everything = b"".join(bodies)
    assert SECRET.encode() not in everything and everything.count(b"what is question") > 100
    logs = "".join(
        line for proxy in [*team.died, *team.others, *team.now.values()] for line in proxy.lines
    )
    assert not [text for text in (SECRET, *env.values()) if text in logs]


async def notes(team: Team, number: int, key: str) -> dict[str, int]:
    """Return what one proxy lists: texts, and their numbers."""
    async with team.client(number, key) as client:
        answer = await client.post(CHAT, json=chat(CHAT, "/remember:list"))
    listed = [line.split(": ", 1) for line in said(answer.content).splitlines()]
    assert len({text for _, text in listed}) == len(listed)
    return {text: int(at.removeprefix("- ")) for at, text in listed}


async def check_cache(team: Team, key: str, bodies: list[bytes]) -> None:
    """Assert that what one proxy asked the model, the others answer."""
    for number in range(3):
        async with team.client(number, key) as client:
            answer = await client.post(CHAT, json=chat(CHAT, "/cache who answers twice?"))
        assert said(answer.content) == f"{SENT}[user] who answers twice?"
    assert b"".join(bodies).count(b"who answers twice?") == 1


# A balancer that keeps each key at one proxy, and so at one Ollama: docs/scale.md
BY_KEY = """
upstream osp {
    hash $http_x_api_key$http_authorization consistent;
    server gpu1:11435;
    server gpu2:11435;
}
"""


async def test_a_key_stays_with_one_of_several_ollamas(plugins: Path, tmp_path: Path) -> None:
    keys = {f"user{n}": {"key": f"osp-secret{n}"} for n in range(8)}
    ollamas = [FakeOllama(), FakeOllama()]
    site = (FOLDER / "nginx.conf").read_text()
    assert BY_KEY.strip() in (HOME / "docs" / "scale.md").read_text()

    async with AsyncExitStack() as stack:
        balanced = BY_KEY
        for name, ollama in zip(("gpu1", "gpu2"), ollamas, strict=True):
            ollama.says(CHAT, name)
            url = await stack.enter_async_context(demo.serve(ollama))
            proxy = await stack.enter_async_context(running(url, plugins, keys=keys))
            balanced = balanced.replace(f"{name}:11435", proxy.base_url.netloc.decode())
        site = re.sub(r"upstream osp \{.*?\n\}\n", balanced, site, flags=re.DOTALL)
        client = await stack.enter_async_context(front("nginx", site, tmp_path))
        said_to = {}
        for each in keys.values():
            headers = {"authorization": f"Bearer {each['key']}"}
            asked = [client.post(CHAT, json=chat(CHAT, "hi"), headers=headers) for _ in range(4)]
            (said_to[each["key"]],) = {said(got.content) for got in await asyncio.gather(*asked)}

    assert set(said_to.values()) == {"gpu1", "gpu2"}


WRITES = """
class Writes(BaseAgent):
    tools = [{"name": "write", "consent": True}]
    async def on_tool(self, name, arguments):
        return "written"
"""


@pytest.mark.parametrize("shared", [True, False])
async def test_yes_counts_at_another_proxy_where_both_have_the_key(
    ollama: FakeOllama, ollama_url: str, plugins: Path, tmp_path: Path, shared: bool
) -> None:
    """The example gives all proxies one consent.key."""
    write_agent(plugins, "writes", WRITES)
    folders = [tmp_path / name for name in ("one", "two")]
    consent = secrets()["OSP_CONSENT"]
    for folder in folders if shared else []:
        folder.mkdir()
        (folder / "consent.key").write_text(consent)
    rounds = [calling(CHAT, "", ("write", {})), calling(CHAT, "Done.")]
    ollama.says_in_turn(CHAT, *rounds, stream=True)

    answers: list[str] = []
    for folder in folders:
        async with running(ollama_url, plugins, data=folder) as client:
            talk = [message("user", "/writes go")]
            if answers:
                talk += [message("assistant", answers[0]), message("user", "/yes")]
            answers.append(said((await client.post(CHAT, json=chat(CHAT, *talk))).content))

    assert "This would be called:" in answers[0]
    assert answers[1] == "Done." if shared else "nothing was done" in answers[1]


async def test_presets_work_at_each_proxy_whichever_made_them(
    plugins: Path, tmp_path: Path
) -> None:
    write_agent(
        plugins, "shout", "class S(BaseAgent):\n def on_response(self, t): return t.upper()"
    )
    presets = {"loud": {"model": "demo", "agents": "/shout"}}

    async with demo.serve(demo.create_app()) as ollama, AsyncExitStack() as stack:
        proxies = [running(ollama, plugins, data=tmp_path / f"{n}", presets=presets) for n in "123"]
        clients = [await stack.enter_async_context(proxy) for proxy in proxies]
        with anyio.fail_after(10):
            while "loud" not in (await clients[0].get("/api/tags")).text:
                await anyio.lowlevel.checkpoint()
        for client in clients:
            answer = await client.post(CHAT, json=chat(CHAT, "hi") | {"model": "loud"})
            assert said(answer.content) == f"{SENT}[user] hi".upper()


# The files


def test_only_the_balancer_can_be_reached_and_it_knows_each_proxy() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    proxies = [service for name, service in SERVICES.items() if name.startswith("osp")]
    fixed = [service["networks"]["default"]["ipv4_address"] for service in proxies]

    assert ports == {"front": ["127.0.0.1:11435:80"]}
    assert [f"{address}:{load(None, {}, {}).server.port}" for address in fixed] == ADDRESSES
    for name in FRONTS.values():
        assert re.findall(r"^ +server (?:\w+ )?([\d.:]+)", (FOLDER / name).read_text(), re.M) == (
            ADDRESSES
        )


def test_every_secret_of_the_settings_is_printed_and_passed_on() -> None:
    fresh, again = secrets(), secrets()
    text = (FOLDER / "osp.toml").read_text()
    named = set(re.findall(r'"\$(\w+)"', text))
    passed = SERVICES["osp1"]["environment"]
    config = load(FOLDER / "osp.toml", fresh, {})

    assert named == set(passed) and named <= set(fresh)
    assert all(value.startswith(f"${{{name}") for name, value in passed.items())
    assert all(fresh[name] not in again[name] for name in fresh)
    assert fresh["POSTGRES_PASSWORD"] in fresh["OSP_STORE"]
    assert set(config.keys) == {"laptop", "phone"} and config.agents["redact"]["always"]


def test_a_container_waits_longer_than_a_proxy_for_open_answers() -> None:
    shutdown = load(FOLDER / "osp.toml", secrets(), {}).server.shutdown
    (container,) = POD["containers"]
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])

    assert POD["terminationGracePeriodSeconds"] >= shutdown + wait + 5
    assert int(SERVICES["osp1"]["stop_grace_period"].removesuffix("s")) >= shutdown + 5


@pytest.mark.parametrize("version", ["1.25", "1.37"])
def test_the_manifests_are_what_kubernetes_allows(version: str, tmp_path: Path) -> None:
    rendered = kustomized(tmp_path) if shutil.which("kubectl") else []
    for manifest in [*MANIFESTS.values(), *rendered]:
        kubernetes_validate.validate(manifest, version, strict=True)

    assert set(MANIFESTS) == {"Deployment", "Service", "PodDisruptionBudget"}


def kustomized(folder: Path) -> list[dict[str, Any]]:
    """Return what `kubectl apply -k .` would apply."""
    shutil.copytree(FOLDER, folder / "it")
    (folder / "it" / ".env").write_text("".join(f"{k}={v}\n" for k, v in secrets().items()))
    command = ["kubectl", "kustomize", str(folder / "it")]
    return [*yaml.safe_load_all(subprocess.run(command, check=True, stdout=PIPE).stdout)]


def test_kubectl_puts_settings_and_secrets_into_the_pods(tmp_path: Path) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl")
    made = {each["kind"]: each for each in kustomized(tmp_path)}
    pod = made["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}

    assert made["ConfigMap"]["data"]["osp.toml"] == (FOLDER / "osp.toml").read_text()
    assert set(made["Secret"]["data"]) == set(secrets())
    assert container["envFrom"] == [{"secretRef": {"name": made["Secret"]["metadata"]["name"]}}]
    assert volumes["settings"]["configMap"]["name"] == made["ConfigMap"]["metadata"]["name"]
    assert volumes["consent"]["secret"]["items"] == [{"key": "OSP_CONSENT", "path": "consent.key"}]
    assert "emptyDir" in volumes["data"] and container["image"] != "osp"


async def test_the_probes_are_answered_without_a_key(ollama: FakeOllama, plugins: Path) -> None:
    (container,) = POD["containers"]
    paths = [container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("liveness", "readiness")]
    async with (
        demo.serve(ollama) as url,
        running(url, plugins, keys={"a": {"key": "osp-secret"}}) as client,
    ):
        there = [(await client.get(path)).status_code for path in paths]
    async with running(f"http://127.0.0.1:{free_port()}", plugins) as client:
        gone = [(await client.get(path)).status_code for path in paths]

    assert (there, gone) == ([200, 200], [200, 503])


# docs/scale.md

PAGE = (HOME / "docs" / "scale.md").read_text()


def test_the_page_names_settings_and_files_that_exist() -> None:
    named = set(re.findall(r"`((?:server|upstream|chain)\.\w+)", PAGE))
    links = re.findall(r"\]\((\.\.[^)#]+)", PAGE)

    assert named >= {"server.store", "server.data", "server.shutdown", "upstream.parallel"}
    for section, key in (name.split(".") for name in named):
        assert hasattr(getattr(Config(), section), key), f"{section}.{key}"
    assert links and all((HOME / "docs" / link).exists() for link in links)
    assert all(f'"{name}"' in sources("kernel") for name in ("consent.key", "presets.json"))
    assert "preset not made" in sources("kernel")


def test_the_page_says_numbers_that_hold() -> None:
    settings = json.loads((HOME / "plugins" / "cache_agent" / "config.json").read_text())
    readme = (HOME / "README.md").read_text()

    assert f"up to {PLACES}, when" in PAGE and f"for {(100 - 3) // PLACES} proxies" in PAGE
    assert f"`max_entries = {settings['settings']['max_entries']}`" in PAGE
    assert all(number in readme for number in ("6,617", " 35 ")) and "6,617" in PAGE


def test_configurations_of_other_programs_can_be_read() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    olla, litellm = map(yaml.safe_load, blocks)
    (base,) = re.findall(r'`upstream.url = "(.*?)"`', PAGE)

    assert len(olla["discovery"]["static"]["endpoints"]) == len(litellm["model_list"]) == 2
    assert parse_upstream(base).base == "/olla/ollama"


def sources(folder: str) -> str:
    return "".join(file.read_text() for file in (HOME / folder).rglob("*.py"))
