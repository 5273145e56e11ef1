"""Five LoRAs trained with plain PEFT become a bank: are fitted coefficients better than the best single LoRA?

Each of five people of MovieLens has a LoRA (of different ranks, one with rsLoRA) trained by PEFT on their earlier
ratings. Coefficients are fitted to their next 8 ratings. All are measured on their next 64: the NLL over the labels,
and paired differences to the best single LoRA. About 12 minutes on two cores.

Run:  python -m benchmarks.imported --out imported
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import mta
from mta.config import MergeSettings, Run, StackSettings
from mta.data.history import Person
from mta.data.readers import read_people
from mta.data.tasks import load_task
from mta.model.base import BaseModel
from mta.personalize.adapters import BASE, PersonOrModel
from mta.store import Store
from mta.store.state import State
from mta.system.assets import fetch

LORAS = ({"r": 8}, {"r": 4}, {"r": 16, "use_rslora": True, "lora_alpha": 8}, {"r": 8}, {"r": 8})
TRAIN, SHOTS, QUERIES, CALIBRATION = 96, 8, 64, 24
TASK = load_task("movielens-rating")
RUN = Run(base="smollm2-135m-instruct", encoder="all-minilm-l6-v2", task=TASK.name, memory="3GiB", max_tokens=256)


def trained(base: BaseModel, person: Person, settings: dict[str, int | bool], out: Path) -> Path:
    """Train one LoRA with PEFT on the base alone, and save it as PEFT does."""
    import peft

    config = peft.LoraConfig(**{"lora_alpha": 16} | settings, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base.model, config)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-4)
    items = [*person.items[:TRAIN]] * 2
    for start in range(0, len(items), 8):
        adam.zero_grad()
        for item in items[start : start + 8]:
            example = base.prompts.example(TASK, item)
            tokens = torch.tensor([example.tokens], device=base.device)
            labels = tokens.clone()
            labels[:, : example.target_start] = -100
            (model(input_ids=tokens, labels=labels).loss / 8).backward()
        adam.step()
    model.save_pretrained(out)
    base.model = model.unload()
    return out


def nll(personal: mta.Personalizer, people: Sequence[Person], models: Sequence[PersonOrModel]) -> Tensor:
    """Return the NLL of every query of all people, each under its person's entry in ``models``."""
    queries = [person.items[TRAIN + SHOTS : TRAIN + SHOTS + QUERIES] for person in people]
    scores = personal.label_scores(list(zip(models, queries)))
    labels = TASK.labels or ()
    right = [[labels.index(TASK.target(item)) for item in items] for items in queries]
    found = [-own.double().log_softmax(1)[torch.arange(len(own)), gold] for own, gold in zip(scores, right)]
    return torch.cat(found)


def measured(base: BaseModel, bank: mta.Bank, people: Sequence[Person], out: Path) -> dict[str, Tensor]:
    """Return the NLL of every query under each method."""
    store = Store(out / "singles")
    for n in range(len(bank)):
        store.save(f"lora-{n}", State(bank.hash, (n,), (1.0,), "fixed", "", f"lora {n}", 0, None))
    single = mta.Personalizer(base, bank, store, run=RUN)
    found = {"base": nll(single, people, [BASE] * len(people))}
    found |= {f"LoRA of person {n + 1} for all": nll(single, people, [f"lora-{n}"] * len(people)) for n in range(5)}
    found["own LoRA"] = nll(single, people, [f"lora-{n}" for n in range(5)])
    shots = [Person(person.id, person.items[TRAIN : TRAIN + SHOTS]) for person in people]
    for policy in ("posterior", "learned", "laplace"):
        run = RUN.model_copy(update={"merge": MergeSettings(policy=policy, k=0), "stack": StackSettings(enabled=False)})
        personal = mta.Personalizer(base, bank, Store(out / policy), run=run)
        personal.personalize(shots)
        found[f"fitted, {policy}"] = nll(personal, people, [person.id for person in people])
    return found


def against(values: Tensor, other: Tensor) -> dict[str, float]:
    """Return the mean difference with its 95% interval over ratings (normal approximation)."""
    apart = values - other
    mean, half = float(apart.mean()), 1.96 * float(apart.std()) / len(apart) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def main() -> None:
    """Print every method's NLL and its difference to the best single LoRA, and write them to ``--out``."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path, default=Path("imported"))
    out = words.parse_args().out
    if out.exists():
        raise SystemExit(f"{out} exists: give another folder with --out, or remove it")
    people = read_people(fetch("movielens-100k"), TASK.name)
    enough = sorted((one for one in people if len(one.items) >= TRAIN + SHOTS + QUERIES), key=lambda one: one.id)
    owners, others = enough[:5], enough[5 : 5 + CALIBRATION]
    base = BaseModel.of(RUN)
    folders = [trained(base, one, settings, out / "loras" / one.id) for one, settings in zip(owners, LORAS)]
    base = BaseModel.of(RUN)
    known = [Person(one.id, one.items[:TRAIN]) for one in owners]
    bank = mta.Bank.of_adapters(base, folders, out / "bank", task=TASK.name, people=known, run=RUN)
    bank = bank.calibrate(base, [Person(one.id, one.items[:32]) for one in others], out / "calibrated", run=RUN)
    found = measured(base, bank, owners, out)
    best = min((name for name in found if "LoRA" in name), key=lambda name: float(found[name].mean()))
    rows = {}
    for name, nlls in found.items():
        apart = against(nlls, found[best])
        rows[name] = {"nll": float(nlls.mean()), "against best": apart}
        print(f"{name:28} {nlls.mean():.3f}   {apart['mean']:+.3f} [{apart['low']:+.3f}, {apart['high']:+.3f}]")
    print(f"best single LoRA: {best}")
    (out / "imported.json").write_text(json.dumps({"best": best, "methods": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
