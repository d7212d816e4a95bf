"""The command line: the values of --config, and the texts of --help."""
