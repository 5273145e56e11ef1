"""Rank-8 LoRAs of many people against another trainer of many LoRAs: MoE-PEFT (the successor of m-LoRA).

It needs an older transformers than mta admits, so it has an environment of its own (with torch as here: it works):

    python3.11 -m venv .moe-peft && .moe-peft/bin/pip install moe-peft
    MTA_MOE_PEFT_PYTHON=.moe-peft/bin/python .venv/bin/python -m benchmarks.speed --only multi_lora
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.speed.adaptation import alike, short_cohort
from benchmarks.speed.adapters import plain_model
from benchmarks.speed.data import SHOTS, Absent
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row, rate, turns
from benchmarks.speed.training import Cohort, agreed, apart, base_of, small
from mta.lora.batch import Factors, LoraBatch

PYTHON = "MTA_MOE_PEFT_PYTHON"
_PREFIX = "base_model.model."
_MINUTE = 60  # people times this, per second, is people per minute
_PEERS = 16  # people that the peer is timed on
_TOGETHER = (1, 2, 4)  # of them in one pass; sixteen need more than 24 GiB


def rows(settings: Settings) -> Iterator[Row]:
    """One row for each dtype. Raises Absent."""
    need_peer()
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        name = f"multi-LoRA training, short, rank 8 (OPPU), {short}"
        if settings.wanted(name):
            yield against(name, short_cohort(dtype, settings), dtype, settings, partial(plain_model, dtype))
        base_of.cache_clear()


def need_peer() -> None:
    """Raise Absent without an environment for the peer."""
    if not os.environ.get(PYTHON):
        raise Absent(f"{PYTHON} does not name the Python of an environment with MoE-PEFT")


def against(name: str, cohort: Cohort, dtype: str, settings: Settings, model: Callable[[], Any]) -> Row:
    """Our cohort against MoE-PEFT's best number of people in a pass, after losses and gradients were compared.

    ``model`` makes the cohort's base as transformers has it. The peer computes on the device of the cohort.
    """
    people = len(cohort.jobs)
    theirs = cohort.typical(min(_PEERS, people))
    some = cohort.first(_TOGETHER[-1])
    some = replace(some, start=small(some.start, 7))
    with peer(some, dtype, model) as ask:
        difference = agreed(_against(some, ask), dtype)

    def ours() -> float:
        cohort.train()
        return _MINUTE * people

    with peer(theirs, dtype, model) as ask:

        def trained(together: int) -> float:
            ask("train", together=together)
            return _MINUTE * alike(theirs, cohort)

        sizes = [n for n in _TOGETHER if n <= len(theirs.jobs)]
        for n in sizes:  # the first request of a size loads the peer's kernels
            trained(n)
        best = max(sizes, key=lambda n: rate(lambda: trained(n)))
        rates, peer_rates = turns(ours, lambda: trained(best), settings.repeats)
    return Row(
        name,
        f"mta {dtype}, {people} people",
        f"MoE-PEFT, {best} of {len(theirs.jobs)} people in a pass",
        "people/min",
        tuple(rates),
        tuple(peer_rates),
        None,
        difference,
        "losses and gradients",
        f"{SHOTS} examples a person, optimizer steps: {cohort.training.steps}; tried {sizes} people in a pass",
        more={"people": people, "peer_people": len(theirs.jobs), "together": best, "steps": cohort.training.steps},
    )


@contextmanager
def peer(cohort: Cohort, dtype: str, model: Callable[[], Any]) -> Iterator[Any]:
    """``moe_peft_peer.py`` over this cohort in the environment that the variable names; call it with a request."""
    with tempfile.TemporaryDirectory() as folder:
        _write(cohort, dtype, model, Path(folder))
        script = Path(__file__).with_name("moe_peft_peer.py")
        command = [os.environ[PYTHON], str(script), folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin
            assert process.stdout

            def ask(do: str, **more: Any) -> dict[str, Any]:
                if do:
                    print(json.dumps({"do": do, **more}), file=process.stdin, flush=True)
                line = process.stdout.readline() if process.stdout else ""
                if not line:
                    raise Absent("MoE-PEFT's process ended: see its error above")
                return dict(json.loads(line)) | {"folder": folder}

            ask("")
            try:
                yield ask
            finally:
                process.stdin.close()


def _write(cohort: Cohort, dtype: str, model: Callable[[], Any], folder: Path) -> None:
    """What the other process needs: the model, everybody's examples, and the adapters to start from."""
    model().save_pretrained(folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    config |= config.get("rope_parameters") or {}  # where its older transformers looks for rope_theta
    (folder / "base" / "config.json").write_text(json.dumps(config))
    training, start = cohort.training, cohort.start
    work = {
        "threads": torch.get_num_threads(),
        "device": str(cohort.base.device),
        "dtype": dtype,
        "steps": training.steps,
        "clip": training.clip,
        "adamw": {
            "lr": training.lr,
            "betas": [training.beta1, training.beta2],
            "eps": training.eps,
            "weight_decay": training.weight_decay,
        },
        "rank": start.rank,
        "alpha": round(start.scale * start.rank),
        "layers": sorted({name.rpartition(".")[2] for name in start.names}),
        "people": [[_example(one) for one in job.examples] for job in cohort.jobs],
    }
    (folder / "work.json").write_text(json.dumps(work))
    tensors = {
        f"{n}/{_PREFIX}{name}.lora_{side}.weight": part[n].float().cpu().contiguous()
        for name, pair in start.factors.items()
        for side, part in zip("AB", pair)
        for n in range(len(cohort.jobs))
    }
    save_file(tensors, folder / "start.safetensors")


def _example(example: Any) -> dict[str, list[int]]:
    tokens, start = list(example.tokens), example.target_start
    return {"tokens": tokens, "labels": [-100] * start + list(example.target), "mask": [1] * len(tokens)}


def _against(cohort: Cohort, ask: Any) -> float:
    """Largest relative difference of losses and gradients to ours, over everybody."""
    loss, gradient = cohort.gradient()
    answer = ask("gradient")
    tensors = load_file(Path(answer["folder"]) / "gradient.safetensors")
    people = range(len(cohort.jobs))
    theirs = {
        name: Factors(*(torch.stack([tensors[f"{n}/{_PREFIX}{name}.lora_{s}.weight"] for n in people]) for s in "AB"))
        for name in cohort.start.names
    }
    expected = sum(answer["losses"]) / len(people)
    return max(apart(gradient, LoraBatch(theirs, cohort.start.scale)), abs(loss - expected) / expected)
