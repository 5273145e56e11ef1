"""The README.md of a bank, and of an exported adapter: what it is, what it was made from, how to use it, its limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mta.bank.format import BankInfo
from mta.config.loader import dump_yaml
from mta.lora.peft import MARK
from mta.system.assets import ASSETS

_PAPER = "arxiv:2511.20072"
_LIMITS = """- It works with the very base it was trained on (its fingerprint is checked), and for its task.
- The method is reconstructed from what is public of the paper: results are not the paper's.
- It was trained on people's texts. No id and no text is in it, but it is not anonymous: whether an item was among
  those an anchor was trained on can be told from the losses better than by guessing, and there is no differential
  privacy in the training. Whoever holds these files has every anchor's meta-LoRA at full strength.
- What was learnt from a person stays in it until it is rebuilt, also when they asked to be forgotten.
- What it says may be wrong, and may repeat what those people wrote."""
_LIMITS_OF_ONE = """\
- This is the model of one person: it was trained on what they wrote and tells something of it. Share it as you
  would share their texts.
- It works with the very base it was made for, and for its task.
- The anchors it was merged from were people too. Without compression their factors stand in it side by side.
- When the person asks to be forgotten, every copy must be deleted: forgetting reaches only those on the machine where
  it was exported.
- The method is reconstructed from what is public of the paper; what the model says may be wrong."""


def card(info: BankInfo, place: str = "path/to/this/folder", results: str = "", license: str = "") -> str:
    """The card of a bank as Markdown, with the hub's metadata in front; ``results`` is Markdown too."""
    return _front(info, "merge-then-adapt", license) + body(info, place, results)


def body(info: BankInfo, place: str = "path/to/this/folder", results: str = "") -> str:
    """The card without the metadata."""
    return f"""# A bank of {len(info.items)} anchors for `{info.task["name"]}`

Meta-LoRAs of {len(info.items)} anchor people over **{info.base}**{_note(info)}, made by merge-then-adapt
(method: arXiv:2511.20072, protocol reconstructed). Of it, and of a newcomer's few texts, their own model is made.

{_facts(info)}
## How to use it

```python
import mta

base = mta.BaseModel.load("{info.base}", "{info.run.dtype}", max_tokens={info.run.max_tokens})
bank = mta.Bank.from_pretrained("{place}", base)
personal = mta.Personalizer(base, bank, store="people/")
personal.personalize(mta.read_people("newcomers.jsonl", task=bank.task))
personal.generate([("ann", "...")])
```

## Results

{results or "None were given with this card: measure with `mta evaluate` on people the bank was not built from."}

## Limits

{_LIMITS}

## Built with

```yaml
{dump_yaml(info.run)}```
"""


def _facts(info: BankInfo) -> str:
    """What it was made of, as a table."""
    cuts = ", ".join(f"{count} {what}" for what, count in info.cut.items())
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in info.seconds.items())
    return f"""| | |
|---|---|
| bank | `{info.hash}` |
| base fingerprint | `{info.base_fingerprint}` |
| encoder | {info.encoder} |
| LoRA | rank {info.run.bank.lora.rank}, alpha {info.run.bank.lora.alpha:g}, all linear layers but the LM head |
| people behind the task LoRA / candidates for anchors | {info.members.task} / {info.members.candidates} |
| items per anchor | {min(info.items)} to {max(info.items)}, the {info.run.bank.max_items} most recent at most |
| cut | {cuts} |
| training | {seconds} |
"""


def adapter_card(info: BankInfo, rank: int, error: float, *, anchors: int, stack: int) -> str:
    """The card of one person's exported adapter, in which nothing says whose it is.

    ``error`` is what svd to ``rank`` cost, 0 for none; ``stack`` the stack's rank, 0 for none.
    """
    parts = [
        *(["the task LoRA everybody shares"] if info.run.task_lora.enabled else []),
        f"a merge of {anchors} anchors",
    ]
    parts += [f"a stack of rank {stack}"] if stack else []
    made = ", ".join(parts) + (f", compressed by svd at a relative error of {error:.2%}" if error else ", exactly")
    return f"""{_front(info, "peft")}{MARK}

# One person's adapter for `{info.task["name"]}`

A LoRA of rank {rank} over **{_base(info)}**{_note(info)}: {made}. Made by merge-then-adapt
(method: arXiv:2511.20072, protocol reconstructed) from bank `{info.hash[:12]}`.

```python
import mta
import peft  # pip install peft

base = mta.BaseModel.load("{_base(info)}")  # or transformers' AutoModelForCausalLM, of these very weights
model = peft.PeftModel.from_pretrained(base.model, "path/to/this/folder")
```

## Limits

{_LIMITS_OF_ONE}
"""


def table_of(results: Mapping[str, Any]) -> str:
    """The likelihood table of what ``mta evaluate --out`` wrote to results.json.

    Nothing else is quoted of it: settings and commands may name people and places. Raises KeyError, TypeError,
    ValueError.
    """
    rows = ["| | NLL (95% interval) | against the task LoRA |", "|---|---|---|"]
    for method in results["methods"]:
        nll, against = method["metrics"].get("NLL"), method["differences"].get("task LoRA", {}).get("NLL")
        if nll:
            rows.append(
                f"| {_plain(method['name'])} | {_interval(nll)} | {_interval(against, '+') if against else ''} |"
            )
    if len(rows) == 2:
        raise ValueError("no method with an NLL")
    people, queries = int(results["people"]), int(results["queries_per_person"] or 0)
    about = f"NLL of the true answer on {people} people who are not in the bank" + (
        f", {queries} questions each" if queries else ""
    )
    return f"{about}; means over people, lower is better, differences are paired.\n\n" + "\n".join(rows)


def _front(info: BankInfo, library: str, license: str = "") -> str:
    """What the hub reads of a card."""
    values: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if base := _on_hub(info):
        values |= {"base_model": base, "base_model_relation": "adapter"}
    if license:
        values["license"] = license
    values["tags"] = ["merge-then-adapt", "lora", "personalization", _PAPER]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n\n"


def _on_hub(info: BankInfo) -> str:
    """The base's id on the hub, where it has one."""
    base = _base(info)
    return ASSETS[base].hub if base in ASSETS else base if base.count("/") == 1 else ""


def _base(info: BankInfo) -> str:
    """What the base is called elsewhere: of one that lies in a folder here, the folder's name."""
    return Path(info.run.base).name if Path(info.run.base).is_absolute() else info.base


def _note(info: BankInfo) -> str:
    return f" ({info.base_note})" if info.base_note else ""


def _plain(name: object) -> str:
    return re.sub(r"[^\w ,.:+#()-]", "", str(name))


def _interval(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"
