"""Readable: answers of our own endpoints, as JSON for programs and as a plain page for people."""

from __future__ import annotations

import html
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kernel.dialects import dumps

SAFE = {  # nothing of a page may run, be framed, or lead a browser elsewhere
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
PAGE = '<!doctype html><meta charset="utf-8"><title>{}</title><pre>{}</pre>\n'


def answer(request: Request, value: Any, status: int = 200) -> Response:
    """Return JSON; for a browser, which asks for text/html, the same with a line for each value."""
    if "text/html" not in request.headers.get("accept", ""):
        return Response(dumps(value), status, media_type="application/json")
    text = json.dumps(json.loads(dumps(value)), indent=2, ensure_ascii=False)
    page = PAGE.format(html.escape(request.url.path), html.escape(text))
    body = page.encode(errors="replace")
    return Response(body, status, headers=SAFE, media_type="text/html; charset=utf-8")
