"""Config: every setting, its default, its meaning.

`osp.toml` mirrors the dataclasses key for key; `OSP_SECTION_KEY` in the environment overrides the
file, and flags override both. An unknown key or a wrong type is a ConfigError that says where, and
what would be right. Times are seconds, sizes bytes. A relative path is seen from the file that says
it, and from the working directory in the environment.
"""

from __future__ import annotations

import ipaddress
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from kernel.errors import ConfigError

T = TypeVar("T")
HOME = Path(__file__).resolve().parent.parent  # the folder of osp.py
Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    host: str = "127.0.0.1"  # where the proxy listens
    port: int = 11435
    max_body: int = 32 * 2**20  # chats up to this size are parsed; larger ones stream untouched
    data: Path = HOME / "data"  # what agents keep, a folder for each
    shutdown: float = 5.0  # how long open answers may go on after a signal


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    url: str = "http://127.0.0.1:11434"  # every form that OLLAMA_HOST takes
    connect_timeout: float = 5.0


@dataclass(frozen=True, slots=True)
class PluginsConfig:
    dirs: tuple[Path, ...] = (HOME / "plugins",)  # the first folder that has a command wins
    watch: bool = False  # load an agent again when its files change
    only: tuple[str, ...] = ()  # these commands and no others (or OSP_PLUGINS; "off": none)
    setup_timeout: float = 60.0


@dataclass(frozen=True, slots=True)
class CommandsConfig:
    prefix: str = "/"  # the sign before a command; empty: nothing typed is a command


@dataclass(frozen=True, slots=True)
class ChainConfig:
    timeout: float = 30.0  # per hook; the clock stands still while the hook asks the model
    notice: bool = True  # a line under the answer when an agent that was asked for failed


@dataclass(frozen=True, slots=True)
class AccessConfig:
    keys: tuple[str, ...] = ()  # who has none of these gets a 401; empty: no key needed
    deny: tuple[str, ...] = ()  # closed paths, with all below them
    hosts: tuple[str, ...] = ()  # names that a Host header may say, beside Ollama's own rules
    origins: tuple[str, ...] = ()  # web pages that may use agents, beside Ollama's own rules


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"  # auto: text at a terminal, else JSON


@dataclass(frozen=True, slots=True)
class Preset:
    """A name that clients find in their lists of models."""

    model: str = ""  # what it stands for
    agents: str = ""  # in a chat, as one would type them: "/rag:k=6 /translate:de"


@dataclass(frozen=True, slots=True)
class Config:
    server: ServerConfig = field(default_factory=ServerConfig)
    upstream: UpstreamConfig = field(default_factory=UpstreamConfig)
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    commands: CommandsConfig = field(default_factory=CommandsConfig)
    chain: ChainConfig = field(default_factory=ChainConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    log: LogConfig = field(default_factory=LogConfig)
    presets: Mapping[str, Preset] = field(default_factory=dict)  # [presets."NAME"]
    agents: Settings = field(default_factory=dict)  # [agents.NAME] mirrors config.json


def load(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, Settings]) -> Config:
    """Read `file`, then `environ`, then `flags` ({section: {key: value}}). Raises ConfigError."""
    config = build(Config, read_toml(file) if file else {}, str(file), (file or HOME).parent)
    for name, kind in get_type_hints(Config).items():
        if is_dataclass(kind):
            said = {**environment(name, kind, environ), **flags.get(name, {})}
            section = replace(getattr(config, name), **said)
            check_numbers(name, section)
            config = replace(config, **{name: section})
    if any(sign.isspace() or sign.isalnum() for sign in config.commands.prefix):
        raise ConfigError("commands.prefix: letters, digits and spaces cannot begin a command")
    for name, preset in config.presets.items():
        if not preset.model or "+" in name:
            raise ConfigError(f"presets.{name}: it must name a `model`, and have no + in its name")
    parse_upstream(config.upstream.url)
    return config


def read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"{file}: {exc}") from exc


def build(kind: type[T], table: Settings, where: str, base: Path) -> T:
    """Make the dataclass `kind` of a table; `where` begins every complaint, `base` every path."""
    hints = get_type_hints(kind)
    for key in table:
        if key not in hints:
            raise ConfigError(f"{where}: unknown key {key!r}; known are {', '.join(hints)}")
    return kind(**{k: convert(v, hints[k], f"{where}: {k}", base) for k, v in table.items()})


