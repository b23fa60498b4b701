"""What holds for every request, one pure-ASGI policy a file; ``app.py`` puts them in order."""
