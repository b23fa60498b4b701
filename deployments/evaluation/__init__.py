"""Measures a model as it is really served, over HTTP: what promotion decides by."""
