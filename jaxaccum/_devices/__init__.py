"""Where local sums live and how they are reduced: one device, a mapped axis, the data axis of a mesh; ZeRO's layout.

`OneDevice`, `MappedAxis` and `MeshAxis` have the same methods; their `joined` is the reduction. Knows no loss and no
optimizer.
"""
