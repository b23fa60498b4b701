"""Sweeps: many runs of one recipe in search of the best configuration, on Ray Tune.

__main__.py   python -m tune NAME --config F --set key=value
config.py     what a person may say about a sweep
space.py      the space held against the recipe's configuration
search.py     which point is next
journal.py    what happened so far: one line an event, from which a killed sweep goes on
schedulers.py who is stopped early
trial.py      one trial, in a worker of Ray Tune
sweep.py      all of it together
results.py    table, best configuration, plots
sweeps/       sweeps to run as they are, and to start from
"""
