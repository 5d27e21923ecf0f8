"""A control: one of the scripts, in which every agent is told the next agent's share. The script's arguments follow it.

    python paper/rolled.py macca_omar.py --env mpe/simple_world --dataset medium-replay

The shares are as large, as different from each other and as noisy as MACCA's; only whose they are is wrong.
"""

import runpy
import sys

from rows import ROOT, SCRIPTS, fail
from torch import Tensor

sys.path.insert(0, str(ROOT))
from causal_model import CausalModel

plain_assign = CausalModel.assign


def rolled(
    self: CausalModel, state: Tensor, action: Tensor, team_reward: Tensor, alive: Tensor | None = None
) -> Tensor:
    """The credit [B, N], agent i's given to agent i + 1 and the last one's to the first."""
    return plain_assign(self, state, action, team_reward, alive).roll(1, dims=1)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        fail(f"the first argument must be one of {', '.join(SCRIPTS)}")
    if any(word.startswith("--resume") for word in sys.argv):
        fail("a resumed run would go on with its own shares; start a new run")
    CausalModel.assign = rolled
    sys.argv = sys.argv[1:]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
