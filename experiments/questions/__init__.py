"""One question a file or folder: its grid, its answer, its figures. Imports study and draw."""
