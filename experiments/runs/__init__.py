"""How many runs are made, kept and written. Imports sim only."""
