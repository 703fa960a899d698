"""Translate: the answer arrives in the language you name, whatever language the model chose.

Thoughts are taken out. Fenced code goes round the translation, and comes back byte for byte. A long
answer is cut between paragraphs and asked about piece by piece. If inline code or the form of a
line (of a list, of a table) is not as it was, the same is asked paragraph by paragraph, then line
by line, and in the end without the code and the marks. A piece that is not translated then is an
error: half a translation would look like a whole one.
"""

from __future__ import annotations

import asyncio
import re

from kernel.agent import BaseAgent

from .markdown import KEPT, kept, pieces, split, without_thoughts

# ISO 639-1 codes of the languages that people ask for most; any other word is taken as a name.
CODES = (
    "ar=Arabic cs=Czech da=Danish de=German el=Greek en=English es=Spanish fi=Finnish fr=French"
    " he=Hebrew hi=Hindi hu=Hungarian id=Indonesian it=Italian ja=Japanese ko=Korean nl=Dutch"
    " no=Norwegian pl=Polish pt=Portuguese ro=Romanian ru=Russian sv=Swedish th=Thai tr=Turkish"
    " uk=Ukrainian vi=Vietnamese zh=Chinese"
)
LANGUAGES = dict(code.split("=") for code in CODES.split())

INSTRUCTION = (
    "You are a translator. Translate what the user sends into {language}. Answer with the"
    " translation alone: no remark, no quotes around it. Keep Markdown, code, names, numbers,"
    " links and words in brackets like [WORD_1] as they are. If it is already {language}, repeat"
    " it unchanged."
)
GLOSSARY = "\n\nWhere this glossary is {language}, use its words:"
MOST = 2000  # characters of a question: with its answer it fits into a small context
# How a piece is divided if its translation is not usable: the finest leaves bare words.
DIVISIONS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), KEPT)


class Translate(BaseAgent):
    """Translates the answer."""

    async def setup(self) -> None:
        glossary = self.settings["glossary"]
        if not isinstance(glossary, dict) or not all(isinstance(v, str) for v in glossary.values()):
            raise ValueError("settings: glossary: must be a table of terms and their translations")

    async def on_response(self, response: str) -> str:
        cut = await asyncio.to_thread(lambda: [*pieces(without_thoughts(response), MOST)])
        if response.strip() and not any(piece.strip() for piece, _ in cut):
            raise ValueError("the answer is a thought without an end")
        return "".join([piece if code else await self.translated(piece) for piece, code in cut])

    async def translated(self, text: str, level: int = 0) -> str:
        """Return a text without fenced code in the other language. Raises ValueError."""
        if not any(map(str.isalpha, KEPT.sub("", text))):
            return text
        answer = await self.ask(text)
        if answer and kept(answer) == kept(text):
            return answer
        for finer, division in enumerate(DIVISIONS[level:], level + 1):
            parts = [*split(division, text)]
            if len(parts) > 1:
                return "".join([await self.translated(part, finer) + by for part, by in parts])
        raise ValueError("the model did not translate a part of the answer")

    async def ask(self, text: str) -> str:
        """Return what the model makes of a text, in the white space of the text, or "".

        Raises UpstreamError, also where the translation was cut off.
        """
        body, system = text.strip(), {"role": "system", "content": self.instruction()}
        messages = [system, {"role": "user", "content": body}]
        answer = without_thoughts(await self.context.chat(messages, temperature=0)).strip()
        return text.replace(body, answer, 1) if answer else ""

    def instruction(self) -> str:
        language = LANGUAGES.get(self.arguments["to"].lower(), self.arguments["to"])
        text = INSTRUCTION.format(language=language)
        if glossary := self.settings["glossary"]:
            lines = [f"- {term}: {translation}" for term, translation in glossary.items()]
            text += "\n".join([GLOSSARY.format(language=language), *lines])
        return text
