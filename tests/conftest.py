"""One thread per test process (the networks are small), the repository on the import path, a seed for every test."""

import os
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whichever tests run before it."""
    import torch  # not before the number of threads is set

    torch.manual_seed(0)
