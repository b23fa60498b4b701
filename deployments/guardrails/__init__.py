"""What may go in and come out: lengths, blocked categories, personal data, caps of a plan.

Pure but for the few awaits of ``checks.py``. The gateway asks for the ``Guard`` of a plan and
does what it says; ``GuardrailsConfig`` in ``deployments/config.py`` has the settings.
"""
