"""The guide for authors: every file on it is written as it stands, and every test on it runs."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from kernel.agent import Context
from kernel.config import HOME
from kernel.plugin import AgentConfig

GUIDE = (HOME / "plugins" / "README.md").read_text(encoding="utf-8")
FILES = re.findall(r"`plugins/(\S+)`:\n\n```\w+\n(.*?)```", GUIDE, re.DOTALL)
BLOCKS = re.findall(r"^```(?:python|json)\n(.*?)```", GUIDE, re.DOTALL | re.MULTILINE)


def test_every_agent_of_the_guide_works_and_passes_its_test(tmp_path: Path) -> None:
    for name, text in FILES:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")

    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        [*run, "--import-mode=importlib"], cwd=HOME, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stdout
    tests = sum(text.count("\ndef test_") for _, text in FILES)
    assert f"{tests} passed" in done.stdout


def test_every_piece_of_code_in_the_guide_is_one_that_runs() -> None:
    assert [text for _, text in FILES] == BLOCKS
    folders = {name.partition("/")[0] for name, _ in FILES}
    assert all((f"{folder}/test_agent.py" in dict(FILES)) for folder in folders)


def test_the_commands_of_the_guide_begin_an_agent_and_look_it_over(tmp_path: Path) -> None:
    file = tmp_path / "osp.toml"
    file.write_text(f"[plugins]\ndirs = ['{tmp_path}']\n", encoding="utf-8")
    (new,) = re.findall(r"```sh\npython (.*?)\n```", GUIDE)

    for command in (new, "testkit.py check"):
        assert f"python {command}" in GUIDE
        run = [sys.executable, *command.split(), "--config", str(file)]
        done = subprocess.run(run, cwd=HOME, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    assert done.stdout == "ok       greet\n"


def test_the_guide_has_every_key_of_config_json() -> None:
    table = GUIDE.partition("| key | default |")[2].partition("\n\n")[0]

    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [f.name for f in fields(AgentConfig)]


def test_the_guide_has_all_that_a_hook_can_ask_of_its_request() -> None:
    table = GUIDE.partition("| of `self.context` |")[2].partition("\n\n")[0]
    values = {f.name for f in fields(Context) if f.repr} - {"streams"}

    assert set(re.findall(r"`(\w+)`", table)) >= values | {"chat", "message", "stream", "embed"}
