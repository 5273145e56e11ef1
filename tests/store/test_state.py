import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import ANN, adapter, person, state

from mta.data.history import Person
from mta.errors import Diverged, InputError, StateCorrupt
from mta.lora.batch import LoraBatch
from mta.store import state as module
from mta.store.state import Losses, State, history_from_bytes, history_to_bytes, state_key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_state_survives_its_file_bit_for_bit(dtype: torch.dtype) -> None:
    made = state(stack=adapter(1, dtype))
    back = State.from_bytes(made.to_bytes())
    assert back == made
    assert hash(back) == hash(made)
    assert back != state(1)
    assert (back.w, back.anchors, back.seed, back.policy) == (made.w, made.anchors, 0, "posterior")
    assert back.stack is not None
    assert back.stack.scale == 0.1
    for name, f in made.stack.factors.items():
        assert torch.equal(back.stack.factors[name].a, f.a)
        assert torch.equal(back.stack.factors[name].b, f.b)


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(FINITE, FINITE, st.none() | FINITE, st.integers(1))
def test_losses_survive_the_file_bit_for_bit(pooled: float, merged: float, stacked: float | None, tokens: int) -> None:
    made = state(losses=Losses(pooled, merged, stacked, tokens))
    back = State.from_bytes(made.to_bytes())
    assert back == made
    assert repr(back.losses) == repr(made.losses)  # -0.0 too
    assert replace(back, losses=None).to_bytes() == state().to_bytes()
    assert back.work == state().work


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["pooled", "merged", "stacked"])
def test_losses_that_are_not_finite_are_neither_written_nor_read(wrong: float, which: str) -> None:
    good = Losses(1.5, 1.25, 1.0, 7)
    with pytest.raises(Diverged, match=r"finite numbers over at least one token\n  Lower stack"):
        replace(good, **{which: wrong})
    forged = state(losses=good)
    object.__setattr__(forged.losses, which, wrong)
    with pytest.raises(StateCorrupt, match="intact, but not a state"):
        State.from_bytes(forged.to_bytes())
    with pytest.raises(Diverged, match="at least one token"):
        replace(good, tokens=0)


def test_a_state_without_a_stack_is_small() -> None:
    made = replace(state(), stack=None)
    assert State.from_bytes(made.to_bytes()) == made
    assert len(made.to_bytes()) < 1000


@pytest.mark.integration
def test_the_same_work_gives_the_same_bytes_in_any_process_and_in_any_order_of_layers() -> None:
    made = state()
    turned = LoraBatch(dict(reversed(made.stack.factors.items())), made.stack.scale)
    assert replace(made, stack=turned).to_bytes() == made.to_bytes()
    code = "import hashlib, stores; print(hashlib.sha256(stores.state().to_bytes()).hexdigest())"
    search = os.pathsep.join(filter(None, sys.path))
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": search}, capture_output=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(digests) == 1


def test_a_work_key_names_everything_a_state_depends_on() -> None:
    key = state_key("bank", "history", "a: 1", 0)
    assert len(key) == 64
    assert key == state_key("bank", "history", "a: 1", 0)
    others = [("other", "history", "a: 1", 0), ("bank", "other", "a: 1", 0), ("bank", "history", "a: 2", 0)]
    assert len({key, state_key("bank", "history", "a: 1", 1), *(state_key(*other) for other in others)}) == 5
    assert state_key("ab", "c", "", 0) != state_key("a", "bc", "", 0)


def test_an_inconsistent_state_is_refused() -> None:
    with pytest.raises(InputError, match=r"one coefficient per anchor, got anchors \(7, 3\), w \(1.0,\)"):
        state(w=(1.0,))
    with pytest.raises(Diverged, match="finite"):
        state(w=(1.0, float("nan")))
    broken = adapter()
    next(iter(broken.factors.values())).a[0, 0, 0] = float("inf")
    with pytest.raises(Diverged, match="the stack contains NaN or infinity"):
        state(stack=broken)
    with pytest.raises(InputError, match="exactly one adapter, got a batch of 2"):
        state(stack=adapter(adapters=2))


