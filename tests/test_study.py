"""The study: commands that train.py accepts, runs side by side that stop and go on, its report."""

import json
import os
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from experiments import command_line

from argparser import parse_args
from utils.study.command import main, visible_devices
from utils.study.plan import RECIPES, SETUPS, Experiment, chosen, experiments
from utils.study.report import Row, gather, lines_of, markdown, rows, write_report
from utils.study.runs import Options, Runner, Step, steps

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def data_folders(monkeypatch):
    for name in ("CITYSCAPES", "CAMVID"):
        monkeypatch.setenv(f"SEGBLOCKS_{name}_DIR", "/nowhere")


def options(folder: Path, dataset: str, **settings) -> Options:
    setup = SETUPS[dataset]
    return Options(dataset, setup, settings.pop("epochs", setup.epochs), folder, 2, **settings)


def parsed(step: Step):
    environment = {**os.environ, "PYTHON": "echo"}
    done = subprocess.run(step.command, env=environment, capture_output=True, text=True)
    return parse_args(done.stdout.split()[1:])


# ---- the plan ----


@pytest.mark.parametrize("dataset", SETUPS)
def test_every_command_is_one_that_train_accepts(tmp_path, dataset):
    plan = experiments(dataset, "warmup")
    names = [e.name for e in plan]
    assert len(set(names)) == len(names)
    for experiment in plan:
        train, *validations = steps(experiment, 3, options(tmp_path, dataset))
        args = parsed(train)
        assert (args.mode, args.dataset, args.seed) == ("train", dataset, 3)
        assert (args.val_every, args.epochs) == (0, SETUPS[dataset].epochs)
        assert args.name == f"{experiment.name}/seed3"
        assert args.exp_dir == str(tmp_path)
        assert validations
        for step in validations:
            found = parsed(step)
            assert found.mode == "val"
            assert found.resume == str(tmp_path / args.name / "checkpoint.pth")
            assert found.policy_metrics
            assert found.segblocks_block_size == args.segblocks_block_size
            assert found.synthetic_size == args.synthetic_size
            assert str(step.folder) == str(tmp_path / found.name)


def test_placements_spend_the_same(tmp_path):
    """Whatever runs at 40 % spends exactly that, or has a policy that decides."""
    for experiment in experiments("camvid", "warmup"):
        if not experiment.name.endswith("40"):
            continue
        train, own, *_ = steps(experiment, 0, options(tmp_path, "camvid"))
        args, found = parsed(train), parsed(own)
        assert args.segblocks_percent_target == found.segblocks_percent_target
        assert args.segblocks_percent_target == pytest.approx(0.4, abs=0.02)
        if args.segblocks_policy == "reinforce":
            assert found.budget is None
        else:
            assert args.segblocks_budgets == [0.4, 0.4]
            assert found.budget == 0.4


