"""Speed and memory, side by side with peers; one command each, tables in ``results/``."""
