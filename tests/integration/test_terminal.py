"""The `ollama` command line with OLLAMA_HOST at the proxy, also typed at, in a terminal."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from pathlib import Path

import pytest

termios = pytest.importorskip("termios", reason="needs a pseudo-terminal")

PROMPT = b"Send a message"
PATIENCE = 20.0  # seconds
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|[\u2800-\u28ff] ")  # and a spinner's frames
UNTIL = re.compile(r"(About an?|Less than a|\d+) \w+ from now *")  # the clock goes on
COMMANDS = [
    ["list"],
    ["show", "tiny-tools"],
    ["show", "tiny-tools", "--modelfile"],
    ["show", "tiny-embed", "-v"],
    ["run", "tiny", "tell me a story"],
    ["run", "tiny", "/etc/hosts is text"],
    ["run", "tiny", "--format", "json", "tell me"],
    ["ps"],
    ["cp", "tiny-tools", "copied"],
    ["show", "copied"],
    ["rm", "copied"],
    ["rm", "copied"],
    ["create", "made", "-f", "Modelfile"],
    ["run", "made", "hear"],
    ["stop", "made"],
    ["rm", "made"],
    ["stop", "no-such-model"],
    ["show", "no-such-model"],
    ["cp", "no-such-model", "x"],
]


@pytest.fixture(scope="session")
def folder(home: Path) -> Path:
    """Where commands run; it holds a Modelfile."""
    model = Path(__file__).parent / "tiny.gguf"
    text = f"FROM {model}\nPARAMETER temperature 0\nPARAMETER seed 7\nPARAMETER num_predict 9\n"
    (home / "Modelfile").write_text(text, encoding="utf-8")
    return home


def environment(folder: Path, url: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "OLLAMA_HOST": url, "TERM": "xterm"}


@pytest.fixture(scope="session")
def transcripts(
    binary: str, folder: Path, direct: str, proxied: str
) -> tuple[list[object], list[object]]:
    """What each of COMMANDS did, in a row: directly, and through the proxy."""

    def run(url: str, command: list[str]) -> object:
        done = subprocess.run(
            [binary, *command],
            cwd=folder,
            env=environment(folder, url),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        error = ESCAPES.sub("", done.stderr) if done.returncode else ""  # else it is a spinner
        output = UNTIL.sub("", done.stdout)
        if command == ["ps"]:  # by the end of their stay, which two loaded at once may swap
            output = "".join(sorted(output.splitlines(keepends=True)))
        return done.returncode, output, error.splitlines()[-1:]

    one, other = ([run(url, command) for command in COMMANDS] for url in (direct, proxied))
    return one, other


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[" ".join(c) for c in COMMANDS])
def test_a_command_does_the_same(
    transcripts: tuple[list[object], list[object]], number: int
) -> None:
    direct, proxied = transcripts

    assert proxied[number] == direct[number]


def converse(binary: str, folder: Path, url: str, *lines: str) -> list[str]:
    """Type `lines` at `ollama run tiny`, then /bye; return what the screen showed after each."""
    keyboard, screen = os.openpty()
    termios.tcsetwinsize(screen, (24, 200))
    command, environ = [binary, "run", "tiny"], environment(folder, url)
    process = subprocess.Popen(command, env=environ, stdin=screen, stdout=screen, stderr=screen)
    os.close(screen)
    try:
        read_to_prompt(keyboard)
        answers = [answer(keyboard, line) for line in lines]
        os.write(keyboard, b"/bye\r")
        assert process.wait(PATIENCE) == 0
        return answers
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def answer(keyboard: int, line: str) -> str:
    os.write(keyboard, line.encode() + b"\r")
    echo, _, text = read_to_prompt(keyboard).partition("\n")
    assert echo == line
    return text.strip()


def read_to_prompt(keyboard: int) -> str:
    """Return what the screen shows until the prompt waits for the next line."""
    text, end = b"", time.monotonic() + PATIENCE
    while PROMPT not in text:
        readable, _, _ = select.select([keyboard], [], [], end - time.monotonic())
        assert readable, f"no prompt after {text!r}"
        text += os.read(keyboard, 4096)
    return ESCAPES.sub("", text.partition(PROMPT)[0].decode()).removesuffix(">>> ")


def test_a_conversation_is_the_same(binary: str, folder: Path, direct: str, proxied: str) -> None:
    lines = ("hello", "and then?", "/nope", "/etc/hosts is text")

    expected = converse(binary, folder, direct, *lines)

    assert all(expected)
    assert converse(binary, folder, proxied, *lines) == expected


def test_after_a_blank_a_command_may_be_typed(binary: str, folder: Path, proxied: str) -> None:
    question = " /rag what did we decide in May?"

    helped, answered = converse(binary, folder, proxied, " /help", question)

    assert "/rag: " in helped and "/translate: " in helped
    assert "Sources:\n- decisions.md" in answered
