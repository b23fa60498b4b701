"""A light safety classifier: a logistic regression on the vectors of the sentence encoder.

It is an alarm that costs one embedding, not a judge: docs/guardrails.md says what it finds and
what it misses. ``python -m deployments.guardrails.safety`` makes ``head.json`` anew out of
texts that Python packages carry, and measures it on sources it has not learned from.
"""
