"""Questions put to the simulator, and the command line."""

INTERRUPTED = 130
"""The exit status of a program ended by Ctrl-C: 128 + SIGINT."""
