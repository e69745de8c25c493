"""All results on one page. Imports study and runs."""
