"""Translate: the answer arrives in the language you name, whatever language the model chose."""

from __future__ import annotations

from kernel.agent import BaseAgent

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
    " translation alone: no remark, no quotes around it. Keep Markdown, code, names, numbers and"
    " links as they are. If it is already {language}, repeat it unchanged."
)


class Translate(BaseAgent):
    """Translates the answer."""

    async def on_response(self, response: str) -> str:
        language = LANGUAGES.get(self.arguments["to"].lower(), self.arguments["to"])
        messages = [
            {"role": "system", "content": INSTRUCTION.format(language=language)},
            {"role": "user", "content": response},
        ]
        translation = await self.context.chat(messages, temperature=0)
        return translation.strip() or response
