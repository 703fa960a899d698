from kernel.agent import BaseAgent


class Piece(BaseAgent):
    """Writes each piece of a stream in capitals: costs next to nothing itself."""

    async def on_chunk(self, text: str) -> str:
        return text.upper()
