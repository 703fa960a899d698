"""Time: tells the model what day and what time it is, where the proxy runs.

The smallest useful agent, and the first to read: `/time what is the date of next Friday?`
"""

from __future__ import annotations

from datetime import datetime

from kernel.agent import BaseAgent, Payload, add_context


class Time(BaseAgent):
    """Tells the model the date and the time."""

    async def on_request(self, payload: Payload) -> Payload:
        if "now" in vars(self):  # it is a guard, and tools ran
            return payload
        self.now = datetime.now().astimezone()
        today = self.now.strftime("%A, %d %B %Y, %H:%M %Z (UTC%z)")
        return add_context(payload, f"It is {today}.")
