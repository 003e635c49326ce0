"""Reads a compiled program and reports what it moves between devices. Knows nothing of this package's drivers."""
