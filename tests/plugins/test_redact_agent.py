"""The agent redact: what it finds, what it leaves alone, and that everything comes back.

`redacted` asks the agent itself; the tests at the end go through the proxy, where a scripted
upstream shows what the model was sent, and the demo model, which repeats it, what came back.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.agent import Abort
from kernel.config import PluginsConfig
from kernel.registry import PluginRegistry
from plugins.redact_agent.agent import Redact
from tests.support import (
    BY_PATH,
    House,
    done,
    frames,
    line,
    message,
    running,
    said,
    turn,
    whole,
)
from tests.support import calling as answers

PLUGINS = Path(__file__).parents[2] / "plugins"
PATHS = ["/api/chat", "/v1/chat/completions"]
WAYS = [(path, stream) for path in BY_PATH for stream in (True, False)]
NAMES = ["Anna", "Anna Müller", "O'Brien", "Jean-Luc", "Weiß", "İpek", "王小明", 'Tom "T" Hill']
KEY = "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4\nMIIEvQIB\nBg+/==\n-----END EC PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP"


def an_agent(**settings: Any) -> Redact:
    agent = Redact()
    agent.settings = {"names": NAMES, "regions": [], "images": "refuse"} | settings
    agent.setup()
    return agent


AGENT = an_agent()


def asked(*messages: dict[str, Any], agent: Redact = AGENT, **fields: Any) -> tuple[Redact, Any]:
    """Return the agent of one request, and the messages that the model gets."""
    mine = copy.copy(agent)
    payload = {"model": "m", "messages": copy.deepcopy(list(messages)), **fields}
    return mine, mine.on_request(payload)["messages"]


def go_on(agent: Redact, sent: list[Any], *new: dict[str, Any], **fields: Any) -> list[Any]:
    """Return the messages that the model gets in the next round, after tools ran."""
    payload = {"model": "m", "messages": copy.deepcopy([*sent, *new]), **fields}
    messages: list[Any] = agent.on_request(payload)["messages"]
    return messages


def calling(arguments: Any, name: str = "send", **fields: Any) -> dict[str, Any]:
    """Return a message in which the model calls a tool."""
    call = {"id": "1", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **fields}


def called(agent: Redact, arguments: Any, name: str = "send") -> Any:
    """Return the arguments with which a tool is called that the model calls with `arguments`."""
    call = {"id": "1", "name": name, "arguments": arguments, "agent": "mail"}
    (changed,) = asyncio.run(agent.on_calls([copy.deepcopy(call)]))
    return changed["arguments"]


def redacted(text: str) -> str:
    _, messages = asked({"role": "user", "content": text})
    return str(messages[0]["content"])


def restored(agent: Redact, chunks: Iterable[str]) -> str:
    async def joined() -> str:
        return "".join([await agent.on_chunk(chunk) for chunk in chunks] + [await agent.on_end()])

    return asyncio.run(joined())


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        # e-mail addresses
        ("write to anna.m@example.org.", "write to [EMAIL_1]."),
        ("<Bob+list@mail.example.co.uk>", "<[EMAIL_1]>"),
        ("...bob@x.de and --eve@x.de", "...[EMAIL_1] and --[EMAIL_2]"),
        ("bob@x.de, eve@x.de, bob@x.de", "[EMAIL_1], [EMAIL_2], [EMAIL_1]"),
        ("müller@exämple.de o'neil@x.com", "[EMAIL_1] [EMAIL_2]"),
        ("root@xn--bcher-kva.example.xn--p1ai", "[EMAIL_1]"),
        ("mailto:bob@x.de?subject=hi", "mailto:[EMAIL_1]?subject=hi"),
        # phone numbers
        ("call +49 30 1234567 now", "call [PHONE_1] now"),
        ("+49 (0)30 123456-78", "[PHONE_1]"),
        ("+1 (415) 555-2671", "[PHONE_1]"),
        ("tel:+4915112345678", "tel:[PHONE_1]"),
        ("+44 20 7946 0958, +33 1 23 45 67 89", "[PHONE_1], [PHONE_2]"),
        ("0049 30 1234567", "[PHONE_1]"),
        ("+49 30 1234567 2024-05-12", "[PHONE_1] 2024-05-12"),
        ("030 1234567 or (030) 1234567", "[PHONE_1] or [PHONE_2]"),
        ("(0711) 123-456", "[PHONE_1]"),
        ("089 / 12 34 56", "[PHONE_1]"),
        ("030 123456 / 030 654321", "[PHONE_1] / [PHONE_2]"),
        ("0151-23456789, 01511234567", "[PHONE_1], [PHONE_2]"),
        ("020 7946 0958 and 07911 123456", "[PHONE_1] and [PHONE_2]"),
        ("01 23 45 67 89", "[PHONE_1]"),
        ("01.23.45.67.89.", "[PHONE_1]."),
        ("(415) 555-2671 415-555-2671 415.555.2671", "[PHONE_1] [PHONE_2] [PHONE_3]"),
        ("1-800-555-0199", "[PHONE_1]"),
        ("(11) 91234-5678", "[PHONE_1]"),
        ("Tel.: 612 345 678", "Tel.: [PHONE_1]"),
        ('"phone": "12 34 56 78"', '"phone": "[PHONE_1]"'),
        ("mobile: 13800138000", "mobile: [PHONE_1]"),
        ("7,030 1234567,Bob", "7,[PHONE_1],Bob"),
        ("01.02.2024 030 1234567", "01.02.2024 [PHONE_1]"),
        # IBANs
        ("to DE89 3704 0044 0532 0130 00 by 1.5.", "to [IBAN_1] by 1.5."),
        ("DE89370400440532013000", "[IBAN_1]"),
        ("IBAN gb82west12345698765432 bis", "IBAN [IBAN_1] bis"),
        ("NO93 8601 1117 947", "[IBAN_1]"),
        # cards
        ("4111 1111 1111 1111", "[CARD_1]"),
        ("4111111111111111", "[CARD_1]"),  # also as a tool's whole result
        ("4111-1111-1111-1111, 4111111111111111", "[CARD_1], [CARD_2]"),
        ("3782 822463 10005 378282246310005", "[CARD_1] [CARD_2]"),
        ("30569309025904", "[CARD_1]"),
        ("4111 1111 1111 1111 123 12/27", "[CARD_1] 123 12/27"),
        ("2 4111 1111 1111 1111", "2 [CARD_1]"),
        ("1234 4111 1111 1111 1111", "1234 [CARD_1]"),
        ("1,4111111111111111,x", "1,[CARD_1],x"),
        # secrets that show what they are
        ("sk-abcdefghijklmnop1234", "[SECRET_1]"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "[SECRET_1]"),
        ("github_pat_11ABCDEFG0abcdefghijkl_mnop", "[SECRET_1]"),
        ("xoxb-123456789012-abcdef xoxp-123456789012-abc", "[SECRET_1] [SECRET_2]"),
        ("id AKIAIOSFODNN7EXAMPLE", "id [SECRET_1]"),
        ("AIzaSyA1234567890abcdefghijklmnopqrstuv", "[SECRET_1]"),
        (f"cookie {JWT};", "cookie [SECRET_1];"),
        (f"see\n{KEY}\nthere", "see\n[SECRET_1]\nthere"),
        ("-----BEGIN PRIVATE KEY----- MIIEvQIBADANBgkqhkiG9w0 etc", "[SECRET_1] etc"),
        # secrets that a word tells
        ("Authorization: Bearer abc123def456", "Authorization: Bearer [SECRET_1]"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic [SECRET_1]"),
        ("API_KEY=0123456789abcdef0123456789abcdef", "API_KEY=[SECRET_1]"),
        ('"token": "c2VjcmV0LXRva2VuLTEyMw=="', '"token": "[SECRET_1]"'),
        ('config["api_key"] = "k3j4h5k3j4h5k3j4"', 'config["api_key"] = "[SECRET_1]"'),
        ("secret: 550e8400-e29b-41d4-a716-446655440000", "secret: [SECRET_1]"),
        ("key = wJalrXUtnFEMI/K7MDENG/bPxRfiCY", "key = [SECRET_1]"),
        ("curl --api-token abcdefgh12345678", "curl --api-token [SECRET_1]"),
        ("token: abcdefgh12345678. Then", "token: [SECRET_1]. Then"),
        ("my password is hunter2.", "my password is [SECRET_1]."),
        ("Passwort: P@ssword!", "Passwort: [SECRET_1]"),
        (f"password: {'!' * 70}a1", "password: [SECRET_1]"),
        ("?password=hunter22&x=1", "?password=[SECRET_1]&x=1"),
        ("postgres://user:pa55@localhost/db", "postgres://user:[SECRET_1]@localhost/db"),
        # names
        ("Anna's dog and Anna’s cat", "[NAME_1]'s dog and [NAME_1]’s cat"),
        ("Annas Hund", "[NAME_1]s Hund"),
        ("ANNA, anna", "[NAME_1], [NAME_2]"),
        ("Anna Müller, Anna\nMu\u0308ller", "[NAME_1], [NAME_2]"),
        ("O’Brien, jean-luc, WEISS, İpek", "[NAME_1], [NAME_2], [NAME_3], [NAME_4]"),
        ("/home/anna/anna_x.txt", "/home/[NAME_1]/[NAME_1]_x.txt"),
        ("我叫王小明。", "我叫[NAME_1]。"),
        (r"{\"a\": \"b\nAnna\"}", r"{\"a\": \"b\n[NAME_1]\"}"),
        # what overlaps becomes one
        ("anna@example.org", "[EMAIL_1]"),
        ("token=ghp_abcdefghijklmnopqrstuvwxyz0123456789", "token=[SECRET_1]"),
    ],
)
def test_what_is_private_becomes_a_placeholder(text: str, sent: str) -> None:
    assert redacted(text) == sent


@pytest.mark.parametrize(
    "text",
    [
        "why is the sky blue?",
        # dates and times
        "2024-05-12T10:00:00+02:00",
        "12.05.2024 08:30, 01.02.2024",
        "01/02/2024, 01-02-2024, 01 02 2024, 05/12/24",
        "from 08:30 to 09:45, ETA 10:15:30",
        "phone call on 01.02.2024, room 0711 2024-05-12",
        "tel 2024-05-12",
        "1990 2000 2010 2020, 2023 2024 2025 2026, (2019-2024)",
        "1700000000 1700000000000 1700000000000000000",
        # versions, addresses of machines, ids
        "v10.15.7, 1.2.3+20240101123456, python@3.11.2",
        "10.0.0.1:11434 192.168.100.100 010.001.002.003 127.0.0.1",
        "phone 192.168.100.100",
        "2001:db8::8a2e:370:7334",
        "550e8400-e29b-41d4-a716-446655440000",
        "e83c5163316f89bfbde7d9ab23ca2e25604af290",
        "order 12345678901, port 8080, #12345, 01234567",
        # amounts and other numbers
        "1,234,567.89 1.234.567,89 EUR $1,000.00",
        "1 000 000, 250 000 000 euros, +10.000.000, +10 000 000",
        "3.14159265358979, 0.5500000000000004, 1e10 + 2000000, x+12345678, +12345678",
        "+40.689247, -74.044502",
        "978-3-16-148410-0 9783161484100 0-306-40615-2 3-16-148410-X",
        # one digit is wrong
        "GB82 WEST 1234 5698 7654 33",
        "DE8937040044053201300",
        "4111 1111 1111 1112",
        "7992 7398 7130 0000",
        # words where a secret could be
        "token: required, password: required, password: ********",
        "password=$PASSWORD1, password={{pw1}}, password: <your-pass1>",
        'password = os.environ["X"]',
        "token: getAccessTokenFromStorage, key: user_12345_profile_settings",
        'key = "/etc/ssl/Private/server1.key"',
        "Bearer authentication is used. Basic information. The secret is out.",
        "sk-folding-cube-animation, AKIA, eyJ",
        "the line -----BEGIN PRIVATE KEY----- begins a key",
        # signs of e-mail addresses
        "git clone git@github.com:foo/bar.git",
        "@app.route, a @ b.de, root@localhost",
        # parts of words
        "Annabel, Hannah, Joanna, Weiße",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert redacted(text) == text


def test_a_value_is_the_same_in_all_messages_whoever_said_it() -> None:
    _, messages = asked(
        {"role": "system", "content": "You work for bob@x.de."},
        {"role": "user", "content": "I am eve@x.de.", "name": "Anna"},
        {"role": "assistant", "content": "Hello eve@x.de!", "thinking": "eve@x.de is not bob@x.de"},
        {"role": "tool", "content": "bob@x.de is ill", "tool_name": "anna", "tool_call_id": "anna"},
        {"role": "user", "content": "Am I EVE@x.de?"},
    )

    one, two, three, four, five = messages
    assert one["content"] == "You work for [EMAIL_1]."
    assert two == {"role": "user", "content": "I am [EMAIL_2].", "name": "[NAME_1]"}
    assert three["content"] == "Hello [EMAIL_2]!"
    assert three["thinking"] == "[EMAIL_2] is not [EMAIL_1]"
    assert four["content"] == "[EMAIL_1] is ill"
    # A template may show a tool's name to the model; an id only has to match another one.
    assert four["tool_name"].startswith("[NAME_") and four["tool_call_id"] == "anna"
    assert five["content"] == "Am I [EMAIL_3]?"  # letter for letter, or it came back otherwise


def test_every_part_of_text_is_searched() -> None:
    parts = [{"type": "text", "text": "bob@x.de"}, {"type": "text", "text": "eve@x.de, bob@x.de"}]

    _, messages = asked({"role": "user", "content": parts})

    hidden = [part["text"] for part in messages[0]["content"]]
    assert hidden == ["[EMAIL_1]", "[EMAIL_2], [EMAIL_1]"]


@pytest.mark.parametrize("as_text", [True, False])
def test_the_arguments_of_tool_calls_in_the_history_are_searched(as_text: bool) -> None:
    arguments = {"name": "Anna", "id": "bob@x.de", "n": 3, "card": 4111111111111111, "eve@x.de": []}
    function = {"name": "anna", "arguments": json.dumps(arguments) if as_text else arguments}
    call = {"id": "anna", "type": "function", "index": 0, "function": function}

    _, messages = asked({"role": "assistant", "content": None, "tool_calls": [call]})

    (changed,) = messages[0]["tool_calls"]
    told = changed["function"]["arguments"]
    hidden = {"name": "[NAME_2]", "id": "[EMAIL_1]", "n": 3, "card": "[CARD_1]", "[EMAIL_2]": []}
    assert (json.loads(told) if as_text else told) == hidden
    assert changed | {"function": function} == call
    assert changed["function"]["name"] == "[NAME_1]"


def test_a_tools_result_is_searched_behind_the_escapes_of_its_json() -> None:
    result = json.dumps({"text": "Hello\nWeiß", "items": ["bob@x.de", None, 1.5, True]})

    _, messages = asked({"role": "tool", "content": result, "name": "weiß"})

    changed = json.loads(messages[0]["content"])
    assert changed == {"text": "Hello\n[NAME_1]", "items": ["[EMAIL_1]", None, 1.5, True]}
    assert messages[0]["name"] == "[NAME_2]"


@pytest.mark.parametrize("text", ['{"a": [1, 2]}', "{no json", "[" * 100_000, '{"a":1,  "b": 2}'])
def test_a_tools_result_without_private_values_stays_as_it_is(text: str) -> None:
    _, messages = asked({"role": "tool", "content": text})

    assert messages[0]["content"] == text


def test_a_password_is_known_again_without_the_word_before_it() -> None:
    """An answer repeats it, and comes back in the next request."""
    long = "-x9" + "y8" * 150
    told = f"password: hunter2, pwd={long}, tel 612 345 678"
    answer = f"(hunter2) /hunter2/ hunter22 {long}. Is 612 345 678 ok?"
    _, messages = asked({"role": "user", "content": told}, {"role": "assistant", "content": answer})

    shown = "([SECRET_1]) /[SECRET_1]/ hunter22 [SECRET_2]. Is [PHONE_1] ok?"
    assert messages[1]["content"] == shown


def test_numbers_that_somebody_wrote_himself_are_not_used() -> None:
    content = "What is [email_1], \\[EMAIL\\_2\\] or [NAME_1]? Ask bob@x.de"
    agent, messages = asked({"role": "user", "content": content})

    assert messages[0]["content"].endswith("Ask [EMAIL_3]")
    text = "[email_1] [EMAIL_2] [NAME_1] [EMAIL_3]"
    assert restored(agent, [text]) == "[email_1] [EMAIL_2] [NAME_1] bob@x.de"


def test_a_placeholder_in_the_models_own_thoughts_keeps_its_meaning() -> None:
    """The client shows thoughts as they come and sends them back: nobody restored them."""
    agent, messages = asked(
        {"role": "user", "content": "I am bob@x.de"},
        {"role": "assistant", "content": "Hello bob@x.de", "thinking": "[EMAIL_1] says hello"},
    )

    assert messages[1]["content"] == "Hello [EMAIL_1]"
    assert messages[1]["thinking"] == "[EMAIL_1] says hello"
    assert restored(agent, ["[EMAIL_1]"]) == "bob@x.de"


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("[EMAIL_1]", "bob@x.de"),
        ("[email_1], [Email_1]", "bob@x.de, bob@x.de"),
        (r"\[EMAIL\_1\], [EMAIL\_1], \\[EMAIL_1\\]", "bob@x.de, bob@x.de, bob@x.de"),
        (r"C:\[EMAIL_1]\x", r"C:\bob@x.de\x"),
        ("[[EMAIL_1]](mailto:[EMAIL_1])", "[bob@x.de](mailto:bob@x.de)"),
        ("[EMAIL_2] [NAME_1] [EMAIL_01] [EMAIL_]", None),
        ("EMAIL_1, [EMAIL-1], [EMAIL 1]", "bob@x.de, bob@x.de, bob@x.de"),
        ("[**EMAIL_1**], [email_1], ［EMAIL_1］", "**bob@x.de**, bob@x.de, bob@x.de"),
        ("[E MAIL_1], []", None),
        ("ends with [EMA", None),
        ("ends with \\", None),
    ],
)
def test_a_placeholder_comes_back_as_its_value(answer: str, shown: str | None) -> None:
    answer = answer.replace("\\\\", "\\")
    for chunks in ([answer], answer):  # as a whole, and letter by letter
        agent, _ = asked({"role": "user", "content": "bob@x.de"})
        assert restored(agent, chunks) == (answer if shown is None else shown)


def test_only_what_may_become_a_placeholder_is_held_back() -> None:
    async def pieces(*chunks: str) -> list[str]:
        return [await agent.on_chunk(chunk) for chunk in chunks]

    agent, _ = asked({"role": "user", "content": "bob@x.de"})

    sent = asyncio.run(pieces("a [", "b] [EM", "AIL_", "1", "] c", "[EMAIL_2", "]", " [NAME"))
    assert sent == ["a ", "[b] ", "", "", "bob@x.de c", "[EMAIL_2", "]", " [NAME"]


PIECES = st.sampled_from(
    ["bob@x.de", "Anna", "+49 30 1234567", "password=hunter2", "hunter2", "王小明", KEY]
    + ["[EMAIL_1]", "[email_2]", "[NAME_1", "[", "]", "\\", "_", "1", "[PHONE", " ", "\n", "x", '"']
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


def cut(text: str, places: list[int]) -> list[str]:
    marks = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in zip(marks, marks[1:], strict=False)]


@settings(deadline=None)
@given(TEXTS, TEXTS, st.lists(st.integers(0, 999)))
def test_however_an_answer_is_split_it_comes_out_the_same(
    text: str, answer: str, places: list[int]
) -> None:
    agent, _ = asked({"role": "user", "content": text + " bob@x.de Anna"})

    assert restored(agent, cut(answer, places)) == restored(agent, [answer])


@settings(deadline=None)
@given(TEXTS, st.lists(st.integers(0, 999)))
def test_what_was_hidden_comes_back_letter_for_letter(text: str, places: list[int]) -> None:
    text = f"password=hunter2 {text}"
    agent, messages = asked({"role": "user", "content": text})

    sent = messages[0]["content"]
    assert restored(agent, cut(sent, places)) == text
    assert not {"bob@x.de", "王小明", "hunter2", "Anna"} & set(sent.split())


@pytest.mark.parametrize(
    "fields",
    [
        *({"format": form} for form in ("json", {"type": "object"})),
        *({"response_format": {"type": kind}} for kind in ("json_object", "json_schema")),
        *({key: {"format": {"type": "json_schema"}}} for key in ("text", "output_config")),
        {"output_format": {"type": "json_schema"}},
    ],
)
def test_where_json_is_asked_for_values_keep_it_valid(fields: dict[str, Any]) -> None:
    content = f'Tom "T" Hill has {KEY}'
    agent, messages = asked({"role": "user", "content": content}, **fields)
    sent = messages[0]["content"]
    assert sent == "[NAME_1] has [SECRET_1]"

    assert json.loads(restored(agent, json.dumps({"a": sent}))) == {"a": content}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"format": ""},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"text": {"format": {"type": "text"}}},
    ],
)
def test_where_text_is_asked_for_values_are_text(fields: dict[str, Any]) -> None:
    agent, _ = asked({"role": "user", "content": 'Tom "T" Hill'}, **fields)

    assert restored(agent, ["[NAME_1]"]) == 'Tom "T" Hill'


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AKIAIOSFODNN7EXAMPLE"}}
SEEN = [
    ({"images": ["AKIAIOSFODNN7EXAMPLE"]}, "images"),
    ({"content": [{"type": "text", "text": "x"}, IMAGE]}, "image_url"),
    ({"content": [{"type": "input_audio", "input_audio": {"data": "AA=="}}]}, "input_audio"),
    ({"content": [{"type": "file", "file": {"file_data": "AA=="}}]}, "file"),
]


@pytest.mark.parametrize(("fields", "named"), SEEN)
def test_what_cannot_be_searched_is_refused(fields: dict[str, Any], named: str) -> None:
    earlier = {"role": "user", "content": "x", **fields}

    with pytest.raises(Abort) as refused:
        asked(earlier, {"role": "user", "content": "y"})

    assert refused.value.status == 403
    assert refused.value.why == f"redact cannot look into {named}, and so it lets none pass"


@pytest.mark.parametrize(("fields", "named"), SEEN)
def test_an_operator_may_let_it_pass_as_it_is(fields: dict[str, Any], named: str) -> None:
    message = {"role": "user", "content": "x", **fields}

    _, messages = asked(message, agent=an_agent(images="pass"))

    assert messages == [message]


def test_an_answer_with_logprobs_is_refused() -> None:
    with pytest.raises(Abort, match="logprobs") as refused:
        asked({"role": "user", "content": "bob@x.de"}, logprobs=True)

    assert refused.value.status == 403


@pytest.mark.parametrize(
    "wrong", [{"names": "Anna"}, {"names": [""]}, {"names": [1]}, {"images": "no"}]
)
async def test_a_wrong_setting_is_said_at_the_start(tmp_path: Path, wrong: dict[str, Any]) -> None:
    config = PluginsConfig(dirs=(PLUGINS,), only=("redact",))
    agents = {"redact": {"settings": wrong}}

    async with PluginRegistry(config, agents, tmp_path, {}) as registry:
        assert f"settings: {next(iter(wrong))}: must be" in str(registry.plugins["redact"].error)


def test_without_names_the_rest_is_found() -> None:
    _, messages = asked({"role": "user", "content": "Anna, bob@x.de"}, agent=an_agent(names=[]))

    assert messages[0]["content"] == "Anna, [EMAIL_1]"


def test_requests_do_not_share_their_values() -> None:
    before = dict(vars(AGENT))

    one, _ = asked({"role": "user", "content": "bob@x.de"})
    two, _ = asked({"role": "user", "content": "eve@x.de"})

    assert restored(one, ["[EMAIL_1"]) == "[bob@x.de"
    assert (restored(one, ["[EMAIL_1]"]), restored(two, ["[EMAIL_1]"])) == ("bob@x.de", "eve@x.de")
    assert vars(AGENT) == before


# Tools: what the model calls them with, and the rounds after they ran


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"to": "[EMAIL_1]"}, {"to": "bob@x.de"}),
        (
            {"a": [{"b": ["x [email_1]", 1, None, True]}]},
            {"a": [{"b": ["x bob@x.de", 1, None, True]}]},
        ),
        ({"[EMAIL_1]": {"[NAME_1]": "EMAIL_1"}}, {"bob@x.de": {'Tom "T" Hill': "bob@x.de"}}),
        (
            {"name": "[NAME_1]", "text": "{[NAME_1]}"},
            {"name": 'Tom "T" Hill', "text": '{Tom "T" Hill}'},
        ),
        ({"key": "[SECRET_1]"}, {"key": KEY}),
        ({"to": "[EMAIL_2] [E MAIL_1] [EMAIL_01]"}, None),  # altered
        ({"to": "eve@x.de", "n": 4111111111111111}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"format": "json"}])
def test_a_tool_is_called_with_the_values(written: Any, told: Any, fields: dict[str, Any]) -> None:
    agent, _ = asked({"role": "user", "content": f'bob@x.de Tom "T" Hill {KEY}'}, **fields)

    assert called(agent, written) == (written if told is None else told)


def test_tools_whose_names_were_hidden_are_called_by_their_own() -> None:
    tools = [{"type": "function", "function": {"name": "anna_mail", "parameters": {}}}]
    agent, _ = asked({"role": "user", "content": "hi"}, tools=tools)
    ours = {"id": "1", "name": "[NAME_1]_mail", "arguments": {}, "agent": "mail"}
    theirs = ours | {"id": "2", "name": "EMAIL_1", "agent": ""}

    calls = asyncio.run(agent.on_calls([ours, theirs]))

    assert calls == [ours | {"name": "anna_mail"}, theirs]


@pytest.mark.parametrize("form", ["ollama", "responses", "anthropic"])
def test_a_number_is_one_again_where_the_tool_wants_one(form: str) -> None:
    kinds = {"card": "integer", "text": "string", "anna": "number", "spaced": "integer"}
    inner = {"cards": {"type": "array", "items": {"type": "integer"}}}
    schema = {"properties": {key: {"type": kind} for key, kind in kinds.items()} | inner}
    tool: dict[str, Any] = {"name": "pay", "parameters": schema}
    if form == "anthropic":
        tool = {"name": "pay", "input_schema": schema}
    tools = [{"type": "function", "function": tool} if form == "ollama" else tool, {"name": "no"}]
    number = 4111111111111111
    agent, sent = asked(
        {"role": "user", "content": "4111 1111 1111 1111"},
        calling({"card": number, "n": 1234567890}, "pay"),
        tools=tools,
    )
    hidden: Any = {"card": "[CARD_2]", "n": 1234567890}
    assert sent[1]["tool_calls"][0]["function"]["arguments"] == hidden

    written: Any = {key: "[CARD_2]" for key in [*kinds, "other"]}
    written |= {"spaced": "[CARD_1]", "cards": ["[CARD_2]", "x"], "[NAME_1]": "[CARD_2]"}

    told: Any = {"card": number, "text": str(number), "anna": number, "other": str(number)}
    told |= {"spaced": "4111 1111 1111 1111", "cards": [number, "x"]}
    assert called(agent, written, "pay") == told
    assert called(agent, {"card": "[CARD_2]"}, "no") == {"card": str(number)}


@pytest.mark.parametrize("parameters", [None, 1, [], {"properties": []}, {"properties": {"to": 1}}])
def test_a_schema_that_is_none_harms_nobody(parameters: Any) -> None:
    tools = [{"function": {"name": "send", "parameters": parameters}}, {"name": 1}, 1]
    agent, _ = asked({"role": "user", "content": "bob@x.de"}, tools=tools)

    assert called(agent, {"to": {"to": ["[EMAIL_1]"]}}) == {"to": {"to": ["bob@x.de"]}}


def test_a_value_keeps_its_placeholder_in_all_rounds() -> None:
    tool = {"name": "look_up", "description": "Looks up bob@x.de"}
    agent, first = asked({"role": "user", "content": "bob@x.de, password: hunter2"}, tools=[tool])
    call = calling({"of": "[EMAIL_1]", "[EMAIL_1]": "EMAIL_1"}, content="[email_1] is [EMAIL_9]")
    result = message("tool", "eve@x.de is the boss of bob@x.de, who types hunter2; [EMAIL_7]")

    second = go_on(agent, first, call, result, tools=[tool])
    third = go_on(agent, second, calling({"of": "[EMAIL_2]"}), result)

    hidden = "[EMAIL_2] is the boss of [EMAIL_1], who types [SECRET_1]; [EMAIL_7]"
    assert second == [*first, call, result | {"content": hidden}]
    assert third == [*second, calling({"of": "[EMAIL_2]"}), result | {"content": hidden}]
    assert called(agent, {"to": "[EMAIL_2]"}) == {"to": "eve@x.de"}
    text = "[EMAIL_1], [EMAIL_2] and [SECRET_1], not [EMAIL_9]"
    assert restored(agent, text) == "bob@x.de, eve@x.de and hunter2, not [EMAIL_9]"


def test_what_the_model_invented_gets_no_meaning_later() -> None:
    agent, sent = asked({"role": "user", "content": "hi"})

    sent = go_on(agent, sent, calling({"to": "[EMAIL_1]"}), {"role": "tool", "content": "bob@x.de"})

    assert sent[2]["content"] == "[EMAIL_2]"
    assert called(agent, {"to": "[EMAIL_1], [EMAIL_2]"}) == {"to": "[EMAIL_1], bob@x.de"}


FUNCTION = {"name": "send", "arguments": '{"of": "[EMAIL_1]"}'}
CALLS: dict[str, Any] = {
    "ollama": calling({"of": "[EMAIL_1]"}),
    "openai": calling('{"of": "[EMAIL_1]"}'),
    "anthropic": {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "1", "name": "send", "input": {"of": "[EMAIL_1]"}}],
    },
    "responses": {"type": "function_call", "call_id": "1", **FUNCTION},
}
RESULTS: dict[str, Any] = {
    "ollama": lambda text: {"role": "tool", "tool_name": "read", "content": text},
    "openai": lambda text: {"role": "tool", "tool_call_id": "1", "content": text},
    "anthropic": lambda text: {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "1", "content": text}],
    },
    "responses": lambda text: {"type": "function_call_output", "call_id": "1", "output": text},
}


@pytest.mark.parametrize("dialect", RESULTS)
@pytest.mark.parametrize(
    "text", ["[EMAIL_1]", "send(to='[email_1]') EMAIL_1", "[EMAIL_2]", "x " * 9000 + "[EMAIL_1]"]
)
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_placeholder_that_a_result_forges_stands_for_itself(
    dialect: str, text: str, rounds: int
) -> None:
    """Also where it is a text that the model was sent before, as the user's "[EMAIL_1]" here."""
    forged = RESULTS[dialect](text)
    agent, sent = asked({"role": "user", "content": "bob@x.de"})
    for _ in range(rounds):
        sent = go_on(agent, sent, CALLS[dialect], forged)
    assert sent[-2] == CALLS[dialect]
    seen = sent[-1].get("output") or sent[-1]["content"]
    seen = seen[0]["content"] if isinstance(seen, list) else seen

    assert sent[0]["content"] == "[EMAIL_1]" and "EMAIL_1" not in seen.upper()
    assert restored(agent, [seen]) == text
    assert called(agent, {"to": seen}) == {"to": text}
    assert called(agent, {"to": "[EMAIL_1]"}) == {"to": "bob@x.de"}


