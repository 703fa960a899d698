"""examples/systemd: its units, its scripts in a folder of their own, the commands in its README.

A service that runs needs systemd and root. What can be tried without is tried here: systemd judges
the units, the scripts lay everything below a folder, what they laid is started, and
systemd-socket-activate passes a socket as systemd does.
"""

from __future__ import annotations

import faulthandler
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from kernel.config import HOME, load
from tests.test_osp import CLEAN, LIMIT, free_port, spawning

FOLDER = HOME / "examples" / "systemd"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SERVICE = (FOLDER / "osp.service").read_text(encoding="utf-8")

LONGEST = 250  # seconds


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"needs {program}")


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**CLEAN, **env}, capture_output=True, text=True, timeout=LONGEST - 10, cwd="/"
    )


def script(name: str, to: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run it for a folder; to install packages may take longer than a test usually may."""
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    env = {"DESTDIR": str(to), "PYTHON": sys.executable, "PIP_NO_COMPILE": "1"}  # faster
    return run("sh", FOLDER / name, *flags, **env)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which install.sh has laid everything."""
    to = tmp_path_factory.mktemp("root")
    done = script("install.sh", to)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("This installs Ollama Smart Proxy, or updates it, from ")
    return to


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@needs("systemd-analyze")
def test_systemd_takes_the_units_and_finds_them_hardly_exposed(
    installed: Path, tmp_path: Path
) -> None:
    """With the lines for a drop-in, too; the program lies elsewhere here, and systemd looks."""
    texts = {name: (FOLDER / name).read_text() for name in ("osp.service", "osp.socket")}
    loose = re.findall(r"(?m)^#   (.+)$", texts["osp.service"].partition("[Unit]")[0])
    texts["loose.service"] = "\n".join([*loose, "ExecStart=/bin/true", ""])
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace("/opt/osp/", f"{installed}/opt/osp/"))

    verified = run("systemd-analyze", "verify", *(tmp_path / name for name in texts))
    judge = ("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=15")
    judged = run(*judge, tmp_path / "osp.service")

    assert "MemoryDenyWriteExecute=no" in loose
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    assert judged.returncode == 0, judged.stdout


@needs("shellcheck")
@pytest.mark.parametrize("name", ["install.sh", "uninstall.sh"])
def test_the_scripts_are_sound(name: str) -> None:
    done = run("shellcheck", FOLDER / name)

    assert done.returncode == 0, done.stdout


async def test_what_was_installed_serves_with_its_settings_and_the_socket_it_is_given(
    installed: Path, tmp_path: Path
) -> None:
    activate = shutil.which("systemd-socket-activate")
    if not activate:
        pytest.skip("needs systemd-socket-activate; tests/kernel/test_systemd.py does the same")
    address = f"127.0.0.1:{free_port()}"
    (started,) = re.findall(r"(?m)^ExecStart=(.*)$", SERVICE)
    command = [f"{installed}{each}" if each[0] == "/" else each for each in started.split()]
    env = {**CLEAN, "OSP_SERVER_DATA": str(tmp_path)}
    flags = [f"--listen={address}", *(f"--setenv={k}={v}" for k, v in env.items())]

    async with spawning(activate, *flags, *command, env=env, cwd=tmp_path) as proxy:
        await proxy.says("Listening on")
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=LIMIT) as client:
            answer = await client.get("/health?live")  # the first connection starts it
            listed = (await client.get("/plugins")).json()["plugins"]
        status = await proxy.stop()

    assert answer.status_code == 200 and status == 0
    assert str(installed / "etc/osp/osp.toml") in await proxy.says('"event": "settings"')
    assert address in await proxy.says('"event": "listening"')
    assert {plugin["status"] for plugin in listed} <= {"loaded", "disabled"}


def test_to_update_keeps_settings_and_data_and_leaves_nothing_old(
    installed: Path, tmp_path: Path
) -> None:
    """Install a second time, as after `git pull`; and remove it then."""
    to = tmp_path / "root"
    shutil.copytree(installed, to, symlinks=True)
    before = files(to / "opt/osp/app")
    assert not [
        f for f in before if re.match(r"(tests|bench|docs|data|build|\..*|osp\.toml)(/|$)", f)
    ]
    settings, data = to / "etc/osp/osp.toml", to / "var/lib/osp/remember/notes.db"
    assert settings.stat().st_mode & 0o777 == 0o640  # it may hold keys
    settings.write_text("[server]\nport = 1\n", encoding="utf-8")
    data.parent.mkdir(parents=True)
    data.touch()
    (to / "opt/osp/app/plugins/gone_agent").mkdir()
    (to / "opt/osp/app/osp.py").write_text("old", encoding="utf-8")
    (to / "etc/systemd/system/osp.service").write_text("old", encoding="utf-8")

    done = script("install.sh", to)

    assert done.returncode == 0, done.stderr
    assert settings.read_text(encoding="utf-8") == "[server]\nport = 1\n" and data.exists()
    assert sorted(path.name for path in (to / "opt/osp").iterdir()) == ["app", "venv"]
    assert files(to / "opt/osp/app") == before
    assert not (to / "opt/osp/app/plugins/gone_agent").exists()
    assert (to / "etc/systemd/system/osp.service").read_text(encoding="utf-8") == SERVICE

    removed = script("uninstall.sh", to)
    again = script("uninstall.sh", to)

    assert (removed.returncode, again.returncode) == (0, 0), removed.stderr + again.stderr
    assert files(to) == {"etc/osp/osp.toml", "var/lib/osp/remember/notes.db"}
    assert "It keeps the user osp and " in removed.stdout

    purged = script("uninstall.sh", to, "--purge")

    assert purged.returncode == 0 and files(to) == set(), purged.stderr
    assert str(to / "var/lib/osp") in purged.stdout


def test_wrong_flags_and_a_python_that_cannot_be_change_nothing(tmp_path: Path) -> None:
    flag = script("uninstall.sh", tmp_path, "--all")
    python = run("sh", FOLDER / "install.sh", DESTDIR=str(tmp_path), PYTHON="/bin/false")

    assert flag.returncode == 2 and "it takes nothing, or --purge" in flag.stderr
    assert python.returncode == 1 and "must be Python 3.11 or newer, with venv" in python.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_only_root_may_install_into_the_system(tmp_path: Path) -> None:
    for name in ("install.sh", "uninstall.sh"):
        text = (FOLDER / name).read_bytes()
        done = subprocess.run(["sh"], input=text, user=65534, cwd="/", capture_output=True)

        assert done.returncode == 1 and b"only root can do this; type: sudo sh" in done.stderr


def test_the_commands_of_its_readme_are_those_that_there_are(installed: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    (start,) = re.findall(r"(?m)^ExecStart=(.*)$", SERVICE)
    key = re.search(r"sudo (\S+) (\S+) key laptop \| sudo tee -a (\S+)", block)
    assert key

    python, program, file = (Path(f"{installed}{path}") for path in key.groups())
    made = run(python, program, "key", "laptop")

    assert start == f"{key[1]} {key[2]} --config {key[3]}"
    with file.open("a", encoding="utf-8") as settings:
        settings.write(made.stdout)  # as tee -a does
    assert set(load(file, {}, {}).keys) == {"laptop"}
    for name in re.findall(r"examples/systemd/(\S+\.sh)", README):
        assert (FOLDER / name).exists()
    assert "nano /etc/osp/osp.toml" in block and "journalctl -u osp -f" in block
