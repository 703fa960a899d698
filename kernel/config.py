"""Config: every setting, its default, its meaning.

`osp.toml` mirrors the dataclasses key for key; `OSP_SECTION_KEY` in the environment overrides the
file, and flags override both. `load` makes one table of the three and `build` reads it: an unknown
key, a wrong type or a number out of range is a ConfigError that says where it stands (in the file,
the variable or the flag) and what would be right. Times are seconds, sizes bytes. A relative path
starts at the file's folder, or at the working directory if the environment has it. Where Ollama
is, is read as Ollama reads OLLAMA_HOST. `places` says which file counts if none is named.
"""

from __future__ import annotations

import os.path
import re
import sys
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from kernel.errors import ConfigError

T = TypeVar("T")
HOME = Path(__file__).resolve().parent.parent  # the folder of osp.py
NOTE = "ollama_smart_proxy-*.dist-info"  # pip and uv write it beside a folder that they install
# Where programs keep files, if not as XDG says: a variable, and the folder if that is not set
OTHERS = {"darwin": ("", "Library/Application Support"), "win32": ("LOCALAPPDATA", "AppData/Local")}
Settings = Mapping[str, Any]
VARIABLE = re.compile(r"OSP_[A-Z]+_\w+")  # section and key
SHORT = {"--host": "OSP_SERVER_HOST", "--port": "OSP_SERVER_PORT"}
SHORT |= {"--upstream": "OSP_UPSTREAM_URL", "OSP_PLUGINS": "OSP_PLUGINS_ONLY"}
WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
WORDS |= {Path: "a path", tuple: "a list of strings"}
PRESET = re.compile(r"[\w.:/-]+", re.ASCII)  # its name
NAMED = "it must name a `model`, and be called by letters, digits and . _ - : /"
OPTION = "a number, or true or false (`stop`: a list of strings)"
KEY_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,39}", re.ASCII)
KEY_NAMED = "letters, digits, _ and - can name a key"
FRESH = "`python osp.py key NAME` prints a fresh one"
SECRET = re.compile(r"[!-~]{8,}")
SECRET_NAME = re.compile(r"(?i)(authorization|: store)$")  # of settings that no message shows
# Seconds, or between quotes what Go's time.ParseDuration takes
STAY = re.compile(r"-?\d{1,9}(\.\d+)?|'[-+]?(0|(\d*\.?\d+([num]?s|m|h))+)'", re.ASCII)
SIGNS = re.compile(r"(?:[^\w\s]|_)*")

FORM = "an address like http://127.0.0.1:11434"
# Scheme, host, port and path, in quotes or not; an IPv6 host needs brackets only before a port
NAME = r"""[^\s@/:"'\[\]]*"""
ADDRESS = re.compile(
    rf"""[\s"']*(?:(https?)://)?(?!.*://)(\[[\w.:%]*\]|{NAME}|(?:{NAME}:)*{NAME})"""
    rf"""(?::({NAME}))?(?:/([^\s"']*))?[\s"']*"""
)


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
    """Read an address as Ollama does (envconfig.Host in its sources). Raises ConfigError.

    `h`, `h:p`, `:p`, `http://h` (port 80), `https://h/base`, `::1`, `[::1]:p`; quotes around it; a
    port that is none means the default. An address that means "all of mine" means this machine.
    """
    found = ADDRESS.fullmatch(text)
    if not found:
        raise ConfigError(f"{text!r} is wrong here, it must be {FORM}")
    scheme, host, port, base = found.groups(default="")
    if text.strip(" \"'") == "ollama.com":
        scheme = "https"
    default = {"http": 80, "https": 443}.get(scheme, 11434)
    number = int(port) if port.isascii() and port.isdigit() and int(port) <= 65535 else default
    host = host.strip("[]")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    base = base.strip("/")
    return Upstream(scheme or "http", host, number, f"/{base}" if base else "")


