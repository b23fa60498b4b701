"""What a model is: contracts, sources, artifacts; of its siblings it imports only ``state``."""
