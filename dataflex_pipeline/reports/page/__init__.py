"""The page of a run: one HTML file with its findings, its charts and its rows."""
