"""Train with one of the scripts and record its causal graph, which paper/pictures.py draws (the paper's Figure 3).

    python paper/edges.py macca_icq.py --dataset expert --seed 3      # the script's own arguments follow it
    python paper/pictures.py runs/RUN

The run folder gets an edges.npz: `edges` [moments, N, S + N A], the mean probability of every edge, and `iterations`
[moments], those of the causal model. The moments are every 500th iteration while it learns, on the minibatch, and the
end, on the held-out transitions. It trains on the CPU.
"""

import itertools
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import ROOT, SCRIPTS, fail

sys.path.insert(0, str(ROOT))
from causal_model import CausalModel

edges: dict[int, np.ndarray] = {}  # by iteration
iterations = itertools.count()


def recording(method: Callable, interval: int) -> Any:
    """A method of the causal model that first notes the mean probability of every edge, at every `interval`-th call."""

    def wrapper(self, state, action, *rest):
        iteration = next(iterations)
        if iteration % interval == 0:
            edges[iteration] = torch.cat(self.probabilities(state, action), dim=2).mean(0).cpu().numpy()
        return method(self, state, action, *rest)

    return wrapper


if __name__ == "__main__":
    name = Path(sys.argv[1]).name if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        raise SystemExit
    if name not in SCRIPTS:
        fail(f"the first argument is {name}, expected one of {', '.join(SCRIPTS)}")
    if any(word.startswith("--resume") for word in sys.argv):
        fail("a resumed run has no edges of its first part; start a new run")
    CausalModel.loss = recording(CausalModel.loss, 500)
    CausalModel.report = recording(CausalModel.report, 1)  # called once, after the last loss
    sys.argv = [*sys.argv[1:], "--no-cuda"]  # a graph runs the causal model's code a few times only
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    finally:  # an interrupted run keeps its edges too
        runs = sorted(Path("runs").glob(f"*-{os.getpid()}"))
        if edges and runs:
            np.savez(runs[-1] / "edges.npz", iterations=[*edges], edges=np.array([*edges.values()]))
