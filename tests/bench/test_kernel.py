import subprocess
import sys

import pytest
import torch

from lococo.bench.kernel import CASES, Case


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures where there is a CUDA device")
def test_it_says_in_one_line_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, "-m", "lococo.bench.kernel"], capture_output=True, text=True, check=True)
    assert done.stdout == "There is no CUDA device: nothing was measured.\n"


def test_floors_count_what_a_chunk_needs():
    case = Case(batch=2, heads=4, kv_heads=2, head_dim=8, chunk=3, entries=5)
    # Queries see 3, 4 and 5 entries.
    assert case.operations == 2 * 4 * (3 + 4 + 5) * 8 * 3 * 2
    assert case.nbytes == 2 * (2 * 4 * 3 * 8 * 2 + 2 * 2 * 5 * 8 * 2 + 2 * 2 * 5 * 4)
    assert len(CASES) == 8
