"""The `ollama` command line at Ollama and at the proxy: it prints and exits the same.

Some of it is typed in a terminal. Both sides have one Ollama and run one after the other.
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

from tests.integration.conftest import HERE, environment, run_ollama

termios = pytest.importorskip("termios", reason="needs a pseudo-terminal")

PROMPT = b"Send a message"
PATIENCE = 30.0  # seconds
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|[\u2800-\u28ff] ?")  # and the spinner
MASKS = [  # a time, a digest and a measure, which no two runs share
    (re.compile(r"(\d+|About an?|Less than a) (second|minute|hour)s? (ago|from now) *"), "THEN"),
    (re.compile(r"\b[0-9a-f]{12,64}\b"), "DIGEST"),
    (re.compile(r"\d+% *▕.*"), "PROGRESS"),
]
SETTINGS = "PARAMETER temperature 0\nPARAMETER seed 7\nPARAMETER num_predict 9\n"
COMMANDS = """
--version
list
list tiny-t
show tiny-tools
show tiny-tools --modelfile
show tiny-embed -v
run tiny tell-me-a-story
run tiny /etc/hosts-is-text
run tiny --format json tell-me
run tiny --format xml tell-me
run tiny --keepalive 0s hear
run tiny --think hear
run tiny-embed hear
ps
cp tiny-tools copied
show copied
rm copied
rm copied
cp no-such-model x
create made -f Modelfile
create made -f no-such-file
run made hear
stop made
rm made
stop no-such-model
pull http://127.0.0.1:1/x/y --insecure
push http://127.0.0.1:1/x/y --insecure
""".strip().splitlines()

Outcome = tuple[int, str, list[str]]


@pytest.fixture(scope="module")
def folder(home: Path) -> Path:
    """Where commands run; it holds a Modelfile."""
    text = f"FROM {HERE / 'tiny.gguf'}\n{SETTINGS}"
    (home / "Modelfile").write_text(text, encoding="utf-8")
    return home


def run(binary: str, folder: Path, url: str, *arguments: str) -> Outcome:
    """Return the exit status, the lines of the output and the last line of what went wrong."""
    done = run_ollama(binary, folder, url, *arguments)
    error = masked(done.stderr).splitlines()[-1:] if done.returncode else []
    output = masked(done.stdout)
    if arguments[0] == "ps":  # by the end of their stay, which two loaded at once may swap
        output = "".join(sorted(output.splitlines(keepends=True)))
    return done.returncode, output, error


def masked(text: str) -> str:
    text = CONTROL.sub("", text)
    for pattern, mask in MASKS:
        text = pattern.sub(mask, text)
    return text


@pytest.fixture(scope="module")
def transcripts(
    binary: str, folder: Path, direct: str, proxied: str
) -> list[tuple[Outcome, Outcome]]:
    """What each of COMMANDS did, in a row: directly, and through the proxy."""
    sides = [[run(binary, folder, u, *c.split()) for c in COMMANDS] for u in (direct, proxied)]
    return list(zip(*sides, strict=True))


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=COMMANDS)
def test_a_command_does_the_same(transcripts: list[tuple[Outcome, Outcome]], number: int) -> None:
    direct, proxied = transcripts[number]

    assert proxied == direct


def test_a_file_is_uploaded_as_it_is(
    binary: str, tmp_path: Path, home: Path, direct: str, proxied: str
) -> None:
    blobs, outcomes = home / "models" / "blobs", []
    (tmp_path / "Modelfile").write_text(f"FROM ./file.gguf\n{SETTINGS}", encoding="utf-8")
    for side, url in (("one", direct), ("other", proxied)):
        before = {*blobs.iterdir()}
        data = (HERE / "tiny.gguf").read_bytes() + side.encode().ljust(32, b"\0")
        (tmp_path / "file.gguf").write_bytes(data)
        created = run(binary, tmp_path, url, "create", "made", "-f", "Modelfile")
        assert data in [blob.read_bytes() for blob in {*blobs.iterdir()} - before]
        ran = run(binary, tmp_path, url, "run", "made", "hear")
        outcomes.append((created, ran, run(binary, tmp_path, url, "rm", "made")))

    assert outcomes[0] == outcomes[1] and outcomes[0][1][0] == 0


@contextmanager
def terminal(binary: str, folder: Path, url: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run `ollama run tiny` in a terminal until the block ends and /bye; give its keyboard."""
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
        os.write(keyboard, b"/bye\r")
        assert process.wait(PATIENCE) == 0
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


def converse(binary: str, folder: Path, url: str, *lines: str) -> list[str]:
    """Type `lines` at `ollama run tiny`, and return what the screen showed after each."""
    screens = []
    with terminal(binary, folder, url) as (keyboard, _):
        for line in lines:
            os.write(keyboard, line.encode() + b"\r")
            screens.append(shown(keyboard, PROMPT))
    return screens


@pytest.mark.parametrize(
    "lines",
    [
        ["hello", "and then?", "/nope", "/etc/hosts is text"],
        ["/show template", "/show system", "/show nonsense"],
        ["/set parameter seed 9", "hello", "/clear", "hello"],
        ["/set system be brief", "hello", "/show system"],
        ["/set format json", "hello"],
        ["/load tiny", "hello", "/save saved"],
    ],
    ids=" ".join,
)
def test_what_is_typed_does_the_same(
    binary: str, folder: Path, direct: str, proxied: str, lines: list[str]
) -> None:
    expected = converse(binary, folder, direct, *lines)

    assert all(expected)
    assert converse(binary, folder, proxied, *lines) == expected


def test_after_a_blank_a_command_may_be_typed(binary: str, folder: Path, proxied: str) -> None:
    question = " /rag what did we decide in May?"

    helped, answered = converse(binary, folder, proxied, " /help", question)

    assert "/rag: " in helped and "/translate: " in helped
    assert "Sources:\n- decisions.md" in answered


def test_an_interrupt_ends_the_answer_and_frees_the_model(
    binary: str, folder: Path, direct: str, proxied: str, http: httpx.Client
) -> None:
    for url in (direct, proxied):
        with terminal(binary, folder, url) as (keyboard, process):
            for line, mark in (("/set parameter num_predict 100000", PROMPT), ("hello", b" the")):
                os.write(keyboard, line.encode() + b"\r")
                shown(keyboard, mark)
            os.killpg(process.pid, signal.SIGINT)
            shown(keyboard, PROMPT)
            turn = {"model": "tiny", "prompt": "once", "stream": False}
            assert http.post(f"{direct}/api/generate", json=turn).is_success
