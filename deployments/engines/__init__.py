"""Queues, schedulers and runners: everything that turns requests into model output."""
