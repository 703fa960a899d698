"""The soak, for a moment: it finds nothing, and it finds what leaks on purpose."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernel.config import HOME

pytestmark = pytest.mark.skipif(
    not (shutil.which("taskset") and Path("/proc/net/tcp").exists()),
    reason="needs Linux, and taskset",
)


def soak(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/soak.py", *"--clients 16 --seed 4".split(), *flags]
    return subprocess.run(command, cwd=HOME, capture_output=True, text=True)


def test_nothing_grows_and_no_answer_is_wrong_while_all_goes_wrong_that_can() -> None:
    done = soak("--minutes", "0.2")

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"(?m)^passed: \d", done.stdout)
    done_well = set(re.findall(r"(\w+), ok", done.stdout))
    assert done_well >= {"plain", "chats", "leaves", "breaks", "malformed"}
    assert "without the stand-in" in done.stdout


@pytest.mark.parametrize("what", ["tasks", "files"])
def test_what_leaks_is_found(what: str) -> None:
    done = soak("--minutes", "0.1", "--leak", what)

    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"WRONG, 1 times: plain: {what} grew from \d+ to \d+", done.stdout)
