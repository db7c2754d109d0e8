"""Chat templates: a conversation as text, token ids and labels."""
