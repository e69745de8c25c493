"""Time: the virtual clock, on which the model runs. Imports proto_v3.errors only."""
