"""Evidence on disk: the dearest part of an experiment, the same for many of its methods."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from mta.personalize.likelihoods import Evidence, Labels
from mta.system.atomic import write_tensors


def save_evidence(path: Path, evidence: Evidence, seconds: float) -> None:
    """Write what was gathered, and the seconds it took."""
    tensors = {"shots": evidence.shots, "counts": evidence.counts}
    if evidence.labels:
        tensors |= {"labels": evidence.labels.scores, "gold": evidence.labels.gold}
    write_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, {"seconds": repr(seconds)})


def load_evidence(path: Path) -> tuple[Evidence, float]:
    """What ``save_evidence`` wrote."""
    with safe_open(path, "pt") as file:
        tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}
        seconds = float(file.metadata()["seconds"])
    labels = Labels(tensors["labels"], tensors["gold"]) if "labels" in tensors else None
    return Evidence(tensors["shots"], tensors["counts"], labels), seconds
