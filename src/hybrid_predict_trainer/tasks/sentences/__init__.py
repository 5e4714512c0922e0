"""Pairs of sentences for a small BERT: data, word pieces, the model."""

from ...former_names import lookup

__getattr__ = lookup("tasks.sentences")
