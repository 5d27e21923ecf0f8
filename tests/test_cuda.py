"""On a GPU: the numbers of the CPU, nothing that waits for the host, and graphs that repeat what they recorded."""

import csv
import importlib

import pytest
import torch
import toy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHORT = ["--batch-size", 16, "--hidden-dim", 8, "--eval-interval", 5, "--causal-iterations", 10]
SHORT += ["--eval-episodes", 1, "--final-episodes", 2]


def build(script, path, env):
    """A script's networks, causal model, optimizers (as its main part prepares them) and data, on the GPU."""
    module = importlib.import_module(script)
    args = module.Args(env=env, cuda=True, batch_size=32, hidden_dim=8, causal_iterations=20)
    torch.manual_seed(0)
    data, metadata = module.load_dataset(path, args, module.make_env(env)[0])
    data = {name: x.cuda() for name, x in data.items()}
    nets, causal_model, optimizers = module.build(args, data, metadata)
    data["credit"] = data["rewards"][:, None] * data["alive"]
    for group in [group for name in ("causal", "critic", "actor") for group in optimizers[name].param_groups]:
        group |= {"capturable": True, "lr": torch.tensor(float(group["lr"]), device="cuda")}
    learn = {
        "policy": lambda: module.update(module.sample(data, 32), nets, optimizers, args),
        "causal": lambda: module.update_causal_model(module.sample(data, 32), causal_model, optimizers),
    }
    return module, nets, causal_model, learn, data, optimizers["schedule"]


@pytest.fixture(scope="module", params=["matching", "matching_discrete"])
def place(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    return toy.write(path, discrete=request.param == "matching_discrete"), f"toy:{request.param}"


@pytest.mark.parametrize("script", toy.SCRIPTS)
@pytest.mark.parametrize("learner", ["policy", "causal"])
def test_a_graph_repeats_the_step(script, learner, place):
    """Ten steps by `repeated`, seven of them as a graph, end where ten calls end, with the same random numbers."""
    results = []
    for as_graph in (False, True):
        module, nets, causal_model, learn, _, schedule = build(script, *place)
        torch.cuda.manual_seed(1)
        steps, logs = module.repeated(learn[learner], as_graph), []
        for _ in range(10):
            logs.append({name: x.item() for name, x in next(steps).items()})
            if learner == "causal":
                schedule.step()  # the graph sees the new rates
        results.append((logs, {**nets.state_dict(), **causal_model.state_dict()}))
    (logs, state), (graph_logs, graph_state) = results
    assert logs == graph_logs and logs[-1] != logs[-2]
    assert all(torch.equal(x, graph_state[name]) for name, x in state.items())


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_nothing_waits_for_the_host(script, place):
    _, _, _, learn, _, _ = build(script, *place)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in learn.values():
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("share", ["shapley", "slots"])
def test_credit_is_the_cpus(share, place):
    module, _, causal_model, learn, data, _ = build("macca_omar", *place)
    causal_model.share = share
    for _ in range(20):
        learn["causal"]()
    inputs = (*module.causal_inputs(data), data["rewards"], data["alive"])
    on_gpu = causal_model.assign(*inputs).cpu()
    on_cpu = causal_model.cpu().assign(*(x.cpu() for x in inputs))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_resume(script, place, tmp_path, monkeypatch):
    """A run in two parts is one run, bit for bit; it can go on without a GPU, and come back to it."""
    path, env = place

    def run(part, *flags):
        (tmp_path / part).mkdir(exist_ok=True)
        status, _, stderr = toy.run(script, tmp_path / part, *flags, monkeypatch=monkeypatch)
        assert status == 0, stderr
        (metrics,) = tmp_path.glob(f"{part}/runs/*/metrics.csv")
        return metrics.parent, list(csv.DictReader(metrics.open()))

    flags = [*SHORT, "--env", env, "--dataset", path]
    _, expected = run("whole", *flags, "--total-iterations", 20)
    folder, _ = run("parts", *flags, "--total-iterations", 10)
    _, found = run("parts", "--resume", folder, "--total-iterations", 20)
    numbers = [[row for row in rows if row["iteration"] in ("5", "15", "20")] for rows in (expected, found)]
    assert len(numbers[0]) == 3 and numbers[0] == numbers[1]
    run("parts", "--resume", folder, "--total-iterations", 30, "--no-cuda")
    _, found = run("parts", "--resume", folder, "--total-iterations", 40, "--cuda")
    assert found[-1]["iteration"] == "40"
