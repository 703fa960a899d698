"""Settings: where they come from, what counts more, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kernel.config import HOME, Config, Upstream, load, parse_upstream
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
    access = {keys = ["a", "b"]}
    chain = {notice = false}
    log = {level = "debug"}
    agents = {rag = {settings = {k = 6}}}
    """

    config = load_text(tmp_path, text)

    assert (config.server.host, config.server.port) == ("127.0.0.1", 1)
    assert config.server.shutdown == 2.0 and type(config.server.shutdown) is float
    assert config.access.keys == ("a", "b")
    assert (config.chain.notice, config.log.level) == (False, "debug")
    assert config.agents == {"rag": {"settings": {"k": 6}}}


@pytest.mark.parametrize(
    ("name", "value", "section", "expected"),
    [
        ("OSP_SERVER_HOST", "::1", "server", "::1"),
        ("OSP_SERVER_HOST", "123", "server", "123"),
        ("OSP_SERVER_PORT", "80", "server", 80),
        ("OSP_SERVER_SHUTDOWN", "2", "server", 2.0),
        ("OSP_SERVER_SHUTDOWN", "0.5", "server", 0.5),
        ("OSP_SERVER_DATA", "/var/osp", "server", Path("/var/osp")),
        ("OSP_SERVER_DATA", "here", "server", Path.cwd() / "here"),
        ("OSP_SERVER_DATA", "~/osp", "server", Path.home() / "osp"),
        ("OSP_CHAIN_NOTICE", "false", "chain", False),
        ("OSP_COMMANDS_PREFIX", "", "commands", ""),
        ("OSP_ACCESS_KEYS", "a, b ,,c", "access", ("a", "b", "c")),
        ("OSP_ACCESS_KEYS", "", "access", ()),
        ("OSP_ACCESS_HOSTS", "pi.lan", "access", ("pi.lan",)),
        ("OSP_PLUGINS_DIRS", "/a,b", "plugins", (Path("/a"), Path.cwd() / "b")),
        ("OSP_PLUGINS_ONLY", "rag", "plugins", ("rag",)),
        ("OSP_PLUGINS", "rag,translate", "plugins", ("rag", "translate")),
        ("OSP_PLUGINS", "off", "plugins", ("off",)),
        ("OSP_PLUGINS", "", "plugins", ()),
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

    server = load(file, environ, {"server": {"port": 3}}).server

    assert (server.host, server.shutdown, server.port) == ("a", 2.0, 3)


def test_a_relative_path_is_seen_from_the_file_that_says_it(tmp_path: Path) -> None:
    text = 'server = {data = "d"}\nplugins = {dirs = ["../p", "/q", "~/r"]}'

    config = load_text(tmp_path, text)

    assert config.server.data == tmp_path / "d"
    assert config.plugins.dirs == (tmp_path / "../p", Path("/q"), Path.home() / "r")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sever]", "osp.toml: unknown key 'sever'; known are server, upstream, plugins,"),
        ("port = 1", "osp.toml: unknown key 'port'; known are server,"),
        ("[log]\nlvl = 'info'", "osp.toml: log: unknown key 'lvl'; known are level, format"),
        ("server = 1", "osp.toml: server: 1 is wrong here, it must be a table"),
        ("agents = []", "osp.toml: agents: [] is wrong here, it must be a table"),
        ("[server]\nport = '1'", "osp.toml: server: port: '1' is wrong here, it must be a whole n"),
        ("[server]\nport = true", "osp.toml: server: port: True is wrong here, it must be a whole"),
        ("[server]\nport = 1.0", "osp.toml: server: port: 1.0 is wrong here, it must be a whole"),
        ("[server]\nport = 65536", "server.port: 65536 is wrong, it must be 0 to 65535"),
        ("[server]\nhost = 1", "osp.toml: server: host: 1 is wrong here, it must be a string"),
        ("[server]\ndata = 1", "osp.toml: server: data: 1 is wrong here, it must be a path"),
        ("[server]\nmax_body = 0", "server.max_body: 0 is wrong, it must be above 0"),
        ("[chain]\ntimeout = -1", "chain.timeout: -1.0 is wrong, it must be above 0"),
        ("[chain]\ntimeout = nan", "chain.timeout: nan is wrong, it must be above 0"),
        ("[chain]\ntimeout = inf", "chain.timeout: inf is wrong, it must be above 0"),
        ("[chain]\ntimeout = '1'", "osp.toml: chain: timeout: '1' is wrong here, it must be a nu"),
        ("[chain]\nnotice = 1", "osp.toml: chain: notice: 1 is wrong here, it must be true or fa"),
        ("[log]\nlevel = 'INFO'", "osp.toml: log: level: 'INFO' is wrong here, it must be one of"),
        (
            "[plugins]\ndirs = [1]",
            "osp.toml: plugins: dirs: this is wrong here, it must be a list of s",
        ),
        ("[commands]\nprefix = 'ai'", "commands.prefix: letters, digits and spaces cannot begin"),
        ("[commands]\nprefix = '/ '", "commands.prefix: letters, digits and spaces cannot begin"),
        ("[upstream]\nurl = 'ftp://x'", "upstream.url: 'ftp://x' is no address like http://127"),
        ("[server\n", "osp.toml: Expected ']' at the end of a table declaration (at line 1, col"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_right(
    tmp_path: Path, text: str, message: str
) -> None:
    assert complaint(tmp_path, text).startswith(message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OSP_SERVER_PROT", "1", "OSP_SERVER_PROT: unknown; known are OSP_SERVER_HOST, OSP_SERV"),
        ("OSP_SERVER_PORT", "x", "OSP_SERVER_PORT: 'x' is wrong here, it must be a whole number"),
        ("OSP_SERVER_PORT", "1.5", "OSP_SERVER_PORT: 1.5 is wrong here, it must be a whole num"),
        ("OSP_SERVER_PORT", "", "OSP_SERVER_PORT: '' is wrong here, it must be a whole number"),
        ("OSP_CHAIN_NOTICE", "yes", "OSP_CHAIN_NOTICE: 'yes' is wrong here, it must be true or"),
        ("OSP_LOG_LEVEL", "loud", "OSP_LOG_LEVEL: 'loud' is wrong here, it must be one of 'deb"),
        ("OSP_UPSTREAM_URL", "a b", "upstream.url: 'a b' is no address like http://127.0.0.1"),
    ],
)
def test_a_wrong_variable_is_named_with_what_is_right(
    tmp_path: Path, name: str, value: str, message: str
) -> None:
    assert complaint(tmp_path, "", **{name: value}).startswith(message)


def test_bytes_that_are_no_text_and_a_missing_file_are_said_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "osp.toml").write_bytes(b"\xff")

    for name in ("osp.toml", "nope.toml"):
        with pytest.raises(ConfigError, match=f"^{tmp_path}/{name}: "):
            load(tmp_path / name, {}, {})


