"""What the tables of a run say: found, described and queried in bounded memory."""
