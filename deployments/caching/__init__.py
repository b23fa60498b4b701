"""Answers that need not be computed again, and identical requests that are computed once."""