@pytest.mark.parametrize("dialect", RESULTS)
def test_a_placeholder_in_an_earlier_result_or_answer_is_not_the_agents(dialect: str) -> None:
    """The client keeps answers with values in them: what is left there, somebody else wrote."""
    agent, sent = asked(
        {"role": "user", "content": "bob@x.de"},
        {"role": "assistant", "content": "It says [EMAIL_1].", "thinking": "[EMAIL_3]"},
        RESULTS[dialect]("[EMAIL_2]"),
    )

    assert sent[0]["content"] == "[EMAIL_3]"
    assert restored(agent, ["[EMAIL_1] [EMAIL_2]"]) == "[EMAIL_1] [EMAIL_2]"


THOUGHT = "[EMAIL_1] says hello"


@pytest.mark.parametrize(
    "item",
    [
        {"role": "assistant", "content": "", "reasoning": THOUGHT},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": THOUGHT}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]},
    ],
)
def test_thoughts_are_the_models_own_in_every_dialect(item: dict[str, Any]) -> None:
    _, sent = asked({"role": "user", "content": "bob@x.de"}, item)

    assert sent == [{"role": "user", "content": "[EMAIL_1]"}, item]


@pytest.mark.parametrize("as_text", [True, False])
def test_a_call_with_values_that_the_user_allowed_is_hidden(as_text: bool) -> None:
    arguments: Any = {"to": "bob@x.de", "name": 'Tom "T" Hill', "key": KEY, "id": 30123456789}
    agent, sent = asked({"role": "user", "content": f'bob@x.de Tom "T" Hill {KEY}'})

    call = calling(json.dumps(arguments) if as_text else arguments)
    sent = go_on(agent, sent, call, {"role": "tool", "content": "sent to bob@x.de"})

    told = sent[1]["tool_calls"][0]["function"]["arguments"]
    hidden = {"to": "[EMAIL_1]", "name": "[NAME_1]", "key": "[SECRET_1]", "id": 30123456789}
    assert (json.loads(told) if as_text else told) == hidden
    assert sent[2]["content"] == "sent to [EMAIL_1]"


