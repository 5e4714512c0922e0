"""Checkpoints that are damaged, foreign or hostile.

Every try does one thing to the newer of two checkpoints.  Whoever names it gets a :class:`.CheckpointError` and an
object that is bitwise as before; whoever asks for the newest good one gets the older, bitwise.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...keep.manifest import MANIFEST, STATE, manifest_text, sha256_of
from ...records import CheckpointError, DamagedCheckpointError
from ...trainer import HybridTrainer
from .material import Subject, batches, bits_of, settings
from .table import Case

#: Does something to a checkpoint: (its folder, the folder of an older one, dice).
Damage = Callable[[Path, Path, random.Random], None]

MODEL = "model_weights.safetensors"


def any_file(folder: Path, dice: random.Random) -> Path:
    """One of the files of a checkpoint."""
    return dice.choice(sorted(p for p in folder.iterdir() if p.stat().st_size))


def truncate(folder: Path, older: Path, dice: random.Random) -> None:
    """Cut a file short anywhere."""
    file = any_file(folder, dice)
    os.truncate(file, dice.randrange(file.stat().st_size))


def zero(folder: Path, older: Path, dice: random.Random) -> None:
    """A file full of zeros, as after a power loss."""
    file = any_file(folder, dice)
    file.write_bytes(bytes(file.stat().st_size))


def flip(folder: Path, older: Path, dice: random.Random) -> None:
    """One bit."""
    file = any_file(folder, dice)
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def remove(folder: Path, older: Path, dice: random.Random) -> None:
    """A file is gone."""
    any_file(folder, dice).unlink()


def swap(folder: Path, older: Path, dice: random.Random) -> None:
    """A file of the older checkpoint in the place of the newer one's, where the two differ."""
    both = [p for p in sorted(folder.iterdir()) if (older / p.name).exists()]
    names = [p.name for p in both if p.read_bytes() != (older / p.name).read_bytes()]
    name = dice.choice([n for n in names if n != MANIFEST])
    shutil.copyfile(older / name, folder / name)


def add(folder: Path, older: Path, dice: random.Random) -> None:
    """A file that nobody has written down."""
    (folder / dice.choice(("extra.bin", "optimizer.pt", "x.safetensors"))).write_bytes(b"x")


def payload(marker: Path) -> bytes:
    """A pickle that, when it is read, runs a command which leaves a file behind."""
    return f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()


def marker_of(folder: Path) -> Path:
    """What code in a checkpoint would leave behind."""
    return folder.parent.parent / "code-has-run"


def poison(folder: Path, older: Path, dice: random.Random) -> None:
    """A pickle that runs code, in the place of a file, with a manifest that vouches for it."""
    file = dice.choice([p for p in sorted(folder.iterdir()) if p.name != MANIFEST])
    file.write_bytes(payload(marker_of(folder)))
    reseal(folder)


