from kernel.agent import BaseAgent


class Whole(BaseAgent):
    """Writes the whole answer in capitals: costs next to nothing itself."""

    async def on_response(self, response: str) -> str:
        return response.upper()
