"""Closed forms that a run is held against. Imports scenario and device."""