@pytest.mark.parametrize("again", [True, False])
def test_what_came_back_in_a_call_is_hidden_however_it_stands_there(again: bool) -> None:
    """A short password, or a name inside of a word, may be something else in other texts."""
    told = {"role": "user", "content": "password: a1b2. Anna is not a1b2, or Annabel"}
    mine, sent = asked(told)
    assert sent[0]["content"] == "password: [SECRET_1]. [NAME_1] is not a1b2, or Annabel"
    written = {"text": "x[SECRET_1]y", "file": "of[NAME_1]2024.txt"}
    call = calling(called(mine, written))

    _, messages = (mine, go_on(mine, sent, call)) if again else asked(told, call)

    assert messages == [*sent, calling(written)]


def test_a_very_short_name_is_not_looked_for_inside_of_words() -> None:
    told = {"role": "user", "content": "I am Li"}

    _, messages = asked(told, calling({"do": "List of Li"}), agent=an_agent(names=["Li"]))

    assert messages[1] == calling({"do": "List of [NAME_1]"})


def test_the_sign_of_an_escape_is_no_part_of_a_value() -> None:
    agent, sent = asked({"role": "user", "content": "password: nnnn1"})
    call = calling({"text": "\nnnn1, \\nnnn1, nnnn1"})

    sent = go_on(agent, sent, call)

    hidden = {"text": "\nnnn1, \\nnnn1, [SECRET_1]"}
    assert sent[1]["tool_calls"][0]["function"]["arguments"] == hidden


