"""Time: tells the model what day and what time it is, where the proxy runs.

The smallest useful agent, and the first to read: `/time what is the date of next Friday?`
"""

from __future__ import annotations

from datetime import datetime

from kernel.agent import BaseAgent, Payload, add_context


class Time(BaseAgent):
    """Tells the model the date and the time."""

    async def on_request(self, payload: Payload) -> Payload:
        now = datetime.now().astimezone()
        today = now.strftime("%A, %d %B %Y, %H:%M %Z (UTC%z)")
        return add_context(payload, f"It is {today}.")
