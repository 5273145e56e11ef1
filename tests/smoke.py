"""One walk through an installed mta, for wheels and images: ``python -P tests/smoke.py`` (``-P``: not the source tree).

Every public name, the command line, and the way of a person: a tiny random base, a bank over it, personalized,
answered, exported and forgotten. It needs what mta itself needs and nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

RUN = {"encoder": "base", "max_tokens": 256, "memory": "64MiB", "task_lora": {"items": 8}}
RUN |= {"bank": {"anchors": 2, "min_items": 3, "training": {"epochs": 1}}, "stack": {"training": {"steps": 2}}}


def main() -> None:
    """Walk, say each step, and end with an assertion where something is not as it should be."""
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["MTA_CACHE"] = str(Path(folder, "cache"))
        names()
        command_line()
        a_person()
    print("ok")


def names() -> None:
    """Every public name is there, and the version is the distribution's."""
    import mta

    for name in mta.__all__:
        assert getattr(mta, name) is not None, name
    assert version("merge-then-adapt") == mta.__version__, (version("merge-then-adapt"), mta.__version__)
    print(f"mta {mta.__version__} from {Path(mta.__file__).parent}, Python {sys.version.split()[0]}")


def command_line() -> None:
    """The installed ``mta`` and ``python -m mta`` tell the version, and help names the verbs."""
    for command in ([str(Path(sys.executable).parent / "mta")], [sys.executable, "-m", "mta"]):
        assert said(*command, "--version").strip() == version("merge-then-adapt")
        assert "personalize" in said(*command, "--help")
        assert "Example:  mta bank build" in said(*command, "bank", "build", "--help")
    print("mta --version, mta --help")


def said(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def a_person() -> None:
    """A bank of two anchors, two people personalized, answered in one batch, exported and forgotten."""
    import mta

    save_base(Path("base"))
    base = mta.BaseModel.load("base", dtype="float32", max_tokens=256)
    run = mta.Run(base="base", **RUN)
    bank = mta.Bank.build(base, raters(18, "old"), "bank", task="movielens-rating", run=run)
    personal = mta.Personalizer(base, bank, store="people")
    personal.personalize(raters(2, "new"))
    question = {"title": "Zorblax", "genres": "Drama"}
    rows = [("new-0", question), ("new-1", question), (mta.TASK, question), (mta.BASE, question)]
    assert len(personal.generate(rows, max_new_tokens=4)) == len(rows)
    assert all(score < 0 for score in personal.score([(who, asked, "4") for who, asked in rows]))
    print(said(sys.executable, "-m", "mta", "person", "show", "new-0", "--bank", "bank", "--store", "people").strip())
    personal.export("new-0", "exported")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in Path("exported").iterdir()}
    assert personal.forget("new-0").states_removed
    assert not Path("exported").exists()
    print("built, personalized, answered, exported, forgotten")


def raters(count: int, name: str) -> list:
    """People who rate made-up films, each in a way of their own."""
    from mta import Item, Person

    def rated(n: int, i: int) -> Item:
        return Item({"title": f"Film {31 * n + 7 * i}", "genres": "Drama", "rating": str(1 + (n + i) % 5)}, time=i)

    return [Person.of(f"{name}-{n}", [rated(n, i) for i in range(6)]) for n in range(count)]


def save_base(folder: Path) -> None:
    """A random Llama of two layers over bytes, saved as a model of anybody's is."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **size, **special)).save_pretrained(folder)


if __name__ == "__main__":
    main()
