"""examples/grafana: the dashboard against what /metrics has, and before a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
from asyncio import create_subprocess_exec
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import promql_parser
import pytest

from kernel.config import HOME
from kernel.metrics import HELP
from tests.support import turn, write_agent
from tests.test_osp import LIMIT, free_port, spawning, starting, with_agents

FOLDER = HOME / "examples" / "grafana"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = [
    target["expr"].replace("$__rate_interval", "1m").replace("$route", ".*")
    for _, target in TARGETS
]
ENDS = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
SERIES = {name + end: name for name, (kind, _, _) in HELP.items() for end in ENDS[kind]}
HAS_TOOL = """
class HasTool(BaseAgent):
    tools = [{"name": "it"}]
    async def on_tool(self, name, arguments):
        return "ok"
"""
FAILS = """
class Fails(BaseAgent):
    async def on_request(self, payload):
        raise ValueError
"""


def used(expression: str) -> tuple[set[str], set[str]]:
    """Return the series and the labels that an expression names."""
    series: set[str] = set()
    labels: set[str] = set()

    def visit(part: promql_parser.Expr) -> None:
        if isinstance(part, promql_parser.VectorSelector):
            series.add(part.name or "")
            labels.update(matcher.name for matcher in part.matchers.matchers)
        elif isinstance(part, promql_parser.AggregateExpr) and part.modifier:
            labels.update(part.modifier.labels)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return series, labels


def test_each_expression_names_a_metric_and_labels_that_it_has() -> None:
    for expression, (_, target) in zip(EXPRESSIONS, TARGETS, strict=True):
        (name,), labels = used(expression)
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))

        assert name in SERIES, expression
        assert labels - {"le"} <= set(HELP[SERIES[name]][2]), expression
        assert shown <= labels, expression


def test_each_metric_and_each_of_its_labels_is_shown() -> None:
    shown = {
        (SERIES[name], label) for e in EXPRESSIONS for name in used(e)[0] for label in used(e)[1]
    }
    due = {(name, label) for name, (_, _, labels) in HELP.items() for label in labels}

    assert due - shown == set()


def test_the_dashboard_can_be_imported() -> None:
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variables["route"]["query"]["query"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]

    assert asked and asked[2] in HELP[asked[1]][2]
    assert variables["datasource"]["query"] == "prometheus"
    assert {target["datasource"]["uid"] for _, target in TARGETS} == {"${datasource}"}
    assert len(set(ids)) == len(ids) == len(set(places))


async def test_prometheus_scrapes_it_with_a_key_and_every_panel_has_data(
    plugins: Path, tmp_path: Path
) -> None:
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        pytest.skip("needs prometheus and promtool")
    write_agent(plugins, "has_tool", HAS_TOOL)
    write_agent(plugins, "fails", FAILS)
    env = {**with_agents(plugins), "OSP_UPSTREAM_PARALLEL": "1"}
    file = tmp_path / "osp.toml"
    file.write_text('[keys.prometheus]\nkey = "osp-secret"\n')
    (tmp_path / "osp.key").write_text("osp-secret\n")

    async with (
        starting("--demo", "0", "--config", str(file), env=env) as proxy,
        proxy.client() as client,
    ):
        client.headers["authorization"] = "Bearer osp-secret"
        for prompt in ("/has_tool use the tool", "/fails hi"):
            assert (await client.post("/api/chat", json=turn(prompt))).status_code == 200
        config = (FOLDER / "prometheus.yml").read_text().replace("15s", "1s")
        config = config.replace("127.0.0.1:11435", client.base_url.netloc.decode())
        async with prometheus(config, tmp_path) as server:
            with anyio.fail_after(LIMIT):
                empty = EXPRESSIONS
                while empty:
                    empty = [each for each in empty if not await query(server, each)]


@asynccontextmanager
async def prometheus(config: str, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Run Prometheus with the text of a configuration, and yield a client of it."""
    file, port = folder / "prometheus.yml", free_port()
    file.write_text(config)
    checked = await create_subprocess_exec("promtool", "check", "config", file, stdout=PIPE)
    assert b"SUCCESS" in (await checked.communicate())[0] and checked.returncode == 0
    flags = f"--config.file={file} --storage.tsdb.path={folder}/tsdb"
    listen = f"--web.listen-address=127.0.0.1:{port}"
    async with (
        spawning("prometheus", *flags.split(), listen) as process,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        await process.says("Server is ready to receive web requests.")
        yield client


async def query(server: httpx.AsyncClient, expression: str) -> list[Any]:
    """Return what Prometheus knows of an expression at this moment."""
    answer = (await server.get("/api/v1/query", params={"query": expression})).json()
    assert answer["status"] == "success", answer
    found: list[Any] = answer["data"]["result"]
    return found
