"""``python -m deployments.guardrails.safety [--write]``"""

from deployments.guardrails.safety.fit import main

main()
