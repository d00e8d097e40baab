"""Speed mode: the table of engines, its figures and what it says of itself."""

from types import SimpleNamespace

import pytest
import torch
from tiny import REINFORCE, SPEED, figures, run, tiny_backbone  # noqa: F401

from utils.speed import benchmark, engines


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


def test_all_engines_work_on_whole_blocks(tmp_path, tiny_backbone, monkeypatch):  # noqa: F811
    """As validation does: GMACs are those of the padded image, and the layout is what is said."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    layouts, best = [], engines.dense_best

    def note(model, image, args):
        engine = best(model, image, args)
        layouts.append(next(p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1))
        return engine

    monkeypatch.setattr(engines, "dense_best", note)
    gmacs = []
    for size in (("90", "120"), ("128", "128")):
        flags = ("--synthetic-size", *size, "--channels-last", "no")
        run(tmp_path / size[0], *REINFORCE, *flags, "--max-steps", "1")
        folder = run(tmp_path / size[0], *REINFORCE, *flags, *SPEED, "--budget", "1.0")
        rows = figures(folder, "speed.json")["rows"]
        gmacs.append({row["engine"]: row["gmacs"] for row in rows})
    assert gmacs[0] == gmacs[1]
    assert gmacs[0]["all high"] == gmacs[0]["blocks eager"] > gmacs[0]["dense eager"]
    assert layouts[0].is_contiguous()


def test_every_image_has_run_before_it_is_timed(monkeypatch):
    """The first pass of an image may capture a graph for its count of blocks."""
    monkeypatch.setattr(benchmark, "WARM_UP", 2)
    images, loaded, timed = [torch.zeros(1) + i for i in range(5)], [], []
    engine = engines.Engine("x", "x", True, lambda x: loaded.append(int(x)), lambda: None)
    monkeypatch.setattr(benchmark, "_cpu_ms", lambda e: timed.append(loaded[-1]) or len(timed))
    (times,) = benchmark._take_turns([engine], images, 3, torch.device("cpu"))
    assert loaded[:5] == [0, 1, 2, 3, 4]
    assert times == [6, 7, 8]


def test_what_is_compiled_for_half_is_not_timed_in_float32():
    """A float16 network beside a float32 one would not be a comparison."""
    for cuda, dtype, expected in (
        (True, torch.float32, False),
        (True, torch.float16, True),
        (False, torch.float32, True),
    ):
        assert engines.can_compile(SimpleNamespace(is_cuda=cuda, dtype=dtype)) == expected


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
