"""A control: MACCA-OMAR in which every agent is told the next agent's share. Arguments are those of macca_omar.py.

    python paper/rolled.py --env mpe/simple_world --dataset medium-replay

The shares are as large, as different from each other and as noisy as MACCA's; only whose they are is wrong.
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from causal_model import CausalModel

if __name__ == "__main__":
    genuine = CausalModel.assign
    CausalModel.assign = lambda self, *given: genuine(self, *given).roll(1, dims=1)
    runpy.run_path(str(ROOT / "macca_omar.py"), run_name="__main__")
