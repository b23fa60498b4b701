"""What happened, told once: cores emit events, subscribers make metrics, logs and traces of them."""
