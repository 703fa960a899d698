"""The bench's own parts: what it starts answers as Ollama does, and numbers come out as they are.

Nothing here measures anything: that is `python bench/run.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pytest

from bench import bare, client, kinds, load, run, servers
from bench.servers import Kind
from bench.table import PANELS, Report
from kernel.access import Access
from kernel.log import AccessLog

WRK = """Running 2s test @ http://127.0.0.1:1/api/chat
  Latency Distribution
     50%  250.00us
     75%    1.27ms
     90%    3.43ms
     99%    1.20s
  3914 requests in 2.50s, 1.69MB read
{}Requests/sec:   1565.60
"""


@pytest.fixture
def report() -> Report:
    report = Report(["direct", "osp", "naive"], ["a note"])
    for number in (900.0, 1000.0, 2000.0):
        report.add("chat", "osp", number)
    report.add("chat", "naive", 50.0)
    report.add("p50", "osp", 0.25)
    return report


@pytest.fixture(params=["Go", "Python"])
def upstream(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    kind = kinds.in_go(tmp_path) if request.param == "Go" else kinds.in_python()
    if kind is None:
        pytest.skip("there is no Go here")
    with servers.start(kind, None, tmp_path / "log") as server:
        yield server.url


def test_the_table_shows_medians_and_how_many_times_the_naive_forwarder(report: Report) -> None:
    head, requests, latency, _, note = report.text().splitlines()

    assert head.split() == ["direct", "osp", "naive"]
    assert requests.split()[-4:] == ["-", "1,000", "20x", "50"]
    assert latency.split()[-3:] == ["-", "0.250", "-"]
    assert note == "- a note"


def test_what_could_not_be_measured_is_no_sample(report: Report) -> None:
    report.add("memory", "osp", None)
    report.add("memory", "osp", float("nan"))

    assert report.value("memory", "osp") is None
    assert "resident" not in report.text()


def test_the_json_has_every_round(report: Report) -> None:
    said = json.loads(report.json())

    assert said["notes"] == ["a note"]
    assert said["rows"]["chat"]["rounds"] == {"osp": [900, 1000, 2000], "naive": [50]}
    assert said["rows"]["chat"]["median"] == {"osp": 1000, "naive": 50}


def test_the_picture_has_a_bar_for_each_server_as_long_as_its_number(report: Report) -> None:
    root = ElementTree.fromstring(report.svg())
    bars = root.findall("{*}rect")
    osp, naive, _ = (float(bar.attrib["width"]) for bar in bars)
    texts = [text.text for text in root.findall("{*}text")]

    assert [bar.get("class") for bar in bars] == ["osp", None, "osp"]
    assert osp == pytest.approx(20 * naive, rel=0.01)
    assert texts == [PANELS["chat"], "osp", "1,000", "naive", "50", PANELS["p50"], "osp", "0.250"]


def test_every_panel_of_the_picture_is_a_row_of_the_table() -> None:
    report = Report(["osp"])
    for row in PANELS:
        report.add(row, "osp", 1.0)

    assert len(report.text().splitlines()) == len(PANELS) + 2


def test_a_whole_answer_of_the_upstream(upstream: str) -> None:
    answer = httpx.post(f"{upstream}/api/chat", content=b'{"stream":false}')

    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.json()["done"] is True and answer.json()["eval_count"] == 200


def test_a_stream_of_the_upstream(upstream: str) -> None:
    answer = httpx.post(f"{upstream}/api/chat?frames=3&every=1", content=b"{}")
    chunks = [json.loads(line) for line in answer.text.splitlines()]

    assert answer.headers["transfer-encoding"] == "chunked"
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [chunk["done"] for chunk in chunks] == [False, False, False, True]
    assert [chunk["message"]["content"] for chunk in chunks] == [" word"] * 3 + [""]
    assert client.SENT.findall(answer.content)[0].endswith(b"Z")


def test_the_naive_forwarder_forwards(upstream: str, tmp_path: Path) -> None:
    kind = kinds.naive(upstream)
    assert kind
    with servers.start(kind, None, tmp_path / "naive") as naive:
        answer = httpx.post(f"{naive.url}/api/chat?frames=2", content=b"{}")

    assert answer.status_code == 200 and len(answer.text.splitlines()) == 3


def test_the_bare_proxy_has_neither_log_nor_guard() -> None:
    assert not isinstance(bare.create_app("http://127.0.0.1:1"), (AccessLog, Access))


def test_what_wrk_says_is_understood() -> None:
    rate = load.of_wrk(WRK.format(""))

    assert rate == load.Rate(count=3914, seconds=2.5, failed=0, p50=0.25, p99=1200.0)
    assert rate.per_second == pytest.approx(1565.6)


def test_answers_that_fail_are_counted() -> None:
    errors = (
        "  Socket errors: connect 1, read 2, write 0, timeout 3\n  Non-2xx or 3xx responses: 4\n"
    )

    assert load.of_wrk(WRK.format(errors)).failed == 10


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_an_answer_is_complete_at_its_last_byte_only(answer: bytes) -> None:
    ends = [end for end in range(len(answer) + 1) if client.is_complete(bytearray(answer[:end]))]

    assert ends == [len(answer)]


def test_the_bodies_that_are_compared_are_of_one_size(tmp_path: Path) -> None:
    asked = load.questions(tmp_path)

    sizes = [asked[name].file.stat().st_size for name in ("chat", "embed")]
    assert max(sizes) - min(sizes) < 100


def test_only_some_measures_and_servers_are_chosen_by_name() -> None:
    found = [Kind("osp"), Kind("nginx")]

    assert run.choose({"osp", "slow"}, found) == (found[:1], ["slow"])
    assert run.choose({"nginx"}, found) == (found[1:], list(run.MEASURES))
    with pytest.raises(SystemExit, match="nothing: no measure, and no server here"):
        run.choose({"nothing"}, found)
