"""What runs on Ray Serve. ``app.py`` puts it together."""
