"""examples/nginx and examples/caddy: the real programs with these files, before a proxy."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from kernel.config import HOME
from tests.support import FakeOllama, done, line, running, said, turn
from tests.test_osp import free_port, spawning

EXAMPLES = HOME / "examples"
NAME = "ollama.example.org"
HOSTS = {"access": {"hosts": [NAME]}}
Open = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


def nginx(proxy: str, port: int, folder: Path) -> tuple[list[str], str]:
    """Write the settings; return the command, and what it says once it serves."""
    site = (EXAMPLES / "nginx" / "osp.conf").read_text()
    site = site.replace("127.0.0.1:11435", proxy).replace("/etc/ssl", str(folder))
    site = site.replace("listen 443", f"listen 127.0.0.1:{port}")
    site = site.replace("listen 80;", f"listen unix:{folder}/80;")
    return nginx_of(site, folder), "start worker process"


def nginx_of(site: str, folder: Path) -> list[str]:
    """Write what a site needs around it; return the command that serves it."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temps = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    head = f"daemon off; pid {folder}/pid; error_log stderr notice; events {{}}"
    (folder / "nginx.conf").write_text(f"{head} http {{ access_log off; {temps}\n{site}}}")
    return ["nginx", "-e", "stderr", "-c", f"{folder}/nginx.conf"]


def caddy(proxy: str, port: int, folder: Path) -> tuple[list[str], str]:
    """Write the settings; return the command, and what it says once it serves."""
    site = (EXAMPLES / "caddy" / "Caddyfile").read_text()
    site = site.replace("127.0.0.1:11435", proxy).replace(f"\n{NAME} ", f"\n{NAME}:{port} ")
    files = f"tls {folder}/{NAME}.pem {folder}/{NAME}.key"
    site = re.sub(r"# tls /path\S* /path\S*", files, site)
    (folder / "Caddyfile").write_text(f"{{\nadmin off\nauto_https disable_redirects\n}}\n{site}")
    command = ["caddy", "run", "--config", f"{folder}/Caddyfile", "--adapter", "caddyfile"]
    return command, "serving initial configuration"


@asynccontextmanager
async def behind(
    program: Any, folder: Path, upstream: str, plugins: Path, **sections: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Run a proxy before `upstream` and `program` before the proxy; yield a client of that."""
    port = free_port()

    async def name(request: httpx.Request) -> None:
        request.extensions["sni_hostname"] = NAME

    async with running(upstream, plugins, **sections) as direct:
        command, ready = program(direct.base_url.netloc.decode(), port, folder)
        home = {name: str(folder) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
        async with spawning(*command, env=os.environ | home) as process:
            await process.says(ready)
            async with httpx.AsyncClient(
                base_url=f"https://127.0.0.1:{port}",
                headers={"host": NAME},
                verify=ssl.create_default_context(cafile=f"{folder}/{NAME}.pem"),
                event_hooks={"request": [name]},
            ) as client:
                yield client


@pytest.fixture(params=[nginx, caddy])
def front(request: Any, tmp_path: Path, ollama_url: str, plugins: Path) -> Open:
    """Opens a client of the proxy behind each of the programs; takes sections of osp.toml."""
    if not shutil.which(request.param.__name__) or not shutil.which("openssl"):
        pytest.skip(f"needs {request.param.__name__} and openssl")
    make = "openssl req -x509 -days 1 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256"
    names = f"-subj /CN={NAME} -addext subjectAltName=DNS:{NAME}"
    files = f"-keyout {tmp_path}/{NAME}.key -out {tmp_path}/{NAME}.pem"
    subprocess.run(f"{make} {names} {files}".split(), check=True, capture_output=True)
    return partial(behind, request.param, tmp_path, ollama_url, plugins)


async def test_a_frame_arrives_while_the_model_holds_back_the_next(
    front: Open, ollama: FakeOllama
) -> None:
    ollama.answers(line("Hel"), ollama.pause, line("lo"), done())

    async with front(**HOSTS) as client:
        async with client.stream("POST", "/api/chat", json=turn("hi")) as answer:
            pieces = answer.aiter_raw()
            first = await anext(pieces)
            ollama.go.set()
            rest = b"".join([piece async for piece in pieces])

    assert (said(first), said(rest)) == ("Hel", "lo")


async def test_a_client_that_leaves_closes_the_upstream(front: Open, ollama: FakeOllama) -> None:
    ollama.answers(line("Hel"), ollama.pause)

    async with front(**HOSTS) as client:
        async with client.stream("POST", "/api/chat", json=turn("hi")) as answer:
            await anext(answer.aiter_raw())
        with anyio.fail_after(5):
            await ollama.disconnected.wait()


async def test_a_large_upload_passes_while_it_is_sent(front: Open, ollama: FakeOllama) -> None:
    sent = os.urandom(5 * 2**20)
    ollama.answers(b"", status=201)

    async with front(**HOSTS) as client:
        answer = await client.post("/api/blobs/sha256:1", content=sent)

    assert answer.status_code == 201 and ollama.asked[0].body == sent


async def test_own_endpoints_and_chats_are_there_under_the_public_name(
    front: Open, ollama: FakeOllama
) -> None:
    ollama.answers(done("y"))

    async with front(**HOSTS) as client:
        origin = {"origin": f"https://{NAME}"}
        assert (await client.get("/health", headers=origin)).json()["status"] == "ok"
        assert (await client.post("/api/chat", json=turn("hi"), headers=origin)).status_code == 200
        foreign = {"origin": "https://elsewhere.example"}
        assert (await client.get("/health", headers=foreign)).status_code == 403


async def test_without_access_hosts_the_public_name_gets_403(
    front: Open, ollama: FakeOllama
) -> None:
    async with front() as client:
        health, chat = await client.get("/health"), await client.post("/api/chat", json=turn("x"))

    assert f'access.hosts = ["{NAME}"]' in health.json()["error"].replace("'", '"')
    assert (health.status_code, chat.status_code, chat.content) == (403, 403, b"")
    assert not ollama.asked


async def test_a_key_passes_and_its_lack_is_a_401(front: Open, ollama: FakeOllama) -> None:
    ollama.answers(done("y"))

    async with front(**HOSTS, keys={"laptop": {"key": "osp-secret"}}) as client:
        without = await client.post("/api/chat", json=turn("hi"))
        key = {"authorization": "Bearer osp-secret"}
        answer = await client.post("/api/chat", json=turn("hi"), headers=key)

    assert (without.status_code, answer.status_code) == (401, 200)
    assert [asked for asked in ollama.asked if b"osp-secret" in repr(asked).encode()] == []
