"""More of the `ollama` command line through the proxy: uploads, pipes, what is typed, Ctrl-C.

Each test does a thing at Ollama and at the proxy, and what is printed and the exit status are the
same. A name or file that one side alone may have is called `own-...` there.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

termios = pytest.importorskip("termios", reason="needs a pseudo-terminal")

HERE = Path(__file__).parent
PROMPT = b"Send a message"
PATIENCE = 30.0  # seconds
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|[\u2800-\u28ff] ?")  # and the spinner
MASKS = [  # a time, a digest and a measure, which no two runs share
    (re.compile(r"(\d+|About an?|Less than a) (second|minute|hour)s? (ago|from now) *"), "THEN"),
    (re.compile(r"\b[0-9a-f]{12,64}\b"), "DIGEST"),
    (re.compile(r"(duration|rate): +\S+( tokens/s)?"), "MEASURE"),
    (re.compile(r"\d+% *▕.*"), "PROGRESS"),
]
SETTINGS = "PARAMETER temperature 0\nPARAMETER seed 7\nPARAMETER num_predict 9\n"

Outcome = tuple[int, str, list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def environment(folder: Path, url: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "OLLAMA_HOST": url, "TERM": "xterm"}


def run(binary: str, folder: Path, url: str, *arguments: str, typed: str = "") -> Outcome:
    """Return the exit status, the output and the last line of what went wrong."""
    done = subprocess.run(
        [binary, *arguments],
        cwd=folder,
        env=environment(folder, url),
        input=typed,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    error = masked(done.stderr).splitlines()[-1:] if done.returncode else []
    return done.returncode, masked(done.stdout), error


def masked(text: str) -> str:
    text = CONTROL.sub("", text)
    for pattern, mask in MASKS:
        text = pattern.sub(mask, text)
    return text


def model_file(folder: Path, side: str) -> bytes:
    """Write a model that no server has yet, and a Modelfile beside it that names it."""
    data = (HERE / "tiny.gguf").read_bytes() + side.encode().ljust(32, b"\0")
    (folder / "file.gguf").write_bytes(data)
    (folder / "Modelfile").write_text(f"FROM ./file.gguf\n{SETTINGS}", encoding="utf-8")
    return data


def test_a_file_is_uploaded_and_runs(
    binary: str, folder: Path, home: Path, direct: str, proxied: str
) -> None:
    outcomes = []
    for side, url in (("one", direct), ("other", proxied)):
        before = blobs(home)
        data = model_file(folder, side)
        created = run(binary, folder, url, "create", "own-made", "-f", "Modelfile")
        uploaded = [blob for blob in blobs(home) - before if blob.stat().st_size == len(data)]
        assert [blob.read_bytes() for blob in uploaded] == [data]
        commands = [
            ["list"],
            ["show", "own-made", "--template"],
            ["run", "own-made", "hear"],
            ["stop", "own-made"],
            ["cp", "own-made", "own-copy"],
            ["rm", "own-made", "own-copy"],
            ["show", "own-copy"],
            ["list"],
        ]
        outcomes.append([created, *(run(binary, folder, url, *words) for words in commands)])

    assert [status for status, _, _ in outcomes[0]] == [0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert outcomes[1] == outcomes[0]


def blobs(home: Path) -> set[Path]:
    return set((home / "models" / "blobs").iterdir())


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (["run", "tiny"], "tell me a story"),
        (["run", "tiny", "and this:"], "line one\nline two\n"),
        (["run", "tiny", "--keepalive", "0s", "hear"], ""),
        (["run", "tiny", "--nowordwrap", "hear"], ""),
        (["run", "tiny", "--think", "hear"], ""),
        (["run", "tiny-embed", "hear"], ""),
        (["run", "tiny", "--format", "xml", "hear"], ""),
        (["show", "tiny-tools", "--template"], ""),
        (["show", "tiny-tools", "--modelfile"], ""),
        (["list", "tiny-t"], ""),
        (["--version"], ""),
        (["create", "own-made", "-f", "no-such-file"], ""),
        (["create", "own-made", "-f", "Modelfile"], ""),
        (["cp", "tiny", "a b"], ""),
        (["rm", "no-such-model"], ""),
        (["pull", "http://127.0.0.1:1/x/y", "--insecure"], ""),
        (["push", "http://127.0.0.1:1/x/y", "--insecure"], ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else repr(value),
)
def test_a_command_says_and_exits_the_same(
    binary: str, folder: Path, direct: str, proxied: str, arguments: list[str], typed: str
) -> None:
    (folder / "Modelfile").write_text("FROM ./missing.gguf\n", encoding="utf-8")

    expected = run(binary, folder, direct, *arguments, typed=typed)

    assert any(expected)
    assert run(binary, folder, proxied, *arguments, typed=typed) == expected


def test_what_runs_is_listed_until_it_is_stopped(
    binary: str, folder: Path, direct: str, proxied: str
) -> None:
    def steps(url: str) -> list[Outcome]:
        for model in ("tiny-embed", "tiny-tools"):  # others that earlier tests may have left
            run(binary, folder, url, "stop", model)
        commands = (["run", "tiny", "--keepalive", "1h", "hear"], ["ps"], ["stop", "tiny"])
        return [run(binary, folder, url, *words) for words in commands]

    expected = steps(direct)

    assert "tiny:latest" in expected[1][1]
    assert steps(proxied) == expected


@contextmanager
def terminal(binary: str, folder: Path, url: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run `ollama run tiny` in a terminal until the block ends; give its keyboard."""
    keyboard, screen = os.openpty()
    termios.tcsetwinsize(screen, (24, 200))
    process = subprocess.Popen(
        [binary, "run", "tiny"],
        env=environment(folder, url),
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
    )
    os.close(screen)
    try:
        shown(keyboard, PROMPT)
        yield keyboard, process
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def shown(keyboard: int, mark: bytes) -> str:
    """Return what the screen shows until `mark` is there."""
    text, end = b"", time.monotonic() + PATIENCE
    while mark not in text:
        readable, _, _ = select.select([keyboard], [], [], max(0, end - time.monotonic()))
        assert readable, f"no {mark!r} after {text!r}"
        text += os.read(keyboard, 4096)
    return masked(text.partition(mark)[0].decode("utf-8", "replace"))


