"""The terminal: tables, drawings, progress, answers as JSON or CSV. No other room of the library prints."""
