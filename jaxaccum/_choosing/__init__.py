"""Choosing the size of a micro-batch and the number of micro-batches in a window.

Computes from numbers that others measured. Runs no training.
"""