def test_recipes_are_one_idea_each_and_some_together(tmp_path):
    seen = {}
    how = options(tmp_path, "camvid", epochs=110)
    for experiment in experiments("camvid", "published", how.epochs):
        if "recipe" in experiment.groups:
            seen[experiment.title] = parsed(steps(experiment, 0, how)[0])
    by_recipe = {
        name: next(args for title, args in seen.items() if f"recipe {name}," in title)
        for name in RECIPES
        if name not in ("published", "calibrated")
    }
    flags = (
        "segblocks_calibrate", "segblocks_normalise_advantage", "segblocks_entropy_weight",
        "segblocks_reward", "segblocks_warmup_epochs", "segblocks_warmup_share",
        "segblocks_budgets", "segblocks_policy_wd_factor", "segblocks_policy_epochs",
        "segblocks_place_weight", "segblocks_recolour", "segblocks_refine_epochs", "teacher",
    )  # fmt: skip
    teacher = str(tmp_path / "dense" / "seed0" / "checkpoint.pth")
    expected = {
        "normalised": ("val", True, 0.5, "loss", 0, None, None, 1, 0, 0, False, 0, ""),
        "warmup": ("val", False, 0, "loss", 11, 1, None, 1, 0, 0, False, 0, ""),
        "exact": ("val", False, 0, "loss", 0, None, [0.381, 0.381], 1, 0, 0, False, 0, ""),
        "short": ("val", False, 0, "loss", 0, None, None, 1, 27, 0, False, 0, ""),
        "balanced": ("val", False, 0, "balanced", 0, None, None, 30, 0, 0, False, 0, ""),
        "soft": ("val", True, 0.5, "balanced", 0, None, None, 30, 15, 0, False, 0, ""),
        "place": ("val", True, 0.5, "balanced", 0, None, None, 30, 15, 2, False, 0, ""),
        "recolour": ("val", True, 0.5, "balanced", 0, None, None, 30, 15, 2, True, 0, ""),
        "fifth": ("val", True, 0.5, "balanced", 0, None, [0.2] * 2, 30, 15, 2, True, 0, ""),
        "refined": ("val", True, 0.5, "balanced", 0, None, [0.2] * 2, 30, 15, 2, True, 15, ""),
        "varied": ("val", True, 0.5, "balanced", 0, None, [0.2, 1], 30, 15, 2, True, 15, ""),
        "taught": ("val", True, 0.5, "balanced", 0, None, [0.2] * 2, 30, 15, 2, True, 15, teacher),
        "brief": ("val", True, 0.5, "balanced", 0, None, [0.2, 1], 30, 5, 2, True, 5, ""),
    }
    found = {n: tuple(getattr(args, f) for f in flags) for n, args in by_recipe.items()}
    assert found == expected
    published = next(args for title, args in seen.items() if "published" in title)
    expected = ("no", False, 0, "loss", 0, None, None, 1, 0, 0, False, 0, "")
    assert tuple(getattr(published, f) for f in flags) == expected


@pytest.mark.parametrize("name", ["reinforce20", "reinforce40", "any"])
def test_scripts_of_camvid_train_as_the_study_does(tmp_path, name):
    """By its recipe; 40 % are 40 %, where the study stays within 55 % of the operations. What is
    trained for 40 % serves any budget."""
    plan = experiments("camvid", SETUPS["camvid"].recipe)
    (experiment,) = chosen(plan, ["reinforce40" if name == "any" else name])
    studied = vars(parsed(steps(experiment, 0, options(tmp_path, "camvid"))[0]))
    script = f"reinforce_{name}" if name == "any" else name
    path = ROOT / f"configs/camvid/swiftnet_rn18/{script}_train.sh"
    given = vars(parse_args(list(command_line(path))))
    differ = {key for key in given if given[key] != studied[key]}
    how_often = {"name", "exp_dir", "val_every", "save_minutes", "num_workers", "num_viz_images"}
    assert differ - {"segblocks_percent_target"} <= how_often
    assert given["segblocks_percent_target"] == pytest.approx(
        studied["segblocks_percent_target"], abs=0.02
    )


def test_what_serves_any_budget_is_trained_once():
    calibrated, varied = (experiments("camvid", recipe) for recipe in ("calibrated", "varied"))
    (of_any,) = chosen(calibrated, ["any"])
    (of_40,) = chosen(varied, ["reinforce40"])
    assert "any" not in [e.name for e in varied]
    assert of_40.validations == of_any.validations


def test_experiments_are_chosen_by_name_and_group():
    plan = experiments("camvid", "balanced")
    assert [e.name for e in chosen(plan, ["dense", "any"])] == ["dense", "any"]
    recipes = [e.name for e in chosen(plan, ["recipe"])]
    assert {"published40", "reinforce40", "recipe_warmup40"} <= set(recipes)
    assert "recipe_balanced40" not in recipes  # that is reinforce40
    assert chosen(plan, []) == plan
    plan = experiments("camvid", "taught")
    taught = ["dense", "reinforce40", "dense_taught", "random40_taught"]
    assert [e.name for e in chosen(plan, taught[1:])] == taught
    with pytest.raises(ValueError, match="'dence'; choose from dense"):
        chosen(plan, ["dence"])


