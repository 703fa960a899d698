"""An MCP server that the SDK made: `sdk.py` speaks on stdin and stdout."""

from __future__ import annotations

from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from mcp_types import (
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
)

CONTENTS: list[ContentBlock] = [
    TextContent(text="first"),
    ImageContent(data="iVBORw0KGgo=", mime_type="image/png"),
    AudioContent(data="AAAA" * 1000, mime_type="audio/wav"),
    ResourceLink(name="plan", uri="file:///plan.txt"),
    EmbeddedResource(resource=TextResourceContents(uri="file:///a.txt", text="of a.txt")),
    EmbeddedResource(resource=BlobResourceContents(uri="file:///b", blob="AAAA" * 1000)),
]
server: MCPServer[Any] = MCPServer("sdk")


@server.tool()
def everything() -> CallToolResult:
    """Returns content of every kind."""
    return CallToolResult(content=CONTENTS)


@server.tool()
def structured() -> CallToolResult:
    """Returns no text."""
    return CallToolResult(content=[], structured_content={"städte": ["Lima"]})


@server.tool()
def fail(text: str) -> CallToolResult:
    """Says that it failed."""
    return CallToolResult(content=[TextContent(text=text)], is_error=True)


@server.tool()
async def learn(name: str, ctx: Context[Any]) -> str:
    """Makes a tool of that name."""
    server.add_tool(lambda: name, name=name)
    await ctx.notify_tools_changed()
    return name


@server.tool()
def header(name: str, ctx: Context[Any]) -> str:
    """Returns a header that came with the request."""
    return (ctx.headers or {}).get(name, "")


if __name__ == "__main__":
    server.run("stdio")
