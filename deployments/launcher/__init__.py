"""Runs the platform on one machine: what stands behind ``scripts/serve``.

Ray first, then ``serve run CONFIG`` in it, then a wait for ``/readyz``; on a signal the
same backwards, and nothing is left behind. Ray is only started here, never imported.
"""
