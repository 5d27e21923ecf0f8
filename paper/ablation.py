"""One of the scripts with one thing changed, for the paper's ablations. The script's own arguments follow its name.

    python paper/ablation.py truth macca_omar.py --dataset expert

truth     Table 5: the causal model learns from the recorded individual rewards instead of their sum, and a slot's
          prediction is the agent's reward, whole (Eq. 6, without what is left of the team reward).
averaged  Table 6, "fixed graph": the credit masks by edge probabilities averaged over 10,000 rows, clipped at h.
soft      Table 6, "without clipping": the credit multiplies by edge probabilities instead of masks.
beside    Table 7: the causal model learns beside the policies, a step before each of theirs, and splits the rewards
          of their minibatch as it stands. --causal-iterations 1 leaves nothing before.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from rows import ROOT, SCRIPTS, fail
from torch import Tensor

sys.path.insert(0, str(ROOT))
from causal_model import CausalModel

plain_slots = CausalModel._slots


def soft(self: CausalModel, parents: Tensor, alive: Tensor | None = None, masks: Tensor | None = None) -> Tensor:
    """Slots whose default masks are the probabilities themselves."""
    return plain_slots(self, parents, alive, torch.sigmoid(self._logits(parents)[0]) if masks is None else masks)


def averaged(self: CausalModel, parents: Tensor, alive: Tensor | None = None, masks: Tensor | None = None) -> Tensor:
    """Slots whose default masks are the same for all rows: where the mean probability is at least h."""
    if masks is None:
        mean: Any = self.mean_probabilities
        masks = (mean >= self.h).float()
    return plain_slots(self, parents, alive, masks)


def predicted(
    self: CausalModel, state: Tensor, action: Tensor, team_reward: Tensor, alive: Tensor | None = None
) -> Tensor:
    """What the slots predict [B, N], in units of a reward; nothing is split evenly."""
    parents = self._parents(state, action)
    return self._slots(parents, alive) * self.reward_std + self.reward_mean / len(self.edge_logits)


# Lines of the scripts, and what takes their place.
CHANGES = {
    "soft": {},
    "averaged": {
        '            data["credit"] = assign_credit(data, args, causal_model)\n': """\
            with torch.no_grad():
                inputs = causal_inputs({name: x[:: len(x) // 10_000 + 1] for name, x in data.items()})
                edges = torch.cat(causal_model.probabilities(*inputs), dim=2)
                causal_model.mean_probabilities = edges.mean(0, keepdim=True)
            data["credit"] = assign_credit(data, args, causal_model)
"""
    },
    "truth": {
        '    loss, error = causal_model.loss(*causal_inputs(batch), batch["rewards"], batch["alive"])\n': """\
    parents = causal_model._parents(*causal_inputs(batch))
    logits, varying = causal_model._logits(parents)
    uniform = torch.rand(len(parents), *logits.shape[1:], device=logits.device).clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid(logits + torch.logit(uniform))
    slots = causal_model._slots(parents, batch["alive"], (soft > 0.5).float() + soft - soft.detach())
    goals = (batch["individual_rewards"] - causal_model.reward_mean / slots.shape[1]) / causal_model.reward_std
    error = (slots - goals).square().sum(1).mean()
    penalty = (causal_model.edge_price * (torch.sigmoid(logits) + varying.abs())).sum((1, 2)).mean()
    loss = error + (1 - error.detach()).clamp(min=0) * penalty
    error = error.detach()
"""
    },
    "beside": {
        "1.0, 0.0, args.causal_iterations)": "1.0, 0.0, args.causal_iterations + args.total_iterations)",
        "        logs = update_causal_model(batch, causal_model, optimizers) if causal else": """\
        logs = update_causal_model(batch, causal_model, optimizers)
        if not causal:
            batch["credit"] = assign_credit(batch, args, causal_model)
            if args.standardize_rewards:  # by the minibatch's deviation, as all shares change all the time
                batch["credit"] = standardize(batch["credit"], batch["alive"], nets.center)
            if (iteration + 1) % args.eval_interval == 0:
                data.pop("credit")  # so that the next evaluation measures the credit anew
        logs = logs if causal else\
""",
    },
}


if __name__ == "__main__":
    name, script = [*sys.argv[1:3], "", ""][:2]
    if name in ("-h", "--help"):
        print(__doc__)
        raise SystemExit
    if name not in CHANGES or script not in SCRIPTS:
        fail(f"the first two arguments must be one of {', '.join(CHANGES)} and one of {', '.join(SCRIPTS)}")
    source = Path(ROOT, script).read_text(encoding="utf-8")
    for old, new in CHANGES[name].items():
        if source.count(old) != 1:
            fail(f"{script} no longer has the lines that {name} replaces")
        source = source.replace(old, new)
    if name in ("soft", "averaged"):
        CausalModel._slots = {"soft": soft, "averaged": averaged}[name]
    if name == "truth":
        CausalModel.assign = predicted
    sys.argv = sys.argv[2:]
    __file__ = str(ROOT / script)
    exec(compile(source, __file__, "exec"))
