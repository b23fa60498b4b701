"""Between text and tokens: prompts in, and out a stream that never shows half a character."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

from deployments.engines.tools import for_template
from models.contracts import Conversation, Prompt
from models.errors import ConfigError, InvalidInput

REPLACEMENT = "\ufffd"
"""What an incomplete UTF-8 sequence decodes to."""
LONGEST_CHARACTER = 4
"""Bytes of a UTF-8 character, so also the most byte tokens one can need."""
LONGEST_WINDOW = 16
"""Tokens that are decoded anew with each new one, at most while they give text."""
LONG_PROMPT = 4096
"""Characters above which tokenising would hold up the event loop noticeably."""


class TextCodec:
    """A model's tokenizer and chat template.

    Args:
        folder: a model folder with tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} has no tokenizer that loads: {error}") from error
        if not self._tokenizer.is_fast:
            raise ConfigError(f"{folder} has only a slow tokenizer; tokenizer.json is needed.")
        self._backend = self._tokenizer.backend_tokenizer
        # What the file may ask for; done once, since threads share the tokenizer from now on.
        self._backend.no_truncation()
        self._backend.no_padding()

    def serialised(self) -> str:
        """The tokenizer, as tokenizer.json has it."""
        text: str = self._backend.to_str()
        return text

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Tokens of a prompt.

        Raises:
            InvalidInput: the chat template refuses the conversation, or there is none; or
                the text is not valid Unicode.
        """
        if isinstance(prompt, Conversation):
            size = sum(
                len(message.content) + sum(len(call.arguments) for call in message.tool_calls)
                for message in prompt.messages
            )
            size += sum(len(tool.description or "") + len(tool.parameters) for tool in prompt.tools)
        else:
            size = len(prompt) if isinstance(prompt, str) else 0
        if size > LONG_PROMPT:
            return await asyncio.to_thread(self._encode, prompt)
        return self._encode(prompt)

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self._tokens(prompt, "prompt", add_special_tokens=True)
        if not isinstance(prompt, Conversation):
            return prompt
        template = self._tokenizer.chat_template
        if not template:
            raise InvalidInput(
                "This model has no chat template; send a plain prompt to /v1/completions.",
                param="messages",
            )
        messages, tools = for_template(prompt, template)
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise InvalidInput(
                f"The model's chat template refuses this conversation: {error}", param="messages"
            ) from error
        return self._tokens(text, "messages", add_special_tokens=False)

    def _tokens(self, text: str, field: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:  # half of a surrogate pair; nothing else is no text
            raise InvalidInput(
                f"{field} has characters that are not valid Unicode.", param=field
            ) from error

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, special ones left out."""
        text: str = self._backend.decode(tokens, skip_special_tokens=True)
        return text

    async def spell(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        if len(tokens) > LONG_PROMPT:
            return await asyncio.to_thread(self._spell, tokens)
        return self._spell(tokens)

    def _spell(self, tokens: Sequence[int]) -> str:
        text: str = self._backend.decode(list(tokens), skip_special_tokens=False)
        return text

    def token(self, token: int) -> str:
        """One token as shown beside its log-probability, special ones included."""
        return self._spell([token])


class TextStream:
    """Turns one sequence's tokens into text as they come.

    Text is handed out as soon as it is certain: not while it ends in a part of a
    character, nor while it may turn out to be the beginning of a stop string.

    Args:
        decode: tokens → text.
        stop: strings that end the sequence; neither they nor what follows is handed out.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()) -> None:
        self._detokenizer = _Detokenizer(decode)
        self._stop = stop
        self._held = ""
        self.stopped = False
        """A stop string was found."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that has become certain, often empty."""
        text = self._held + self._detokenizer.push(token)
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            # The one complete first, as if the text had come letter by letter.
            _, begin = min(found)
            self.stopped = True
            self._held = ""
            return text[:begin]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back for a stop string that did not come. Half a character is dropped."""
        text, self._held = self._held, ""
        return text


class _Detokenizer:
    """Tokens → the text that no later token can change.

    A token reads differently after others (leading spaces, bytes of one character), so it
    is decoded at the end of a short window, and what is new is what goes beyond the
    characters of that window which were taken before.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context = 0
        """Leading tokens of the window that are there only to be read after."""
        self._taken = 0
        """Leading characters of the window's text that were handed out."""

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        uncertain = self._uncertain(text)
        piece = text[self._taken : len(text) - uncertain]
        self._taken = max(self._taken, len(text) - uncertain)
        if not uncertain:
            self._advance(piece)
        elif len(self._window) > LONGEST_WINDOW:  # the model writes bytes that are no text
            self._window = self._window[-LONGEST_WINDOW // 2 :]
            self._context = 0
            self._taken = len(self._decode(self._window)) - uncertain
        return piece

    def _uncertain(self, text: str) -> int:
        """How many characters at the end may be parts of one that is not complete yet.

        A byte-level decoder shows such parts as one replacement, a byte-fallback decoder as
        one a byte and with them all bytes they follow; they span less than a character.
        """
        replaced = len(text) - len(text.rstrip(REPLACEMENT))
        new_tokens = len(self._window) - self._context
        return replaced if new_tokens < LONGEST_CHARACTER else min(replaced, LONGEST_CHARACTER - 1)

    def _advance(self, piece: str) -> None:
        """The window's text is all out: its newer tokens become the context of the next."""
        context = self._window[self._context :]
        text = self._decode(context)
        if text:
            self._window, self._context, self._taken = context, len(context), len(text)
        elif self._context and not piece:  # a special token, which shows nothing
            self._window.pop()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
