"""Local steps in torch: every rank steps by itself, and the change of its parameters is exchanged now and then."""