FILE = state().to_bytes()
WITH_LOSSES = state(losses=Losses(1.5, 1.25, 1.125, 7)).to_bytes()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(FILE) - 1), st.integers(1, 255))
def test_a_flipped_byte_anywhere_is_refused(place: int, flip: int) -> None:
    with pytest.raises(StateCorrupt):
        State.from_bytes(FILE[:place] + bytes([FILE[place] ^ flip]) + FILE[place + 1 :])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(FILE) - 1), st.binary(max_size=40))
def test_a_file_cut_short_or_grown_is_refused(length: int, more: bytes) -> None:
    cut = FILE[:length] + more
    if cut != FILE:
        with pytest.raises(StateCorrupt):
            State.from_bytes(cut)
    with pytest.raises(StateCorrupt):
        State.from_bytes(FILE + b"\0" + more)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([FILE, WITH_LOSSES]))
def test_forged_contents_under_a_right_sha256_are_refused_or_sound(data: st.DataObject, file: bytes) -> None:
    header = int.from_bytes(file[:8], "little")
    place = data.draw(st.integers(module._DIGEST.stop, header + 7))
    forged = file[:place] + data.draw(st.binary(min_size=1, max_size=2)) + file[place + 1 :]
    sealed = forged[: module._DIGEST.start] + module._digest(forged).encode() + forged[module._DIGEST.stop :]
    try:
        assert isinstance(State.from_bytes(sealed), State)
    except StateCorrupt as error:
        assert "intact, but not a state" in str(error)  # noqa: PT017


def test_a_damaged_seal_is_another_seal() -> None:
    place = module._DIGEST.start
    assert module.seal_of(FILE[:place] + b"\xff" + FILE[place + 1 :]) not in ("", module.seal_of(FILE))


def test_a_damaged_state_is_reported_with_its_file() -> None:
    with pytest.raises(StateCorrupt) as caught:
        State.from_bytes(b"PK\x03\x04" + bytes(50), "people/ab/1.safetensors")
    assert str(caught.value) == (
        "people/ab/1.safetensors is not a person's state: got 54 bytes that begin with "
        r"b'PK\x03\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00', "
        "expected a safetensors file with a state\n"
        "  Load an earlier version, or make the state again:  mta personalize"
    )
    with pytest.raises(StateCorrupt, match=r"x was changed or cut short: its sha256 is \w{12}…, expected b'\w{12}'…"):
        State.from_bytes(FILE[:-1], "x")


def test_another_schema_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATE_SCHEMA", 1)
    other = state().to_bytes()
    monkeypatch.undo()
    with pytest.raises(StateCorrupt, match=r"got ValueError\('schema 1'\), expected schema 3\n  Update mta"):
        State.from_bytes(other)


HISTORY = history_to_bytes(person())


def test_a_history_comes_back_without_its_id_in_the_file() -> None:
    assert history_from_bytes("another", HISTORY) == Person("another", person().items, person().queries)
    assert b"ann" not in HISTORY


@pytest.mark.parametrize("rows", [[], [[]], 7, [[{"text": "a"}], []], [[1], []]])
def test_forged_rows_under_a_right_sha256_are_refused(rows: object) -> None:
    with pytest.raises(StateCorrupt, match="x was changed or cut short: got "):
        history_from_bytes(ANN, module.sealed_json("history", rows, 1), "x")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(HISTORY) - 1), st.integers(0, 255), st.booleans())
def test_a_damaged_history_is_refused_or_the_same(place: int, byte: int, cut: bool) -> None:
    damaged = HISTORY[:place] if cut else HISTORY[:place] + bytes([byte]) + HISTORY[place + 1 :]
    try:
        assert history_from_bytes(ANN, damaged, "x") == person()
    except StateCorrupt as error:
        assert str(error).startswith("x was changed or cut short: got ")  # noqa: PT017
        assert "Give the person's history again, or forget them:  mta forget" in str(error)  # noqa: PT017
