"""The command ``hpt``.

Reading order: `hpt` (the parser, and which module runs a command), `arguments` and `bench_arguments` (flags), `names`
(what may be chosen), then one module per command: `train`, `compare`, `inspect`, `report`, `bench`; `progress` (the
line on a terminal).  A new command is a parser in `hpt`, a line in `hpt.COMMANDS` and a module with ``run(args)``.
"""

from .hpt import main as main
