"""What a model is: contracts, sources, artifacts. Imports nothing from its siblings but ``state``."""
