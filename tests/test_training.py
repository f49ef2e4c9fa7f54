"""Training: configs that say what is wrong, the order of teacher and student, resume after a kill."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import forward_inputs, tiny_pipeline, tiny_transformer
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from training_runs import ONE, start_and_signal, train_here

from flexivid.diffusion import Level, shift_sigma
from flexivid.model.adapter import AdapterConfig, save_adapter
from flexivid.training.checkpoints import run_facts
from flexivid.training.config import Config, DistillConfig, load_config
from flexivid.training.configuration_page import page
from flexivid.training.noise import State, uniform_steps_sigma
from flexivid.training.student import (
    build_student,
    corrected_distillation_loss,
    distillation_loss,
    weak_errors,
)

ROOT = Path(__file__).parents[1]


def write_config(path: Path, **settings) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


def test_overrides_are_dotted_and_typed(tmp_path):
    path = write_config(tmp_path / "c.yaml", objective="distill", output="out")
    config = load_config(path, ["--optim.lr", "1e-4", "--distill.modes", "[1x4x4]", "--steps", "7"])
    assert (config.optim.lr, config.distill.modes, config.steps) == (1e-4, ["1x4x4"], 7)


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"objective": "distill", "output": "o", "colour": 1}, [], "colour: Extra inputs are not permitted"),
        ({"objective": "distil", "output": "o"}, [], "objective"),
        ({"objective": "vae", "output": "o"}, ["--optim.speed", "3"], "optim.speed: Extra inputs"),
        ({"objective": "vae", "output": "o"}, ["--steps"], "has no value"),
        ({"objective": "distill", "output": "o"}, ["--distill.modes_per_step", "4"], "only 3 modes"),
        ({"objective": "distill", "output": "o"}, ["--distill.mode_weights", "[1, 2]"], "2 entries for 3 modes"),
        (
            {"objective": "distill", "output": "o"},
            ["--gradient_checkpointing", "true", "--distill.modes_per_step", "2"],
            "needs distill.modes_per_step 1",
        ),
        ({"objective": "vae", "output": "o"}, ["--steps", "0"], "steps: Input should be greater than 0"),
    ],
)
def test_config_errors_name_the_key(tmp_path, settings, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(write_config(tmp_path / "c.yaml", **settings), overrides)


CLIPS = {"folder": "f"}
ON_POLICY = {"on_policy": 0.5}


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        *(
            ({"objective": "shared", "distill": {name: value}}, f"shared does not read distill.{name}")
            for name, value in {
                "mode_weights": [1, 2, 3],
                "modes_per_step": 1,
                "rank": 8,
                "adapter": "a",
                "correction_gap": 0.25,
                "anchor": 0.1,
                **ON_POLICY,
                "on_policy_every": 5,
                "on_policy_clips": 2,
                "on_policy_budget": 0.5,
            }.items()
        ),
        (
            {"objective": "shared", "distill": {"mode_weights": [1, 2, 3], **ON_POLICY}},
            "shared does not read distill.mode_weights, distill.on_policy: leave it out",
        ),
        ({"objective": "shared", "component": "transformer"}, "shared does not read component"),
        ({"objective": "shared", "push_to_hub": "a/b"}, "shared does not read push_to_hub"),
        ({"objective": "distill", "distill": {"teacher_weight": 2.0}}, "distill does not read distill.teacher_weight"),
        ({"objective": "distill", "distill": {"on_policy_every": 5}}, "on_policy_every .*distill.on_policy is 0"),
        ({"objective": "distill", "distill": {"anchor": 0.1}}, "distill.anchor .*correction_gap is 0"),
        ({"objective": "distill", "clips": CLIPS, "data": {"clips": 9}}, "data would not be read, because clips are"),
        ({"objective": "distill", "clips": CLIPS | {"teacher_steps": 9}}, "clips.teacher_steps .*for clips.prompts"),
        ({"objective": "distill", "validation": {"prompts": ["a"]}}, "validation.prompts .*they need clips"),
        ({"objective": "distill", "validation": {"steps": 9}}, "validation.steps .*clips or distill.on_policy"),
        ({"objective": "distill", "vae": {}}, "distill does not read vae"),
        ({"objective": "distill", "optim": {"muon_lr": 0.1}}, "optim.muon_lr .*optim.name is not muon"),
        ({"objective": "pretrain", "distill": {"rank": 8}}, "pretrain does not read distill:"),
        ({"objective": "pretrain", "base_dtype": "float32"}, "pretrain does not read base_dtype"),
        ({"objective": "pretrain", "clips": CLIPS}, "pretrain does not read clips"),
        ({"objective": "pretrain", "vae": {"z_dim": 8}}, "pretrain does not read vae"),
        ({"objective": "vae", "flow_shift": 5.0}, "vae does not read flow_shift"),
        ({"objective": "vae", "compile": True}, "vae does not read compile"),
        ({"objective": "vae", "gradient_checkpointing": True}, "vae does not read gradient_checkpointing"),
        ({"objective": "vae", "data": {"word_weights": {"cross": 2.0}}}, "vae does not read data.word_weights"),
        ({"objective": "vae", "base": "b", "vae": {"z_dim": 8}}, "vae.z_dim .*those of base"),
        ({"objective": "vae", "vae": {"latent_noise": 0.1}}, "vae.latent_noise .*from a base"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(tmp_path, settings, unread):
    with pytest.raises(ValueError, match=unread):
        load_config(write_config(tmp_path / "c.yaml", output="o", **settings))


def test_settings_that_are_read_are_not_refused(tmp_path):
    on_policy = {"on_policy": 0.5, "on_policy_every": 5}
    for settings in (
        {"objective": "shared", "base_dtype": "float32", "distill": {"modes": ["1x4x4"], "teacher_weight": 0.5}},
        {"objective": "distill", "distill": on_policy, "validation": {"steps": 9}, "data": {"clips": 9}},
        {"objective": "distill", "clips": CLIPS, "validation": {"prompts": ["a"]}, "distill": {"rank": 8}},
        {"objective": "distill", "clips": {"prompts": "p.txt", "teacher_steps": 9}},
    ):
        load_config(write_config(tmp_path / "c.yaml", output="o", **settings))
    path = write_config(tmp_path / "c.yaml", output="o", objective="distill", distill={"rank": 8})
    overrides = ["--objective", "shared", "--distill.rank", "null"]
    assert load_config(path, overrides).distill == DistillConfig()


def test_a_dry_run_refuses_them_too(tmp_path, capsys):
    path = write_config(tmp_path / "c.yaml", objective="shared", output="o", distill={"mode_weights": [1, 2, 3]})
    assert train_here(path, "--dry-run") == 2
    assert "does not read distill.mode_weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--clips.fps", "8"], "cannot set clips.fps: clips is None in the config"),
        (["--steps.more", "8"], "cannot set steps.more: steps is 4 in the config"),
        (["--distill.modes", "[1x4x4"], "the value '\\[1x4x4' of --distill.modes is not YAML"),
    ],
)
def test_overrides_that_cannot_be_are_no_traceback(tmp_path, overrides, message):
    path = write_config(tmp_path / "c.yaml", objective="distill", output="o", steps=4, clips=None)
    with pytest.raises(ValueError, match=message):
        load_config(path, overrides)


def test_words_that_are_not_in_the_world_are_refused_at_once(tmp_path, capsys):
    data = {"word_weights": {"cross": 2.0, "sideways": 1.0}}
    path = write_config(tmp_path / "c.yaml", objective="pretrain", output=str(tmp_path / "o"), data=data)
    assert train_here(path) == 2
    assert "word_weights names sideways; the words are black" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_committed_configs_are_valid(path):
    load_config(path)


def test_the_page_of_settings_is_up_to_date():
    assert (ROOT / "docs/configuration.md").read_text() == page(), "run the command at its top"
    assert "| `lr` | float, > 0 | `0.0008` | peak learning rate |" in page()


@pytest.mark.slow
def test_train_exits_with_2_and_one_line_for_a_bad_config(tmp_path):
    path = write_config(tmp_path / "c.yaml", objective="vae", output=str(tmp_path / "out"), colour=1)
    done = subprocess.run(
        [sys.executable, ROOT / "flexivid/train.py", "--config", path], capture_output=True, text=True
    )
    assert done.returncode == 2 and "colour" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_sampled_noise_levels_are_those_of_the_schedule():
    u = torch.linspace(0, 1, 41)
    assert torch.allclose(uniform_steps_sigma(u, (0.0, 1.0), 3.0), shift_sigma(u, 3.0), atol=1e-6)
    limited = uniform_steps_sigma(u, (0.3, 0.9), 3.0)
    assert limited[0].item() == pytest.approx(0.3) and limited[-1].item() == pytest.approx(0.9)


def state_of(inputs: dict, sigma: list[float]) -> State:
    sigma = torch.tensor(sigma)
    conditions = {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    return State(inputs["hidden_states"], 1000 * sigma, Level(1 - sigma, sigma), conditions)


@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_distillation_gradients_reach_all_of_the_mode_and_nothing_of_the_base(parametrisation):
    """Fails where LoRA is switched by peft's `set_adapter` and the student runs before the teacher."""
    student = build_student(
        tiny_transformer(), DistillConfig(modes=["1x4x4", "2x4x4"], parametrisation=parametrisation, rank=4)
    )
    inputs = forward_inputs()
    for patch_size in ("1x4x4", "2x4x4"):
        student.zero_grad()
        # The second round has lora_B away from zero, so that lora_A gets a gradient too.
        for _ in range(2):
            errors = weak_errors(student, student._flex[0], [patch_size], state_of(inputs, [0.9, 0.6]))
            distillation_loss(errors).backward()
            with torch.no_grad():
                for p in student.parameters():
                    if p.grad is not None:
                        p.sub_(0.01 * p.grad.sign())
        for name, p in student.named_parameters():
            if patch_size in name:
                assert p.grad is not None and p.grad.abs().sum() > 0, name
            elif "lora_" not in name and "weak_modes" not in name:
                assert p.grad is None and not p.requires_grad, name


