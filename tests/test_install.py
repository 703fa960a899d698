"""The installed copy: what is in the packages, and that the commands of the README hold.

Packages are built, installed into fresh environments, updated and removed, as the README says it.
What these need is fetched once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from kernel.config import HOME
from tests import wheels
from tests.support import said, turn, write_agent
from tests.test_osp import CLEAN, Proxy, starting
from tests.test_readme import INSTALL, LEFT_OUT, README, UV

SECTION = README.partition("## Install, update, remove\n")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"`((?:uv|pip|python3?|rm) [^`]*)`", SECTION)
VENV, UV_RUN, *UV_WAY = COMMANDS[:5]  # the way: to install, update and remove
*PIP_WAY, OSP, TESTKIT, REMOVE_ALL, WHEELS = COMMANDS[5:]  # the way: to install or update, remove
(REPOSITORY,) = re.findall(r"`([\w-]+\[agents\] @ [^`]*)`", SECTION)
PARTS = ("osp.py", "demo.py", "demo.json", "testkit.py", "entry.py", "kernel", "slices", "plugins")
NAME = "ollama_smart_proxy"
GENERAL = "osp demo testkit entry kernel slices plugins examples tests"


def run(command: str, cwd: Path, **environ: str) -> str:
    """Run a line in bash; return what it wrote to stdout."""
    env = {**CLEAN, "PYTHONPATH": "", "UV_PYTHON": sys.executable, **environ}
    line = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def of_user(home: Path) -> dict[str, str]:
    """Return the environment of a user whose folder is `home`."""
    return {"HOME": str(home), "XDG_CONFIG_HOME": "", "XDG_DATA_HOME": "relative: not counted"}


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def environment(folder: Path) -> Path:
    """Make a virtual environment; return its folder of commands."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=60)
    return folder / "bin"


def packages(bin: Path) -> Path:
    """Return the folder in which an environment has its packages."""
    (found,) = bin.parent.glob("lib/python3*/site-packages")
    return found


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which pip and uv find all that an installation needs in a folder."""
    folder = tmp_path_factory.mktemp("packages")
    project = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    needed += [*project["project"]["optional-dependencies"]["agents"], "editables"]
    command = [sys.executable, "-m", "pip", "wheel", "-q", "-w", str(folder), *needed]
    subprocess.run(command, check=True, timeout=50)
    tools = {"PIP_NO_INDEX": "1", "UV_NO_INDEX": "1"}
    return {**tools, "PIP_FIND_LINKS": str(folder), "UV_FIND_LINKS": str(folder)}


@pytest.fixture(scope="module")
def built(offline: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both packages; the wheel is made of what the other one holds."""
    copy, out = tmp_path_factory.mktemp("copy") / "osp", tmp_path_factory.mktemp("built")
    shutil.copytree(HOME, copy, ignore=LEFT_OUT)
    before = files(copy)
    run(f"{sys.executable} -m build --outdir {out} .", copy, **offline)
    assert files(copy) == before  # nothing is left behind, so nothing old comes in again
    return out


