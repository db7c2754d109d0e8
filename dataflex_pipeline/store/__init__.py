"""Results on disk: atomic writes, fingerprints, sharded tables, the run folder."""