def test_gradient_checkpointing_changes_no_gradient():
    inputs, gradients = forward_inputs(), []
    for checkpointing in (False, True):
        student = build_student(tiny_transformer(), DistillConfig(modes=["1x4x4", "2x4x4"], rank=4)).train()
        torch.manual_seed(5)
        for name, p in student.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
        if checkpointing:
            student.transformer.enable_gradient_checkpointing()
        errors = weak_errors(student, student._flex[0], ["1x4x4"], state_of(inputs, [0.9, 0.6]))
        distillation_loss(errors).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_distillation_lowers_the_error_to_the_teacher():
    student = build_student(tiny_transformer(), DistillConfig(modes=["1x4x4"], rank=4))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=3e-3)
    inputs = forward_inputs(4)
    losses = []
    for _ in range(30):
        errors = weak_errors(student, student._flex[0], ["1x4x4"], state_of(inputs, [0.8] * 4))
        loss = distillation_loss(errors)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_corrected_distillation_asks_for_errors_that_stay_the_same():
    torch.manual_seed(0)
    before = torch.randn(2, 3, 1, 1, 2, 2)
    now = before + 0.1
    all_corrected, none = torch.tensor([True] * 3), torch.tensor([False] * 3)
    plain = distillation_loss(now).item()
    assert corrected_distillation_loss(now, before, all_corrected, 0.0).item() == pytest.approx(0.01, rel=1e-4)
    assert corrected_distillation_loss(now, before, all_corrected, 0.5).item() == pytest.approx(
        0.01 + 0.5 * plain, rel=1e-4
    )
    assert corrected_distillation_loss(now, before, none, 0.0).item() == pytest.approx(plain)


