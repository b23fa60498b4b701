"""What can go wrong with durable state. ``models`` and above translate for their callers."""

from __future__ import annotations


class StateError(Exception):
    """Base. The message never contains a password, nor anything else of a URL's secrets."""


class StateUnavailable(StateError):
    """The database cannot be reached, or does not answer in time: try again later."""


class StateMisconfigured(StateError):
    """An operator's mistake, which no retry repairs."""