# A type, what a value must be besides, and the check
Seconds = Annotated[float, "above 0", lambda number: 0 < number < 1e15]  # neither NaN nor infinity
Size = Annotated[int, "above 0", lambda number: number > 0]
Count = Annotated[int, "0 or more", lambda number: number >= 0]
Port = Annotated[int, "0 to 65535", lambda number: 0 <= number <= 65535]
Signs = Annotated[str, "without letters, digits and spaces", SIGNS.fullmatch]
Address = Annotated[str, FORM, ADDRESS.fullmatch]
LEVELS = ("low", "medium", "high", "max")
THINK = "true, false, low, medium, high or max"
Think = Annotated[Any, THINK, lambda value: type(value) is bool or value in LEVELS]
Stay = Annotated[Any, 'seconds, or a time like "30m"', lambda value: STAY.fullmatch(repr(value))]
Credentials = Annotated[str, "like Bearer KEY", re.compile("([!-~]+ [!-~]+)?").fullmatch]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    host: str = "127.0.0.1"  # where the proxy listens, in every form that OLLAMA_HOST takes
    port: Port = 11435  # unless the host has one; 0: any free one
    max_body: Size = 32 * 2**20  # chats up to this size are parsed; larger ones stream untouched
    data: Path = HOME / "data"  # a folder for each agent; `load` puts it beside osp.toml
    store: str = field(default="", repr=False)  # PostgreSQL for what agents keep; empty: SQLite
    shutdown: Seconds = 5.0  # how long open answers may go on after a signal


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    url: Address = "http://127.0.0.1:11434"  # every form that OLLAMA_HOST takes
    connect_timeout: Seconds = 5.0
    authorization: Credentials = field(default="", repr=False)  # sent, not the client's own
    parallel: Count = 0  # requests that ask a model at once, others wait for their turn; 0: all


@dataclass(frozen=True, slots=True)
class PluginsConfig:
    dirs: tuple[Path, ...] = (HOME / "plugins",)  # the first folder that has a command wins
    only: tuple[str, ...] = ()  # these commands and no others (or OSP_PLUGINS; "off": none)


@dataclass(frozen=True, slots=True)
class CommandsConfig:
    prefix: Signs = "/"  # the sign before a command; empty: nothing typed is a command


@dataclass(frozen=True, slots=True)
class ChainConfig:
    timeout: Seconds = 30.0  # per hook; the clock stands still while the hook asks the model
    rounds: Size = 5  # of calls of tools, in one answer
    notice: bool = True  # a line under the answer when an agent that was asked for failed


@dataclass(frozen=True, slots=True)
class AccessConfig:
    deny: tuple[str, ...] = ()  # closed paths, with all below them
    hosts: tuple[str, ...] = ()  # names that a Host header may say, beside Ollama's own rules
    origins: tuple[str, ...] = ()  # web pages that may use agents, beside Ollama's own rules


@dataclass(frozen=True, slots=True)
class Key:
    """The key of somebody who may come in, and what it opens; its table's name is theirs."""

    key: str = field(default="", repr=False)  # "$NAME" is the environment's
    models: tuple[str, ...] = ()  # patterns of those that it may ask; empty: all
    agents: tuple[str, ...] = ()  # patterns of those that it may ask for; empty: all
    deny: tuple[str, ...] = ()  # paths that are closed to it, with all below them
    priority: Annotated[float, "finite", isfinite] = 0.0  # who waits for a model: lowest first

    @property
    def is_limited(self) -> bool:
        return bool(self.models or self.agents or self.deny)


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"  # auto: text at a terminal, else JSON


@dataclass(frozen=True, slots=True)
class PageConfig:
    requests: Annotated[int, "1 to 10000", lambda number: 0 < number <= 10000] = 200  # kept
    bodies: bool = False  # keep texts of requests and answers, too: in memory, cut