def test_a_value_that_holds_a_placeholder_is_not_hidden_once_more() -> None:
    """An address with a password in it is found again where the password is hidden already."""
    agent, sent = asked({"role": "user", "content": "postgres://user:pa55@localhost/db"})
    call = calling({"url": "postgres://user:[SECRET_1]@localhost/db"})

    assert go_on(agent, sent, call) == [*sent, call]
    assert called(agent, {"url": "[SECRET_1]"}) == {"url": "pa55"}


def test_tools_that_come_later_are_searched() -> None:
    tool = {"name": "a", "description": "of bob@x.de"}
    agent, sent = asked({"role": "user", "content": "bob@x.de"}, tools=[tool])
    tools = [tool | {"description": "of [EMAIL_1]"}, {"name": "b", "description": "eve@x.de"}]

    tools = agent.on_request({"model": "m", "messages": sent, "tools": tools})["tools"]

    assert [tool["description"] for tool in tools] == ["of [EMAIL_1]", "[EMAIL_2]"]


def test_a_result_that_cannot_be_searched_is_refused() -> None:
    agent, sent = asked({"role": "user", "content": "bob@x.de"})

    with pytest.raises(Abort, match="cannot look into images"):
        go_on(agent, sent, calling({}), {"role": "tool", "content": "", "images": ["AAAA"]})


