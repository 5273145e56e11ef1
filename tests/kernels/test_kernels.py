"""Compiled kernels against torch's own operations: the same values and the same gradients."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import KINDS, base_of, random_examples, random_loras, rows_of, without_kernels

from mta.kernels import functions
from mta.kernels.compile import kernels, obstacle
from mta.kernels.functions import AdaptedRows, RmsNorm, Rotate, add_low_rank, low_rank_gradients, product
from mta.kernels.linear import FrozenLinear
from mta.kernels.swap import use_kernels
from mta.lora.layers import PerPerson, Shared
from mta.lora.terms import RowTerm, with_terms
from mta.model.tree_attention import additive, blocks_of, tree_attention
from mta.training.scoring import log_likelihood

DOUBLE = torch.float64
pytestmark = pytest.mark.skipif(bool(obstacle()), reason=f"no kernels here: {obstacle()}")
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.sampled_from([2, 6, 16, 34]))


def draw(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def plain_norm(x, weight):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def plain_rotation(x, cos, sin):
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


def pairs(size):
    """Every function with its plain counterpart: (ours, plain, inputs that get gradients, further inputs)."""
    b, t, d = size
    angles = [draw(1 if b == 2 else b, t, d, seed=s) for s in (3, 4)]
    heads = draw(b, t, 3, d).transpose(1, 2)  # as linear layers leave them
    return {
        "norm": (lambda x, w: RmsNorm.apply(x, w, 1e-5), plain_norm, [draw(b, t, d)], [draw(d, seed=1)]),
        "rotate": (Rotate.apply, plain_rotation, [heads], angles),
    }


def with_gradients(function, inputs, others):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs, *others)
    return y, torch.autograd.grad((y * draw(*y.shape, seed=9, dtype=y.dtype)).sum(), inputs)


@settings(max_examples=25)
@given(SIZES)
def test_functions_equal_plain_ones_with_their_gradients(size):
    for name, (ours, plain, inputs, others) in pairs(size).items():
        found, slopes = with_gradients(ours, inputs, others)
        expected, right = with_gradients(plain, inputs, others)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=name)
        torch.testing.assert_close(slopes, right, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(("dtype", "rough"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_functions_in_lower_precision_are_off_by_its_rounding_alone(dtype, rough):
    for ours, plain, inputs, others in pairs((3, 5, 34)).values():
        low = [x.to(dtype) for x in inputs], [x.to(dtype) if x.is_floating_point() else x for x in others]
        found, slopes = with_gradients(ours, *low)
        exact = [x.double() for x in low[0]], [x.double() if x.is_floating_point() else x for x in low[1]]
        expected, right = with_gradients(plain, *exact)
        assert (found.double() - expected).norm() <= rough * expected.norm()
        for slope, other in zip(slopes, right):
            assert slope.dtype == dtype
            assert (slope.double() - other).norm() <= rough * other.norm()


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("of_values", [3000, 5])
def test_heads_of_any_width_are_attended_to(dtype, of_values):
    rows = rows_of([3, 2], 12)
    batch, tokens = rows.tokens.shape
    widths = (3000, 3000, of_values)
    inputs = [draw(batch, tokens, 2, e, seed=n, dtype=dtype).transpose(1, 2) for n, e in enumerate(widths)]
    blocks = blocks_of(rows.ends, rows.positions)
    mask = additive(blocks.seen, dtype)

    def attend(*x):
        return tree_attention(None, *x, mask, scaling=0.02, blocks=blocks)[0]

    found, slopes = with_gradients(attend, inputs, [])
    with without_kernels():
        expected, right = with_gradients(attend, inputs, [])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slopes, right, rtol=1e-4, atol=1e-4)


RANKS = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 18), st.integers(1, 80), st.integers(1, 80))


@settings(max_examples=60)
@given(RANKS, st.integers(1, 18), st.booleans())
def test_low_rank_updates_and_their_gradients_equal_matrix_products(sizes, trained, deeper):
    people, tokens, rank, d, o = sizes
    trained = min(trained, rank)
    x, a, b = draw(people, tokens, d), draw(people, rank, d, seed=1), draw(people, rank, o, seed=2)
    y, dy, dx = draw(people, tokens, o, seed=3), draw(people, tokens, o, seed=4), draw(people, tokens, d, seed=5)
    expected, pulled = y + x @ a.mT @ b, dx + dy @ b.mT @ a
    h = add_low_rank(y, x, a, b)
    da, db = low_rank_gradients(dx if deeper else None, dy, x, h, a, b, trained)
    right = (x @ a.mT, (dy @ b.mT).mT @ x, (x @ a.mT).mT @ dy)
    for found, plain in zip((y, h, da, db), (expected, right[0], right[1][:, :trained], right[2][:, :trained])):
        torch.testing.assert_close(found, plain, rtol=1e-11, atol=1e-9)
    torch.testing.assert_close(dx, pulled if deeper else draw(people, tokens, d, seed=5), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize(("dtype", "rough"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_low_rank_updates_in_lower_precision_are_off_by_its_rounding_alone(dtype, rough):
    x, a, b = (draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(2, 4, 70), (2, 9, 70), (2, 9, 50)]))
    y, dx, dy = (
        draw(*like.shape, seed=seed, dtype=dtype) for seed, like in ((3, x @ a.mT @ b), (4, x), (5, x @ a.mT @ b))
    )
    wide_y, wide_dx = y.double(), dx.double()
    h = add_low_rank(y, x, a, b)
    found = (*low_rank_gradients(dx, dy, x, h, a, b, 9), dx, y)
    x, a, b, dy = (t.double() for t in (x, a, b, dy))
    dh = dy @ b.mT
    for low, right in zip(found, (dh.mT @ x, (x @ a.mT).mT @ dy, wide_dx + dh @ a, wide_y + x @ a.mT @ b)):
        assert low.dtype == dtype
        assert (low.double() - right).norm() <= rough * right.norm()


def test_a_layer_takes_inputs_of_any_strides_with_its_gradients():
    layer = torch.nn.Linear(6, 5, bias=False).double().requires_grad_(False)
    x, a, b = draw(4, 6, 3).mT, draw(4, 2, 6, seed=1), draw(4, 5, 2, seed=2)
    assert not x.is_contiguous()

    def adapted(x, a, b):
        return with_terms(layer, [RowTerm(a, b)])(x)

    found, slopes = with_gradients(adapted, [x, a, b], [])
    expected, right = with_gradients(lambda x, a, b: x @ layer.weight.mT + x @ a.mT @ b.mT, [x, a, b], [])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(slopes, right, rtol=0, atol=1e-12)


def test_low_rank_kernels_leave_to_others_what_they_do_not_know():
    x, a, b, y = draw(2, 3, 6), draw(2, 4, 6), draw(2, 4, 5), draw(2, 3, 5)
    before = y.clone()
    assert add_low_rank(y, x, a, b.mT.contiguous().mT) is None  # another layout
    assert add_low_rank(y, x.to(torch.float16), a, b) is None
    assert torch.equal(y, before)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 80), st.integers(1, 40), st.booleans())
def test_products_equal_linear_layers_with_their_gradient(rows, d, o, bias):
    x, weight = draw(1, rows, d), draw(o, d, seed=1)
    others = [weight, draw(o, seed=2) if bias else None]
    found, slopes = with_gradients(FrozenLinear.apply, [x], [SimpleNamespace(weight=weight, bias=others[1])])
    expected, right = with_gradients(torch.nn.functional.linear, [x], others)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(slopes, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "d", "o", "ranks", "own"), [(1, 7, 5, 3, 1), (5, 40, 33, 64, 2), (24, 64, 96, 32, 1)])
def test_rows_with_updates_of_their_own_equal_plain_products(rows, d, o, ranks, own, bias):
    draw = torch.Generator().manual_seed(rows)
    shapes = ((rows, 1, d), (o, d), (o,), (ranks, d), (o, ranks), (rows, ranks), (rows, own, d), (rows, own, o))
    x, w, c, a, b, gates, p, q = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)

    def adapted_rows(x, w, c, a, b, gates, p, q):
        return AdaptedRows(w, c, (a, b), gates, (p, q), AdaptedRows.buffers_for(gates, (p, q)))(x)

    found = adapted_rows(x, w, c if bias else None, a, b, gates, p, q)
    expected = x @ w.T + (c if bias else 0) + (gates[:, None] * (x @ a.T)) @ b.T + (x @ p.mT) @ q
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert adapted_rows(x.expand(rows, 2, d), w, None, a, b, gates, p, q) is None  # two tokens of each
    x16, w16, *low = (part.bfloat16() for part in (x, w, a, b, gates, p, q))
    rough = adapted_rows(x16, w16, None, *low).double()
    exact = adapted_rows(x, w, None, a, b, gates, p, q)
    assert float((rough - exact).norm()) < 0.03 * float(exact.norm())


@pytest.mark.parametrize(("dtype", "rough"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_products_in_lower_precision_are_off_by_its_rounding_alone(dtype, rough, rows):
    x, weight, bias = draw(rows, 70, dtype=dtype), draw(40, 70, seed=1, dtype=dtype), draw(40, seed=2, dtype=dtype)
    right = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    ways = [product, functions._onednn] if dtype == torch.float32 else [product]
    for way in ways:
        found = way(x, weight, bias)
        assert found.dtype == dtype
        assert (found.double() - right).norm() <= rough * right.norm()


@pytest.fixture
def choose_library():
    """Choose between oneDNN and MKL again, as a new process does."""

    def choose():
        functions._onednn_is_faster.cache_clear()
        return functions._onednn_is_faster()

    yield choose
    functions._onednn_is_faster.cache_clear()


def test_onednn_is_used_on_amd_with_avx512_if_it_computes_the_same(monkeypatch, choose_library):
    said = {"vendor_id": "AuthenticAMD", "flags": "avx2 avx512f"}
    monkeypatch.setattr(functions, "cpuinfo", lambda *fields: said.get(fields[0], ""))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)  # not on ARM
    assert choose_library()
    assert [choose_library() for said["vendor_id"] in ("GenuineIntel", "AuthenticAMD")] == [False, True]
    assert [choose_library() for said["flags"] in ("avx2", "avx512f")] == [False, True]
    monkeypatch.setattr(functions, "_onednn", lambda x, weight, bias: x @ weight.mT + 1)
    assert not choose_library()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_models_compute_the_same_with_kernels_and_without(kind):
    base = base_of(kind)
    jobs, task = [random_examples(5, 1), random_examples(3, 2)], Shared(random_loras(base, 1, rank=3))
    adapters = [task, PerPerson(random_loras(base, 2))]
    found = log_likelihood(base, jobs, adapters)
    with without_kernels():
        expected = log_likelihood(base, jobs, adapters)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_what_is_exchanged_is_what_has_a_known_shape():
    expected = {
        "llama": ["LlamaAttention", "LlamaRMSNorm"],
        "gemma3": ["Gemma3Attention"],  # norms multiply by 1 + weight, and gates are not SiLU
        "gpt2": [],
    }
    for kind, classes in expected.items():
        assert use_kernels(KINDS[kind]().requires_grad_(False)) == classes


def test_a_norm_that_is_trained_stays_plain():
    model = KINDS["llama"]().requires_grad_(False)
    use_kernels(model)
    model.model.norm.requires_grad_(True)
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert model.model.norm.weight.grad is not None


def test_tensors_of_other_kinds_are_left_to_torch():
    assert kernels("norm", torch.zeros(1, dtype=torch.float16)) is None
    assert kernels("norm", torch.zeros(1), torch.zeros(1, dtype=DOUBLE)) is None
    assert kernels("norm", torch.zeros(1, device="meta")) is None