@pytest.fixture(scope="module")
def installed(
    built: Path, offline: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The commands of a fresh environment with the wheel and what the agents need."""
    bin = environment(tmp_path_factory.mktemp("venv"))
    (wheel,) = built.glob("*.whl")
    run(f"{bin}/pip install -q '{wheel}[agents]'", built, **offline)
    return bin


def shipped() -> set[str]:
    """Return the files of the project that an installed copy needs."""
    found = [file for part in PARTS for file in [HOME / part, *(HOME / part).rglob("*")]]
    found += [*HOME.glob("examples/sample_agent/*.*"), *HOME.glob("examples/tools/*/*.*")]
    names = {str(file.relative_to(HOME)) for file in found if file.is_file()}
    return {n for n in names if not re.search(r"plugins/(README|.*/(test_|bench/))|__pycache__", n)}


def test_the_packages_hold_the_folder_without_tests_and_nothing_else(built: Path) -> None:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        notes = {name.partition("/")[2] for name in archive.namelist()} - shipped()
    with tarfile.open(source) as tar:
        sources = {member.name.partition("/")[2] for member in tar if member.isfile()}

    assert names == {f"{NAME}/{name}" for name in shipped()}
    assert notes == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    more = {"README.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert sources == shipped() | more


def serving(bin: Path, cwd: Path, env: Mapping[str, str]) -> AbstractAsyncContextManager[Proxy]:
    python, script = bin / "python", bin / "osp"
    return starting("--demo", "0", python=python, script=script, cwd=cwd, env=env)


async def test_the_command_does_what_osp_py_does_and_writes_only_where_the_user_keeps_files(
    installed: Path, tmp_path: Path
) -> None:
    before, env = files(packages(installed)), {**of_user(tmp_path), "OSP_PLUGINS": ""}

    async with serving(installed, tmp_path, env) as proxy, proxy.client() as client:
        answer = await client.post("/api/chat", json=turn("/rag:k=1 what did we decide in May?"))
        port = str(client.base_url.port)
        health = run(f"{installed}/osp --port {port} health", tmp_path, **env)
        page = await client.get("/osp")
        settings = await proxy.event("settings")

    assert "decisions.md, Decisions > Meeting of 12 May 2026" in said(answer.content)
    assert '"status": "ok"' in health and page.status_code == 200
    data = tmp_path / ".local/share/osp"
    assert (settings["file"], settings["data"]) == ("none", str(data))
    assert {"rag"} <= {*os.listdir(data)} and os.listdir(tmp_path) == [".local"]
    assert files(packages(installed)) == before
    assert run(f"{installed}/osp --version", tmp_path) == "0.1.0\n"
    assert run(f"{installed}/osp key laptop", tmp_path).startswith("[keys.laptop]\nkey = ")


async def test_settings_and_own_agents_of_the_command_lie_in_the_users_folder(
    installed: Path, tmp_path: Path
) -> None:
    env = {**of_user(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "100%"), "OSP_PLUGINS": ""}
    folder = tmp_path / "100%" / "osp"
    made = run(f"{installed}/osp-testkit new greet", tmp_path, **env)
    write_agent(folder / "plugins", "time", "class Own(BaseAgent): 'Mine.'")
    (folder / "osp.toml").write_text("[agents.rag]\nenabled = false\n", encoding="utf-8")

    async with serving(installed, tmp_path, env) as proxy, proxy.client() as client:
        listed = (await client.get("/plugins")).json()["plugins"]
        settings = await proxy.event("settings")

    found = {plugin["name"]: plugin for plugin in listed}
    assert found["time"]["description"] == "Mine." and found["greet"]["status"] == "loaded"
    assert found["rag"]["status"] == "disabled" and found["cache"]["status"] == "loaded"
    assert settings["file"] == str(folder / "osp.toml")
    usage = run(f"COLUMNS=500 {installed}/osp --help", tmp_path, **env)
    assert f"settings (default: {folder / 'osp.toml'})" in usage
    assert "100%/osp/plugins/greet_agent is there; test it: osp-testkit check\n" in made
    checked = run(f"{installed}/osp-testkit check || true", tmp_path, **env)  # time is there twice
    assert re.search("(?m)^ok +greet$", checked) and re.search("(?m)^disabled +rag$", checked)


PLACES = """
import sys
sys.platform = sys.argv[1]
sys.path.insert(0, sys.argv[2])
from kernel.config import load, places
print(*places(dict([sys.argv[3:]])), load(None, dict([sys.argv[3:]]), {}).server.data, sep="\\n")
"""


@pytest.mark.parametrize(
    ("platform", "variable", "settings", "data"),
    [
        ("linux", "", "~/.config/osp/osp.toml", "~/.local/share/osp"),
        ("linux", "XDG_CONFIG_HOME", "/here/osp/osp.toml", "~/.local/share/osp"),
        ("linux", "XDG_DATA_HOME", "~/.config/osp/osp.toml", "/here/osp"),
        ("win32", "", "~/AppData/Local/osp/osp.toml", "~/AppData/Local/osp/data"),
        ("win32", "LOCALAPPDATA", "/here/osp/osp.toml", "/here/osp/data"),
        ("darwin", "LOCALAPPDATA", "~/Library/Application Support/osp/osp.toml", "data"),
    ],
)
def test_each_platform_has_its_places(
    installed: Path, tmp_path: Path, platform: str, variable: str, settings: str, data: str
) -> None:
    folder = packages(installed) / NAME
    line = f"{installed}/python -c '{PLACES}' {platform} '{folder}' '{variable}' /here"

    found = run(line, tmp_path, HOME=str(tmp_path)).replace(str(tmp_path), "~").splitlines()

    data = settings.replace("osp.toml", data) if data == "data" else data
    assert found == [settings, data, data]


def test_no_general_name_becomes_importable_and_a_checkout_stays_its_own(
    installed: Path, tmp_path: Path
) -> None:
    look = f"import importlib.util as i; print(*filter(i.find_spec, '{GENERAL}'.split()))"

    assert run(f'{installed}/python -c "{look}"', tmp_path) == "\n"
    usage = run(f"COLUMNS=500 {installed}/python {HOME}/osp.py --help", tmp_path)
    assert f"settings (default: {HOME}/osp.toml)" in usage


def test_installed_as_editable_the_commands_run_the_checkout(
    offline: Mapping[str, str], tmp_path: Path
) -> None:
    copy, bin = tmp_path / "osp", environment(tmp_path / "venv")
    shutil.copytree(HOME, copy, ignore=LEFT_OUT)
    run(f"{bin}/pip install -q -e .", copy, **offline)
    (copy / "osp.toml").write_text("[server]\nprot = 1\n", encoding="utf-8")

    usage = run(f"COLUMNS=500 {bin}/osp --help", tmp_path)
    checked = run(f"{bin}/osp-testkit check 2>&1 || true", tmp_path)

    assert f"settings (default: {copy}/osp.toml)" in usage
    assert checked.startswith(f"osp-testkit: {copy}/osp.toml: server: unknown key 'prot'")


def test_the_ways_without_a_command_are_those_of_the_first_screen() -> None:
    assert INSTALL.startswith(f"{VENV} && ") and UV.startswith(UV_RUN)
    assert (OSP, TESTKIT) == ("python osp.py", "python testkit.py")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A repository of the project, from which `tmp_path / "osp"` was cloned."""
    folder = tmp_path / "origin"
    shutil.copytree(HOME, folder, ignore=LEFT_OUT)
    run("git init -q .", folder)
    commit(folder)
    run(f"git clone -q {folder} osp", tmp_path)
    return folder


def commit(folder: Path) -> None:
    run("git add -A && git -c user.name=x -c user.email=x@x commit -qm x", folder)


@pytest.fixture
def lent(installed: Path, built: Path, offline: Mapping[str, str]) -> Iterator[Path]:
    """The environment of `installed`, which has the wheel again afterwards."""
    yield installed
    (wheel,) = built.glob("*.whl")
    run(f"{installed}/pip install -q --no-deps --force-reinstall {wheel}", built, **offline)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("way", ["uv", "pip"])
def test_the_readme_installs_updates_and_removes_the_command(
    offline: Mapping[str, str],
    origin: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    way: str,
) -> None:
    if not shutil.which(way):
        pytest.skip(f"needs {way}")
    install, update, remove = UV_WAY if way == "uv" else (PIP_WAY[0], *PIP_WAY)
    uv = {"UV_TOOL_DIR": str(tmp_path / "tools"), "UV_TOOL_BIN_DIR": str(tmp_path / "bin")}
    own = tmp_path / "bin" if way == "uv" else request.getfixturevalue("lent")
    root = tmp_path / "tools" if way == "uv" else packages(own)
    env = {**of_user(tmp_path), **uv, "PATH": f"{own}:{os.environ['PATH']}"}
    env |= {**offline, "PIP_NO_COMPILE": "1"}  # so that the first start writes what must go, too
    clone, script, agent = tmp_path / "osp", origin / "osp.py", f"{NAME}/plugins/time_agent"

    run(install, clone, **env)
    assert run("osp --version", clone, **env) == "0.1.0\n" and [*root.rglob(agent)]

    script.write_text(script.read_text().replace('"0.1.0"', '"0.1.1"'), encoding="utf-8")
    shutil.rmtree(origin / "plugins" / "time_agent")
    commit(origin)
    run(f"git pull -q && {update}", clone, **env)
    assert run("osp --version", clone, **env) == "0.1.1\n" and not [*root.rglob(agent)]

    run("osp-testkit new greet", clone, **env)
    (tmp_path / ".local/share/osp").mkdir(parents=True)
    run(f"{remove} && {REMOVE_ALL}", clone, **env)
    assert not [*own.glob("osp*"), *root.rglob(f"{NAME}*"), *tmp_path.glob(".[cl]o*/**/osp")]

    if way == "uv":  # which has all that it needs at hand: pip would take long
        address = REPOSITORY.replace("https://...", f"file://{origin}")
        run(install.replace(".[agents]", address), tmp_path, **env)
        assert run("osp --version", tmp_path, **env) == "0.1.1\n"


@pytest.mark.parametrize("target", wheels.TARGETS)
def test_all_packages_come_ready_made_for_a_raspberry_pi(target: str) -> None:
    assert WHEELS == "python tests/wheels.py"

    found = wheels.wheels(wheels.requirements(), *wheels.TARGETS[target])

    kinds = {name.removesuffix(".whl").rpartition("-")[2] for name in found}
    assert len(found) > 20 and all(re.search("any|aarch64", kind) for kind in kinds)


def test_a_package_that_would_need_a_compiler_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(["httptools"]) == 0
    assert re.search("(?m)^  httptools-.*-cp311-.*aarch64.whl$", capsys.readouterr().out)
    assert wheels.main(["pywin32"]) == 1
    assert "No matching distribution found for pywin32" in capsys.readouterr().out
