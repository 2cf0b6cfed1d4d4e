import pytest
import torch

from lococo import loops

DTYPES = [torch.float32, torch.bfloat16]


def needed(dtype):
    """Skip where there are no loops."""
    if loops._loop("few_rows", dtype) is None:
        pytest.skip(f"no loops in {dtype}: the processor lacks AVX-512, or there is no C++ compiler")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7, 8, 9, 16])
@pytest.mark.parametrize(("n", "d"), [(5, 3), (33, 64), (65, 100), (256, 576)])
def test_few_rows_are_products_with_a_matrix(dtype, rows, n, d):
    needed(dtype)
    torch.manual_seed(rows)
    x, weight = torch.randn(2, rows, d).to(dtype)[1:], torch.randn(n, d).to(dtype)
    assert loops.multiplies(x, weight)
    product = loops.few_rows(x, weight)
    assert product.dtype == torch.float32
    assert (product - x.double() @ weight.double().T).abs().max() < 3e-6 * d**0.5
    # Rows that lie otherwise in memory are the same rows.
    assert torch.equal(loops.few_rows(x[0].T.contiguous().T, weight), product[0])


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
    needed(dtype)
    torch.manual_seed(s)
    if not loops.attends(*2 * [torch.empty(1, 1, 1, d, dtype=dtype)]):
        assert d * dtype.itemsize > 512
        return
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "h", "g", "q", "s", "d"), [(1, 3, 3, 256, 716, 64), (2, 1, 2, 17, 33, 16), (1, 2, 1, 97, 130, 32)]
)
def test_column_mass_is_what_maps_of_attention_add_up_to(dtype, b, h, g, q, s, d):
    needed(dtype)
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


def test_a_query_that_sees_nothing_gives_no_mass():
    needed(torch.float32)
    keys, queries, visible = torch.randn(1, 1, 9, 16), torch.randn(1, 1, 1, 40, 16), torch.full((1, 40), 9)
    visible[0, :20] = 0
    mass = loops.column_mass(keys, torch.zeros(1, 1, 9), queries, scaling=1.0, visible=visible)
    assert mass.sum() == pytest.approx(20)


@pytest.mark.parametrize("s", [64, 70])
def test_what_is_no_number_stays_none(s):
    needed(torch.float32)
    keys, queries, bias = torch.randn(1, 1, s, 16), torch.randn(1, 1, 1, 40, 16), torch.zeros(1, 1, s)
    keys[0, 0, 2] = torch.nan
    assert loops.column_mass(keys, bias, queries, scaling=1.0).isnan().all()
    assert loops.attention(queries[:, :, 0, :1], keys, keys, bias, 1.0).isnan().all()
    hidden = torch.full_like(bias, -torch.inf)
    assert loops.column_mass(queries[:, :, 0], hidden[..., :40], queries, scaling=1.0).isnan().all()


def test_results_are_float32_on_the_cpu_whatever_torch_would_make_of_new_tensors():
    needed(torch.float32)
    x, weight, keys = torch.randn(3, 64), torch.randn(5, 64), torch.randn(1, 1, 9, 64)
    queries, bias = torch.randn(1, 1, 1, 40, 64), torch.zeros(1, 1, 9)

    def computed():
        few, mass = loops.few_rows(x, weight), loops.column_mass(keys, bias, queries, scaling=1.0)
        return few, mass, loops.attention(queries[:, :, 0, :1], keys, keys, bias, 1.0)

    expected = computed()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            same = computed()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(expected, same, strict=True))


def test_threads_share_the_work(monkeypatch):
    needed(torch.float32)
    x, weight, keys = torch.randn(3, 64), torch.randn(500, 64), torch.randn(2, 3, 99, 64)
    queries, bias = torch.randn(2, 3, 2, 200, 64), torch.zeros(2, 3, 99)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        few, mass = loops.few_rows(x, weight), loops.column_mass(keys, bias, queries, scaling=0.1)
        results.append((few, mass, loops.attention(queries[:, :, :, 0].reshape(2, 6, 1, 64), keys, keys, bias, 0.1)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_what_the_loops_do_not_know_is_left_to_others():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert not loops.multiplies(x[:1], weight)  # which torch.compile does as fast
    assert not loops.multiplies(torch.randn(loops.MOST_ROWS + 1, 8), weight)
    assert not loops.multiplies(x, torch.randn(8, 5).T)
    assert not loops.multiplies(x.double(), weight.double())
    assert not loops.multiplies(x.to("meta"), weight.to("meta"))
    assert not loops.multiplies(x.bfloat16(), weight)
    assert not loops.multiplies(x, weight[0])
    queries = torch.randn(1, 2, 3, 40, 16)
    assert not loops.sums(queries[..., :15])
    assert not loops.sums(queries[:, :, :1, :1])  # a decoding step's
    assert not loops.sums(queries.to("meta"))
    key = torch.randn(1, 2, 9, 64)
    assert not loops.attends(key, key[..., :32].contiguous())
    assert not loops.attends(key[..., :40].contiguous(), key[..., :40].contiguous())
    assert not loops.attends(key.transpose(1, 2), key.transpose(1, 2))
    assert not loops.attends(key.half(), key.half())


@pytest.mark.parametrize("lacking", ["avx512", "compiler", "instructions", "folder", "torch"])
def test_where_something_is_lacking_there_are_no_loops(lacking, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCOCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loops, "_processor", lambda: tuple(loops._NEEDED[torch.bfloat16]))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2" if lacking == "torch" else "AVX512")
    monkeypatch.setenv("CXX", "false" if lacking == "instructions" else str(tmp_path / "none"))
    if lacking == "avx512":
        monkeypatch.setattr(loops, "_processor", tuple)
    if lacking == "folder":
        (tmp_path / "cache").write_text("")
    for cached in (loops._loop, loops._compiled):
        cached.cache_clear()
    try:
        assert not loops.multiplies(torch.randn(3, 8), torch.randn(5, 8))
        assert not loops.attends(torch.randn(1, 1, 9, 64), torch.randn(1, 1, 9, 64))
        assert not loops.sums(torch.randn(1, 2, 3, 40, 16).bfloat16())
    finally:
        for cached in (loops._loop, loops._compiled):
            cached.cache_clear()


def test_a_processor_that_nothing_is_known_of_can_do_nothing(monkeypatch):
    def absent(path, **how):
        raise FileNotFoundError(path)

    monkeypatch.setattr("pathlib.Path.read_text", absent)
    assert loops._processor.__wrapped__() == ()
