import pytest
import torch

from lococo import loops

NEEDED = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the loops are for CPUs with AVX-512"
)
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            loops._loop("few_rows", torch.bfloat16) is None, reason="this CPU has no products of bfloat16 numbers"
        ),
    ),
]


@NEEDED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7, 8, 9, 16])
@pytest.mark.parametrize(("n", "d"), [(5, 3), (33, 64), (65, 100), (256, 576)])
def test_few_rows_are_products_with_a_matrix(dtype, rows, n, d):
    torch.manual_seed(rows)
    x, weight = torch.randn(2, rows, d).to(dtype)[1:], torch.randn(n, d).to(dtype)
    assert loops.multiplies(x, weight)
    product = loops.few_rows(x, weight)
    assert product.dtype == torch.float32
    assert (product - x.double() @ weight.double().T).abs().max() < 3e-6 * d**0.5
    # Rows that lie otherwise in memory are the same rows.
    assert torch.equal(loops.few_rows(x[0].T.contiguous().T, weight), product[0])


@NEEDED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "h", "g", "s", "d"),
    [
        (1, 3, 3, 768, 64),
        (8, 3, 3, 700, 64),
        (2, 1, 1, 5, 32),
        (1, 2, 5, 333, 128),
        (3, 2, 2, 64, 96),
        (1, 1, 1, 1, 64),
    ],
)
def test_attention_of_one_query_is_softmax_and_a_product(dtype, b, h, g, s, d):
    torch.manual_seed(s)
    query, key, value = (
        torch.randn(b, h * g, 1, d).to(dtype),
        torch.randn(b, h, s, d).to(dtype),
        torch.randn(b, h, s, d),
    )
    value, bias = value.to(dtype), 3 * torch.randn(b, h, s)
    bias[..., s // 2 + 1 :] = -torch.inf
    assert loops.attends(key, value)
    keys, values, added = (each.double().repeat_interleave(g, 1) for each in (key, value, bias))
    logits = 0.5 * query.double() @ keys.transpose(2, 3) + added[:, :, None]
    mixed = loops.attention(query, key, value, bias, 0.5)
    assert mixed.dtype == torch.float32
    assert (mixed - logits.softmax(-1) @ values).abs().max() < 2e-6
    # What is hidden counts for nothing, whatever it holds, and a logit far above all others for everything.
    key[:, :, s // 2 + 1 :], value[:, :, s // 2 + 1 :] = 7, 1e30
    bias[..., 0] = 1e4
    assert torch.equal(loops.attention(query, key, value, bias, 0.5)[0, 0, 0], value[0, 0, 0].float())


@NEEDED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "h", "g", "q", "s", "d"), [(1, 3, 3, 256, 716, 64), (2, 1, 2, 17, 33, 16), (1, 2, 1, 97, 130, 32)]
)
def test_column_mass_is_what_maps_of_attention_add_up_to(dtype, b, h, g, q, s, d):
    torch.manual_seed(s)
    keys, queries = torch.randn(b, h, s, d), torch.randn(b, h, g, q, d).to(dtype)
    log_mass = torch.randn(b, h, s)
    log_mass[..., 3] = -torch.inf
    assert loops.sums(queries)
    logits = 0.3 * torch.einsum("bhgqd,bhsd->bhgqs", queries.double(), keys.to(dtype).double())
    logits = logits + log_mass[:, :, None, None]
    visible, weight = torch.randint(1, s + 1, (b, q)), torch.rand(b, q)
    visible[:, 0] = 3  # and not the hidden one behind
    hidden = torch.arange(s) >= visible[:, None, None, :, None]
    for seen, factor in ((None, None), (visible, None), (visible, weight)):
        maps = logits if seen is None else logits.masked_fill(hidden, -torch.inf)
        maps = maps.softmax(-1) * (1 if factor is None else factor[:, None, None, :, None])
        mass = loops.column_mass(keys, log_mass, queries, scaling=0.3, visible=seen, weight=factor)
        assert (mass - maps.sum((2, 3))).abs().max() < 1e-6 * g * q
        assert (mass[..., 3] == 0).all()


@NEEDED
def test_a_query_that_sees_nothing_gives_no_mass():
    keys, queries, visible = torch.randn(1, 1, 9, 16), torch.randn(1, 1, 1, 40, 16), torch.full((1, 40), 9)
    visible[0, :20] = 0
    mass = loops.column_mass(keys, torch.zeros(1, 1, 9), queries, scaling=1.0, visible=visible)
    assert mass.sum() == pytest.approx(20)


def test_what_the_loops_do_not_know_is_left_to_others():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert not loops.multiplies(x[:1], weight)  # which torch.compile does as fast
    assert not loops.multiplies(torch.randn(loops.MOST_ROWS + 1, 8), weight)
    assert not loops.multiplies(x, torch.randn(8, 5).T)
    assert not loops.multiplies(x.double(), weight.double())
    assert not loops.multiplies(x.to("meta"), weight.to("meta"))
    assert not loops.multiplies(x.bfloat16(), weight)
    queries = torch.randn(1, 2, 3, 40, 16)
    assert not loops.sums(queries[..., :15])
    assert not loops.sums(queries[:, :, :1, :1])  # a decoding step's
    assert not loops.sums(queries.to("meta"))
    key = torch.randn(1, 2, 9, 64)
    assert not loops.attends(key, key[..., :32].contiguous())
    assert not loops.attends(key[..., :40].contiguous(), key[..., :40].contiguous())
    assert not loops.attends(key.transpose(1, 2), key.transpose(1, 2))
    assert not loops.attends(key.half(), key.half())


def test_without_the_instructions_or_a_compiler_there_are_no_loops(monkeypatch):
    x, weight = torch.randn(3, 8), torch.randn(5, 8)

    def missing():
        raise RuntimeError("no compiler")

    for name, value in (("get_cpu_capability", lambda: "AVX2"), ("_library", missing)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cpu if name == "get_cpu_capability" else loops, name, value)
            loops._loop.cache_clear()
            assert not loops.multiplies(x, weight)
            assert not loops.attends(torch.randn(1, 1, 9, 64), torch.randn(1, 1, 9, 64))
            assert not loops.sums(torch.randn(1, 2, 3, 40, 16))
    loops._loop.cache_clear()
