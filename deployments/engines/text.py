"""Between text and tokens: prompts in, and out a stream that never shows half a character."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

from models.contracts import ChatMessage, Prompt
from models.errors import ConfigError, InvalidInput

REPLACEMENT = "\ufffd"
"""What an incomplete UTF-8 sequence decodes to."""
LONGEST_CHARACTER = 4
"""Bytes of a UTF-8 character, so also the most byte tokens one can need."""
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

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Tokens of a prompt.

        Raises:
            InvalidInput: the chat template refuses the conversation, or there is none.
        """
        if isinstance(prompt, str):
            size = len(prompt)
        else:
            size = sum(0 if isinstance(part, int) else len(part.content) for part in prompt)
        if size > LONG_PROMPT:
            return await asyncio.to_thread(self._encode, prompt)
        return self._encode(prompt)

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode(prompt))
        if not prompt or isinstance(prompt[0], int):
            return tuple(token for token in prompt if isinstance(token, int))
        if not self._tokenizer.chat_template:
            raise InvalidInput(
                "This model has no chat template; send a plain prompt to /v1/completions.",
                param="messages",
            )
        messages = [
            {"role": m.role, "content": m.content} for m in prompt if isinstance(m, ChatMessage)
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise InvalidInput(
                f"The model's chat template refuses this conversation: {error}", param="messages"
            ) from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, special ones left out."""
        text: str = self._backend.decode(tokens, skip_special_tokens=True)
        return text

    def token(self, token: int) -> str:
        """One token as shown beside its log-probability, special ones included."""
        text: str = self._backend.decode([token], skip_special_tokens=False)
        return text


class TextStream:
    """Turns one sequence's tokens into text as they come.

    Text is handed out as soon as it is certain: not while it ends in a part of a
    character, nor while it may turn out to be the beginning of a stop string.

    Args:
        decode: tokens → text.
        stop: strings that end the sequence; neither they nor what follows is handed out.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()) -> None:
        self._decode = decode
        self._stop = stop
        # Tokens decode differently after others (leading spaces, bytes), so each new piece
        # is the difference between a short window with and without the new tokens.
        self._window: list[int] = []
        self._known = 0
        """Tokens of the window whose text has been taken."""
        self._held = ""
        self.stopped = False
        """A stop string was found."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that has become certain, often empty."""
        self._window.append(token)
        before = self._decode(self._window[: self._known])
        after = self._decode(self._window)
        unfinished = after.endswith(REPLACEMENT)
        if unfinished and len(self._window) - self._known < LONGEST_CHARACTER:
            return ""
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """What was held back for a stop string that did not come. Half a character is dropped."""
        text, self._held = self._held, ""
        return text

    def _release(self, piece: str) -> str:
        text = self._held + piece
        ends = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)[0]]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