def test_a_call_does_not_touch_the_text_around_it() -> None:
    """What is held back at the end of a round leaves with the next one's text."""

    async def rounds() -> list[str]:
        pieces = [await agent.on_chunk("I ask [EMA")]
        await agent.on_calls([{"id": "1", "name": "a", "arguments": {"to": "[EMAIL_1]"}}])
        return [*pieces, await agent.on_chunk("IL_1], [EMAIL"), await agent.on_end()]

    agent, _ = asked({"role": "user", "content": "bob@x.de"})

    assert asyncio.run(rounds()) == ["I ask ", "bob@x.de, ", "[EMAIL"]


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_rounds_keep_what_was_sent_and_bring_back_what_was_hidden(
    question: str, thought: str, one: str, two: str
) -> None:
    agent, first = asked({"role": "user", "content": f"password=hunter2 {question} bob@x.de Anna"})
    call = calling({"a": thought}, thinking=thought)

    second = go_on(agent, first, call, {"role": "tool", "content": one})
    third = go_on(agent, second, {"role": "tool", "content": two})

    assert second[0] == first[0] and third[:3] == second
    for sent, text in ((second[2], one), (third[3], two)):
        assert called(agent, {"a": sent["content"]}) == {"a": text}
        assert not {"bob@x.de", "王小明", "hunter2", "Anna"} & set(sent["content"].split())


