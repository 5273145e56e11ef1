"""The cards (README.md) of a bank and of one person's exported adapter: training, use, and limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mta.bank.calibration.info import CalibrationInfo, Gain
from mta.bank.calibration.laplace import BOUNDLESS
from mta.bank.format import BankInfo, with_hash, write_info
from mta.config.constants import NOTICEABLE
from mta.config.loader import dump_yaml
from mta.lora.peft import CARD, MARK
from mta.system.assets import ASSETS
from mta.system.atomic import write_text
from mta.system.hub import public_name

_WIDTH = 30  # of a drawn interval, in characters


def card(info: BankInfo, place: str = "path/to/this/folder", license: str = "") -> str:
    """Return the card of a bank as Markdown, after the hub's metadata."""
    return _front_matter(info, "merge-then-adapt", license) + body(info, place)


def write_described(folder: Path, info: BankInfo) -> None:
    """Write the hash, the card, and the description of a bank, the description last."""
    whole = with_hash(info)
    write_text(folder / CARD, card(whole))
    write_info(folder, whole)


def body(info: BankInfo, place: str = "path/to/this/folder") -> str:
    """Return the card without the metadata."""
    cuts = ", ".join(f"{count} {what}" for what, count in info.cut.items())
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in info.seconds.items())
    gains = what_to_expect(info)
    expected = f"## What to expect\n\n{gains}\n\n" if gains else ""
    tried = ", ".join(f"{count} groups {gain:+.4f}" for count, gain in info.tried)
    tried = f"\n| tried, and the gain per token of people outside | {tried} |" if tried else ""
    groups = f"groups of {min(info.people)} to {max(info.people)} people"
    who = "anchor people" if max(info.people) == 1 else groups
    return f"""# A bank of {len(info.items)} anchors for `{info.task.name}`

LoRAs of {len(info.items)} {who} over **{info.base}**{_base_note(info)}, made by merge-then-adapt
(method: arXiv:2511.20072, protocol reconstructed). The bank and a new person's few texts give the person's own model.

| | |
|---|---|
| bank | `{info.hash}` |
| base fingerprint | `{info.base_fingerprint}` |
| encoder | {info.encoder} |
| LoRA | rank {info.run.bank.lora.rank}, alpha {info.run.bank.lora.alpha:g}, all linear layers but the LM head |
| people behind the task LoRA / candidates for anchors | {info.members.task} / {info.members.candidates} |
| items per anchor | {min(info.items)} to {max(info.items)}, at most {info.run.bank.max_items} of a person |
| cut | {cuts} |{tried}
| training | {seconds} |

{expected}## How to use it

```python
import mta

base = mta.BaseModel.load("{info.base}", "{info.run.dtype}", max_tokens={info.run.max_tokens}{_quantized(info)})
bank = mta.Bank.from_pretrained("{place}", base)
personal = mta.Personalizer(base, bank, store="people/")
people = mta.read_people("newcomers.jsonl", task=bank.task)
personal.personalize(people{", histories=people" * bool(info.run.task_lora.history)})
personal.generate([("ann", "...")])
```

To measure: `mta compare` on people who are not in the bank.

## Limits

- The bank works only with the base that it was trained on (the fingerprint is checked), and for its task.
- The method is reconstructed from the public parts of the paper: results are not the paper's results.
- The bank was trained on people's texts. It contains no id and no text, but it is not anonymous: from losses, one can
  tell better than by guessing whether an item was among an anchor's texts. Training has no differential privacy. These
  files contain every anchor's meta-LoRA at full strength.
- The bank keeps what it learned from a person until it is rebuilt, also after the person asked to be forgotten.
- Generated text may be wrong, and may repeat texts of the people in the bank.

## Built with

```yaml
{dump_yaml(info.run)}```
"""


def adapter_card(info: BankInfo, rank: int, error: float, *, anchors: int, stack: int) -> str:
    """Return the card of one person's exported adapter; the card does not identify the person.

    ``error`` is the relative error of compression to ``rank``, 0 without; ``stack`` is the stack's rank, 0 without.
    """
    parts = ["the task LoRA that all people share"] if info.run.task_lora.enabled else []
    parts += ([f"a merge of {anchors} anchors"] if anchors else []) + ([f"a stack of rank {stack}"] if stack else [])
    exact = f"compressed by svd at a relative error of {error:.2%}" if error else "exactly"
    base = public_name(info.run.base)
    return f"""{_front_matter(info, "peft")}{MARK}

# One person's adapter for `{info.task.name}`

A LoRA of rank {rank} over **{base}**{_base_note(info)}: {", ".join(parts)}, {exact}. Made by merge-then-adapt
(method: arXiv:2511.20072, protocol reconstructed) from bank `{info.hash[:12]}`.

```python
import mta
import peft  # pip install peft

base = mta.BaseModel.load("{base}"{_quantized(info)})  # or transformers' AutoModelForCausalLM with the same weights
model = peft.PeftModel.from_pretrained(base.model, "path/to/this/folder")
```

## Limits

- This is the model of one person. It was trained on their texts and reveals something about them: share it like the
  texts.
- The adapter works only with the base that it was made for, and for its task.
- The merged anchors were people too. Without compression, the adapter contains their factors side by side.
- If the person asks to be forgotten, delete every copy: `mta forget` removes only copies on the machine that exported
  them.
- The method is reconstructed from the public parts of the paper; generated text may be wrong.
"""


