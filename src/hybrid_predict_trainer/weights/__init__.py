"""Parameters as lists of tensors.

Reading order: `algebra` (copy, move, norms, finite), `real_views` (complex ones), `shards` (parts of sharded ones),
`trained` (which may move), `products` (inner products and weighted sums), `offload` (host copies).
"""

from ..former_names import lookup

__getattr__ = lookup("weights")
