"""The card of an exported adapter (README.md): its parts, its use, and its limits."""

from __future__ import annotations

from mta.bank.card import base_name, base_note, front_matter
from mta.bank.format import BankInfo
from mta.lora.peft import MARK

_LIMITS = """\
- This is the model of one person. It was trained on their texts and reveals something about them: share it like the
  texts.
- The adapter works only with the base that it was made for, and for its task.
- The merged anchors were people too. Without compression, the adapter contains their factors side by side.
- If the person asks to be forgotten, delete every copy: `mta forget` removes only copies on the machine that exported
  them.
- The method is reconstructed from the public parts of the paper; generated text may be wrong."""


def adapter_card(info: BankInfo, rank: int, error: float, *, anchors: int, stack: int) -> str:
    """Return the card of one person's exported adapter; the card does not identify the person.

    ``error`` is the relative error of compression to ``rank``, 0 without; ``stack`` is the stack's rank, 0 without.
    """
    parts = ["the task LoRA that all people share"] if info.run.task_lora.enabled else []
    parts += [f"a merge of {anchors} anchors"] + ([f"a stack of rank {stack}"] if stack else [])
    exact = f"compressed by svd at a relative error of {error:.2%}" if error else "exactly"
    base = base_name(info)
    return f"""{front_matter(info, "peft")}{MARK}

# One person's adapter for `{info.task["name"]}`

A LoRA of rank {rank} over **{base}**{base_note(info)}: {", ".join(parts)}, {exact}. Made by merge-then-adapt
(method: arXiv:2511.20072, protocol reconstructed) from bank `{info.hash[:12]}`.

```python
import mta
import peft  # pip install peft

base = mta.BaseModel.load("{base}")  # or transformers' AutoModelForCausalLM with the same weights
model = peft.PeftModel.from_pretrained(base.model, "path/to/this/folder")
```

## Limits

{_LIMITS}
"""
