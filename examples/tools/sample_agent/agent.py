"""Sample: a tool that the model can call."""

from typing import Any

from kernel.agent import BaseAgent


class Sample(BaseAgent):
    """Lets the model count letters."""

    tools = [
        {
            "name": "count_letter",
            "description": "Count how often a letter stands in a word.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string"}, "letter": {"type": "string"}},
                "required": ["word", "letter"],
            },
        }
    ]

    async def on_tool(self, name: str, arguments: dict[str, Any]) -> str:
        return str(arguments["word"].lower().count(arguments["letter"].lower()))
