"""Evidence in files: the likelihood of shots under every anchor is the most expensive part of an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from mta.evaluation.context import Context, gathered_evidence
from mta.personalize.evidence import Evidence, Labels
from mta.personalize.shots import ShotsJob
from mta.system.atomic import json_sha256, write_tensors


def kept_evidence(folder: Path, context: Context, jobs: Sequence[ShotsJob]) -> tuple[Evidence, float]:
    """Return the evidence of the shots, and the seconds that gathering it took.

    Both are read from ``folder`` if an earlier run gathered them, and written there otherwise. A file's name is a hash
    of everything that determines the evidence.
    """
    base = context.base
    parts = [context.bank.hash, str(base.dtype), base.prompts.max_tokens, *(job.key for job in jobs)]
    path = folder / f"evidence-{json_sha256(parts)[:24]}.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
            seconds = float(file.metadata()["seconds"])
        labels = Labels(tensors["labels"], tensors["gold"]) if "labels" in tensors else None
        return Evidence(tensors["shots"], tensors["counts"], labels), seconds
    evidence, seconds = gathered_evidence(context, jobs)
    tensors = {"shots": evidence.loglik, "counts": evidence.counts}
    if evidence.labels:
        tensors |= {"labels": evidence.labels.scores, "gold": evidence.labels.gold}
    write_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, {"seconds": repr(seconds)})
    return evidence, seconds
