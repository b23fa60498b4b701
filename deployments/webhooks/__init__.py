"""Webhooks that come in: whose they are, whether they are genuine, and where they are kept."""
