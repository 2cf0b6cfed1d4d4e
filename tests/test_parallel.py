import threading
import time

import pytest
import torch
from families import tiny

from lococo import attach, parallel
from lococo.reader import prefill

CPU = {torch.device("cpu")}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of(count=8, devices=CPU):
    """Who does each of some pieces, and with how many threads."""
    found = [None] * count

    def piece(i):
        time.sleep(0.01)
        found[i] = threading.current_thread().name, torch.get_num_threads()

    parallel.each([lambda i=i: piece(i) for i in range(count)], devices)
    return found


@torch.no_grad()
def test_pieces_are_shared_by_threads_that_compute_alone(two_threads):
    found = threads_of()
    assert len({name for name, _ in found}) == 2
    assert {count for _, count in found} == {1}
    assert torch.get_num_threads() == 2
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start(), thread.join()
    assert found[-1] == 2  # what the workers set holds for nobody else


def test_with_gradients_they_are_done_one_after_the_other(two_threads):
    assert threads_of() == [(threading.current_thread().name, 2)] * 8


@torch.no_grad()
@pytest.mark.parametrize("devices", [{torch.device("meta")}, {torch.device("cpu"), torch.device("meta")}])
def test_on_a_device_as_well(two_threads, devices):
    assert threads_of(devices=devices) == [(threading.current_thread().name, 2)] * 8


@torch.no_grad()
def test_under_autocast_as_well(two_threads):
    with torch.autocast("cpu", torch.bfloat16):
        assert threads_of() == [(threading.current_thread().name, 2)] * 8


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_holds(two_threads, mode):
    made = []
    with mode():
        parallel.each([lambda: made.append(torch.ones(1) + 1)] * 4, CPU)
    assert [tensor.is_inference() for tensor in made] == [mode is torch.inference_mode] * 4


@torch.no_grad()
def test_a_piece_that_fails_is_heard_of_when_all_are_done(two_threads):
    done = []

    def fail():
        raise ZeroDivisionError("first")

    with pytest.raises(ZeroDivisionError, match="first"):
        parallel.each([fail, *[lambda: (time.sleep(0.01), done.append(1))] * 5], CPU)
    assert len(done) == 5


@torch.no_grad()
def test_who_is_interrupted_finds_no_piece_at_work(two_threads, monkeypatch):
    began, ended, waits = [], [], []

    def piece():
        began.append(1)
        time.sleep(0.05)
        ended.append(1)

    def interrupted(futures, real=parallel.wait):
        waits.append(1)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return real(futures)

    monkeypatch.setattr(parallel, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parallel.each([piece] * 20, CPU)
    assert len(began) == len(ended) < 20


@pytest.mark.parametrize("compressor", ["h2o", "look-ahead", "mass-merge", "lococo-paper"])
@pytest.mark.parametrize("family", ["llama", "llama-yarn", "gemma3"])
def test_layers_side_by_side_make_the_slots_that_each_makes_alone(two_threads, family, compressor):
    model, held = tiny(family), []
    ids = torch.randint(5, 100, (1, 150), generator=torch.Generator().manual_seed(0))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with attach(model, compressor, num_slots=20, chunk_size=16) as slots:
            cache = slots.new_cache()
            prefill(model, ids, cache)
        held.append([(layer.keys, layer.values, layer.log_mass, layer.token_index) for layer in cache.slot_layers])
    for alone, together in zip(*held, strict=True):
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one, other)
