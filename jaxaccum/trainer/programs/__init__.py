"""The compiled programs of a run, and what they return. Knows no loader and no callback."""
