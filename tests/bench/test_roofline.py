from lococo.bench import roofline


def test_the_machine_reads_and_multiplies(monkeypatch):
    monkeypatch.setattr(roofline, "BLOCK", 1 << 20)
    monkeypatch.setattr(roofline, "ROWS", 64)
    clock = iter(range(100))
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(clock) / 2)
    # Half a second each, whatever the work.
    assert roofline.machine("bfloat16", None) == {"bytes_per_s": 2 << 20, "operations_per_s": 4 * 64**3}
