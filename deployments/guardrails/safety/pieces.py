"""A text in pieces that the encoder can read, without its tokenizer. Pure.

The encoder averages over what it reads: one bad sentence among many good ones would vanish. So
pieces are a few sentences long, and the worst one counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MOST_TOKENS = 256
"""That a piece may have; what ``EmbedModel.max_tokens`` has to allow."""
ROOM = MOST_TOKENS - 2
"""Without the marks for beginning and end."""
WORDS = re.compile(r"\s*+\S++|\s++")
"""The second for blanks at the end: they would be tried from each of them on."""
SENTENCE_END = re.compile(r"[.!?:;][\"')\]]*$")
FULL_ENOUGH = ROOM * 2 // 3
"""From here on a piece ends with its sentence."""


def pieces(text: str) -> Iterator[str]:
    """All of ``text`` but blanks, in order; nothing of a text that is blank."""
    piece, size = "", 0
    for word in _words(text):
        more = tokens(word)
        ends = size >= FULL_ENOUGH and (SENTENCE_END.search(piece) or word[0] == "\n")
        if piece and (ends or size + more > ROOM):
            yield piece.strip()
            piece, size = "", 0
        piece, size = piece + word, size + more
    if piece:
        yield piece.strip()


def tokens(text: str) -> int:
    """What ``text`` is at most in a WordPiece vocabulary: a token a letter.

    Letters outside ASCII may be taken apart first; a Hangul syllable has three.
    """
    return sum(0 if letter.isspace() else 1 if letter < "\x80" else 3 for letter in text)


def _words(text: str) -> Iterator[str]:
    """With the blanks before them; what would be no piece by itself is cut."""
    for match in WORDS.finditer(text):
        word = match[0]
        if word.isspace():
            continue
        if tokens(word) <= ROOM:
            yield word
        else:
            step = ROOM // 3
            yield from (word[at : at + step] for at in range(0, len(word), step))
