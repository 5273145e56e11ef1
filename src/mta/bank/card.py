"""The README.md of a bank: what it is, what it was made from, how to use it."""

from __future__ import annotations

from mta.bank.files import BankInfo
from mta.settings import dump_yaml


def card(info: BankInfo) -> str:
    """The card of a bank as Markdown."""
    note = f" ({info.base_note})" if info.base_note else ""
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in info.seconds.items())
    cuts = ", ".join(f"{count} {what}" for what, count in info.cut.items())
    return f"""# A bank of {len(info.items)} anchors for `{info.task["name"]}`

Meta-LoRAs of {len(info.items)} anchor people over **{info.base}**{note}, made by merge-then-adapt
(method: arXiv:2511.20072, protocol reconstructed).

| | |
|---|---|
| base fingerprint | `{info.base_fingerprint}` |
| encoder | {info.encoder} |
| LoRA | rank {info.run.bank.lora.rank}, alpha {info.run.bank.lora.alpha:g}, all linear layers but the LM head |
| people behind the task LoRA / candidates for anchors | {len(info.members.task)} / {len(info.members.candidates)} |
| items per anchor | {min(info.items)} to {max(info.items)}, the {info.run.bank.max_items} most recent at most |
| cut | {cuts} |
| training | {seconds} |

Nobody's name or text is in these files. What was learnt from people's pooled data is, and stays until a rebuild.

```python
import mta

base = mta.BaseModel.load("{info.base}", "{info.run.dtype}", max_tokens={info.run.max_tokens})
bank = mta.Bank.open("path/to/this/folder", base)
```

Built with:

```yaml
{dump_yaml(info.run)}```
"""