@dataclass(frozen=True, slots=True)
class Preset:
    """A model that Ollama is asked to make: it stands in every client's list of models."""

    model: str = ""  # what it is made from
    agents: str = ""  # in a chat, as one would type them: "/rag:k=6 /translate:de"
    system: str = ""  # its system prompt
    options: Settings = field(default_factory=dict)  # Ollama's parameters, num_ctx for example
    think: Think = None  # in a chat that does not say it: whether, or how much
    keep_alive: Stay = None  # the same: how long the model stays loaded; below 0: for ever


@dataclass(frozen=True, slots=True)
class Config:
    server: ServerConfig = field(default_factory=ServerConfig)
    upstream: UpstreamConfig = field(default_factory=UpstreamConfig)
    plugins: PluginsConfig = field(default_factory=PluginsConfig)
    commands: CommandsConfig = field(default_factory=CommandsConfig)
    chain: ChainConfig = field(default_factory=ChainConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    keys: Mapping[str, Key] = field(default_factory=dict)  # [keys.NAME]; empty: no key needed
    log: LogConfig = field(default_factory=LogConfig)
    page: PageConfig = field(default_factory=PageConfig)
    presets: Mapping[str, Preset] = field(default_factory=dict)  # [presets."NAME"]
    agents: Settings = field(default_factory=dict)  # [agents.NAME] mirrors config.json


def places(environ: Mapping[str, str]) -> tuple[Path, Path | None]:
    """Return the file osp.toml, there or not, and the folder of data (None: beside that file).

    Both lie beside osp.py, but for a copy that pip or uv installed where the platform keeps them.
    """
    if not any(HOME.parent.glob(NOTE)):
        return HOME / "osp.toml", None
    if sys.platform in OTHERS:
        folder = user_folder(environ, *OTHERS[sys.platform])
        return folder / "osp.toml", folder / "data"
    settings = user_folder(environ, "XDG_CONFIG_HOME", ".config")
    return settings / "osp.toml", user_folder(environ, "XDG_DATA_HOME", ".local/share")


def user_folder(environ: Mapping[str, str], variable: str, folder: str) -> Path:
    path = Path(environ.get(variable, ""))  # XDG's rule: a relative one does not count
    return (path if path.is_absolute() else Path.home() / folder) / "osp"


def load(file: Path | None, environ: Mapping[str, str], flags: Mapping[str, str | None]) -> Config:
    """Read `file`, then `environ`, then `flags` ({"--port": "1"}). Raises ConfigError."""
    usual, data = places(environ)
    base = (file or usual).absolute().parent
    own = base / "plugins"
    try:
        toml = file.read_text(encoding="utf-8") if file else ""
        table: dict[str, Any] = {"server": {}, "plugins": {}, **tomllib.loads(toml)}
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file}: {exc}") from exc
    sections = get_type_hints(Config)
    for name, text in {**environ, **flags}.items():
        found = VARIABLE.fullmatch(SHORT.get(name, name))
        section, key = found[0].lower().split("_", 2)[1:] if found else ("", "")
        known = is_dataclass(sections.get(section)) and text is not None
        if known and isinstance(table.setdefault(section, {}), dict):
            table[section][key] = (text, name)
    if isinstance(table["server"], dict):
        table["server"].setdefault("data", str(data or base / "data"))
    if data and os.path.isdir(own) and isinstance(table["plugins"], dict):
        table["plugins"].setdefault("dirs", [str(own), str(HOME / "plugins")])
    config = build(Config, table, str(file), base)
    for name, preset in config.presets.items():
        if not (preset.model and PRESET.fullmatch(name)):
            raise ConfigError(f"{file}: presets.{name}: {NAMED}")
        for key, value in preset.options.items():  # Ollama takes any, and fails in each chat
            if not isinstance(value, (list,) if key == "stop" else (int, float)):
                raise ConfigError(f"{file}: presets.{name}.options: {key} must be {OPTION}")
    return replace(config, keys=read_keys(config.keys, environ, f"{file}"))


