"""Figures: the one style, panels, and the figures of the commands. Imports study and runs."""
