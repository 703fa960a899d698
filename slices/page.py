"""Page: GET /osp, what the proxy does, for a browser: one file, page.html beside this one.

Without script it is a table of the latest requests. With script it asks the endpoints that others
can ask, too, with the key that is typed into it: where a key is needed, the page comes without one
and is empty. Nothing in it comes from elsewhere, and its policy says so to the browser: only the
style and the script of page.html count, by their hashes, and no text can become markup.
"""

from __future__ import annotations

import hashlib
import re
import time
from base64 import b64encode
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from kernel.log import info
from kernel.readable import SAFE
from kernel.traces import Traces, about

KEYLESS = ["/osp"]  # a browser cannot send a key with what is typed into its address bar
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src {style}; script-src {script};"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
ALONE = {
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
CELL = '<td class="{}">{}'
CLASSES = ["", "", "w", "w", "", "n", "n w"]  # of the cells of a row
# Signs that hide text or turn it around, and those that UTF-8 cannot say
HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def routes(traces: Traces, prefix: str, *, keys: bool) -> list[Route]:
    """`prefix` is the sign before commands; `keys` says that a key is needed to see requests."""
    source = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    policy = POLICY.format(style=hash_of("style", source), script=hash_of("script", source))
    headers = SAFE | ALONE | {"content-security-policy": policy}
    source = source.replace("$prefix", escape(prefix)).replace("$kept", f"{traces.config.requests}")
    endpoint = partial(page, traces, source.partition("$rows"), headers, keys)
    return [Route("/osp", endpoint, methods=["GET"], name="page")]


def hash_of(tag: str, source: str) -> str:
    """Return what a Content-Security-Policy calls the text of an element."""
    text = source.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


async def page(
    traces: Traces,
    source: tuple[str, str, str],
    headers: dict[str, str],
    keys: bool,
    request: Request,
) -> HTMLResponse:
    viewer = info(request.scope)
    shown = [] if keys and not viewer.user else map(about, traces.seen_by(viewer)[1])
    return HTMLResponse(f"{source[0]}{''.join(map(row, shown))}{source[2]}", headers=headers)


def row(trace: dict[str, Any]) -> str:
    """Return a row of the table for those without script, as page.html makes them with it."""
    began = time.strftime("%H:%M:%S", time.localtime(trace["time"]))
    agents = ", ".join(f"{agent['name']} {agent['outcome']}" for agent in trace["agents"])
    status = f"{trace['status'] or ''} {trace['outcome']}{', full context' * trace['full']}"
    name, sender = trace["model"] or trace["path"], trace["user"] or trace["client"]
    speed = trace["tokens_per_second"] or ""
    texts = [began, name, agents, sender, status, f"{trace['ms']:.0f} ms", f"{speed}"]
    return "<tr>" + "".join(map(CELL.format, CLASSES, map(visible, texts)))


def visible(text: str) -> str:
    return escape(HIDDEN.sub(lambda sign: f"⟨U+{ord(sign[0]):04X}⟩", text))
