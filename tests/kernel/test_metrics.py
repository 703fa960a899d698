"""The numbers: what is counted, and that Prometheus can read it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from kernel.metrics import BOUNDS, HELP, NAMES, Metrics
from tests.support import CHAT, House, done, dumped, line, running, said, turn, write_agent

COMPLETIONS = "/v1/chat/completions"
SAMPLE = re.compile(
    r'([a-z_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*"(?:,(?=[a-z])|(?=\})))+)\} (\d[\d.e+-]*)'
)
AGENTS = {
    "good": "class A(BaseAgent):\n    async def on_response(self, response):\n        return 'ok'",
    "bad": "class A(BaseAgent):\n    async def on_request(self, payload):\n        1 / 0",
}


def parsed(text: str) -> dict[str, float]:
    """Read the text format by its grammar: HELP, TYPE, then samples of that name; no repeats."""
    samples: dict[str, float] = {}
    name = kind = ""
    assert text.endswith("\n")
    for row in text.splitlines():
        if found := re.fullmatch(r"# HELP ([a-z_]+) [^\\\n]+", row):
            name, kind = found[1], ""
        elif found := re.fullmatch(r"# TYPE ([a-z_]+) (counter|gauge|histogram)", row):
            assert found[1] == name and not kind
            kind = found[2]
        else:
            found = SAMPLE.fullmatch(row)
            assert found, row
            parts = [f"{name}_{part}" for part in ("bucket", "sum", "count")]
            assert found[1] in (parts if kind == "histogram" else [name])
            assert f"{found[1]}{{{found[2]}}}" not in samples
            samples[f"{found[1]}{{{found[2]}}}"] = float(found[3])
    return samples


async def numbers(client: httpx.AsyncClient) -> dict[str, float]:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parsed(answer.text)


@pytest.fixture
def agents(plugins: Path) -> Path:
    for name, code in AGENTS.items():
        write_agent(plugins, name, code)
    return plugins


def test_a_new_proxy_has_every_metric_and_no_number() -> None:
    text = Metrics().text()

    assert parsed(text) == {}
    assert re.findall(r"# TYPE (\w+)", text) == list(HELP)


async def test_requests_are_counted_by_route_and_status(demo_url: str, plugins: Path) -> None:
    async with running(demo_url, plugins, access={"deny": ["/api/embed"]}) as client:
        for path in ("/api/tags", "/api/tags", "/nope", "/nope/2", "/health", "/api/embed"):
            await client.get(path)
        for path in ("/v1/models/demo", "/v1/models/a/b?c"):
            await client.get(path)
        await client.post("/api/chat", json=turn("x", model="none"))
        seen = await numbers(client)

    counts = {name: n for name, n in seen.items() if name.startswith("osp_requests_total")}
    one = [("/v1/models/{name:path}", 200), ("/v1/models/{name:path}", 404), ("/health", 200)]
    one += [("/api/embed", 403), ("/api/chat", 404)]
    expected = dict.fromkeys(one, 1) | {("/api/tags", 200): 2, ("other", 404): 2}
    text = 'osp_requests_total{route="%s",status="%d",user=""}'
    assert counts == {text % labels: number for labels, number in expected.items()}


async def test_the_time_of_requests_is_summed(house: House) -> None:
    house.ollama.answers(line("Hel"), house.ollama.pause, done())

    async with house.open() as client:
        async with client.stream("POST", CHAT, json=turn("x")) as answer:
            chunks = answer.aiter_raw()
            await anext(chunks)
            house.ollama.go.set()
            assert [chunk async for chunk in chunks]
        seen = await numbers(client)

    label = '{route="/api/chat"}'
    assert seen[f"osp_request_seconds_count{label}"] == 1
    assert seen[f"osp_first_byte_seconds_count{label}"] == 1
    assert 0 < seen[f"osp_first_byte_seconds_sum{label}"] < seen[f"osp_request_seconds_sum{label}"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, turn("/good why?")),
        (CHAT, turn("why?", stream=False)),
        ("/api/generate", {"model": "demo", "prompt": "why?"}),
        (COMPLETIONS, turn("/good why?")),
        (COMPLETIONS, turn("why?", stream=True, stream_options={"include_usage": True})),
        ("/v1/completions", {"model": "demo", "prompt": "why?"}),
        ("/api/embed", {"model": "demo-embed", "input": "why?"}),
        ("/v1/embeddings", {"model": "demo-embed", "input": "why?"}),
    ],
)
async def test_tokens_are_ollamas_own_count(
    demo_url: str, agents: Path, path: str, body: dict[str, Any]
) -> None:
    async with running(demo_url, agents) as client:
        text = (await client.post(path, json=body)).text
        await client.post(path, json=body)
        seen = await numbers(client)

    found = dict(re.findall(r'"(\w+_count|\w+_tokens)":(\d+)', text))
    heard = int(found.get("prompt_eval_count") or found["prompt_tokens"])
    spoken = int(found.get("eval_count") or found.get("completion_tokens") or 0)
    model = body["model"]
    assert seen[f'osp_tokens_total{{model="{model}",kind="prompt",user=""}}'] == 2 * heard > 0
    assert seen[f'osp_tokens_total{{model="{model}",kind="answer",user=""}}'] == 2 * spoken


def events(*usages: int) -> bytes:
    rows = [{"model": "m", "usage": {"prompt_tokens": n, "completion_tokens": n}} for n in usages]
    return b"".join(b"data: %b\n" % dumped(row) for row in rows)


CALL = {"function": {"name": "f", "arguments": {"eval_count": 99, "prompt_eval_count": 99}}}


@pytest.mark.parametrize(
    "frames",
    [
        [events(0, 0, 7), b"data: [DONE]\n\n"],  # as /v1/completions does with include_usage
        [done("", message={"tool_calls": [CALL]}, prompt_eval_count=7)],
        [line('","eval_count":99,"prompt_eval_count":99'), done("", prompt_eval_count=7)],
        [line("x" * 5000), line("", context=[1] * 5000, prompt_eval_count=7, eval_count=7)],
    ],
)
async def test_only_the_last_count_of_an_answer_counts(house: House, frames: list[bytes]) -> None:
    house.ollama.answers(*frames)

    async with house.open() as client:
        await client.post("/v1/completions", json={"model": "m", "prompt": "x"})
        seen = await numbers(client)

    assert seen['osp_tokens_total{model="m",kind="answer",user=""}'] == 7
    assert seen['osp_tokens_total{model="m",kind="prompt",user=""}'] == 7


async def test_without_counters_of_ollamas_no_tokens_are_counted(house: House) -> None:
    error = b'{"error":"no","model":"m","eval_count":7}'

    async with house.open() as client:
        for path in (CHAT, COMPLETIONS):  # the proxy answers itself
            for stream in (True, False):
                answer = await client.post(path, json=turn("/help", stream=stream))
                assert answer.status_code == 200
        for status, body in ((200, line("x")), (404, error), (500, error)):
            house.ollama.answers(body, status=status)
            await client.post(CHAT, json=turn("x"))
        seen = await numbers(client)

    assert not [name for name in seen if name.startswith("osp_tokens_total")]


async def test_agents_are_counted_when_they_take_part_and_when_they_fail(
    demo_url: str, agents: Path
) -> None:
    async with running(demo_url, agents) as client:
        for text in ("/good x", "/good /bad x", "/help", "x"):
            await client.post("/api/chat", json=turn(text))
        seen = await numbers(client)

    assert seen['osp_agents_activated_total{agent="good"}'] == 2
    assert seen['osp_agents_activated_total{agent="bad"}'] == 1
    assert seen['osp_agent_failures_total{agent="bad"}'] == 1
    assert seen['osp_agent_seconds_count{agent="good"}'] == 2
    assert 'osp_agent_failures_total{agent="good"}' not in seen


async def test_an_unknown_agent_and_a_typo_of_a_model_make_no_series(
    demo_url: str, agents: Path
) -> None:
    async with running(demo_url, agents) as client:
        answer = await client.post("/api/chat", json=turn("/nope x"))
        await client.post("/api/chat", json=turn("x", model="typo"))
        text = (await client.get("/metrics")).text

    assert said(answer.content).endswith("[user] /nope x")
    assert "nope" not in text and "typo" not in text


def test_a_histogram_counts_up_to_each_bound() -> None:
    metrics = Metrics()

    for seconds in (0.001, 0.1, 0.11, 9999):
        metrics.request("/", 200, seconds, seconds)

    seen = parsed(metrics.text())
    counts = [
        seen[f'osp_request_seconds_bucket{{route="/",le="{at}"}}'] for at in (*BOUNDS, "+Inf")
    ]
    assert counts == [1, 1, 2, *[3] * (len(BOUNDS) - 3), 4]
    assert seen['osp_first_byte_seconds_sum{route="/"}'] == pytest.approx(9999.211)


def test_of_models_fifty_have_a_name_and_the_rest_are_other() -> None:
    metrics = Metrics()

    for number in [*range(NAMES + 10), 0]:
        metrics.tokens(b'{"model":"m%d"' % number, b'"eval_count":2}')

    counts = {n: v for n, v in parsed(metrics.text()).items() if 'kind="answer"' in n}
    assert len(counts) == NAMES + 1 == 51
    assert counts['osp_tokens_total{model="other",kind="answer",user=""}'] == 20
    assert counts['osp_tokens_total{model="m0",kind="answer",user=""}'] == 4


@pytest.mark.parametrize(
    ("value", "escaped"), [('a"b', r"a\"b"), ("a\\b", r"a\\b"), ("a\nb", r"a\nb"), ("é 日", "é 日")]
)
def test_what_a_label_says_is_escaped(value: str, escaped: str) -> None:
    metrics = Metrics()

    metrics.activated(value)

    assert parsed(metrics.text()) == {f'osp_agents_activated_total{{agent="{escaped}"}}': 1}
