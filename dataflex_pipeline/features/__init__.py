"""The costly tables over the rows: one file per feature, computed part by part, cached and shared."""
