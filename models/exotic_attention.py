"""What transformers may ask of an attention function and ours do not compute."""

from __future__ import annotations

from collections.abc import Mapping

ARGUMENTS = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")
"""They would change the result if they were ignored."""


def asked_for(arguments: Mapping[str, object]) -> str | None:
    """The first of ``ARGUMENTS`` that is given; it must not be ignored."""
    for name in ARGUMENTS:
        if arguments.get(name) is not None:
            return name
    return None
