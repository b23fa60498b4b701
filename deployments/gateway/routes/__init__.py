"""What each route does: a thin translation between its protocol and the shared core."""
