"""What happened, told once: cores emit events; metrics, logs and traces subscribe."""
