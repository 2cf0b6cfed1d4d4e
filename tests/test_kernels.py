"""The kernels against plain torch in double precision, on a GPU or else in Triton's interpreter, in another process."""

import copy
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from families import tiny, tokens

import lococo
from lococo import kernels
from lococo.entries import attention_mass, mass_in_blocks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED and kernels._has_kernels(torch.device("cuda"))
DEVICE = "cuda" if ON_GPU else "cpu"

computes = pytest.mark.skipif(
    not INTERPRETED and not ON_GPU, reason="needs Triton and CUDA; without, test_in_tritons_interpreter runs it"
)
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs Triton and CUDA")

# Largest error of an output against its largest number, and of a mass against the largest; the model's dtype rounds
# outputs (and probabilities before they are mixed), masses are sums of float32.
OUTPUT_ERROR = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
MASS_ERROR = 5e-5


@pytest.fixture(scope="module", autouse=INTERPRETED)
def interpreter():
    """Triton's interpreter, with what its release 3.6 lacks: numpy 2.4's scalars, and products of bfloat16."""
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    builder, patch = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    dot = builder.create_dot

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(interpreter, "_patch_lang_tensor", patched)
        patching.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))
        yield


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below run on the GPU, or in the interpreter already")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which comes with the CUDA builds of torch")
def test_in_tritons_interpreter():
    # Triton reads the variable when it is first imported.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def chunk_of(b, h, g, q, s, d, v, dtype, seed=0):
    """Queries, keys, values, log-masses and what queries see: a chunk, causal, behind what the cache holds."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    query, key, value = (
        each.to(DEVICE, dtype) for each in (random(b, h * g, q, d), random(b, h, s, d), random(b, h, s, v))
    )
    log_mass = (random(b, h, s).abs() * 2).to(DEVICE)
    visible = (torch.arange(q, device=DEVICE) + s - q + 1).clamp(min=1)[None]
    return query, key, value, log_mass, visible


def errors(given, **options):
    """Largest errors of the kernel's output and mass against the naive twin's, relative to the largest number."""
    output, mass = kernels.attention_with_mass(*given, **options)
    doubled = [each.double() for each in given[:4]]
    true_output, true_mass = kernels.naive_attention_with_mass(*doubled, given[4], **options)
    assert output.dtype == given[0].dtype
    assert mass.dtype == torch.float32
    assert output.shape == true_output.shape
    assert output.is_contiguous()
    pairs = (output.double(), true_output), (mass.double(), true_mass.double())
    return [float((one - other).abs().max() / other.abs().max()) for one, other in pairs]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 1, 1, 1, 64, 64), torch.float32),
        ((2, 2, 3, 7, 45, 32, 32), torch.float32),
        ((1, 2, 2, 50, 50, 48, 20), torch.float32),  # widths that are no powers of 2, values of their own
        ((1, 1, 1, 5, 40, 256, 256), torch.float32),
        ((2, 3, 3, 40, 150, 64, 64), torch.bfloat16),
        ((1, 2, 4, 33, 129, 128, 128), torch.bfloat16),
        ((1, 1, 2, 9, 70, 256, 256), torch.bfloat16),
        ((3, 2, 2, 1, 100, 80, 80), torch.float16),
    ],
)
@computes
def test_output_and_mass_are_the_naive_twins(shape, dtype):
    output, mass = errors(chunk_of(*shape, dtype), scaling=shape[5] ** -0.5)
    assert output < OUTPUT_ERROR[dtype]
    assert mass < MASS_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@computes
def test_caps_sinks_padding_and_rows_of_their_own(dtype):
    b, h, g, q, s, d = 3, 2, 2, 19, 75, 64
    query, key, value, log_mass, _ = chunk_of(b, h, g, q, s, d, d, dtype)
    log_mass[0, :, 5:9] = -torch.inf  # entries without mass
    visible = torch.randint(1, s + 1, (b, q), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    visible[1, 3], visible[2] = 0, 4
    given = query, key, value, log_mass, visible
    sinks, weight = torch.linspace(-2, 4, h * g, device=DEVICE).view(h, g), torch.rand(b, q, device=DEVICE)
    weight[0, :4] = 0
    for options in ({"softcap": 3.0}, {"sinks": sinks}, {"weight": weight, "softcap": 20.0, "sinks": sinks}):
        output, mass = errors(given, scaling=0.2, **options)
        assert output < OUTPUT_ERROR[dtype]
        assert mass < MASS_ERROR


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # as a cap's tanh means it to be
@computes
def test_large_logits_and_capped_ones_stay_numbers():
    query, key, value, log_mass, visible = chunk_of(1, 1, 2, 20, 40, 32, 32, torch.float32)
    for softcap in (None, 30.0):
        output, mass = errors((query * 30, key * 30, value, log_mass, visible), scaling=1.0, softcap=softcap)
        # Logits of some thousands: what float32 rounds, a GPU's three products a little more, is seen among near ties.
        assert output < 2e-2
        assert mass < 2e-2


@computes
def test_mass_alone_and_cut_buffers_give_the_same():
    b, h, g, q, s, d = 2, 2, 3, 21, 90, 32
    query, key, value, log_mass, visible = chunk_of(b, h, g, q, s, d, d, torch.float32)
    output, mass = kernels.attention_with_mass(query, key, value, log_mass, visible, scaling=0.2)
    again = kernels.attention_with_mass(query, key, value, log_mass, visible, scaling=0.2)
    queries = query.view(b, h, g, q, d)
    alone = kernels.column_mass(key, log_mass, queries, scaling=0.2, visible=visible)
    # As models hand queries over, and caches the filled part of what they hold: what lies beyond must not be read.
    wide = [torch.full_like(each, torch.nan).repeat_interleave(2, 2) for each in (key, value, log_mass)]
    for buffer, each in zip(wide, (key, value, log_mass), strict=True):
        buffer[:, :, :s] = each
    across = query.transpose(1, 2).contiguous().transpose(1, 2)
    cut = kernels.attention_with_mass(across, *(buffer[:, :, :s] for buffer in wide), visible, scaling=0.2)
    assert torch.equal(mass, again[1])
    assert torch.equal(output, again[0])
    torch.testing.assert_close(cut, (output, mass), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, mass, atol=1e-4, rtol=1e-4)
    everything = kernels.column_mass(key, log_mass, queries, scaling=0.2)
    expected = mass_in_blocks(key, log_mass, queries, scaling=0.2, softcap=None, sinks=None, visible=None, weight=None)
    torch.testing.assert_close(everything, expected, atol=1e-4, rtol=1e-4)
    assert everything.sum().item() == pytest.approx(b * h * g * q, rel=1e-5)


@pytest.mark.parametrize("compressor", ["h2o", "look-ahead"])
@computes
@torch.no_grad()
def test_a_model_reads_with_the_kernel_as_without(compressor, monkeypatch):
    ids = torch.cat([torch.zeros(1, 9, dtype=torch.long), tokens(1, 70)], 1)
    both = torch.cat([ids, tokens(1, 79, seed=4)]).to(DEVICE)
    mask = torch.ones_like(both)
    mask[0, :9] = 0
    model, read, calls = copy.deepcopy(tiny("llama", "sdpa")).to(DEVICE), [], []

    def watched(function):
        def call(*given, **options):
            calls.append(function.__name__)
            return function(*given, **options)

        return call

    for name in ("attention_with_mass", "column_mass"):
        monkeypatch.setattr(kernels, name, watched(getattr(kernels, name)))
    for taken in (True, False):
        monkeypatch.setattr(kernels, "usable", lambda *tensors, taken=taken: taken)
        calls.clear()
        with lococo.attach(model, compressor, num_slots=40, chunk_size=16) as slots:
            cache = slots.new_cache()
            logits = model(both, attention_mask=mask, past_key_values=cache).logits
        assert set(calls) == ({"attention_with_mass" if compressor == "h2o" else "column_mass"} if taken else set())
        read.append((logits[mask.bool()], [layer.mass for layer in cache.slot_layers]))
    torch.testing.assert_close(read[0][0], read[1][0], atol=5e-3, rtol=0)
    for one, other in zip(*(masses for _, masses in read), strict=True):
        if compressor == "h2o":
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@on_gpu
def test_attention_mass_takes_the_kernel_unless_it_is_too_wide():
    for d in (64, 576):
        query, key, _, log_mass, visible = chunk_of(1, 1, 4, 30, 100, d, 16, torch.bfloat16)
        queries = query.view(1, 1, 4, 30, d)
        assert kernels.usable(query, key) == (d == 64)
        options = {"scaling": d**-0.5, "softcap": None, "sinks": None, "visible": visible, "weight": None}
        mass, expected = (f(key, log_mass, queries, **options) for f in (attention_mass, mass_in_blocks))
        torch.testing.assert_close(mass, expected, atol=1e-3, rtol=1e-3)


@on_gpu
def test_a_gradient_goes_the_other_way():
    query, key, *_ = chunk_of(1, 1, 1, 4, 8, 32, 32, torch.float32)
    assert kernels.usable(query, key)
    query.requires_grad_()
    assert not kernels.usable(query, key)
    with torch.no_grad():
        assert kernels.usable(query, key)


def test_a_cpu_and_other_dtypes_have_no_kernel():
    assert not kernels.usable(torch.zeros(1, 8))
    assert not kernels.usable(torch.zeros(1, 8, dtype=torch.float64))
