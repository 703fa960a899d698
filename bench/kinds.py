"""Kinds: how each server of the bench is started; what is not on this machine is None."""

from __future__ import annotations

import importlib.util
import json
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from bench.servers import Kind

HERE = Path(__file__).resolve().parent
RUNTIME = f"{platform.python_implementation()} {platform.python_version()}"
PATHS = ("/api/chat", "/api/embed", "/api/version")  # what the bench asks for

# Two agents that cost next to nothing themselves
HOOKS = {"piece": "on_chunk", "whole": "on_response"}
AGENT = """
from kernel.agent import BaseAgent

class Agent(BaseAgent):
    async def {hook}(self, text: str) -> str:
        return text.upper()
"""

NGINX = """
daemon off; worker_processes 1; error_log stderr crit; pid {folder}/nginx.pid;
events {{ worker_connections 8192; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    keepalive_requests 1000000;
    upstream ollama {{ server {authority}; keepalive 64; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=2048;
        location / {{
            proxy_pass http://ollama; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_buffering off; proxy_read_timeout 1h;
        }}
    }}
}}
"""


def upstream(folder: Path) -> Kind:
    """Return the canned Ollama in Go, or where there is none in Python; its name says which."""
    return in_go(folder) or in_python()


def in_go(folder: Path) -> Kind | None:
    if shutil.which("go") is None:
        return None
    built = folder / "upstream"
    subprocess.run(["go", "build", "-o", str(built), "."], cwd=HERE / "upstream", check=True)
    return Kind("Go", lambda port: [str(built), f"127.0.0.1:{port}"])


def in_python() -> Kind:
    script = str(HERE / "upstream" / "canned.py")
    return Kind("Python", lambda port: [sys.executable, script, f"127.0.0.1:{port}"])


def osp(folder: Path, url: str) -> Kind:
    """Return the proxy as its README starts it, with the agents of `HOOKS`."""
    for name, hook in HOOKS.items():
        plugin = folder / "plugins" / f"{name}_agent"
        plugin.mkdir(parents=True)
        (plugin / "agent.py").write_text(AGENT.format(hook=hook), encoding="utf-8")
    settings = folder / "osp.toml"
    values = {"upstream.url": url, "plugins.dirs": ["plugins"], "server.data": "data"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    settings.write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, str(HERE.parent / "osp.py"), "--config", str(settings), "--port"]
    return Kind("osp", lambda port: [*command, str(port)], ready="/health")


def bare(url: str) -> Kind:
    return Kind("bare", script("bare.py", url))


def naive(url: str) -> Kind | None:
    """Return the naive forwarder, or None without httpx."""
    if importlib.util.find_spec("httpx") is None:
        return None
    return Kind("naive", script("naive.py", url))


def script(name: str, url: str) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, str(HERE / name), f"127.0.0.1:{port}", url]


def nginx(folder: Path, url: str) -> Kind | None:
    """Return nginx as a plain proxy that keeps connections and no log, or None without it."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        return None
    found = binary

    def command(port: int) -> list[str]:
        home = folder / f"nginx-{port}"
        home.mkdir()
        settings = NGINX.format(folder=home, authority=urlsplit(url).netloc, port=port)
        (home / "nginx.conf").write_text(settings, encoding="utf-8")
        return [found, "-p", str(home), "-c", str(home / "nginx.conf")]

    return Kind("nginx", command)


def litellm(folder: Path, url: str) -> Kind | None:
    """Return LiteLLM's proxy, which forwards our paths unread, or None without it."""
    if importlib.util.find_spec("litellm") is None:
        return None
    settings = folder / "litellm.json"  # JSON is YAML, too
    paths = [{"path": path, "target": url + path, "auth": False} for path in PATHS]
    general = {"master_key": f"sk-{secrets.token_hex(32)}", "pass_through_endpoints": paths}
    settings.write_text(json.dumps({"general_settings": general}), encoding="utf-8")
    command = [sys.executable, "-m", "litellm.proxy.proxy_cli", "--config", str(settings)]
    command += ["--host", "127.0.0.1", "--telemetry", "False", "--port"]
    return Kind("litellm", lambda port: [*command, str(port)])
