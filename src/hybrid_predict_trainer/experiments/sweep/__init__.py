"""Sweeps: ``hpt sweep``, and what stopping runs early saves on recorded grids (``hpt bench sweep``)."""
