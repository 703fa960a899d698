"""Sample: tells the model how to answer, and signs the answer."""

from kernel.agent import BaseAgent, Payload, add_system


class Sample(BaseAgent):
    """Asks for a short answer, and signs it."""

    async def on_request(self, payload: Payload) -> Payload:
        return add_system(payload, self.settings["rule"])

    async def on_response(self, response: str) -> str:
        return f"{response} ({self.arguments['sign']})"
