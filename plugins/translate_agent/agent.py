"""Translate: the answer arrives in the language you name, whatever language the model chose.

Program text goes round the translation and comes back byte for byte, where it was: a fenced block
divides the answer into questions of their own, and inline code becomes a tag in one. If a tag gets
lost, the same is asked paragraph by paragraph, and in the end without what stands around the code.
"""

from __future__ import annotations

import re

from kernel.agent import BaseAgent

from .code import FENCED, INLINE, Tags, split

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
PARAGRAPHS = re.compile(r"(\n\s*\n)")


class Translate(BaseAgent):
    """Translates the answer."""

    async def setup(self) -> None:
        glossary = self.settings["glossary"]
        if not isinstance(glossary, dict) or not all(isinstance(v, str) for v in glossary.values()):
            raise ValueError("settings: glossary: must be a table of terms and their translations")

    async def on_response(self, response: str) -> str:
        pieces = split(FENCED, response)
        return "".join([await self.translated(prose) + code for prose, code in pieces])

    async def translated(self, prose: str) -> str:
        """Return a text without fenced code in the other language."""
        pieces = split(INLINE, prose)
        if not has_letters("".join(text for text, _ in pieces)):
            return prose
        if len(pieces) == 1:
            return await self.ask(prose)
        tags = Tags(pieces)
        answer = tags.replaced(await self.ask(tags.text, TAGGED.format(tag=tags.example)))
        if answer is not None:
            return answer
        paragraphs = PARAGRAPHS.split(prose)
        if sum(map(has_letters, paragraphs)) > 1:
            return "".join([await self.translated(paragraph) for paragraph in paragraphs])
        return "".join([await self.ask(text) + code for text, code in pieces])

    async def ask(self, text: str, note: str = "") -> str:
        """Return what the model makes of a text, in the white space of the text.

        A text without letters is no question, and one without an answer stays as it is.
        """
        body = text.strip()
        if not has_letters(body):
            return text
        messages = [
            {"role": "system", "content": self.instruction() + note},
            {"role": "user", "content": body},
        ]
        translation = await self.context.chat(messages, temperature=0)
        return text.replace(body, translation.strip() or body, 1)

    def instruction(self) -> str:
        language = LANGUAGES.get(self.arguments["to"].lower(), self.arguments["to"])
        text = INSTRUCTION.format(language=language)
        if glossary := self.settings["glossary"]:
            lines = [f"- {term}: {translation}" for term, translation in glossary.items()]
            text += "\n".join([GLOSSARY.format(language=language), *lines])
        return text


def has_letters(text: str) -> bool:
    return any(map(str.isalpha, text))
