"""Wheels: whether every package comes ready made for 64-bit Raspberry Pi OS.

    python tests/wheels.py

asks the index that pip uses, installs nothing, and prints the wheels that pip would take there, the
extras `agents` and `mcp` included. It exits with 1 and pip's words where one is missing: that
package would need a compiler. Conditions on the version of Python are judged by the one that runs
this.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

TARGETS = {  # the Python, and the newest glibc that a wheel may need
    "Raspberry Pi OS 12": ("3.11", 36),
    "Raspberry Pi OS 13": ("3.13", 41),
}


def requirements() -> list[str]:
    file = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["agents"], *extras["mcp"]]


def wheels(packages: list[str], python: str, glibc: int) -> list[str]:
    """Return the names of the wheels. Raises CalledProcessError where there is none."""
    tags = ["linux", "manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, glibc + 1))]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-"]
    command += ["--ignore-installed", "--only-binary=:all:", f"--python-version={python}"]
    command += ["--implementation=cp", *(f"--platform={tag}_aarch64" for tag in tags)]
    with tempfile.TemporaryDirectory() as folder:
        command += [f"--target={folder}", *packages]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = [package["download_info"]["url"] for package in json.loads(done.stdout)["install"]]
    return sorted(Path(url).name for url in found)


def main(packages: list[str]) -> int:
    """Print the wheels of `packages` (none: those of the project); return the exit status."""
    status = 0
    for target, (python, glibc) in TARGETS.items():
        sys.stdout.write(f"{target}: CPython {python}, glibc 2.{glibc}, aarch64\n")
        try:
            for name in wheels(packages or requirements(), python, glibc):
                sys.stdout.write(f"  {name}\n")
        except subprocess.CalledProcessError as exc:
            sys.stdout.write(f"{exc.stderr}\n")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
