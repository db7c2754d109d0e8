"""One thin module per command: they check, call the library, and say what happened."""
