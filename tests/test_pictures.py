"""paper/pictures.py on tiny runs: the files that it leaves, and its sentence for a folder that it cannot draw."""

import pytest
import toy
from PIL import Image

SHORT = ["--no-cuda", "--total-iterations", 4, "--eval-interval", 2, "--eval-episodes", 1, "--final-episodes", 1]
SHORT += ["--batch-size", 16, "--hidden-dim", 8]


def trained(folder, *flags, script="macca_omar", monkeypatch):
    status, _, stderr = toy.run(script, folder, *SHORT, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr
    return toy.run_folder(folder)


def test_cooperative_navigation(tmp_path, monkeypatch):
    run = trained(tmp_path, monkeypatch=monkeypatch)
    status, stdout, stderr = toy.run("paper/pictures", tmp_path, run, monkeypatch=monkeypatch)
    assert status == 0, stderr
    assert stdout.split() == [str(run / name) for name in ("edges.png", "credit.png", "episode.gif")]
    for name in ("edges.png", "credit.png"):
        with Image.open(run / name) as image:
            image.load()
            assert len(image.convert("RGB").getcolors(10**6)) > 100, name  # something was drawn
    with Image.open(run / "episode.gif") as animation:
        assert animation.n_frames == 25
    assert (run / "episode.gif").stat().st_size < 600_000


@pytest.mark.parametrize("script, discrete", [("macca_cql", False), ("macca_icq", True)])
def test_an_environment_that_is_not_rendered(script, discrete, tmp_path, monkeypatch):
    """With a state of the dataset's own, which is then asked of the environment."""
    states = toy.record(toy.Matching(discrete), 100)["observations"].reshape(100, 4)[:, ::-1]
    toy.write(tmp_path / "data.npz", discrete, states=states.copy())
    flags = ["--env", f"toy:matching{'_discrete' * discrete}", "--dataset", "data.npz"]
    run, out = trained(tmp_path, *flags, script=script, monkeypatch=monkeypatch), tmp_path / "new" / "folder"
    status, stdout, stderr = toy.run("paper/pictures", tmp_path, run, "--out", out, monkeypatch=monkeypatch)
    assert status == 0, stderr
    assert "no episode.gif" in stdout
    assert sorted(path.name for path in out.iterdir()) == ["credit.png", "edges.png"]


def test_folders_that_cannot_be_drawn(tmp_path, monkeypatch):
    def sentence(*flags):
        status, stdout, stderr = toy.run("paper/pictures", tmp_path, *flags, monkeypatch=monkeypatch)
        assert (status, stdout, stderr.count("\n")) == (2, "", 1), stderr
        return stderr

    assert "is no run folder" in sentence("nowhere")
    toy.write(tmp_path / "data.npz")
    flags = ["--env", "toy:matching", "--dataset", "data.npz"]
    team = trained(tmp_path, *flags, "--credit", "team", monkeypatch=monkeypatch)
    assert "--credit team" in sentence(team)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.npz").write_bytes((tmp_path / "data.npz").read_bytes())
    run = trained(tmp_path / "other", *flags, monkeypatch=monkeypatch)
    assert "cannot be written" in sentence(run, "--out", tmp_path / "data.npz")
    (run / "checkpoint.pt").write_bytes(b"nothing")
    assert "is no run folder" in sentence(run)