@pytest.mark.parametrize("words", [("mars", "balanced"), ("camvid", "luck")])
def test_unknown_data_set_or_recipe(words):
    with pytest.raises(ValueError, match=r"unknown .*choose one of"):
        experiments(*words)


# ---- runs ----


def step(folder: Path, *command: str) -> Step:
    return Step(folder.name, command, folder)


def shell(folder: Path, text: str) -> Step:
    return step(folder, "bash", "-c", text)


def test_chains_run_in_order_and_what_is_done_is_left_alone(tmp_path):
    log = tmp_path / "log"
    chain = [shell(tmp_path / name, f"echo {name} >>{log}") for name in "abc"]
    assert Runner(2, 1, lambda line: None).run([chain])
    assert log.read_text().split() == ["a", "b", "c"]
    chain.append(shell(tmp_path / "d", f"echo d >>{log}"))
    assert Runner(2, 1, lambda line: None).run([chain])
    assert log.read_text().split() == ["a", "b", "c", "d"]


def test_runs_are_side_by_side_but_not_more_than_asked(tmp_path):
    text = f"echo x >>{tmp_path}/now; sleep 0.3; wc -l <{tmp_path}/now"
    chains = [[shell(tmp_path / str(i), text)] for i in range(3)]
    started = time.monotonic()
    assert Runner(3, 1, lambda line: None).run(chains)
    assert time.monotonic() - started < 3
    seen = [int((tmp_path / str(i) / "study.log").read_text()) for i in range(3)]
    assert seen == [3, 3, 3]
    assert Runner(1, 1, lambda line: None).run([[shell(tmp_path / "4", text)]])


