"""What is wrong with a run, from its records, and what to change.

Reading order: `record` (a run's records as columns), `signals` (one function per illness), `diagnosis` (all of them,
as data, text and a TOML patch).  It reads files only: no model, no trainer.
"""

from .diagnosis import Diagnosis as Diagnosis
from .diagnosis import diagnose as diagnose
from .record import RunRecord as RunRecord
from .record import read_record as read_record
from .signals import Finding as Finding
