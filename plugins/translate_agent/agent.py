"""Translate: the answer arrives in the language you name, whatever language the model chose.

Thoughts are taken out. Program text goes round the translation and comes back byte for byte: a
fenced block divides the answer, and inline code becomes a tag in a question. A long answer is cut
between paragraphs and asked about piece by piece. If a tag gets lost, or a line its form (of a
list, of a table), the same is asked paragraph by paragraph, then line by line, and in the end
without the code and the marks. A piece that is not translated then is an error: half a translation
would look like a whole one.
"""

from __future__ import annotations

import asyncio
import re

from kernel.agent import BaseAgent

from .markdown import FORM, INLINE, pieces, restored, split, tagged, without_thoughts

# ISO 639-1 codes of the languages that people ask for most; any other word is taken as a name.
LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "sv": "Swedish", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian",
    "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip

INSTRUCTION = (
    "You are a translator. Translate what the user sends into {language}. Answer with the"
    " translation alone: no remark, no quotes around it. Keep Markdown, code, names, numbers,"
    " links and words in brackets like [WORD_1] as they are. If it is already {language}, repeat"
    " it unchanged."
)
GLOSSARY = "\n\nWhere this glossary is {language}, use its words:"
TAGGED = "\n\nA tag like {tag} stands for a word. Put it where the word belongs, unchanged."
MOST = 2000  # characters of a question: with its answer it fits into a small context
# How a piece is divided if its translation is not usable: the finest leaves bare words.
DIVISIONS = (
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile(f"{INLINE.pattern}|{FORM.pattern}", re.S | re.M),
)


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
        if not has_letters(INLINE.sub("", text)):
            return text
        question, codes = tagged(text)
        answer = await self.ask(question, TAGGED.format(tag=f"<c{[*codes][0]}/>") if codes else "")
        usable = restored(question, answer, codes)
        while usable is None and level < len(DIVISIONS):
            parts = split(DIVISIONS[level], text)
            level += 1
            if len(parts) > 1:
                return "".join([await self.translated(part, level) + by for part, by in parts])
        if usable is None:
            raise ValueError("the model did not translate a part of the answer")
        return usable

    async def ask(self, text: str, note: str = "") -> str:
        """Return what the model makes of a text, in the white space of the text, or "".

        Raises UpstreamError, also where the translation was cut off.
        """
        body = text.strip()
        messages = [
            {"role": "system", "content": self.instruction() + note},
            {"role": "user", "content": body},
        ]
        answer = without_thoughts(await self.context.chat(messages, temperature=0)).strip()
        return text.replace(body, answer, 1) if answer else ""

    def instruction(self) -> str:
        language = LANGUAGES.get(self.arguments["to"].lower(), self.arguments["to"])
        text = INSTRUCTION.format(language=language)
        if glossary := self.settings["glossary"]:
            lines = [f"- {term}: {translation}" for term, translation in glossary.items()]
            text += "\n".join([GLOSSARY.format(language=language), *lines])
        return text


def has_letters(text: str) -> bool:
    return any(map(str.isalpha, text))
