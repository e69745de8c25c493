"""One host and the network between two: link, machine, VMMs. Imports device and what that imports."""