SIZE = 200_000
NASTY = ["a@", "a@a.", "a.", "a'", "1", "1 ", "4111 ", "0", "00", "+1 ", "01 ", "030 ", "(0", "-"]
NASTY += ["--", "--a", "--key", "key ", "key=", "password:", "password=a1", "key=aaaaaaaaaaaaaaa1 "]
NASTY += ["://a:", "eyJ", "eyJaaaaaaaa.", "sk-a", "bearer ", "-----BEGIN PRIVATE KEY-----", "\\"]
NASTY += ["-----BEGIN ", "DE89", "DE89 ", "DE89370400440532013001 ", "tel ", "tel: 1 ", "Anna "]
NASTY += ["Anna  ", "[", "\\[", "[EMAIL_", "[email_1]", "x@yy.zz "]
NASTY += ["\u0301", '="', "123456789:", " ", "\n"]


@pytest.mark.parametrize("unit", [*NASTY, "values that begin alike", "a thousand names"])
def test_no_text_takes_longer_than_its_length(unit: str) -> None:
    text = (unit * SIZE)[:SIZE]
    agent = AGENT
    if unit.startswith("values"):
        secrets = [f"key=aaaaaa-{'B' * length}1" for length in range(9, 440)]
        text = " ".join(secrets) + " aaaaaa-" * (SIZE // 16)
    if unit.startswith("a thousand"):
        agent = an_agent(names=[f"Anna {chr(97 + n % 26)}{n}" for n in range(1000)])
        text = "Anna x1 " * (SIZE // 8)

    began = time.process_time()
    mine, messages = asked({"role": "user", "content": text}, agent=agent)
    assert restored(mine, [messages[0]["content"]]) == text

    assert time.process_time() - began < 15  # phonenumbers looks at each number; in a thread


@pytest.mark.parametrize(
    "unit", ["[EMAIL_1] ", "EMAIL_1", "[", "1", '"', '\\"', "://a:[EMAIL_1]@b "]
)
def test_no_round_takes_longer_than_its_length(unit: str) -> None:
    text = (unit * SIZE)[:SIZE]
    agent, sent = asked({"role": "user", "content": "bob@x.de"})

    began = time.process_time()
    sent = go_on(agent, sent, calling({"a": text}, content=text), {"role": "tool", "content": text})
    assert called(agent, {"a": sent[-1]["content"]}) == {"a": text}

    assert time.process_time() - began < 15


def test_an_answer_that_comes_in_pieces_takes_no_longer_than_its_length() -> None:
    agent, _ = asked({"role": "user", "content": "bob@x.de"})

    began = time.process_time()
    assert restored(agent, ["[EMAIL_"] * 20_000) == "[EMAIL_" * 20_000

    assert time.process_time() - began < 1


# Through the proxy


@pytest.fixture
def agents(house: House) -> House:
    house.link("redact", "rag", "translate")
    return house


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "typed", ["/redact", "/redact /translate:de", "/rag:k=1 /redact", "/redact /rag:k=1"]
)
async def test_the_answer_speaks_of_what_the_model_never_saw(
    demo_url: str, tmp_path: Path, path: str, stream: bool, typed: str
) -> None:
    """The demo model repeats what it was sent; that these were placeholders is the next test's."""
    text = "Tell bob@example.org that +49 30 1234567 is mine."

    async with running(demo_url, PLUGINS, data=tmp_path) as client:
        answer = await client.post(path, json=turn(f"{typed} {text}", stream=stream))

    assert text in said(answer.content)
    assert "redact;ok" in answer.headers["x-osp-agents"]
    assert "[EMAIL_1]" not in said(answer.content)


@pytest.mark.parametrize("path", BY_PATH)
@pytest.mark.parametrize("typed", ["/redact ", "/rag:k=1 /redact ", ""])
async def test_the_model_sees_placeholders_and_the_client_does_not(
    agents: House, path: str, typed: str
) -> None:
    agents.ollama.says(path, "Hi [EM", "AIL_1", "]!")

    async with agents.open(agents={"redact": {"always": not typed}}) as client:
        answer = await agents.post(client, path, f"{typed}I am bob@example.org", stream=True)

    assert said(answer.content).partition("\n\n")[0] == "Hi bob@example.org!"
    assert agents.sent[0][-1].endswith("I am [EMAIL_1]")
    assert b"bob@" not in agents.ollama.asked[0].body


async def test_a_translation_is_made_of_placeholders_too(agents: House) -> None:
    ollama = agents.ollama

    async def second() -> None:
        if len(ollama.asked) == 1:
            ollama.answers(done("Hallo [email_1]"), kind="application/json", before=second)

    ollama.answers(line("Hello [EMAIL_1]"), second, done())

    answer = await agents.ask(PATHS[0], "/redact /translate:de I am bob@example.org", stream=True)

    assert said(answer.content) == "Hallo bob@example.org"
    assert len(ollama.asked) == 2 and not any(b"bob@" in asked.body for asked in ollama.asked)


@pytest.mark.parametrize(
    ("path", "fields"),
    [(PATHS[0], {"format": "json"}), (PATHS[1], {"response_format": {"type": "json_object"}})],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_structured_output_comes_back_as_json(
    demo_url: str, tmp_path: Path, path: str, fields: dict[str, Any], stream: bool
) -> None:
    agents = {"redact": {"settings": {"names": NAMES}}}
    text = f'Tom "T" Hill has\n{KEY}'

    async with running(demo_url, PLUGINS, data=tmp_path, agents=agents) as client:
        body = turn(f"/redact {text}", stream=stream, **fields)
        answer = await client.post(path, json=body)

    assert json.loads(said(answer.content))["answer"].endswith(f"[user] {text}")


@pytest.mark.parametrize("path", PATHS)
async def test_a_refusal_is_an_error_of_the_dialect(agents: House, path: str) -> None:
    answer = await agents.ask(path, "/redact x", logprobs=True)

    assert answer.status_code == 403
    assert "redact cannot restore an answer with logprobs" in answer.text
    assert not agents.ollama.asked


async def test_a_failure_sends_nothing_to_the_model(agents: House) -> None:
    """Here it fails because it has no time at all."""
    async with agents.open(agents={"redact": {"timeout": 1e-9}}) as client:
        answer = await agents.post(client, PATHS[0], "/redact bob@example.org")

    assert answer.status_code == 500 and not agents.ollama.asked


async def test_values_are_neither_logged_nor_kept(
    demo_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        async with running(demo_url, PLUGINS, data=tmp_path) as client:
            await client.post("/api/chat", json=turn("/redact bob@example.org"))

    assert caplog.records and "bob@" not in caplog.text
    assert "redact" not in os.listdir(tmp_path)


POST = """
class Post(BaseAgent):
    tools = [{"name": "w", "parameters": {"type": "object"}}]
    async def on_tool(self, name, arguments):
        return f"{arguments['z'] == 'bob@x.de'}: eve@x.de is bob@x.de, says [EMAIL_1]"
"""


@pytest.mark.parametrize(("path", "stream"), WAYS)
async def test_the_tools_of_agents_get_values_and_the_model_gets_none(
    agents: House, path: str, stream: bool
) -> None:
    agents.write("post", POST)
    text = "[EMAIL_2], [EMAIL_1]; [EMAIL_3]"
    end = b"".join(frames(path, *text)) if stream else whole(path, text)
    agents.ollama.says_in_turn(
        path, answers(path, "Look: ", ("w", {"z": "[EMAIL_1]"}), stream=stream), end, stream=stream
    )

    answer = await agents.ask(path, "/redact /post write to bob@x.de", stream=stream)

    assert said(answer.content).endswith("eve@x.de, bob@x.de; [EMAIL_1]")
    bodies = [asked.body for asked in agents.ollama.asked]
    assert len(bodies) == 2 and not any(b"@x.de" in body for body in bodies)
    assert b"True: [EMAIL_2] is [EMAIL_1], says [EMAIL_3]" in bodies[1]


@pytest.mark.parametrize(("path", "stream"), WAYS)
async def test_the_clients_tools_get_values_and_the_model_gets_none(
    agents: House, path: str, stream: bool
) -> None:
    own = {"stream": stream, "tools": BY_PATH[path].offer([{"name": "w"}])}
    agents.ollama.says_in_turn(
        path, answers(path, "Look: ", ("w", {"z": "[EMAIL_1]"}), stream=stream), stream=stream
    )

    answer = await agents.ask(path, "/redact write to bob@x.de", **own)

    made = re.findall(rb'z\\?":\\?"([^"\\]*)', answer.content)
    assert made and {*made} == {b"bob@x.de"}
    assert b"@x.de" not in agents.ollama.asked[0].body


CASES = Path(__file__).with_name("redact_cases.txt").read_text(encoding="utf-8").splitlines()
MARKED = re.compile("⟦(.*?)⟧")


def test_what_is_private_is_found_in_many_languages_and_little_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = missed = wrong = 0
    for case in (case for case in CASES if case and not case.startswith("#")):
        text = re.sub(r"<U\+(\w+)>", lambda m: chr(int(m[1], 16)), case.partition("|")[2])
        plain, private = MARKED.sub(r"\1", text), set(MARKED.findall(text))
        mine, _ = asked({"role": "user", "content": plain})
        found = set(mine.placeholders._of)
        right, missed = right + len(found & private), missed + len(private - found)
        wrong += len(found - private)
    precision, recall = right / (right + wrong), right / (right + missed)
    with capsys.disabled():
        print(f"redact: precision {precision:.3f}, recall {recall:.3f} of {right + missed} values")  # noqa: T201

    assert right > 200 and precision > 0.97 and recall > 0.97
