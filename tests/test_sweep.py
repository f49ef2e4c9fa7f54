"""The quality-compute sweep, on the embedded model at a few steps: its arms, its figures, and that it can be killed."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SWEEP, SWEEP_STEPS, sweep
from diffusers import WanPipeline
from families import tiny_trainable_pipeline
from PIL import Image

import flexivid
import pareto
from flexivid.commands import sweep as vbench_sweep
from flexivid.inputs import empty_wan_pipeline
from flexivid.model.adapter import AdapterConfig
from flexivid.shapes.embedded import ADAPTER, MODEL, SAMPLING
from flexivid.shapes.world import Scene, fixed_layout, render
from flexivid.sweep import arms, bootstrap, curve, metrics, sampling, scoring, settings, vbench
from flexivid.video import write_mp4

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_arm_has_a_row_and_clips_in_vbench_naming(finished_sweep):
    folder, results = finished_sweep
    assert [row["arm"] for row in results["arms"]] == ["full", "budget-0.5", "steps-3", "magcache-0.5"]
    for row in results["arms"]:
        names = sorted(path.name for path in (folder / "videos" / row["arm"]).iterdir())
        assert len(names) == 4 and all(name.endswith(("-0.mp4", "-1.mp4")) for name in names)
        assert {"adherence_all", "adherence_motion", "frechet_distance_to_data"} <= row["metrics"].keys()
        assert row["seconds"] > 0
        # Relative to the full run, and so not of the full run itself.
        assert ({"motion", "diversity"} <= row["metrics"].keys()) == (row["arm"] != "full")
    assert "psnr" not in results["arms"][0]["metrics"] and results["arms"][1]["metrics"]["psnr"]["mean"] < 100


@pytest.mark.slow
def test_counted_flops_are_those_of_the_real_run(finished_sweep):
    full, budget, fewer, cached = finished_sweep[1]["arms"]
    pipe = WanPipeline.from_pretrained(MODEL, dtype=torch.float32)
    flexivid.enable(pipe, adapter=ADAPTER, budget=0.5, merge_lora=True)
    flexivid.plan(pipe, 17, 64, 64, SWEEP_STEPS, 32)
    pipe("a plain red circle moving up on a gray background", **{**SAMPLING, "num_inference_steps": SWEEP_STEPS})
    predicted = flexivid.summary(pipe)
    assert full["flops"] == pytest.approx(predicted.flops_full, rel=1e-3)
    assert budget["flops"] == pytest.approx(predicted.flops_used, rel=1e-2)
    assert budget["flops_ratio"] <= 0.5
    assert fewer["flops_ratio"] == pytest.approx(0.5, abs=1e-6)
    assert abs(cached["flops_ratio"] - 0.5) < 0.2  # tuned on other clips, and six steps are few to choose from


@pytest.mark.slow
def test_csv_page_and_plot(finished_sweep):
    folder, results = finished_sweep
    with (folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["arm"] for line in lines] == [row["arm"] for row in results["arms"]]
    assert float(lines[1]["psnr_mean"]) == results["arms"][1]["metrics"]["psnr"]["mean"]
    page = (folder / "report.html").read_text()
    assert "/*RESULTS*/" not in page and page.count("AAAAIGZ0eXBpc29t") == 4  # the head of an mp4, one an arm
    assert 'src="http' not in page and "href=" not in page
    assert (folder / "pareto.png").stat().st_size > 10_000


def after(calls: int, function):
    """The function, until it was called so often: then it is as if the sweep were killed."""
    left = [calls]

    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


@pytest.mark.slow
def test_a_sweep_killed_five_times_ends_as_one_that_was_not(finished_sweep, tmp_path, monkeypatch):
    _, results = finished_sweep
    for module, name, calls in (
        (sampling, "write_mp4", 2),
        (sampling, "write_mp4", 5),
        (sampling, "write_json", 1),
        (scoring, "read_clip", 7),
        (vbench_sweep, "write_pareto", 0),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, after(calls, getattr(module, name)))
            sweep(tmp_path)
    for row, other in zip(results["arms"], sweep(tmp_path)["arms"], strict=True):
        assert row["metrics"] == other["metrics"] and row["flops"] == other["flops"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be made equal on this system")
def test_two_processes_are_one(tmp_path):
    """To the last bit: both have one thread a process."""
    few = ["--methods", "steps", "--timed-rounds", "1", "--videos-per-prompt", "1", "--batch", "1"]
    core = {min(os.sched_getaffinity(0))}
    for processes, name in ((1, "one"), (2, "two")):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*launcher, "eval/vbench_sweep.py", "--cpu", *SWEEP, *few, "--output", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, preexec_fn=lambda: os.sched_setaffinity(0, core))
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for row, other in zip(one["arms"], two["arms"], strict=True):
        assert row["arm"] == other["arm"] and row["flops"] == other["flops"]
        assert row["metrics"].keys() == other["metrics"].keys()
        for name, value in row["metrics"].items():
            assert other["metrics"][name] == value, name


@pytest.mark.slow
def test_any_stock_pipeline(tmp_path):
    """Its own sizes' names, frame rate and VAE: a model that is not of this world, on prompts of one's own."""
    tiny_trainable_pipeline("cogvideox-5b").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    sizes = "--steps 6 --frames 9 --height 64 --width 96 --videos-per-prompt 1 --batch 2 --dtype bfloat16".split()
    arms = "--budgets 1.0 0.8 --methods training-free steps --timed-rounds 1 --report-prompts 1 --modes 1x4x4".split()
    folders = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert vbench_sweep.main([*folders, "--prompts", str(tmp_path / "prompts.txt"), *sizes, *arms]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["call"]["fps"] == 8 and results["call"]["text_length"] == 226
    assert [row["arm"] for row in results["arms"]] == ["full", "training-free-0.8", "steps-4"]
    assert results["arms"][1]["flops_ratio"] <= 0.8


@pytest.mark.slow
def test_a_folder_holds_one_sweep(finished_sweep, capsys):
    folder, _ = finished_sweep
    assert vbench_sweep.main([*SWEEP, "--output", str(folder), "--seed", "1"]) == 2
    assert "holds a sweep with another seed;" in capsys.readouterr().err


def test_only_some_arms():
    every = [arms.Arm(name, "steps", 1.0, 4) for name in ("full", "steps-2", "steps-1")]
    assert [arm.name for arm in arms.picked(every, ["steps-1"])] == ["full", "steps-1"]
    assert arms.picked(every, None) == every
    with pytest.raises(
        ValueError, match="there is no arm steps-3; with these methods and budgets there are full, steps-2"
    ):
        arms.picked(every, ["steps-3"])


def test_rivals_may_come_before_the_adapter(tmp_path):
    path, identity = tmp_path / "sweep.json", {"adapter": None, "direct_adapter": None, "seed": 0}
    assert settings.check_identity(path, identity) == identity
    path.write_text(json.dumps(identity))
    later = {**identity, "adapter": "a1"}
    assert settings.check_identity(path, later) == later
    path.write_text(json.dumps(later))
    assert settings.check_identity(path, identity) == later
    with pytest.raises(ValueError, match="a sweep with another adapter"):
        settings.check_identity(path, {**identity, "adapter": "a2"})


def test_a_sweep_goes_on_with_the_same_model_wherever_it_lies_and_with_no_other(tmp_path):
    def identity(model: Path | str, adapter: Path) -> dict:
        argv = ["--model", str(model), "--adapter", str(adapter), "--methods", "adapter", "--output", str(tmp_path)]
        arguments = settings.parse_arguments("", argv)
        return settings.identity_of(arguments, [], {}, torch.device("cpu"))

    def holds(folder: Path, text: str) -> Path:
        (folder / "part").mkdir(parents=True)
        (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
        (folder / "part" / "config.json").write_text('{"layers": 2}')
        (folder / "part" / "weights.safetensors").write_text(text)
        return folder

    model, adapter = holds(tmp_path / "here" / "model", "w"), holds(tmp_path / "here" / "adapter", "a")
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(settings.check_identity(path, identity(model, adapter))))
    shutil.move(tmp_path / "here", tmp_path / "there")
    model, adapter = tmp_path / "there" / "model", tmp_path / "there" / "adapter"
    (model / ".cache").mkdir()
    (model / ".cache" / "download.json").write_text("{}")
    (model / "README.md").write_text("a model")
    assert settings.check_identity(path, identity(model, adapter)) == json.loads(path.read_text())

    others = {
        "model": identity(holds(tmp_path / "other" / "model", "v"), adapter),
        "adapter": identity(model, holds(tmp_path / "other" / "adapter", "b")),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"a sweep with another {name};"):
            settings.check_identity(path, other)
    (model / "part" / "config.json").write_text('{"layers": 3}')
    with pytest.raises(ValueError, match="a sweep with another model;"):
        settings.check_identity(path, identity(model, adapter))
    assert identity("org/one", adapter)["model"] != identity("org/two", adapter)["model"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--budgets", "0"], "above 0"),
        (["--budgets", "1"], "nothing to compare"),
        (["--model", "somewhere"], "needs --prompts"),
        (["--dimensions", "scene"], "on VBench's own prompts only"),
        (["--methods", "direct"], "--direct-adapter"),
        (["--methods", "calibrated"], "--schedules"),
        (["--methods", "few"], "--few-adapters"),
        (["--prompts", "nowhere.txt"], "no file nowhere.txt"),
        (["--dimensions", "beauty"], "no dimension beauty"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--methods", "steps", "--rivals", "steps"], "one of --methods and --rivals"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(arguments, message, tmp_path, capsys):
    folder = tmp_path / "out"
    assert vbench_sweep.main([*arguments, "--output", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_prompts_that_are_no_file_names_are_refused():
    for prompts, message in ([["a/b"], "no / in it"], [["a", "a"], "there twice"], [[" "], "is empty"]):
        with pytest.raises(ValueError, match=message):
            sampling.clips_of(prompts, 1, 0)


def test_calibrated_schedules_are_arms(tmp_path):
    path = tmp_path / "0.25.json"
    path.write_text('{"schedule": [["2x4x4", "2x4x4"], ["1x2x2", "1x2x2"]], "budget": 0.25}')
    command = ["--methods", "calibrated", "--budgets", "0.25", "--adapter", "adapter", "--schedules", str(path)]
    arm = arms.all_arms(settings.parse_arguments("", command), None, {"steps": 2, "guidance_scale": 4.0})[1]
    assert arm.name == "calibrated-0.25" and arm.budget == 0.25
    assert arm.flexivid["schedule"] == "2x4x4/2x4x4:1,1x2x2/1x2x2:1"
    assert not {"budget", "guidance"} & arm.flexivid.keys()  # a schedule says both


def test_few_steps_without_guidance_are_arms(tmp_path):
    folder, plain = tmp_path / "coarse-to-fine", tmp_path / "plain"
    config = AdapterConfig(
        patch_sizes=["1x4x4"],
        parametrisation="snr",
        lora_rank=4,
        base_model="shapes",
        components=["transformer"],
        transformer_class="WanTransformer3DModel",
        transformer_shape={},
        recipe={"sigmas": [1.0, 0.6], "patch_sizes": ["1x4x4", "1x2x2"]},
    )
    for path, recipe in ((folder, config.recipe), (plain, None)):
        path.mkdir()
        (path / "flexivid_config.json").write_text(config.model_copy(update={"recipe": recipe}).model_dump_json())
    empty, call = empty_wan_pipeline(MODEL), {"steps": 40, "guidance_scale": 4.0}

    def listed(*adapters):
        words = ["--methods", "few", "unguided", "--budgets", "0.05", "--few-adapters", *map(str, adapters)]
        return arms.all_arms(settings.parse_arguments("", words), empty, call)

    full, unguided, few = listed(folder)
    assert full.call(call) == call
    assert unguided.name == "unguided-4" and unguided.call(call) == {"steps": 4, "guidance_scale": 1.0}
    assert few.name == "few-coarse-to-fine" and few.budget == 2 / 80
    assert few.call(call) == {"steps": 2, "guidance_scale": 1.0}
    with pytest.raises(ValueError, match="plain is no few-step adapter"):
        listed(plain)
    with pytest.raises(ValueError, match="two of --few-adapters are called coarse-to-fine"):
        listed(folder, folder)


def test_what_comes_near_no_budget_is_said_and_left_out():
    command = "--methods adapter-fbcache steps pab --budgets 0.6 0.25 --adapter adapter --guidance same".split()
    listed = arms.all_arms(settings.parse_arguments("", command), None, {"steps": 40, "guidance_scale": 4.0})
    assert [arm.name for arm in listed] == [
        "full",
        "adapter-fbcache-0.25",
        "steps-24",
        "steps-10",
        "pab-0.6",
        "pab-0.25",
    ]
    assert listed[1].flexivid["budget"] == 0.5 and listed[1].rival == "fbcache"
    assert listed[1].flexivid["guidance"] == "same"
    tuning = {
        "adapter-fbcache-0.25": {"share": 0.26, "settings": {"threshold": 0.1}},
        "pab-0.6": {"share": 0.62, "settings": {"spatial_attention_block_skip_range": 2}},
        "pab-0.25": {"share": 0.44, "settings": {"spatial_attention_block_skip_range": 40}},
    }
    said = []
    kept = arms.tuned(listed, tuning, said.append)
    assert [arm.name for arm in kept] == ["full", "adapter-fbcache-0.25", "steps-24", "steps-10", "pab-0.6"]
    assert kept[1].settings == {"threshold": 0.1} and said == ["pab does not reach 0.25: the nearest is 0.440"]


class TestMetrics:
    def test_adherence_of_a_rendered_clip(self):
        scene = Scene("striped", "red", "circle", "moving right", "black")
        clip = render([scene], [fixed_layout(scene)])[0]
        frames = ((clip.permute(1, 2, 3, 0) + 1) * 127.5).byte().numpy()
        assert set(metrics.adherence(frames, scene).values()) == {1.0}
        other = Scene("striped", "blue", "circle", "moving right", "black")
        values = metrics.adherence(frames, other)
        assert values["adherence_colour"] == values["adherence_all"] == 0.0 and values["adherence_shape"] == 1.0

    def test_psnr_of_a_known_error(self):
        dark = np.full((5, 16, 16, 3), 100, np.uint8)
        values = metrics.fidelity(dark + 10, dark)
        assert values["psnr"] == pytest.approx(20 * np.log10(25.5), abs=1e-4)
        assert metrics.fidelity(dark, dark) == {"psnr": 100.0, "ssim": pytest.approx(1.0)}

    def test_frechet_distance_of_known_gaussians(self):
        samples = np.random.default_rng(0).standard_normal((20_000, 3))
        gaussian = metrics.Gaussian(samples)
        assert metrics.frechet_distance(gaussian, gaussian) == pytest.approx(0.0, abs=1e-9)
        # |shift|^2, and (1 - 2)^2 for every axis whose deviation doubles.
        assert metrics.frechet_distance(metrics.Gaussian(samples + [3, 0, 0]), gaussian) == pytest.approx(9.0)
        assert metrics.frechet_distance(gaussian, metrics.Gaussian(2 * samples)) == pytest.approx(3.0, rel=0.05)

    def test_frechet_distance_of_fewer_samples_than_dimensions(self):
        draw = np.random.default_rng(0)
        ours, theirs = draw.standard_normal((6, 40)), 2 + draw.standard_normal((9, 40))
        gaussians = metrics.Gaussian(ours), metrics.Gaussian(theirs)
        product = gaussians[0].covariance @ gaussians[1].covariance
        roots = np.sqrt(np.sort(np.linalg.eigvals(product).real)[-5:]).sum()  # the other eigenvalues are 0
        traces = sum(np.trace(gaussian.covariance) for gaussian in gaussians)
        expected = np.square(ours.mean(0) - theirs.mean(0)).sum() + traces - 2 * roots
        assert metrics.frechet_distance(*gaussians) == pytest.approx(expected)

    def test_perceptual_distance_grows_with_the_change(self):
        features = metrics.Features(torch.device("cpu"))
        noise = np.random.default_rng(0)
        clip = noise.integers(0, 255, (4, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        distances = []
        for size in (0, 8, 40):
            changed = (clip.astype(int) + noise.integers(-size, size + 1, clip.shape)).clip(0, 255).astype(np.uint8)
            distances.append(metrics.perceptual_distance(features(changed)[0], features(clip)[0]))
        assert distances[0] == 0 < distances[1] < distances[2]

    def test_an_interval_holds_the_mean(self):
        values = np.random.default_rng(0).normal(5, 1, 400)
        found = bootstrap.estimate(values)
        assert found["low"] < found["mean"] < found["high"]
        assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / 20, rel=0.2)
        assert bootstrap.interval(np.array([0.25])) == (0.25, 0.25)

    def test_intervals_are_those_of_the_committed_measurements(self):
        """Which were drawn by hand, before scipy drew them."""
        values = np.random.default_rng(1).normal(5, 1, 64)
        draws = np.random.default_rng(0).integers(64, size=(2000, 64))
        expected = np.percentile(values[draws].mean(1), [2.5, 97.5])
        assert bootstrap.interval(values) == pytest.approx(tuple(expected), rel=1e-12)
        generator = np.random.default_rng(0)
        spread = 1.96 * np.std([np.median(values[generator.integers(64, size=64)]) for _ in range(50)])
        found = bootstrap.estimate_of_sets(lambda picks: np.median(values[picks]), 64)
        assert found["high"] - found["mean"] == pytest.approx(spread, rel=1e-12)


class TestVBench:
    def test_the_table_is_vbenchs(self):
        assert len(vbench.DIMENSIONS) == 16
        assert sum(dimension.group == "quality" for dimension in vbench.DIMENSIONS.values()) == 7

    def test_no_total_unless_all_are_scored(self):
        best = {name: {"status": "scored", "score": d.high} for name, d in vbench.DIMENSIONS.items()}
        assert vbench.total_scores(best) == {"quality": 1.0, "semantic": 1.0, "total": 1.0}
        best["dynamic_degree"]["score"] = 0.0
        # Half a share of six and a half.
        assert vbench.total_scores(best)["quality"] == pytest.approx(1 - 0.5 / 6.5)
        best["scene"] = {"status": "weights missing"}
        assert vbench.total_scores(best) == {}

    def test_a_missing_weight_is_reported_not_scored(self, tmp_path, monkeypatch):
        monkeypatch.setattr(vbench, "PYTHON", tmp_path)
        answer = vbench.score_dimension(tmp_path, "motion_smoothness", tmp_path, standard=False)
        assert answer == {"status": "weights missing", "detail": "weights missing: amt_model/amt-s.pth"}
        monkeypatch.setattr(vbench, "PYTHON", tmp_path / "nowhere")
        answer = vbench.score_dimension(tmp_path, "motion_smoothness", tmp_path, standard=False)
        assert "make vbench" in answer["detail"] and "score" not in answer

    @pytest.mark.parametrize("asked", [[], ["--dimensions", "temporal_flickering"]])
    def test_a_dry_run_names_what_each_dimension_lacks(self, asked, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(vbench, "PYTHON", tmp_path / "env/bin/python")
        for step in ("load_pipeline", "reachable", "print_plan"):  # which come after, and sample
            monkeypatch.setattr(vbench_sweep, step, lambda *given: None)
        command = [
            "--dry-run",
            "--rivals",
            "steps",
            "--vbench-cache",
            str(tmp_path),
            "--output",
            str(tmp_path / "out"),
            *asked,
        ]
        assert vbench_sweep.main(command) == 0
        lines = capsys.readouterr().out.split("VBench dimensions:\n")[1].split("\n")
        said = {line.split()[0]: line for line in lines if line.startswith("  ")}
        assert list(said) == (asked[1:] or list(vbench.DIMENSIONS))
        assert said["temporal_flickering"].endswith("   the environment is missing: make vbench")
        for name, line in said.items():
            dimension = vbench.DIMENSIONS[name]
            assert all(path in line for path in dimension.weights)
            assert ("--prompts vbench" in line) != dimension.any_prompt
            assert ("detectron2" in line) == (dimension.weights == vbench.GRIT)
        assert not (tmp_path / "out").exists()

    @pytest.mark.skipif(not vbench.PYTHON.exists(), reason="VBench's environment is missing: make vbench")
    @pytest.mark.parametrize("levels, expected", [((128, 128), 1.0), ((60, 171), 1 - 111 / 255)])
    def test_temporal_flickering_through_the_real_package(self, levels, expected, tmp_path):
        """It is 1 - the mean absolute difference of neighbouring frames / 255."""
        frames = np.stack([np.full((128, 192, 3), levels[i % 2], np.uint8) for i in range(16)])
        for index in (0, 1):
            write_mp4(frames, tmp_path / f"a clip-{index}.mp4", 8)
        answer = vbench.score_dimension(tmp_path, "temporal_flickering", tmp_path, standard=False)
        assert answer["status"] == "scored", answer
        assert answer["score"] == pytest.approx(expected, abs=5e-3)
        assert answer["videos"].keys() == {"a clip-0.mp4", "a clip-1.mp4"}


LESS = {"mean": -0.1}


class TestCurve:
    ROWS = [
        {"arm": name, "method": method, "flops_ratio": share, "metrics": {"psnr": {"mean": mean}, **metrics}, **more}
        for name, method, share, mean, metrics, more in (
            ("full", "full", 1.0, 50.0, {"ssim": {"mean": 1.0}}, {}),
            ("reuse-0.5", "reuse", 0.5, 40.0, {"ssim": {"mean": 0.9}}, {"difference_to_full": {"ssim": LESS}}),
            ("steps-20", "steps", 0.5, 38.0, {}, {}),
            ("steps-10", "steps", 0.25, 30.0, {}, {}),
            ("pab-0.25", "pab", 0.3, 29.0, {}, {}),
        )
    ]

    def test_every_method_has_a_look_of_its_own(self):
        assert list(curve.LOOKS)[0] == "full" and curve.LOOKS.keys() - {"full"} == arms.METHODS.keys()
        assert len(set(curve.LOOKS.values())) == len({colour for colour, _ in curve.LOOKS.values()}) == len(curve.LOOKS)

    def test_the_front_is_what_nothing_cheaper_is_better_than(self):
        assert curve.front(self.ROWS, "psnr") == ["full", "reuse-0.5", "steps-10"]
        worse = [{**row, "metrics": {"motion": {"mean": row["metrics"]["psnr"]["mean"] / 40}}} for row in self.ROWS]
        assert curve.front(worse, "motion") == ["reuse-0.5", "steps-10"]  # full moves a quarter too much

    def test_differences_to_the_full_run_are_drawn_where_there_are_any(self):
        assert curve.estimates(self.ROWS, "ssim") == {"reuse-0.5": LESS}
        assert curve.estimates(self.ROWS, "psnr")["steps-20"] == {"mean": 38.0}

    def test_committed_measurements_can_be_drawn(self, tmp_path):
        """Those without seconds, too."""
        for name, columns in (("sweep-reuse", 1), ("sweep-full", 2)):
            path = ROOT / f"docs/measurements/{name}/results.json"
            words = [str(path), "--metrics", "adherence_all", "psnr", "--output", str(tmp_path / "curve.png")]
            assert pareto.main(words) == 0
            width, height = Image.open(tmp_path / "curve.png").size
            assert width == pytest.approx(550 + columns * 600, abs=250)


def test_arms_of_several_sweeps_are_joined_if_their_clips_are_the_same(tmp_path):
    def results(name, quality, arms):
        of_all = {"method": "any", "flops_ratio": 1.0, "seconds_ratio": 1.0, "metrics": {"psnr": {"mean": quality}}}
        rows = [{"arm": arm, **of_all, "of": name} for arm in ["full", *arms]]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"arms": rows}))
        return path

    first, second = results("first", 30.0, ["steps-2"]), results("second", 30.00001, ["steps-2", "pab-0.5"])
    found = [(row["arm"], row["of"]) for row in pareto.joined([first, second])["arms"]]
    assert found == [("full", "first"), ("steps-2", "first"), ("pab-0.5", "second")]
    with pytest.raises(ValueError, match="their full runs differ"):
        pareto.joined([first, results("third", 31.0, [])])
