"""Closed forms that runs are compared with. Imports scenario and device."""
