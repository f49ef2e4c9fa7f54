"""Training at more than one process, in parts, stopped and killed; on real clips; and what a dry run says of it."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import sample, tiny_pipeline, tiny_transformer, write_clip
from diffusers import WanPipeline
from safetensors.torch import load_file
from training_runs import LAUNCHED, ONE, ROOT, SHARDED, TWO, losses, run, start_and_signal, train_here, write

import flexivid
from flexivid.__main__ import main as flexivid_command
from flexivid.shapes.embedded import MODEL
from flexivid.shapes.pretrain import ShapesWorld
from flexivid.training import optimizers, report
from flexivid.training.batches import step_generator
from flexivid.training.config import Config
from flexivid.training.distill import DistillObjective
from flexivid.training.forecast import check_model, forecast
from flexivid.training.parallel.sharding import check_sharding
from flexivid.training.student import build_student


@pytest.fixture
def settings(training_config):
    return training_config | {"steps": 10, "save_every": 4}


def curve_of(tmp_path: Path, name: str, settings: dict, **more) -> torch.Tensor:
    """Losses of a run of one process."""
    path, output = write(tmp_path, name, settings, **more)
    assert train_here(path) == 0
    return torch.tensor(losses(output))


def test_micro_batches_change_nothing(tmp_path, settings):
    """Mean squared errors over equal parts average to that over the whole."""
    whole, parts = (curve_of(tmp_path, f"of {count}", settings, micro_batches=count) for count in (1, 2))
    assert len(whole) == 10 and torch.allclose(parts, whole, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_processes_with_micro_batches_change_nothing(tmp_path, settings):
    whole = curve_of(tmp_path, "whole", settings)
    path, output = write(tmp_path, "both", settings, micro_batches=2)
    run(LAUNCHED, path)
    assert len(whole) == 10 and torch.allclose(torch.tensor(losses(output)), whole, atol=1e-5, rtol=0)


def test_a_batch_that_cannot_be_split_is_refused(tmp_path, settings, capsys):
    path, _ = write(tmp_path, "parts", settings, micro_batches=3)
    assert train_here(path) == 2
    assert "cannot be split evenly over 1 processes and 3 micro-batches" in capsys.readouterr().err


def test_an_optimiser_that_is_not_installed(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    config = Config(**{**settings, "optim": {"name": "adamw8bit"}}, output=tmp_path / "out")
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        optimizers.check_optimizer(config)


def test_a_finished_adapter_is_uploaded(tmp_path, settings, monkeypatch):
    uploaded = {}

    class Hub:
        def create_repo(self, name, exist_ok):
            uploaded[name] = []

        def upload_folder(self, repo_id, folder_path):
            uploaded[repo_id] += sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr(report, "HfApi", Hub)
    config = Config(**settings, push_to_hub="someone/adapter", output=tmp_path / "out")
    DistillObjective(config, Accelerator(cpu=True), ShapesWorld()).save(tmp_path / "result")
    files = ["README.md", "flexivid.safetensors", "flexivid_config.json", "pytorch_lora_weights.safetensors"]
    assert uploaded == {"someone/adapter": files}


def test_an_upload_without_login_is_refused_at_once(tmp_path, settings, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    path, output = write(tmp_path, "pushed", settings)
    assert train_here(path, "--push-to-hub", "someone/adapter") == 2
    assert "push_to_hub someone/adapter needs a login" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("name", ["fsdp", "zero2"])
def test_configs_of_accelerate_are_valid(name):
    config = load_config_from_file(str(ROOT / f"configs/accelerate/{name}.yaml"))
    assert config.distributed_type == {"fsdp": "FSDP", "zero2": "DEEPSPEED"}[name]
    assert config.mixed_precision == "bf16" and config.num_processes == 8
    if name == "zero2":  # accelerate does not look into it
        offload = {"offload_optimizer_device": "none", "offload_param_device": "none"}
        assert config.deepspeed_config == {"zero_stage": 2, **offload}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"flow_shift": 5.0}, "flow_shift is 5.0, and the scheduler of .* has 3.0"),
        ({"distill": {"modes": ["1x4x4"], "on_policy": 0.5, "on_policy_budget": 0.1}}, "cannot be reached"),
        ({"clips": {"folder": "nowhere"}}, "nowhere does not exist"),
        ({"clips": {"prompts": "nowhere.txt"}}, "no file nowhere.txt"),
        ({"objective": "shared", "base_dtype": "bfloat16"}, "base_dtype must be float32"),
        ({"base": "no-one/nothing"}, "no-one/nothing"),
    ],
)
def test_what_would_fail_after_hours_is_refused_at_once(tmp_path, settings, monkeypatch, more, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, OSError), match=message):
        if "clips" in more:
            del settings["data"]
        check_model(Config(**{**settings, **more}, output=tmp_path / "out"))


def test_budgets_of_shared_are_those_without_a_lora(tmp_path, settings, folder):
    """On a model this small a LoRA puts .6 out of reach."""
    modes = settings["distill"]["modes"]
    del settings["data"]
    clips = dict(folder=str(folder), buckets=["5x16x32"], max_sequence_length=16)
    more = {"clips": clips, "validation": {"prompts": ["a red circle"], "budgets": [0.6], "steps": 9}}
    with pytest.raises(ValueError, match="cannot be reached"):
        check_model(Config(**settings | more | {"distill": {"modes": modes, "rank": 32}}, output=tmp_path / "out"))
    more |= {"objective": "shared", "distill": {"modes": modes}}
    check_model(Config(**settings | more, output=tmp_path / "out"))


def test_two_transformers_are_trained_one_at_a_time(tmp_path, settings, folder):
    pipe = tiny_pipeline()
    pipe.register_modules(transformer_2=tiny_transformer(seed=7))
    pipe.register_to_config(boundary_ratio=0.875)
    pipe.save_pretrained(tmp_path / "base")
    del settings["data"]
    clips = dict(folder=str(folder), cache=str(tmp_path / "cache"), buckets=["5x16x32"], fps=10, max_sequence_length=16)
    adapters = []
    for component in ("transformer", "transformer_2"):
        path, output = write(tmp_path, component, settings, clips=clips, component=component, steps=2)
        assert train_here(path) == 0
        adapters.append(str(output / "result"))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="none for transformer_2"):
        flexivid.enable(pipe, adapter=adapters[0], budget=0.6, order="interleaved")
    assert flexivid_command(["merge", *adapters, "--output", str(tmp_path / "both")]) == 0
    flexivid.enable(pipe, adapter=tmp_path / "both", budget=0.6, order="interleaved")
    assert sample(pipe).isfinite().all() and flexivid.summary(pipe).ratio <= 0.6
    with pytest.raises(ValueError, match="that there can be no clips.prompts"):
        more = {"clips": {**clips, "prompts": str(tmp_path / "p.txt"), "folder": None}}
        check_model(Config(**settings | more, output=tmp_path / "out"))


def test_merging_what_does_not_belong_together(tmp_path, settings, capsys):
    path, output = write(tmp_path, "one", settings, steps=2)
    assert train_here(path) == 0
    same = [str(output / "result")] * 2
    assert flexivid_command(["merge", *same, "--output", str(tmp_path / "both")]) == 2
    assert "both have weights for transformer" in capsys.readouterr().err
    assert not (tmp_path / "both").exists()


def test_a_base_in_half_precision_trains_and_samples(tmp_path, settings, folder):
    """Under autocast, as `accelerate launch --mixed_precision bf16` sets it."""
    clips = dict(folder=folder, cache=tmp_path / "cache", buckets=["5x32x32"], fps=10, max_sequence_length=16)
    validation = {"prompts": ["a red circle"], "budgets": [1.0, 0.6], "steps": 9}
    del settings["data"]
    config = Config(**settings, base_dtype="bfloat16", clips=clips, validation=validation, output=tmp_path / "out")
    check_model(config)
    with pytest.raises(ValueError, match="needs `accelerate launch --mixed_precision bf16`"):
        DistillObjective(config, Accelerator(cpu=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        objective = DistillObjective(config, accelerator)
        model = accelerator.prepare(objective.model)
        loss = objective.loss(model, 0, 0)
        accelerator.backward(loss)
        trained = [p for p in objective.model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in trained) and any(p.grad is not None for p in trained)
        objective.sample(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").exists() and (tmp_path / "picture-error.png").exists()
        assert all(p.dtype == torch.float32 for p in trained)
        again = objective.loss(model, 0, 0)
        assert torch.equal(again, loss)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_as_if_nothing_had_happened(tmp_path, settings):
    """As in one process, and with whole batches."""
    whole = curve_of(tmp_path, "whole", settings, steps=13)
    killed, output = write(tmp_path, "killed", settings, steps=13)
    start_and_signal(TWO, killed, output, after=5, number=signal.SIGKILL)
    run(TWO, killed)
    assert torch.allclose(torch.tensor(losses(output)), whole, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_sharded_weights_change_nothing(tmp_path, settings, folder):
    """FSDP: the curve of one process; killed, it goes on without FSDP, and killed again, with it."""
    del settings["data"]
    settings["clips"] = dict(folder=str(folder), cache=str(tmp_path / "cache"), buckets=["5x16x32"], fps=10)
    settings["clips"]["max_sequence_length"] = 16
    settings["validation"] = {"prompts": ["a red circle"], "budgets": [1.0, 0.6], "steps": 9}
    whole, whole_output = write(tmp_path, "whole", settings, steps=15)
    assert train_here(whole) == 0
    moved, output = write(tmp_path, "moved", settings, steps=15, sample_every=3)
    start_and_signal(SHARDED, moved, output, after=5, number=signal.SIGKILL)
    assert (output / "samples/000003.png").exists() and (output / "samples/000003-error.png").exists()
    start_and_signal(ONE, moved, output, after=10, number=signal.SIGKILL)
    run(SHARDED, moved)
    assert torch.allclose(torch.tensor(losses(output)), torch.tensor(losses(whole_output)), atol=1e-5, rtol=0)
    for name in ("flexivid.safetensors", "pytorch_lora_weights.safetensors"):
        expected, found = (load_file(folder / "result" / name) for folder in (whole_output, output))
        assert expected.keys() == found.keys()
        assert all(torch.allclose(found[key], expected[key], atol=1e-3) for key in expected)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"objective": "shared", "distill": {"modes": ["1x4x4"]}},
            "objective must be distill or few and optim.name adamw, not shared and adamw",
        ),
        ({"optim": {"name": "muon"}}, "not distill and muon"),
        ({"compile": True}, "neither compile nor"),
        ({"distill": {"on_policy": 0.5}}, "nor distill.on_policy"),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings, tmp_path, more, message):
    launched = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    with pytest.raises(ValueError, match=message):
        check_sharding(launched, Config(**settings | more, output=tmp_path / "out"))


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_exits_with_0(tmp_path, settings):
    whole, whole_output = write(tmp_path, "whole", settings)
    assert train_here(whole) == 0
    stopped, output = write(tmp_path, "stopped", settings, save_every=1000, keep_checkpoints=2)
    assert start_and_signal(ONE, stopped, output, after=3, number=signal.SIGTERM) == 0
    done = len(losses(output))
    assert 3 <= done < 10 and [path.name for path in output.glob("checkpoint-*")] == [
        f"checkpoint-{done:08d}.safetensors"
    ]
    assert train_here(stopped) == 0
    assert losses(output) == losses(whole_output)
    assert len(list(output.glob("checkpoint-*"))) == 2 and list((output / "flexivid").glob("events*"))


def test_an_adapter_from_a_folder_of_clips(tmp_path, settings, folder, capsys):
    del settings["data"]
    clips = dict(folder=str(folder), cache=str(tmp_path / "cache"), buckets=["5x16x32", "5x32x16"], fps=10)
    clips["max_sequence_length"] = 16
    path, output = write(tmp_path, "real", settings, clips=clips)
    assert train_here(path) == 0
    pipe = WanPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    flexivid.enable(pipe, adapter=output / "result", budget=0.5, order="interleaved")
    pipe("a red circle", num_frames=5, height=32, width=32, num_inference_steps=4, max_sequence_length=16)
    assert flexivid.summary(pipe).ratio <= 0.5
    # Of other data it is another run.
    write_clip(folder / "c.mp4")
    path, _ = write(tmp_path, "real", settings, clips={**clips, "fps": 5})
    assert train_here(path) == 2 and "another clips" in capsys.readouterr().err


def test_shared_trains_every_weight_and_saves_a_model_of_its_own(tmp_path, settings):
    distill = {"modes": settings["distill"]["modes"]}
    path, output = write(tmp_path, "shared", settings, objective="shared", distill=distill)
    assert train_here(path) == 0
    curve = losses(output)
    assert len(curve) == 10
    base = load_file(tmp_path / "base/transformer/diffusion_pytorch_model.safetensors")
    model = load_file(output / "result/model/transformer/diffusion_pytorch_model.safetensors")
    assert base.keys() == model.keys()
    unchanged = [name for name in base if torch.equal(base[name].half(), model[name])]
    assert unchanged == [], unchanged
    pipe = WanPipeline.from_pretrained(output / "result/model")
    pipe.set_progress_bar_config(disable=True)
    stock = sample(pipe)
    flexivid.enable(pipe, adapter=output / "result/adapter", budget=1.0)
    assert torch.equal(sample(pipe), stock)
    flexivid.enable(pipe, adapter=output / "result/adapter", budget=0.5, order="interleaved")
    assert sample(pipe).isfinite().all() and flexivid.summary(pipe).ratio <= 0.5
    card = (output / "result/adapter/README.md").read_text()
    assert "LoRA rank: 0" in card and "| 2x4x4 | " in card and "base_model: base\n" in card
    assert 'from_pretrained("../model"' in card and str(tmp_path) not in card


def test_on_policy_states_are_those_of_the_students_own_run(tmp_path, settings):
    more = {"on_policy": 1.0, "on_policy_clips": 2, "on_policy_every": 5, "on_policy_budget": 0.7}
    validation = {"steps": 4, "guidance_scale": 3.0}
    config = Config(
        **{**settings, "distill": {**settings["distill"], **more}, "validation": validation, "output": tmp_path / "out"}
    )
    objective = DistillObjective(config, Accelerator(cpu=True), ShapesWorld())
    noised = objective.errors_by_sigma()
    x_t, timestep, conditions = objective.roll_outs.batch(0, 64, torch.Generator().manual_seed(0))
    sigma = timestep / 1000
    assert sorted(set(sigma.tolist())) == pytest.approx(sorted(objective.pipeline.scheduler.sigmas[1:-1].tolist()))
    assert x_t.shape[0] == conditions["encoder_hidden_states"].shape[0] == 64
    # The states are those of a run of this pipeline from the same noise.
    generator = step_generator(config.seed + 1, 0)
    x_0, conditions = objective.data.batch(2, generator)
    captions = conditions["encoder_hidden_states"]
    noise = torch.randn(x_0.shape, generator=generator)
    flexivid_states = []
    objective.pipeline(
        prompt_embeds=captions,
        negative_prompt_embeds=objective.data.empty_text(captions.shape[1]).expand_as(captions),
        num_frames=5,
        height=16,
        width=16,
        latents=noise,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, tensors: flexivid_states.append(tensors["latents"].clone()) or {},
    )
    last = x_t[sigma == sigma.min()]
    assert all(min((row - state).abs().max() for state in flexivid_states[-2]) < 1e-5 for row in last)
    # And a run in between leaves nothing behind in training.
    assert objective.errors_by_sigma() == noised
    assert objective.loss(objective.model, 0, 0).requires_grad


class TestDryRun:
    def test_it_says_what_there_is_and_starts_nothing(self, tmp_path, settings, capsys):
        path, output = write(tmp_path, "dry", settings)
        assert train_here(path, "--dry-run") == 0
        assert "budgets from" in capsys.readouterr().out and not output.exists()

    def test_its_figures_are_those_of_the_real_thing(self, tmp_path, settings):
        config = Config(**settings, output=tmp_path / "out")
        text = forecast(config, processes=1, mixed_precision=False)
        transformer = WanPipeline.from_pretrained(tmp_path / "base").transformer
        count = sum(p.numel() for p in transformer.parameters())
        student = build_student(transformer, config.distill)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        assert f"{count / 1e9:.3f} B parameters" in text and f"trained: {trained / 1e6:.2f} M" in text
        rows = {line.split()[0]: line.split() for line in text.splitlines() if "x" in line.split(" ")[0]}
        # 5 frames of 16 x 16 are 2 x 4 x 4 latent pixels.
        assert [rows[name][1] for name in ("1x4x4", "2x4x4", "1x2x2")] == ["2", "1", "8"]

    def test_checkpointing_keeps_less(self, tmp_path, settings):
        def kept(**more) -> float:
            text = forecast(Config(**{**settings, **more}, output=tmp_path / "out"), 1, False)
            return float(next(line for line in text.splitlines() if line.startswith("1x4x4")).split()[-1])

        big = {"batch_size": 512, "data": {"frames": 17, "size": 64, "text_lengths": {16: 1.0}}}
        assert 0 < kept(**big, gradient_checkpointing=True) < 0.5 * kept(**big)

    @pytest.mark.parametrize("patch_size", ["1x4x4", "2x4x4"])
    def test_what_is_kept_for_backward_is_what_the_profiler_sees(self, patch_size, tmp_path):
        """On the embedded model, in float32: memory that is live after a student's forward."""
        written = yaml.safe_load((ROOT / "configs/shapes-flex.yaml").read_text())
        config = Config(**{**written, "base": str(MODEL), "output": str(tmp_path)})
        lines = forecast(config, processes=1, mixed_precision=False).splitlines()
        predicted = float(next(line for line in lines if line.startswith(patch_size)).split()[-1])
        transformer = WanPipeline.from_pretrained(MODEL).transformer
        student = build_student(transformer, config.distill)
        clips, length = config.batch_size, max(config.data.text_lengths)
        latents = torch.randn(clips, transformer.config.in_channels, 5, 16, 16)
        conditions = {"encoder_hidden_states": torch.randn(clips, length, transformer.config.text_dim)}
        inputs = [patch_size], latents, torch.full((clips,), 500.0), conditions
        student(*inputs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            outputs = student(*inputs)
        events = profiler.profiler.kineto_results.events()
        live = sum(event.nbytes() for event in events if event.name() == "[memory]")
        assert live / 2**30 == pytest.approx(predicted, rel=0.15) and outputs[0].requires_grad
