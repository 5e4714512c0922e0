"""Mathematics that knows nothing of training.

`sequential` (tests that may be looked at again and again), `ridge` (online ridge regression), `streaming` (principal
components, sketches, power iteration).
"""
