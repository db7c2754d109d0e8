"""A command as a process: exit codes, Ctrl-C, streams, settings of libraries, and the ranks of a launch."""
