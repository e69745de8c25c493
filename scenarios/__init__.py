"""The scenario files that ship with the project."""