def test_runs_are_spread_over_devices(tmp_path, monkeypatch):
    text = "echo $CUDA_VISIBLE_DEVICES; sleep 0.3"
    chains = [[shell(tmp_path / f"{i}", text)] for i in range(4)]
    assert Runner(4, 1, lambda line: None, ["5", "GPU-7"]).run(chains)
    seen = [(tmp_path / name / "study.log").read_text().strip() for name in ("0", "1", "2", "3")]
    assert sorted(seen) == ["5", "5", "GPU-7", "GPU-7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert visible_devices() == ["2", "3"]


def test_a_failure_stops_its_own_chain_only_and_is_told(tmp_path):
    told: list[str] = []
    bad = [shell(tmp_path / "bad", "echo error: no luck; exit 3"), shell(tmp_path / "after", ":")]
    good = [shell(tmp_path / "good", ":")]
    runner = Runner(1, 1, told.append)
    assert not runner.run([bad, good])
    assert runner.failed == ["bad"]
    assert any("FAILED bad: error: no luck" in line for line in told)
    assert not bad[1].folder.exists()
    assert good[0].is_done()
    assert not bad[0].is_done()


def test_a_step_waits_for_another_and_fails_with_it(tmp_path):
    for name, text in (("good", "sleep 0.5; echo x >$0"), ("bad", "exit 3")):
        first = step(tmp_path / name, "bash", "-c", text, str(tmp_path / "made"))
        second = replace(shell(tmp_path / f"{name}2", f"cat {tmp_path}/made"), after=first)
        runner = Runner(2, 1, lambda line: None)
        assert runner.run([[second], [first]]) == second.is_done() == (name == "good")
        assert runner.failed == ([] if name == "good" else ["bad"])


def test_steps_that_come_after_the_same_one_are_side_by_side(tmp_path):
    first = shell(tmp_path / "first", ":")
    text = f"echo x >>{tmp_path}/now; sleep 0.5; wc -l <{tmp_path}/now"
    both = [replace(shell(tmp_path / name, text), after=first) for name in "ab"]
    assert Runner(2, 1, lambda line: None).run([[first, *both]])
    assert [(tmp_path / name / "study.log").read_text().strip() for name in "ab"] == ["2", "2"]


def test_time_is_up_and_the_run_goes_on_later(tmp_path):
    """A run that is asked to stop saves; with its marker missing, it is started again."""
    saves = "trap 'echo saved; exit 143' TERM; echo begun; sleep 60 & wait"
    first, second = shell(tmp_path / "a", saves), shell(tmp_path / "b", ":")
    told: list[str] = []
    started = time.monotonic()
    assert not Runner(1, 1, told.append).run([[first], [second]], minutes=0.02)
    assert time.monotonic() - started < 20
    assert (first.folder / "study.log").read_text().split() == ["begun", "saved"]
    assert told[-1] == "saved  a"
    assert not first.is_done()
    assert not second.folder.exists()


def test_stop_from_another_thread_leaves_no_process(tmp_path):
    runner = Runner(2, 1, lambda line: None)
    chains = [[shell(tmp_path / name, f"echo $$ >{tmp_path}/{name}.pid; exec sleep 60")]
              for name in "ab"]  # fmt: skip
    threading.Timer(1.5, runner.stop).start()
    assert not runner.run(chains)
    assert not runner._processes
    for name in "ab":
        pid = int((tmp_path / f"{name}.pid").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_figures_of_other_flags_are_never_taken_for_these(tmp_path):
    assert Runner(1, 1, lambda line: None).run([[shell(tmp_path / "a", "true")]])
    with pytest.raises(ValueError, match=r"other flags \(false.*give another --out"):
        Runner(1, 1, lambda line: None).run([[step(tmp_path / "a", "bash", "-c", "false")]])


def test_a_run_that_was_begun_with_other_flags_is_not_gone_on_with(tmp_path):
    other = step(tmp_path / "a", "bash", "-c", "true")
    assert not Runner(1, 1, lambda line: None).run([[shell(tmp_path / "a", "exit 1")]])
    assert not other.is_done()  # nothing came of it
    (tmp_path / "a" / "checkpoint.pth").touch()
    with pytest.raises(ValueError, match=r"other flags \(true"):
        other.is_done()


def test_flags_that_change_no_result_may_differ(tmp_path):
    one, other, third = (
        step(tmp_path / "a", "true", "--lr", lr, "--num-workers", n, "--camvid-data-dir", n)
        for lr, n in (("1", "1"), ("1", "2"), ("2", "1"))
    )
    assert Runner(1, 1, lambda line: None).run([[one]])
    assert other.is_done()
    with pytest.raises(ValueError, match=r"other flags \(2\)"):
        third.is_done()


# ---- the report ----


PLAN = [
    Experiment("dense", "dense", "", {"own": ""}, True),
    Experiment("any", "any budget", "", {"own": "", "curve": "", "random": ""}),
]


def figures(miou, share=0.4, gmacs=5.0, **more):
    metrics = {"boundary_miou": miou / 2, "rank_correlation": None, "rank_correlation_pooled": 0.5}
    return {"miou": miou, "share": share, "gmacs": gmacs, "policy_metrics": metrics, **more}


@pytest.fixture
def folder(tmp_path):
    def write(place, name, content):
        path = tmp_path / place
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(content))
        (path / "done.json").write_text(json.dumps({"command": ["x"], "seconds": 1}))
        (path.parent / "done.json").write_text(json.dumps({"command": ["t"], "seconds": 1}))

    write("dense/seed0/own", "val.json", figures(0.60, 1.0, 9.0))
    write("dense/seed1/own", "val.json", figures(0.64, 1.0, 9.0))
    write("any/seed0/own", "val.json", figures(0.61, budget=None))
    write("any/seed0/random", "val.json", figures(0.55, budget=0.4))
    budgets = [figures(0.5, 1.0, 9.0, budget=1.0), figures(0.4, 0.1, 2.0, budget=0.1)]
    write("any/seed0/curve", "curve.json", {"command": "c", "budgets": budgets})
    (tmp_path / "any/seed1/own").mkdir(parents=True)  # begun, not done
    (tmp_path / "any/seed1/own/val.json").write_text("{}")
    return tmp_path


def test_report_of_what_is_done(folder):
    found = rows(gather(PLAN, folder, [0, 1]))
    settings = [(row.experiment, row.validation, row.budget, len(row.figures)) for row in found]
    assert settings == [
        ("dense", "own", None, 2),
        ("any", "own", None, 1),
        ("any", "curve", 1.0, 1),
        ("any", "curve", 0.1, 1),
        ("any", "random", 0.4, 1),
    ]
    assert found[0].mean("miou") == pytest.approx(0.62)
    assert found[0].deviation("miou") == pytest.approx(0.0283, abs=1e-4)
    assert found[1].deviation("miou") is None
    assert found[1].mean("rank_correlation") is None
    table = markdown(found, 3).splitlines()
    assert table[0].startswith("3 training runs")
    assert "| dense | own | 2 | 62.0 ± 2.8 | +0.0 | 100.0 ± 0.0 | 9.00 | 31.0 ± 1.4 | – |" in table
    assert (
        "| any budget; placed by random | 40 % | 1 | 55.0 | -7.0 | 40.0 | 5.00 | 27.5 | – |"
        in table
    )


def test_picture_joins_curves_in_order_of_their_cost(folder):
    made = {line.name: line for line in lines_of(rows(gather(PLAN, folder, [0, 1])))}
    assert set(made) == {"dense", "any budget", "any budget: budgets"}
    curve = made["any budget: budgets"]
    assert curve.joined
    assert [point[:2] for point in curve.points] == [(2.0, 40.0), (9.0, 50.0)]
    assert made["dense"].points[0][2] == pytest.approx(2.83, abs=0.01)


def test_picture_shows_an_imposed_budget_beside_the_threshold():
    points = {"own": (None, 4.0, 0.5), "budget": (0.2, 3.0, 0.4), "random": (0.2, 3.0, 0.1)}
    found = [
        Row("few", "few", validation, budget, [{"gmacs": gmacs, "miou": miou}])
        for validation, (budget, gmacs, miou) in points.items()
    ]
    (line,) = lines_of(found)
    assert [point[:2] for point in line.points] == [(3.0, 40.0), (4.0, 50.0)]
    assert not line.joined


def test_report_files(folder, tmp_path):
    into = tmp_path / "report"
    told = write_report(PLAN, folder, [0, 1], into, "camvid")
    assert told[0].startswith("3 runs, 5 validations")
    raw = json.loads((into / "study_camvid.json").read_text())
    assert raw["runs"] == 3
    assert raw["validations"][0]["training"] == ["t"]
    assert (into / "study_camvid.md").read_text().startswith("3 training runs")
    assert write_report(PLAN, tmp_path / "empty", [0], into, "camvid") == [
        f"nothing to report: no validation under {tmp_path / 'empty'} is done"
    ]


# ---- all of it ----


def test_a_study_from_one_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "segblocks"), prepend=os.pathsep)
    flags = [
        *("--dataset", "synthetic", "--only", "low", "--seeds", "0", "--epochs", "1"),
        *("--out", str(tmp_path), "--device", "cpu", "--num-workers", "0"),
        *("--synthetic-size", "128", "256", "--synthetic-val-images", "1", "--train-flags"),
        "--synthetic-train-images 2 --res 256 --crop-res 128 --batch-size 2",
    ]
    assert main(flags) == 0, capsys.readouterr().out
    raw = json.loads((tmp_path / "study_synthetic.json").read_text())
    (found,) = raw["validations"]
    assert (found["experiment"], found["share"], found["images"]) == ("low", 0, 1)
    assert main(flags) == 0
    assert "0 trainings and validations left" in capsys.readouterr().out
    assert main([*flags, "--list"]) == 0
    assert capsys.readouterr().out.strip() == ""
    for more in ([], ["--report-only"]):
        assert main([*flags, "--lr", "1", *more]) == 1
        assert "other flags" in capsys.readouterr().err
    assert main([*flags, "--report-only"]) == 0
    more = ["--only", "low", "dense"]  # of which one is left
    assert main([*flags, *more, "--report-only"]) == 1