def convert(value: Any, hint: Any, where: str, base: Path) -> Any:
    """Return `value` as the type `hint`, or raise a ConfigError that says what would be right."""
    origin, kinds = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(value, dict):
        return build(hint, value, where, base)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(convert(item, kinds[0], where, base) for item in value)
    if origin is Mapping and isinstance(value, dict) and is_dataclass(kinds[1]):
        return {k: convert(v, kinds[1], f"{where}.{k}", base) for k, v in value.items()}
    if origin is UnionType:
        return convert(value, kinds[0], where, base)
    if hint is Path and isinstance(value, str):
        return (base / Path(value).expanduser()).absolute()
    if hint is float and type(value) is int:
        return float(value)
    if (
        value in kinds
        if origin is Literal
        else type(value) is (dict if origin is Mapping else hint)
    ):
        return value
    shown = "this" if origin is tuple else repr(value)  # a key stays out of the terminal
    raise ConfigError(f"{where}: {shown} is wrong here, it must be {expected(hint)}")


def expected(hint: Any) -> str:
    """Say a type in an operator's words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is UnionType:
        return " or ".join(expected(arg) for arg in get_args(hint) if arg is not NoneType)
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    names |= {Path: "a path", tuple: "a list of strings"}
    return names.get(get_origin(hint) or hint, "a table")


def environment(section: str, kind: Any, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what `OSP_<SECTION>_<KEY>` says; a list is separated by commas."""
    hints = get_type_hints(kind)
    prefix = f"OSP_{section.upper()}_"
    names = {name: name.removeprefix(prefix).lower() for name in environ if name.startswith(prefix)}
    if section == "plugins" and "OSP_PLUGINS" in environ:
        names["OSP_PLUGINS"] = "only"
    for name, key in names.items():
        if key not in hints:
            known = ", ".join(prefix + known.upper() for known in hints)
            raise ConfigError(f"{name}: unknown; known are {known}")
    return {
        key: convert(parse(environ[name], hints[key]), hints[key], name, Path.cwd())
        for name, key in names.items()
    }


def parse(text: str, hint: Any) -> Any:
    """Read a string of the environment as TOML would; `convert` judges the result."""
    if get_origin(hint) is tuple:
        return [item.strip() for item in text.split(",") if item.strip()]
    if hint in (int, float, bool):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return text
    return text


def check_numbers(name: str, section: Any) -> None:
    """Raise ConfigError for a number that has the right type and cannot work."""
    for key, hint in get_type_hints(type(section)).items():
        low, high = (0, 65535) if key == "port" else (1e-9, 1e15)
        if hint in (int, float) and not low <= getattr(section, key) <= high:
            span = f"{low} to {high}" if key == "port" else "above 0"
            raise ConfigError(f"{name}.{key}: {getattr(section, key)} is wrong, it must be {span}")


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
    """Read an address as Ollama reads OLLAMA_HOST (envconfig.Host in its sources).

    `h`, `h:p`, `:p`, `http://h` (port 80), `https://h/base`, `::1`, `[::1]:p`; quotes around it; a
    port that is none means the default. An address that means "all of mine" means this machine.
    """
    text = text.strip().strip("\"'").strip()
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = ("https", text) if text == "ollama.com" else ("http", text)
    hostport, _, base = rest.partition("/")
    host, port = split_port(hostport)
    if scheme not in ("http", "https") or "@" in hostport or any(map(str.isspace, host + base)):
        raise ConfigError(f"upstream.url: {text!r} is no address like http://127.0.0.1:11434")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    default = 443 if scheme == "https" else 80 if separator else 11434
    number = int(port) if port.isascii() and port.isdigit() and int(port) <= 65535 else default
    base = base.strip("/")
    return Upstream(scheme, host, number, f"/{base}" if base else "")


def split_port(text: str) -> tuple[str, str]:
    """Split `host:port`, `[v6]:port` or a bare IPv6 address; the port may be empty."""
    try:
        return str(ipaddress.IPv6Address(text.strip("[]"))), ""
    except ValueError:
        host, _, port = text.rpartition(":") if ":" in text else (text, "", "")
        return host.strip("[]"), port
