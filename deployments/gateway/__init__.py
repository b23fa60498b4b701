"""The edge: HTTP in, typed requests out. One policy, one file; no torch, no Ray."""
