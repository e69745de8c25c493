"""Questions put to the simulator, and the command line."""
