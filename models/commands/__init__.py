"""The commands of ``python -m models``: one file a subject, each with an ``add``."""
