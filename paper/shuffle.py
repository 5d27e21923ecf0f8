"""A control: a copy of a dataset whose rewards are shuffled between transitions, so that they say nothing.

python paper/shuffle.py data/datasets/mpe/simple_spread/expert.npz data/datasets/mpe/simple_spread/expert-shuffled.npz
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import tyro


def main(source: Annotated[Path, tyro.conf.Positional], target: Annotated[Path, tyro.conf.Positional], seed: int = 0):
    """Write `source` with `rewards` and `individual_rewards` moved to other rows, the same for both, to `target`."""
    with np.load(source, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    rows = np.random.default_rng(seed).permutation(len(arrays["rewards"]))
    for name in {"rewards", "individual_rewards"} & arrays.keys():
        arrays[name] = arrays[name][rows]
    np.savez(target, **arrays)


if __name__ == "__main__":
    tyro.cli(main)
