"""What the kernel promises: structures, state machine, ioctls and the port of a device. Imports the wire's payloads
and the errors."""
