"""Address: where Ollama is, read as Ollama reads OLLAMA_HOST."""

from __future__ import annotations

from dataclasses import dataclass

from kernel.errors import ConfigError

FORM = "an address like http://127.0.0.1:11434"


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where Ollama is; `base` is a path before every path, without a slash at its end."""

    scheme: str
    host: str
    port: int
    base: str = ""

    @property
    def authority(self) -> str:
        """The Host header that Ollama is sent: the address that it listens on itself."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.base}"


def parse_upstream(text: str) -> Upstream:
    """Return the address that a text is. Raises ConfigError."""
    upstream = read_address(text)
    if upstream is None:
        raise ConfigError(f"{text!r} is wrong here, it must be {FORM}")
    return upstream


def read_address(text: str) -> Upstream | None:
    """Read an address as Ollama reads OLLAMA_HOST (envconfig.Host in its sources).

    `h`, `h:p`, `:p`, `http://h` (port 80), `https://h/base`, `::1`, `[::1]:p`; quotes around it; a
    port that is none means the default. An address that means "all of mine" means this machine.
    """
    text = text.strip().strip("\"'").strip()
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = ("https", text) if text == "ollama.com" else ("http", text)
    hostport, _, base = rest.partition("/")
    has_port = hostport.count(":") == 1 or "]:" in hostport  # else it is a bare IPv6 address
    host, _, port = hostport.rpartition(":") if has_port else (hostport, "", "")
    if scheme not in ("http", "https") or "@" in hostport or any(map(str.isspace, host + base)):
        return None
    host = host.strip("[]") or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    default = 443 if scheme == "https" else 80 if separator else 11434
    number = int(port) if port.isascii() and port.isdigit() and int(port) <= 65535 else default
    base = base.strip("/")
    return Upstream(scheme, host, number, f"/{base}" if base else "")
