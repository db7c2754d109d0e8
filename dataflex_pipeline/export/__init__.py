"""What leaves a run to be used elsewhere: the merged model, the adapter, the selected rows, and a card."""
