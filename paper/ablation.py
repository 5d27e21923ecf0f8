"""One of the scripts with one thing changed, for the paper's ablations. The script's own arguments follow its name.

    python paper/ablation.py truth macca_omar.py --dataset expert

truth     Table 5: the causal model learns from the recorded individual rewards instead of their sum, and what a slot
          predicts is the agent's reward; nothing is split but the team reward's mean. --share means nothing here.
averaged  Table 6, "fixed graph": the credit masks by edge probabilities averaged over 10,000 rows, clipped at h. (The
          paper averages while it trains.)
soft      Table 6, "without clipping": the credit multiplies by edge probabilities instead of masks.
beside    Table 7: the causal model learns alternately with the policies, a step before each of theirs, and splits the
          rewards of their minibatch as it stands. --causal-iterations 1, the least, leaves one step before.
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


@torch.no_grad()
def predicted(
    self: CausalModel, state: Tensor, action: Tensor, team_reward: Tensor, alive: Tensor | None = None
) -> Tensor:
    """What the slots predict [B, N], in a reward's units, 0 for the dead; only the mean is split evenly."""
    own = self._slots(self._parents(state, action)) * self.reward_std + self.reward_mean / len(self.edge_logits)
    return own if alive is None else own * alive


# Lines of the scripts, and what takes their place.
CHANGES = {
    "soft": {},
    "averaged": {
        '            data["credit"] = assign_credit(data, args, causal_model)\n': """\
            with torch.no_grad():
                some = torch.linspace(0, len(data["rewards"]) - 1, 10_000).long()
                edges = causal_model.probabilities(*causal_inputs({name: x[some] for name, x in data.items()}))
                edges = torch.cat(edges, dim=2)
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
    error = (slots - goals).square().sum(1).mean() / goals.var(0).sum()
    penalty = (causal_model.edge_price * (torch.sigmoid(logits) + varying.abs())).sum((1, 2)).mean()
    loss = error + (1 - error.detach()).clamp(min=0) * penalty
    error = error.detach()
"""
    },
    "beside": {
        "1.0, 0.0, args.causal_iterations)": "1.0, 0.0, args.causal_iterations + args.total_iterations)",
        "        logs = next(causes if iteration < 0 else policies)\n        if iteration < 0:\n": """\
        batch = sample(data, args.batch_size)  # one for both, and no graphs, as nothing learns alone
        logs = update_causal_model(batch, causal_model, optimizers)
        if iteration >= 0:
            batch["credit"] = causal_model.assign(*causal_inputs(batch), batch["rewards"], batch["alive"])
            if args.standardize_rewards:  # by the minibatch's deviation, as all shares change all the time
                batch["credit"] = standardize(batch["credit"], batch["alive"], nets.center)
            if (iteration + 1) % args.eval_interval == 0:
                data.pop("credit")  # so that the next evaluation measures the credit anew
            logs = update(batch, nets, optimizers, args)
        if iteration <= args.total_iterations:
""",
    },
}


if __name__ == "__main__":
    name, script = [*sys.argv[1:3], "", ""][:2]
    if name in ("-h", "--help"):
        print(__doc__)
        raise SystemExit
    if name not in CHANGES:
        fail(f"the first argument must be one of {', '.join(CHANGES)}")
    if script not in SCRIPTS:
        fail(f"the second argument must be one of {', '.join(SCRIPTS)}")
    if any(word.startswith("--resume") for word in sys.argv):
        fail("a resumed run would go on without the change; start a new run")
    if any(word.startswith("--credit") for word in sys.argv):
        fail(f"{name} changes MACCA's credit; leave out --credit")
    source = Path(ROOT, script).read_text(encoding="utf-8")
    names = {
        '__{args.credit}"': f'__{{args.credit}}-{name}"',
        "to go on: python": "without the change it would go on by: python",
    }
    for old, new in (CHANGES[name] | names).items():
        if source.count(old) != 1:
            fail(f"{script} no longer has the lines that {name} replaces")
        source = source.replace(old, new)
    if name in ("soft", "averaged"):
        CausalModel._slots = {"soft": soft, "averaged": averaged}[name]
    if name == "truth":
        CausalModel.assign = predicted
    sys.argv = [f"ablation.py {name} {script}", *sys.argv[3:]]
    __file__ = str(ROOT / script)
    exec(compile(source, __file__, "exec"))
