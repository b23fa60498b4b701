"""E-mail addresses as people write them: no quotes, no comments, no addresses without a dot."""

from __future__ import annotations

from deployments.guardrails.kinds import PiiKind
from deployments.guardrails.pii.rule import rule

LETTER = "0-9A-Za-z\u00c0-\u024f"
"""Latin letters with their accents: addresses in scripts without spaces would have no beginning."""

RULES = (
    rule(
        PiiKind.EMAIL,
        # At most 64 characters before the @ (RFC 5321); of what is longer, the last 64.
        rf"[{LETTER}_][{LETTER}_.%+'-]{{0,63}}@(?:[{LETTER}][{LETTER}-]{{0,40}}\.){{1,5}}"
        rf"[{LETTER}]{{2,24}}",
        before="",
        after="",
    ),
)
