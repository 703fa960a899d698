"""examples/compose-open-webui: its form, what it tells the proxy, and what that makes of it.

The form is also that of examples/scale-out.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import yaml

import demo
from kernel.config import HOME, load
from tests.support import outcomes, turn
from tests.test_osp import LIMIT, starting

FOLDER = HOME / "examples" / "compose-open-webui"
FILE = FOLDER / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())["services"]
ENVIRONMENT = SERVICES["osp"]["environment"]


@pytest.mark.parametrize("example", ["compose-open-webui", "scale-out"])
def test_it_is_what_the_compose_specification_allows(example: str) -> None:
    command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    file = str(HOME / "examples" / example / "compose.yaml")
    done = subprocess.run([sys.executable, *command, file], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout


def test_docker_compose_reads_it() -> None:
    docker = shutil.which("docker") or pytest.skip("needs docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("needs docker compose")
    done = subprocess.run([docker, "compose", "-f", FILE, "config", "-q"], capture_output=True)

    assert (done.returncode, done.stderr) == (0, b"")


def test_only_open_webui_can_be_reached_and_only_from_this_machine() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}

    assert ports == {"open-webui": ["127.0.0.1:3000:8080"]}


def test_each_service_has_a_check_that_the_next_one_waits_for() -> None:
    waits = {name: list(service.get("depends_on", ())) for name, service in SERVICES.items()}
    conditions = [c for s in SERVICES.values() for c in s.get("depends_on", {}).values()]

    assert waits == {"ollama": [], "osp": ["ollama"], "open-webui": ["osp"]}
    assert conditions == [{"condition": "service_healthy"}] * 2
    assert all("healthcheck" in service for service in SERVICES.values())


def test_what_is_mounted_and_built_is_there() -> None:
    build = SERVICES["osp"]["build"]
    mounts = [mount.split(":") for mount in SERVICES["osp"]["volumes"]]

    assert (FOLDER / build["context"]).resolve() == HOME
    assert (HOME / build["dockerfile"]).is_file()
    assert ["./osp.toml", "/osp/osp.toml", "ro"] in mounts and (FOLDER / "osp.toml").is_file()
    assert [
        "./notes",
        load(FOLDER / "osp.toml", {}, {}).agents["rag"]["settings"]["folder"],
        "ro",
    ] in mounts


def test_the_addresses_are_those_of_the_services() -> None:
    config = load(FOLDER / "osp.toml", ENVIRONMENT, {})

    assert config.upstream.url == "http://ollama:11434"
    assert (
        SERVICES["open-webui"]["environment"]["OLLAMA_BASE_URL"]
        == f"http://osp:{config.server.port}"
    )


async def test_the_preset_stands_in_the_list_and_answers_from_the_notes(tmp_path: Path) -> None:
    (tmp_path / "wall.md").write_text("# Paint\nThe north wall is ochre.\n")
    file = tmp_path / "osp.toml"
    text = (FOLDER / "osp.toml").read_text()
    file.write_text(text.replace('"/notes"', f'"{tmp_path}"'))

    async with demo.serve(demo.create_app()) as ollama:
        async with httpx.AsyncClient(base_url=ollama) as client:
            await client.post("/api/create", json={"model": "llama3.2", "from": "demo"})
        flags = ("--config", str(file), "--upstream", ollama, "--host", "0.0.0.0")
        async with starting(*flags, env={"OSP_PLUGINS": "rag"}) as proxy, proxy.client() as client:
            await proxy.event("preset made")
            await proxy.says("folder is read")
            client.headers["host"] = "osp:11435"  # as Open WebUI calls it
            models = (await client.get("/api/tags")).json()["models"]
            body = turn("which colour has the wall?") | {"model": "notes"}
            with anyio.fail_after(LIMIT):
                answer = await client.post("/api/chat", json=body)

    assert "notes:latest" in [model["name"] for model in models]
    assert outcomes(answer) == "rag;ok" and "ochre" in answer.text
