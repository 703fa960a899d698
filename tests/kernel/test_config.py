"""Settings: where they come from, what counts more, and what is said of a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kernel.config import HOME, Config, Key, Preset, Upstream, load, parse_upstream
from kernel.errors import ConfigError


def load_text(folder: Path, text: str, **environ: str) -> Config:
    file = folder / "osp.toml"
    file.write_text(text, encoding="utf-8")
    return load(file, environ, {})


def complaint(folder: Path, text: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_text(folder, text, **environ)
    return str(caught.value).replace(f"{folder}/", "")


def test_without_anything_every_setting_has_its_default() -> None:
    config = load(None, {"PATH": "/bin", "OSP": "1"}, {})

    assert config == Config()
    assert (config.server.host, config.server.port) == ("127.0.0.1", 11435)
    assert config.upstream.url == "http://127.0.0.1:11434"
    assert (config.server.data, config.plugins.dirs) == (HOME / "data", (HOME / "plugins",))


def test_a_file_counts_key_by_key(tmp_path: Path) -> None:
    text = """
    server = {port = 1, shutdown = 2}
    access = {deny = ["a", "b"]}
    keys = {laptop = {key = "12345678", priority = 1}}
    chain = {notice = false}
    log = {level = "debug"}
    agents = {rag = {settings = {k = 6}}}
    presets = {notes = {model = "m", options = {num_ctx = 1}}}
    """

    config = load_text(tmp_path, text)

    assert (config.server.host, config.server.port) == ("127.0.0.1", 1)
    assert config.server.shutdown == 2.0 and type(config.server.shutdown) is float
    assert config.access.deny == ("a", "b")
    assert config.keys == {"laptop": Key("12345678", priority=1.0)}
    assert (config.chain.notice, config.log.level) == (False, "debug")
    assert config.agents == {"rag": {"settings": {"k": 6}}}
    assert config.presets == {"notes": Preset("m", options={"num_ctx": 1})}


@pytest.mark.parametrize(
    ("name", "value", "section", "expected"),
    [
        ("OSP_SERVER_HOST", "123", "server", "123"),
        ("OSP_SERVER_PORT", "80", "server", 80),
        ("OSP_SERVER_SHUTDOWN", "2", "server", 2.0),
        ("OSP_SERVER_DATA", "/var/osp", "server", Path("/var/osp")),
        ("OSP_SERVER_DATA", "here", "server", Path.cwd() / "here"),
        ("OSP_SERVER_DATA", "~/osp", "server", Path.home() / "osp"),
        ("OSP_CHAIN_NOTICE", "false", "chain", False),
        ("OSP_COMMANDS_PREFIX", "", "commands", ""),
        ("OSP_ACCESS_DENY", "a, b ,,c", "access", ("a", "b", "c")),
        ("OSP_ACCESS_DENY", "", "access", ()),
        ("OSP_PLUGINS_DIRS", "/a,b", "plugins", (Path("/a"), Path.cwd() / "b")),
        ("OSP_PLUGINS_ONLY", "rag", "plugins", ("rag",)),
        ("OSP_PLUGINS", "rag,translate", "plugins", ("rag", "translate")),
        ("OSP_PLUGINS", "off", "plugins", ("off",)),
        ("OSP_LOG_FORMAT", "json", "log", "json"),
    ],
)
def test_the_environment_says_what_the_file_could(
    name: str, value: str, section: str, expected: Any
) -> None:
    config = load(None, {name: value}, {})

    key = "only" if name == "OSP_PLUGINS" else name.split("_", 2)[2].lower()
    assert getattr(getattr(config, section), key) == expected


def test_the_environment_counts_more_than_the_file_and_flags_count_most(tmp_path: Path) -> None:
    file = tmp_path / "osp.toml"
    file.write_text('[server]\nhost = "a"\nport = 1\nshutdown = 1\n', encoding="utf-8")
    environ = {"OSP_SERVER_PORT": "2", "OSP_SERVER_SHUTDOWN": "2"}

    server = load(file, environ, {"--port": "3"}).server

    assert (server.host, server.shutdown, server.port) == ("a", 2.0, 3)


def test_a_relative_path_starts_at_the_file_that_says_it(tmp_path: Path) -> None:
    text = 'server = {data = "d"}\nplugins = {dirs = ["../p", "/q", "~/r"]}'

    config = load_text(tmp_path, text)

    assert config.server.data == tmp_path / "d"
    assert config.plugins.dirs == (tmp_path / "../p", Path("/q"), Path.home() / "r")
    assert load_text(tmp_path, "").server.data == tmp_path / "data"


WRONG = "is wrong here, it must be"
PRESET = "[presets.x]\nmodel = 'm'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sever]", "unknown key 'sever'; known are server, upstream, plugins,"),
        ("port = 1", "unknown key 'port'; known are server,"),
        ("[plugins]\nwatch = true", "plugins: unknown key 'watch'; known are dirs, only"),
        ("server = 1", f"server: 1 {WRONG} a table"),
        ("agents = []", f"agents: [] {WRONG} a table"),
        ("[server]\nport = '1'", f"server: port: '1' {WRONG} a whole number"),
        ("[server]\nport = true", f"server: port: True {WRONG} a whole number"),
        ("[server]\nport = 1.0", f"server: port: 1.0 {WRONG} a whole number"),
        ("[server]\nport = 65536", f"server: port: 65536 {WRONG} 0 to 65535"),
        ("[server]\nhost = 1", f"server: host: 1 {WRONG} a string"),
        ("[server]\ndata = 1", f"server: data: 1 {WRONG} a path"),
        ("[server]\nmax_body = 0", f"server: max_body: 0 {WRONG} above 0"),
        ("[chain]\ntimeout = -1", f"chain: timeout: -1.0 {WRONG} above 0"),
        ("[chain]\ntimeout = nan", f"chain: timeout: nan {WRONG} above 0"),
        ("[chain]\ntimeout = '1'", f"chain: timeout: '1' {WRONG} a number"),
        ("[chain]\nnotice = 1", f"chain: notice: 1 {WRONG} true or false"),
        ("[log]\nlevel = 'INFO'", f"log: level: 'INFO' {WRONG} one of 'debug', 'info', "),
        ("[plugins]\ndirs = [1]", f"plugins: dirs: this {WRONG} a list of strings"),
        ("[commands]\nprefix = 'ai'", f"commands: prefix: 'ai' {WRONG} without letters, dig"),
        ("[commands]\nprefix = '/ '", f"commands: prefix: '/ ' {WRONG} without letters, dig"),
        ("[upstream]\nurl = 'ftp://x'", f"upstream: url: 'ftp://x' {WRONG} an address like htt"),
        ("[presets.x]\nagents = '/a'", "presets.x: it must name a `model`"),
        ("[presets.'a+b']\nmodel = 'm'", "presets.a+b: it must name a `model`, and be called by"),
        ("[presets.x]\nmodel = 'm'\noptions = 1", f"presets.x: options: 1 {WRONG} a table"),
        (f"{PRESET}think = 'loud'", f"presets.x: think: 'loud' {WRONG} true, false, low, medium,"),
        (
            f"{PRESET}think = 1",
            f"presets.x: think: 1 {WRONG} true, false, low, medium, high or max",
        ),
        (f"{PRESET}think = []", f"presets.x: think: [] {WRONG} true, false, low, medium,"),
        (f"{PRESET}keep_alive = '1d'", f"presets.x: keep_alive: '1d' {WRONG} seconds, or a time l"),
        (f"{PRESET}keep_alive = '60'", f"presets.x: keep_alive: '60' {WRONG} seconds, or a time"),
        (f"{PRESET}keep_alive = true", f"presets.x: keep_alive: True {WRONG} seconds, or a time"),
        (f"{PRESET}keep_alive = inf", f"presets.x: keep_alive: inf {WRONG} seconds, or a time"),
        (f"{PRESET}options.num_ctx = '9'", "presets.x.options: num_ctx must be a number, or true"),
        (f"{PRESET}options.a = [1]", "presets.x.options: a must be a number, or true or false"),
        (
            f"{PRESET}options.a.b = 1",
            "presets.x.options: a must be a number, or true or false (`st",
        ),
        (f"{PRESET}options.stop = 'x'", "presets.x.options: stop must be a number, or true or fal"),
        ("[server\n", "Expected ']' at the end of a table declaration (at line 1, col"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file_and_with_what_is_right(
    tmp_path: Path, text: str, message: str
) -> None:
    assert complaint(tmp_path, text).startswith(f"osp.toml: {message}")


@pytest.mark.parametrize("stay", ["3600", "-1", "0", "1.5", "'1h'", "'1h30m'", "'-1m'", "'0'"])
@pytest.mark.parametrize("think", ["true", "false", "'low'", "'max'"])
def test_a_preset_says_how_long_to_stay_and_how_to_think_as_ollama_takes_it(
    tmp_path: Path, stay: str, think: str
) -> None:
    options = "options = {num_ctx = 1, temperature = 0.5, use_mmap = false, stop = ['a']}"
    text = f"{PRESET}keep_alive = {stay}\nthink = {think}\n{options}"

    preset = load_text(tmp_path, text).presets["x"]

    assert repr(preset.keep_alive) == stay
    assert repr(preset.think).lower() == think


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OSP_SERVER_PROT", "1", "unknown key 'prot'; known are host, port, "),
        ("OSP_SERVER_PORT", "x", f"'x' {WRONG} a whole number"),
        ("OSP_SERVER_PORT", "1.5", f"1.5 {WRONG} a whole number"),
        ("OSP_SERVER_PORT", "", f"'' {WRONG} a whole number"),
        ("OSP_CHAIN_NOTICE", "yes", f"'yes' {WRONG} true or false"),
        ("OSP_LOG_LEVEL", "loud", f"'loud' {WRONG} one of 'debug'"),
        ("OSP_UPSTREAM_URL", "a b", f"'a b' {WRONG} an address like http://127.0.0.1"),
    ],
)
def test_a_wrong_variable_is_named_with_what_is_right(
    tmp_path: Path, name: str, value: str, message: str
) -> None:
    file = "[server]\nport = 2\n[upstream]\nurl = 'h'"  # what a variable overrides is right

    assert complaint(tmp_path, file, **{name: value}).startswith(f"{name}: {message}")


@pytest.mark.parametrize("value", ["99999", "x"])
def test_a_wrong_flag_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--port: '?{value}'? {WRONG} "):
        load(None, {"OSP_SERVER_PORT": "1"}, {"--port": value, "--host": None})


def test_bytes_that_are_no_text_and_a_missing_file_are_said_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "osp.toml").write_bytes(b"\xff")

    for name in ("osp.toml", "nope.toml"):
        with pytest.raises(ConfigError, match=f"^{tmp_path}/{name}: "):
            load(tmp_path / name, {}, {})


KEYS = """
[keys.a]
key = "0123456789"
[keys.b]
key = {}
"""


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("4711", f"keys.b: key: this {WRONG} a string"),
        ("['4711']", f"keys.b: key: this {WRONG} a string"),
        ("'short'", "keys.b: key: this must be 8 or more visible signs: `python osp.py key NAME`"),
        ("'with a space'", "keys.b: key: this must be 8 or more visible signs"),
        ("'schlüssel'", "keys.b: key: this must be 8 or more visible signs"),
        ("''", "keys.b: key: this must be 8 or more visible signs"),
        ("'0123456789'", "keys.b: key: a has the same: `python osp.py key NAME` prints a fresh"),
        ("'$OSP_KEY_B'", "keys.b: $OSP_KEY_B is not set in the environment"),
        ("'12345678'\nmodel = 'x'", "keys.b: unknown key 'model'; known are key, models, agents,"),
        ("'12345678'\npriority = nan", f"keys.b: priority: this {WRONG} finite"),
        ("'12345678'\n[keys.'c d']\nkey = '87654321'", "keys.c d: letters, digits, _ and - can"),
    ],
)
def test_a_wrong_key_is_named_and_not_shown(tmp_path: Path, key: str, message: str) -> None:
    said = complaint(tmp_path, KEYS.format(key))

    assert said.startswith(f"osp.toml: {message}")
    assert not any(secret in said for secret in ("4711", "short", "0123", "schl", "space"))


def test_keys_in_the_place_of_the_table_are_not_shown(tmp_path: Path) -> None:
    for text in ("keys = ['4711']", "keys = '4711'", "[keys]\na = '4711'"):
        assert "4711" not in complaint(tmp_path, text)


@pytest.mark.parametrize("text", ["geheimnis", "Bearer geheim nis", "Bearer geheimnis\n"])
def test_a_wrong_authorization_is_not_shown(tmp_path: Path, text: str) -> None:
    said = complaint(tmp_path, "", OSP_UPSTREAM_AUTHORIZATION=text)

    assert said == f"OSP_UPSTREAM_AUTHORIZATION: this {WRONG} like Bearer KEY"
    assert "geheim" not in complaint(tmp_path, f"[upstream]\nauthorization = {json.dumps(text)}")


def test_a_key_may_stand_in_the_environment(tmp_path: Path) -> None:
    own = {"MINE": "abcdefgh", "OSP_UPSTREAM_AUTHORIZATION": "Bearer abcdefgh"}

    config = load_text(tmp_path, KEYS.format("'$MINE'"), **own)

    assert {name: key.key for name, key in config.keys.items()} == {
        "a": "0123456789",
        "b": "abcdefgh",
    }
    assert "abcdefgh" not in repr(config)


ADDRESSES = {  # as envconfig.Host in Ollama's sources reads them
    "http://127.0.0.1:11434": ["", ":", "0.0.0.0", "127.0.0.1", ' "127.0.0.1" ', "'127.0.0.1'"],
    "http://127.0.0.1:80": ["0.0.0.0:80", ":80"],
    "http://h:11434": ["h", "h:", "h:65536", "h:-1", "h:nope", "h/"],
    "http://h:0": ["h:0"],
    "http://h:1234": ["h:1234", "h:1234/"],
    "http://h:80": ["http://h"],
    "http://h:11434/ollama": ["h/ollama"],
    "https://ollama.com:443": ["ollama.com"],
    "https://h:443": ["https://h", "https://h:nope"],
    "https://h:1234": ["https://h:1234"],
    "https://h:443/a/b": ["https://h/a/b", "https://h/a/b/"],
    "http://[::1]:11434": ["::1", "[::1]", "::"],
    "http://[::1]:1234": ["[::1]:1234", "[::]:1234"],
    "http://[::1]:80": ["http://[::1]"],
}


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_upstream_is_read_as_ollama_reads_its_host(url: str) -> None:
    assert {parse_upstream(text).url for text in ADDRESSES[url]} == {url}


def test_an_upstream_has_its_parts() -> None:
    upstream = parse_upstream("https://[2001:db8::1]/a/")

    assert upstream == Upstream("https", "2001:db8::1", 443, "/a")
    assert upstream.authority == "[2001:db8::1]:443"


@pytest.mark.parametrize(
    "text", ["ftp://x", "://x", "http://me:pw@x", "a b", "http://x/a b", "[::1]h", "[", "a:b:c]"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be an address like http://127.0.0.1:11434"):
        parse_upstream(text)
