"""The tensor primitives of compression: one protocol, one module per framework. Imports no framework itself."""
