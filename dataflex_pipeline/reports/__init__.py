"""Reports on the tables of a run: found, described and queried in bounded memory."""