def header_bomb(folder: Path, older: Path, dice: random.Random) -> None:
    """A header that asks for exabytes, or claims to be that long itself."""
    huge = {"weight": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}
    header = json.dumps(huge).encode()
    bombs = (struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", len(header)) + header, b"", b"\xff" * 64)
    file = dice.choice([p for p in sorted(folder.iterdir()) if p.suffix == ".safetensors"])
    file.write_bytes(dice.choice(bombs))
    reseal(folder)


def parser_bomb(folder: Path, older: Path, dice: random.Random) -> None:
    """A state that is nested a hundred thousand deep, or is no state."""
    bombs = ("[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "[]", '{"trees": 1}', '{"trees": {"model": {"$x": 1}}}')
    (folder / STATE).write_text(dice.choice(bombs))
    reseal(folder)


def traversal(folder: Path, older: Path, dice: random.Random) -> None:
    """A manifest that names files elsewhere."""
    fields = read(folder)
    outside = folder.parent.parent / "outside.safetensors"
    outside.write_bytes((folder / MODEL).read_bytes())
    name = dice.choice((f"../../{outside.name}", str(outside), "..\\x", "./x", "a/b", "", ".", "\0"))
    fields["files"][name] = fields["files"][MODEL] | {"sha256": sha256_of(outside)}
    (folder / MANIFEST).write_text(manifest_text(fields))


def link(folder: Path, older: Path, dice: random.Random) -> None:
    """A link in the place of a file, to the same content elsewhere."""
    file = any_file(folder, dice)
    elsewhere = folder.parent.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def odd_manifest(folder: Path, older: Path, dice: random.Random) -> None:
    """A manifest with a value of another kind, and a hash that fits it."""
    fields = read(folder)
    key = dice.choice(sorted(fields))
    odd: Any = dice.choice((None, -1, 1.5, "x", [], {}, True, 10**30))
    if fields[key] == odd:
        odd = "y"
    fields[key] = odd
    if key in ("library_version", "torch_version"):  # only told to people
        fields["step"] = odd
    (folder / MANIFEST).write_text(manifest_text(fields))


def unfinished(folder: Path, older: Path, dice: random.Random) -> None:
    """Some of the files are empty, the manifest was not written."""
    (folder / MANIFEST).unlink()
    for file in sorted(folder.iterdir()):
        if dice.random() < 0.5:
            file.write_bytes(b"")


def read(folder: Path) -> dict[str, Any]:
    """The fields of a manifest without its own hash."""
    fields: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    del fields["sha256"]
    return fields


def reseal(folder: Path) -> None:
    """A manifest that vouches for whatever is in the files now: an attacker's."""
    fields = read(folder)
    for name in fields["files"]:
        file = folder / name
        fields["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (folder / MANIFEST).write_text(manifest_text(fields))


def trained(seed: int, folder: Path) -> tuple[HybridTrainer, list[Path]]:
    """A trainer after nine steps, and its checkpoints of steps 8 and 9."""
    trainer = Subject.of(seed).trainer(settings(checkpoint__keep_last_n=9))
    paths = []
    for batch in batches(seed, 9):
        trainer.step(batch)
        if trainer.current_step >= 8:
            paths.append(trainer.save_checkpoint(folder))
    return trainer, paths


def damaged(damage: Damage, seed: int, folder: Path) -> str | None:
    """Refused by name, got round without one, and nothing is changed or run."""
    _, (older, newer) = trained(seed, folder / "run")
    wanted, _ = trained(seed, folder / "again")
    wanted.load_checkpoint(older)
    damage(newer, older, random.Random(seed))
    live = Subject.of(seed + 50).trainer(settings())
    live.step(batches(seed, 1)[0])
    before = bits_of(live)
    try:
        live.load_checkpoint(newer)
    except DamagedCheckpointError:
        pass
    except CheckpointError as error:
        if not isinstance(error.__cause__, OSError):
            return f"refused as if it were whole: {error}"
    else:
        return "it was loaded"
    if bits_of(live) != before:
        return "refused, and the live object was changed"
    live.load_latest(newer.parent)
    if bits_of(live) != bits_of(wanted):
        return "the older checkpoint is not what was loaded instead"
    return "code in the checkpoint was run" if marker_of(newer).exists() else None


def explicit_and_missing(seed: int, folder: Path) -> str | None:
    """A checkpoint that is named and not there is an error, never a new start."""
    trainer, _ = trained(seed, folder / "run")
    before = bits_of(trainer)
    for path in (folder / "run" / "checkpoint_step_77", folder / "nowhere"):
        for load in (trainer.load_checkpoint, trainer.load_latest):
            try:
                load(path)
            except CheckpointError:
                continue
            return f"{path.name} was loaded"
    return None if bits_of(trainer) == before else "the live object was changed"


def cases() -> list[Case]:
    """Of this module."""
    kinds: dict[str, tuple[Damage, int]] = {
        "file truncated": (truncate, 20), "file zeroed": (zero, 8), "one bit flipped": (flip, 20),
        "file missing": (remove, 8), "files of two checkpoints swapped": (swap, 8), "file added": (add, 3),
        "malicious pickle, with a manifest for it": (poison, 8),
        "header bomb, with a manifest for it": (header_bomb, 8),
        "parser bomb, with a manifest for it": (parser_bomb, 6), "path traversal in the manifest": (traversal, 8),
        "link in the place of a file": (link, 5), "manifest with a wrong value": (odd_manifest, 20),
        "no manifest": (unfinished, 5),
    }  # fmt: skip
    means = "refused by name, set aside and the one before used without; nothing changed, nothing run"
    found = [
        Case(name=f"checkpoint: {name}", survived=means, tries=tries, trial=_of(damage))
        for name, (damage, tries) in kinds.items()
    ]
    told = "CheckpointError, nothing changed"
    return [*found, Case(name="checkpoint: named, not there", survived=told, tries=3, trial=explicit_and_missing)]


def _of(damage: Damage) -> Callable[[int, Path], str | None]:
    return lambda seed, folder: damaged(damage, seed, folder)
