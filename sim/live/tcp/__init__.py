"""The session and the data connections between two VMM processes. Imports proto_v3.wire and the root of sim.live."""