def typed(keyboard: int, line: str) -> str:
    os.write(keyboard, line.encode() + b"\r")
    return shown(keyboard, PROMPT)


@pytest.mark.parametrize(
    "lines",
    [
        ["/show template", "/show system", "/show nonsense"],
        ["/set parameter seed 9", "hello", "/clear", "hello"],
        ["/set system be brief", "hello", "/show system"],
        ["/set format json", "hello"],
        ["/load tiny", "hello"],
    ],
    ids=" ".join,
)
def test_what_is_typed_does_the_same(
    binary: str, folder: Path, direct: str, proxied: str, lines: list[str]
) -> None:
    def screens(url: str) -> tuple[list[str], int]:
        with terminal(binary, folder, url) as (keyboard, process):
            screens = [typed(keyboard, line) for line in lines]
            os.write(keyboard, b"/bye\r")
            return screens, process.wait(PATIENCE)

    expected = screens(direct)

    assert screens(proxied) == expected


def test_a_session_is_saved_as_a_model(
    binary: str, folder: Path, direct: str, proxied: str
) -> None:
    def steps(url: str) -> list[object]:
        with terminal(binary, folder, url) as (keyboard, process):
            screens = [typed(keyboard, line) for line in ("hello", "/save own-saved")]
            os.write(keyboard, b"/bye\r")
            assert process.wait(PATIENCE) == 0
        commands = (["run", "own-saved", "hear"], ["rm", "own-saved"])
        return [*screens, *(run(binary, folder, url, *words) for words in commands)]

    expected = steps(direct)

    assert steps(proxied) == expected


def test_an_interrupt_ends_the_answer_and_frees_the_model(
    binary: str, folder: Path, direct: str, proxied: str, http: httpx.Client
) -> None:
    for url in (direct, proxied):
        with terminal(binary, folder, url) as (keyboard, process):
            typed(keyboard, "/set parameter num_predict 100000")
            os.write(keyboard, b"hello\r")
            shown(keyboard, b" the")
            os.killpg(process.pid, signal.SIGINT)
            shown(keyboard, PROMPT)
            turn = {"model": "tiny", "prompt": "once", "stream": False}
            assert http.post(f"{direct}/api/generate", json=turn).is_success
            os.write(keyboard, b"/bye\r")
            assert process.wait(PATIENCE) == 0
