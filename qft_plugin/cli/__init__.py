"""The command line, `qft`: settings, networks and images come from files, results go to files."""
