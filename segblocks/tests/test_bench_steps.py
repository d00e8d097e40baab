"""The timing of networks as they are and on blocks, on small ones."""

import json

import pytest
import torch

from segblocks import bench_steps

SMALL = "--block 32 --eager-size 64x64 --train-size 64x64 --batch 1".split()
SMALL += "--repeats 1 --row 2 --warm-up 0".split()
NET = ["--net", "networks:net", "--arguments", '{"stride": 2}']


def test_times_every_part(tmp_path, capsys):
    path = tmp_path / "steps.json"
    bench_steps.main(
        [*NET, *SMALL, "--eager-dtype", "float32", "--device", "cpu", "--json", str(path)]
    )
    record = json.loads(path.read_text())
    found = [(r["what"], r["variant"], r["precision"]) for r in record["results"]]
    assert found == [
        (what, variant, precision)
        for what, precision in (("eager", "float32"), ("train", "float32"), ("train", "bfloat16"))
        for variant in ("dense", "blocks")
    ]
    for result in record["results"]:
        assert 0 < result["host_ms"] <= result["median_ms"] <= result["p95_ms"]
        assert result["peak_mib"] is None
    assert record["torch"] == torch.__version__
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(found)


def test_a_grid_has_its_share():
    grid = bench_steps.random_grid(3, (64, 128), 16, 0.4, "cpu")
    assert grid.shape == (3, 4, 8)
    assert grid.sum((1, 2)).tolist() == [13] * 3
    assert not torch.equal(grid[0], grid[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eager-size", "100x128"], "whole 32-pixel blocks"),
        (["--eager-size", "large"], "is not HEIGHTxWIDTH"),
        (["--share", "2"], "--share must be between 0 and 1"),
        (["--repeats", "0"], "--repeats and --row at least 1"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_steps.parse([*NET, *SMALL, *arguments])
    assert message in capsys.readouterr().err


def test_a_name_of_no_network():
    with pytest.raises(ValueError, match="module:callable"):
        bench_steps.load("networks", {})
