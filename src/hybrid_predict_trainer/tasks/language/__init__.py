"""Language: texts, tokens, batches, models, fine-tuning."""

from ...former_names import lookup

__getattr__ = lookup("tasks.language")