def what_to_expect(info: BankInfo) -> str:
    """Return what people are expected to gain from a bank, in words and as a table; empty without a calibration."""
    if info.calibration is None:
        return ""
    said = [in_words(info.calibration)]
    if info.calibration.gains:
        said.append(
            "Merge and stack were chosen on these people, too: a person's gain is by what the others chose, but the "
            "intervals do not cover the choice."
        )
    if info.tried:
        said.append("The number of groups or rounds was chosen on these people too, which makes gains look larger.")
    said += _history_in_words(info)
    said += _rivals_in_words(info.calibration)
    if not info.run.task_lora.enabled:
        said.append(
            "The bank has no task LoRA: part of a gain can be the form of an answer, which one would teach, too."
        )
    return f"{' '.join(said)}{gains_table(info.calibration)}"


def _history_in_words(info: BankInfo) -> list[str]:
    """Return what gains mean where prompts show earlier items, and whether the bank adds anything to these."""
    if info.calibration is None or not (most := info.run.task_lora.history):
        return []
    said = f"All prompts show up to {most} earlier items of the person, also those of the pooled model."
    gains = [*info.calibration.gains, *info.calibration.stacked]
    clear = any(gain.low > 0 for gain in gains)
    return [said if clear or not gains else f"{said} These alone are as good as the bank: use them with the task LoRA."]


def _rivals_in_words(info: CalibrationInfo) -> list[str]:
    """Return which personal models without a bank this bank beats, and which are as good."""
    if not info.rivals:
        return []
    shots = info.rivals[0].gain.shots
    said = [f"{one.name} {one.ahead.mean:+.3f} [{one.ahead.low:+.3f}, {one.ahead.high:+.3f}]" for one in info.rivals]
    equal = [one.name for one in info.rivals if one.ahead.low <= 0]
    advice = (
        f"Not clearly better than {', '.join(equal)}: use {'one of these' if equal[1:] else 'that'}, without a bank."
        if equal
        else "It beats them all."
    )
    return [f"With {shots} shots, the bank's gain minus that of what needs no bank: {', '.join(said)}. {advice}"]


def gains_table(info: CalibrationInfo) -> str:
    """Return the measured gains as a table after an empty line; empty without any."""
    kinds = {"merge": info.gains, "merge and stack": info.stacked}
    measured = [(name, gain) for name, gains in kinds.items() for gain in gains]
    measured += [(one.name, one.gain) for one in info.rivals]
    rows = "".join(
        f"| {gain.shots} | {name} | {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] | {gain.worse:.0%} | "
        f"{gain.people} | `{_interval_line(gain, [one for _, one in measured])}` |\n"
        for name, gain in sorted(measured, key=lambda entry: entry[1].shots)
    )
    head = f"| shots | | gain | worse by {NOTICEABLE:g} | people | |\n|---|---|---|---|---|---|\n"
    return f"\n\n{head}{rows}" if rows else ""


def _interval_line(gain: Gain, gains: Sequence[Gain]) -> str:
    """Draw a gain on the axis of all ``gains``: ● the mean, ━ its interval, ┊ no gain, · the rest."""
    low, high = min(0.0, *(one.low for one in gains)), max(0.0, *(one.high for one in gains))

    def place(value: float) -> int:
        return round((value - low) / ((high - low) or 1.0) * (_WIDTH - 1))

    cells = ["·"] * _WIDTH
    cells[place(gain.low) : place(gain.high) + 1] = "━" * (place(gain.high) - place(gain.low) + 1)
    cells[place(0.0)] = "┊"
    cells[place(gain.mean)] = "●"
    return "".join(cells)


def in_words(info: CalibrationInfo) -> str:
    """Return what a calibration found, in one paragraph."""
    notes = [f"{note[0].upper()}{note[1:]}." for note in info.notes]
    if not info.gains:
        return " ".join(["No gain could be measured: merges are made by the policy posterior.", *notes])
    parts = [
        f"Measured on {info.people} people, on items that the bank was not trained on: the decrease of the true "
        "answer's NLL per token, its end included, against the pooled model, in nats, with 95% intervals."
    ]
    merged = any(gain.mean for gain in info.gains)  # otherwise, there are no merges
    if merged and info.prior == BOUNDLESS:
        parts.append("A person's own shots did not help to merge: everybody gets the population's best merge.")
    elif merged:
        parts.append(f"The population's best merge counts as much as {info.prior:.2g} of a person's shots.")
    if info.rate is not None:
        parts.append(
            f"A stack gained most with one step at {info.rate:g}." if info.rate else "No stack gained clearly."
        )
    return " ".join([*parts, *notes])


def _front_matter(info: BankInfo, library: str, license: str = "") -> str:
    """Return the metadata that the hub reads from a card, as YAML."""
    values: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    base = public_name(info.run.base)
    hub_id = ASSETS[base].hub if base in ASSETS else base
    if hub_id.count("/") == 1:
        values |= {"base_model": hub_id, "base_model_relation": "adapter"}
    if license:
        values["license"] = license
    values["tags"] = ["merge-then-adapt", "lora", "personalization", "arxiv:2511.20072"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n\n"


def _quantized(info: BankInfo) -> str:
    """Return the argument by which the base is quantized as it is loaded, or ""."""
    return f', quantize="{info.run.quantize}"' * (info.run.quantize != "none")


def _base_note(info: BankInfo) -> str:
    """Return the note on the base in parentheses, or ""."""
    return f" ({info.base_note})" if info.base_note else ""
