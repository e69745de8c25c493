"""Sets of parameters that scenario files extend."""
