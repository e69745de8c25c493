"""A run as tracks, samples and a Perfetto file. Imports sim only."""
