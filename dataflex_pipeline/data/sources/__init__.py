"""Sources of rows: files, folders and hub data sets, by name, read row by row."""