def test_distillation_goes_on_from_an_adapter(tmp_path):
    modes = ["1x4x4", "2x4x4"]
    student = build_student(tiny_transformer(), DistillConfig(modes=modes, rank=4))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p).half())  # the precision of adapter files
    flex = student._flex[0]
    config = AdapterConfig.of(
        flex,
        lora_rank=4,
        components=["transformer"],
        base_model="tiny",
    )
    save_adapter(tmp_path, config, {"transformer": flex})
    again = build_student(tiny_transformer(), DistillConfig(modes=modes, rank=4, adapter=tmp_path))
    before, after = dict(student.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {n for n, p in before.items() if p.requires_grad} == {n for n, p in after.items() if p.requires_grad}
    with pytest.raises(ValueError, match="lora_rank 4 != 8"):
        build_student(tiny_transformer(), DistillConfig(modes=modes, rank=8, adapter=tmp_path))


def losses_by_step(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines}), "a step was logged twice"
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, training_config):
    whole = write_config(tmp_path / "whole.yaml", **training_config, output=str(tmp_path / "whole"))
    assert train_here(whole) == 0
    killed = write_config(tmp_path / "killed.yaml", **training_config, output=str(tmp_path / "killed"))
    start_and_signal(ONE, killed, tmp_path / "killed", after=5, number=signal.SIGKILL)
    assert train_here(killed) == 0
    assert losses_by_step(tmp_path / "killed") == losses_by_step(tmp_path / "whole")
    assert set(losses_by_step(tmp_path / "whole")) == set(range(1, 13))
    for name in ("flexivid.safetensors", "pytorch_lora_weights.safetensors"):
        killed_tensors, whole_tensors = (load_file(tmp_path / run / "result" / name) for run in ("killed", "whole"))
        assert killed_tensors.keys() == whole_tensors.keys()
        assert all(torch.equal(killed_tensors[key], whole_tensors[key]) for key in whole_tensors)
    # The result is the average of every mode, also of those that were not drawn in the last step.
    raw, averaged = load_file(tmp_path / "whole/checkpoint-00000012.safetensors"), whole_tensors
    for mode in ("1x4x4", "2x4x4"):
        key = "blocks.0.attn1.to_q.lora_B"
        last = raw[f"model.transformer.{key}.flexivid-{mode}.weight"]
        assert not torch.allclose(averaged[f"transformer.{mode}.{key}.weight"].float(), last, rtol=1e-2)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, training_config, capsys):
    settings = training_config | {"output": str(tmp_path / "out"), "steps": 2, "save_every": 2}
    path = write_config(tmp_path / "c.yaml", **settings)
    assert train_here(path) == 0
    for override, message in (
        (["--distill.rank", "2"], "belongs to a run with another distill"),
        (["--steps", "1"], "is at step 2, past the 1 steps"),
    ):
        assert train_here(path, *override) == 2 and message in capsys.readouterr().err
    assert train_here(path, "--optim.lr", "1e-4", "--steps", "3") == 0


