"""The command line: what --config names, and the text of --help."""
