"""Exports for use elsewhere: the merged model, the adapter, the selected rows, and a card."""