def read_keys(keys: Mapping[str, Key], environ: Mapping[str, str], file: str) -> dict[str, Key]:
    """Return the keys with the environment's values in them. Raises ConfigError."""
    read: dict[str, Key] = {}
    for name, key in keys.items():
        where = f"{file}: keys.{name}"
        secret = resolved(key.key, environ, where)
        if not KEY_NAME.fullmatch(name):
            raise ConfigError(f"{where}: {KEY_NAMED}")
        if not SECRET.fullmatch(secret):
            raise ConfigError(f"{where}: key: this must be 8 or more visible signs: {FRESH}")
        if twin := next((other for other, known in read.items() if known.key == secret), None):
            raise ConfigError(f"{where}: key: {twin} has the same: {FRESH}")
        read[name] = replace(key, key=secret)
    return read


def resolved(value: Any, environ: Mapping[str, str], where: str) -> Any:
    """Return a setting with the environment's value for each text "$NAME" in it.

    Raises ConfigError for a name that is not set there.
    """
    if isinstance(value, dict):
        return {key: resolved(item, environ, where) for key, item in value.items()}
    if isinstance(value, list):
        return [resolved(item, environ, where) for item in value]
    if isinstance(value, str) and re.fullmatch(r"\$[A-Za-z_]\w*", value):
        if value[1:] not in environ:
            raise ConfigError(f"{where}: {value} is not set in the environment")
        return environ[value[1:]]
    return value


def build(kind: type[T], table: Settings, where: str, base: Path) -> T:
    """Make the dataclass `kind` of a table; `where` begins every complaint, `base` every path."""
    hints = get_type_hints(kind, include_extras=True)
    for key, value in table.items():
        if key not in hints:
            where = value[1] if isinstance(value, tuple) else where
            raise ConfigError(f"{where}: unknown key {key!r}; known are {', '.join(hints)}")
    return kind(**{k: convert(v, hints[k], f"{where}: {k}", base) for k, v in table.items()})


def convert(value: Any, hint: Any, where: str, base: Path) -> Any:
    """Return `value` as the type `hint`; a tuple is the text of a variable or flag, and its name.

    Raises a ConfigError that says what would be right.
    """
    if isinstance(value, tuple):
        return convert(parse(value[0], hint), hint, value[1], Path.cwd())
    origin, kinds = get_origin(hint), get_args(hint)
    expected = WORDS.get(origin or hint, "a table")
    if isinstance(value, dict) and is_dataclass(hint):
        return build(hint, value, where, base)  # type: ignore[arg-type]
    if isinstance(value, dict) and origin is Mapping and is_dataclass(kinds[1]):
        return {k: convert(v, kinds[1], f"{where}.{k}", base) for k, v in value.items()}
    if origin is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(convert(item, kinds[0], where, base) for item in value)
    if hint is Path and isinstance(value, str):
        return base / os.path.expanduser(value)
    if origin is Annotated:
        value, expected = convert(value, kinds[0], where, base), kinds[1]
        valid = kinds[2](value)
    elif origin is Literal:
        valid, expected = value in kinds, "one of " + ", ".join(map(repr, kinds))
    else:
        value = float(value) if hint is float and type(value) is int else value
        valid = hint is Any or type(value) is (dict if origin is Mapping else hint)
    if valid:
        return value
    secret = origin is tuple or ": keys" in where or SECRET_NAME.search(where)
    shown = "this" if secret else repr(value)  # it may hold keys
    raise ConfigError(f"{where}: {shown} is wrong here, it must be {expected}")


def parse(text: str, hint: Any) -> Any:
    """Read a text as TOML reads a number, a boolean or, between commas, a list of strings."""
    if get_origin(hint) is tuple:
        return [item.strip() for item in text.split(",") if item.strip()]
    if getattr(hint, "__origin__", hint) in (int, float, bool):
        with suppress(tomllib.TOMLDecodeError):
            return tomllib.loads(f"value = {text}")["value"]
    return text
