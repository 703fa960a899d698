"""examples/home-lan: its README is done as it stands, on one machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from asyncio import create_subprocess_exec
from asyncio.subprocess import PIPE
from pathlib import Path

import httpx
import pytest
from anyio import to_thread

from kernel.config import HOME
from tests.support import FakeOllama
from tests.test_osp import CLEAN, free_port, spawning, starting

FOLDER = HOME / "examples" / "home-lan"
README = (FOLDER / "README.md").read_text()
MAKE, FIREWALL, ASK, CADDY = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
UFW, NFT = FIREWALL.replace("sudo ", "").splitlines()


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, str]:
    """What the README's first commands leave: an osp.toml with a fresh key, and the key."""
    shutil.copytree(FOLDER, tmp_path / "examples" / "home-lan")
    line = MAKE.replace("python osp.py", f"{sys.executable} {HOME}/osp.py")
    done = subprocess.run(["sh", "-ec", line], cwd=tmp_path, env=CLEAN, capture_output=True)
    (key,) = re.findall(r'key = "(osp-[\w-]{32})"', done.stdout.decode())
    file = tmp_path / "osp.toml"
    file.write_text(file.read_text().replace("$OSP_KEY_LAPTOP", key))
    assert file.stat().st_mode & 0o777 == 0o600
    return file, key


def settings(file: Path, upstream: str) -> tuple[str, ...]:
    return "--config", str(file), "--upstream", upstream


async def test_the_laptop_lists_the_models_with_its_key_only(
    made: tuple[Path, str], ollama: FakeOllama, ollama_url: str
) -> None:
    ollama.answers(b'{"models":[]}')
    file, key = made

    async with starting(*settings(file, ollama_url)) as proxy, proxy.client() as client:
        port = client.base_url.port
        curl = ASK.replace("curl", f"curl -s --connect-to ::127.0.0.1:{port}", 1)

        def ask(key: str) -> str:
            env = CLEAN | {"OSP_KEY": key}
            return subprocess.run(["sh", "-c", curl], env=env, capture_output=True).stdout.decode()

        allowed, refused = [await to_thread.run_sync(ask, each) for each in (key, "wrong")]
        page = {"host": "pi.lan", "authorization": f"Bearer {key}"}
        own = await client.get("/health", headers=page)

    assert proxy.lines[1].find("http://0.0.0.0:") > 0
    assert (allowed, own.status_code) == ('{"models":[]}', 200)
    assert "the key that was sent is none of those in [keys]" in refused


async def test_it_does_not_start_without_the_key() -> None:
    async with starting("--config", str(FOLDER / "osp.toml")) as proxy:
        assert await proxy.ended() == 2

    assert "$OSP_KEY_LAPTOP is not set in the environment" in proxy.lines[0]


async def test_the_command_ollama_gets_in_through_caddy(
    made: tuple[Path, str], demo_url: str
) -> None:
    if not (shutil.which("caddy") and shutil.which("ollama")):
        pytest.skip("needs caddy and ollama")
    file, key = made
    local = f"127.0.0.1:{free_port()}"

    async with starting(*settings(file, demo_url)) as proxy, proxy.client() as client:
        caddyfile = file.with_name("laptop.Caddyfile")
        text = (FOLDER / "laptop.Caddyfile").read_text().replace("127.0.0.1:11434", local)
        text = text.replace("pi.local:11435", client.base_url.netloc.decode())
        caddyfile.write_text("{\nadmin off\n}\n" + text.replace("localhost:11434", "localhost:0"))
        env = os.environ | {"OSP_KEY": key, "HOME": str(file.parent), "OLLAMA_HOST": local}
        async with spawning(*CADDY.split(), cwd=file.parent, env=env) as process:
            await process.says("serving initial configuration")
            listed = await create_subprocess_exec("ollama", "list", env=env, stdout=PIPE)
            names, _ = await listed.communicate()
            foreign = httpx.AsyncClient(
                base_url=f"http://{local}", headers={"host": "evil.example"}
            )
            async with foreign:
                assert (await foreign.get("/api/tags")).content == b""

    assert b"demo:latest" in names


def test_nftables_takes_the_rule() -> None:
    nft = shutil.which("nft") or pytest.skip("needs nft")
    table = "table inet filter {\nchain input { type filter hook input priority 0; }\n}\n"
    rule = table + NFT.removeprefix("nft ")
    done = subprocess.run([nft, "-c", "-f", "-"], input=rule, capture_output=True, text=True)
    if "not permitted" in done.stderr:
        pytest.skip("needs the rights of root")

    assert (done.returncode, done.stderr) == (0, "")


def test_ufw_takes_the_rule_and_its_removal() -> None:
    ufw = shutil.which("ufw") or pytest.skip("needs ufw")
    removal = re.findall(r"`sudo (ufw delete [^`]*)`", README)[0]
    for line in (UFW, removal):
        done = subprocess.run([ufw, "--dry-run", *line.split()[1:]], capture_output=True, text=True)
        if "root" in done.stderr:
            pytest.skip("needs the rights of root")
        assert (done.returncode, done.stderr) == (0, "")
