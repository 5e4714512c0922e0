"""``hpt recipe``: the step sizes of a run, to take home into a plain script."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..experiments.arms.options import InputError
from ..move.prior import BESIDE_MUON
from ..move.recipe import Recipe
from .arguments import OK, show


def run(args: argparse.Namespace) -> int:
    """Read a recipe and print it.

    Raises:
        InputError: there is none.
        ConfigError: it cannot be read.
    """
    path: Path = args.path
    file = path / "recipe.toml" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path}: holds no recipe.toml; 'hpt train --out {path}' writes one when its run has ended")
    found = Recipe.load(file)

    def text() -> str:
        loaded = f'Recipe.load("{file}").param_groups(model, lr=LR, weight_decay=DECAY'
        if BESIDE_MUON in found.origin:  # in AdamW alone these factors are worth less than none for all
            built = (
                '#   muon = torch.optim.Muon(MATRICES, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")\n'
                f'#   groups = {loaded}, groups=[{{"params": THE_REST}}])\n'
                "#   adamw = torch.optim.AdamW(groups)\n"
            )
        else:
            built = f"#   groups = {loaded})\n#   optimizer = torch.optim.AdamW(groups)\n"
        usage = (
            "# in a plain script:\n#   from hybrid_predict_trainer import Recipe\n"
            f'{built}# in the next run: --set training.recipe="{file}"'
        )
        return f"{found.lines()}\n{usage}"

    value = {"origin": found.origin, "multiplier": found.multiplier, "rates": dict(found.rates)}
    show(args, value, text)
    return OK
