"""Reads the text of a compiled program and reports what it moves between devices.

Knows meshes and the names of their axes. Knows no loss, no optimizer and no driver.
"""
