"""Where local sums live and how they are reduced: one device, a mapped axis, the data axis of a mesh; ZeRO's layout.

Knows no loss and no optimizer.
"""
