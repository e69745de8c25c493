"""Live mode: the protocols of `proto_v3`, unchanged, and the device of `sim`, behind real file descriptors.

Four processes: a device process and a VMM at each side. `device_process` runs the simulated drivers on the real clock,
with the state as real bytes; a VMM (`vmm`) reaches them by ioctls on a UNIX socket (`calls`, `remote`) and reads and
writes data fds that were passed to it; the VMMs talk over TCP (`wire`).
"""
