"""What a VMM does: the move as a whole, v2 and v3 at both ends, the decision to stop. Imports vfio, wire and the
ground."""