@pytest.mark.parametrize("keys", ["'4711'", "4711", "[4711]", "['a', ['4711']]", "{a = '4711'}"])
def test_a_key_of_the_wrong_type_is_not_shown(tmp_path: Path, keys: str) -> None:
    message = complaint(tmp_path, f"access = {{keys = {keys}}}")

    assert message.startswith("osp.toml: access: keys: ") and "4711" not in message


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        ("example.com", "http://example.com:11434"),
        ("example.com:", "http://example.com:11434"),
        ("example.com:1234", "http://example.com:1234"),
        (":1234", "http://127.0.0.1:1234"),
        (":", "http://127.0.0.1:11434"),
        ("ollama.com", "https://ollama.com:443"),
        ("http://example.com", "http://example.com:80"),
        ("https://example.com", "https://example.com:443"),
        ("https://example.com:1234", "https://example.com:1234"),
        ("https://example.com/ollama", "https://example.com:443/ollama"),
        ("https://example.com/a/b/", "https://example.com:443/a/b"),
        ("example.com:1234/", "http://example.com:1234"),
        ("example.com/ollama", "http://example.com:11434/ollama"),
        ("example.com:65536", "http://example.com:11434"),
        ("example.com:-1", "http://example.com:11434"),
        ("example.com:nope", "http://example.com:11434"),
        ("https://example.com:nope", "https://example.com:443"),
        ("example.com:0", "http://example.com:0"),
        ("::1", "http://[::1]:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("[::1]:1234", "http://[::1]:1234"),
        ("http://[::1]", "http://[::1]:80"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:80", "http://127.0.0.1:80"),
        ("[::]:80", "http://[::1]:80"),
        ("::", "http://[::1]:11434"),
        (' "1.2.3.4" ', "http://1.2.3.4:11434"),
        ("'1.2.3.4'", "http://1.2.3.4:11434"),
    ],
)
def test_an_upstream_is_read_as_ollama_reads_its_host(text: str, url: str) -> None:
    assert parse_upstream(text).url == url


def test_an_upstream_has_its_parts() -> None:
    upstream = parse_upstream("https://[2001:db8::1]/a/")

    assert upstream == Upstream("https", "2001:db8::1", 443, "/a")
    assert upstream.authority == "[2001:db8::1]:443"


@pytest.mark.parametrize("text", ["ftp://x", "://x", "http://me:pw@x", "a b", "http://x/a b"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no address like http://127.0.0.1:11434"):
        parse_upstream(text)
