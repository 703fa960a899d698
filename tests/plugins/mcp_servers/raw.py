"""An MCP server without the SDK: `raw.py MODE` speaks on stdin and stdout, or fails in one way.

It notes its process id in the file that `STARTS` names, and offers what `TOOLS` holds as JSON, in
which HUGE stands for 10 MB.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

MODE = sys.argv[1]
ECHO = {"name": "echo", "description": "Says it again.", "inputSchema": {"type": "object"}}
OFFERED = os.environ.get("TOOLS") or json.dumps([ECHO])
TOOLS: list[Any] = json.loads(OFFERED.replace("HUGE", "x" * 10_000_000))
MODERN = {"resultType": "complete", "ttlMs": 0, "cacheScope": "private"}  # in every answer of 2026


def say(**message: Any) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def flood(text: str) -> None:
    while True:
        sys.stdout.write(text * 1000)


def answer(method: str, params: dict[str, Any]) -> Any:
    """Return a result; None for a method that is not known."""
    if method == "server/discover" and MODE == "modern":
        return {"supportedVersions": ["2026-07-28"], "capabilities": {"tools": {}}, **MODERN}
    if method == "initialize" and MODE != "modern":
        info = {"name": "raw", "version": "1"}
        version = "2025-11-25" if MODE == "last" else "2024-11-05"
        return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        if MODE == "pages":
            page = int(params.get("cursor", 0))
            return {"tools": [{**ECHO, "name": f"echo{page}"}], "nextCursor": f"{page + 1}"}
        return {"tools": TOOLS} | (MODERN if MODE == "modern" else {})
    if method == "tools/call":
        text = called(**params.get("arguments", {}))
        return {"content": [{"type": "text", "text": text}]} | (MODERN if MODE == "modern" else {})
    return None


def called(do: str = "", text: str = "", **_: Any) -> str:
    """Do what the tool was asked for, and return its text."""
    if do == "learn":
        TOOLS.append({**ECHO, "name": text})
        say(method="notifications/tools/list_changed")
    if do == "exit":
        sys.exit(3)
    if do == "lines":
        flood('{"jsonrpc": "2.0", "method": "notifications/message"}\n')
    if do == "endless":
        flood("x" * 1000)
    if do == "hang":
        sys.stderr.write(text + "\n")
        time.sleep(60)
    return text * (10_000_000 if do == "large" else 1)


if starts := os.environ.get("STARTS"):
    with open(starts, "a") as file:
        file.write(f"{os.getpid()}\n")
sys.stderr.write("x" * 10_000 + "\nready\n")
if MODE == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "60"])
    with open(os.environ["STARTS"], "a") as file:
        file.write(f"{child.pid}\n")
if MODE == "mute":
    time.sleep(60)
if MODE == "flood":
    flood("no message\n")
if MODE == "wrong":
    sys.stdout.write("Listening for messages\n")
for line in sys.stdin:
    asked = json.loads(line)
    if MODE == "quits" and asked["method"] == "server/discover":
        sys.exit(3)
    if "id" in asked:
        result = answer(asked["method"], asked.get("params", {}))
        wrong = {"error": {"code": -32601, "message": "Method not found"}}
        say(id=asked["id"], **({"result": result} if result is not None else wrong))
if MODE == "stubborn":
    time.sleep(60)
