"""Speed mode: the table of engines, its figures and what it says of itself."""

import pytest
import torch
from tiny import REINFORCE, SPEED, figures, run, tiny_backbone  # noqa: F401


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_backbone):  # noqa: F811
    folder = tmp_path_factory.mktemp("trained")
    run(folder, *REINFORCE, "--max-steps", "1")
    return folder


def test_speed_without_a_compiler_says_so(trained, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    folder = run(trained, *REINFORCE, *SPEED, "--batch-size", "2", "--profiler", "yes")
    found = figures(folder, "speed.json")
    rows = {row["engine"]: row for row in found["rows"]}
    assert list(rows) == ["dense eager", "dense best", "all high", "blocks eager", "blocks fast"]
    assert "no C++ compiler" in rows["dense best"]["how"]
    assert (found["batch_size"], found["height"], found["width"]) == (2, 64, 128)
    assert found["versions"]["torch"] == torch.__version__
    for row in rows.values():
        assert len(row["times_ms"]) == 3
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        dense = rows["dense best"]["p50_ms"]
        assert row["ratio"]["dense best"] == pytest.approx(dense / row["p50_ms"])
    assert rows["dense eager"]["share"] == 1
    assert (folder / "profile.json").stat().st_size > 0


@pytest.mark.slow
def test_speed_with_a_compiler(trained, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    folder = run(trained, *REINFORCE, *SPEED, "--budget", "0")
    rows = {row["engine"]: row for row in figures(folder, "speed.json")["rows"]}
    assert rows["blocks eager"]["share"] == 0
    assert rows["blocks eager"]["gmacs"] > 0
    how = rows["dense best"]["how"]
    if "no C++ compiler" in how or "torch.compile failed" in how:
        pytest.skip(f"this machine cannot compile: {how}")
    assert "Inductor freezing" in how
