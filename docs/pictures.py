"""Draws the pictures of the documentation: ``python docs/pictures.py [folder]``. The same bytes on every run."""

from __future__ import annotations

import sys
from pathlib import Path

from drawing import computing, merging, overview, packages, stage

DRAWINGS = {
    "stages": overview.stages,
    "stage-0": stage.stage_0,
    "stage-1": stage.stage_1,
    "stage-2": merging.stage_2,
    "stage-3": stage.stage_3,
    "batch": computing.batch,
    "architecture": packages.architecture,
    "serving": packages.serving,
}


def draw(folder: Path) -> None:
    """Write every drawing into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in DRAWINGS.items():
        (folder / f"{name}.svg").write_text(drawing().svg(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