def test_training_a_decoder_on_leaves_the_encoder_and_the_latents_as_they_are(tmp_path):
    tiny_pipeline().vae.save_pretrained(tmp_path / "vae")
    path = write_config(
        tmp_path / "c.yaml",
        objective="vae",
        base=str(tmp_path / "vae"),
        output=str(tmp_path / "out"),
        steps=2,
        batch_size=2,
        data={"size": 16},
        vae={"crop": 16, "frames": 5, "full_share": 0.0, "latent_noise": 0.1},
    )
    assert train_here(path) == 0
    before, after = (AutoencoderKLWan.from_pretrained(tmp_path / name) for name in ("vae", "out/result"))
    assert after.config.latents_mean == before.config.latents_mean
    changed = {
        name for name, p in after.state_dict().items() if not torch.equal(p, before.state_dict()[name].half().to(p))
    }
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


def test_a_run_goes_on_wherever_its_adapter_lies_but_with_no_other(tmp_path, training_config):
    def facts(folder: Path) -> dict:
        distill = training_config["distill"] | {"adapter": folder}
        return run_facts(Config(**training_config | {"distill": distill}, output=tmp_path / "out"))

    for name, content in (("one", b"weights"), ("moved", b"weights"), ("other", b"others")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "flexivid.safetensors").write_bytes(content)
    assert facts(tmp_path / "one") == facts(tmp_path / "moved") != facts(tmp_path / "other")
