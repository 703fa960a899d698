"""Calc: a tool with which the model calculates, because models guess at digits.

`/calc what do 3 at 19.99 cost, less 15%?` offers the tool `calculate`, which takes an expression as
people and models write it: `3 × 19.99 − 15%`. `arithmetic.py` reads it, and says what is possible.
"""

from __future__ import annotations

from typing import Any

from kernel.agent import BaseAgent

from .arithmetic import POSSIBLE, calculate

EXPRESSION = {"type": "string", "description": f"{POSSIBLE}; 80 - 25% is 60"}


class Calc(BaseAgent):
    """Lets the model calculate."""

    tools = [
        {
            "name": "calculate",
            "description": "Calculates exactly. Use it for all arithmetic, and to compare numbers.",
            "parameters": {
                "type": "object",
                "properties": {"expression": EXPRESSION},
                "required": ["expression"],
            },
        }
    ]

    async def on_tool(self, name: str, arguments: dict[str, Any]) -> str:
        only = len(arguments) == 1  # whatever the model calls it
        text = [*arguments.values()][0] if only else arguments.get("expression")
        if not isinstance(text, str | int | float):
            raise ValueError('expression must be a text like "17.5% of 2,340"')
        return calculate(str(text))
