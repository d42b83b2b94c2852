"""The primitives that compression is written over: one protocol, one module a framework. Nothing is imported here."""
