"""Training of MiniMax-H3: one sequence of text, sound and video, noise levels and all as in its modular pipeline."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    MiniMaxH3Blocks,
    MiniMaxH3ModularPipeline,
    MiniMaxH3Scheduler,
    WanModularPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.modular_pipelines.minimax_h3.encoders import MiniMaxH3Ref2VAReferenceEncoderStep, encode_vae_condition
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from families import TEXT, tiny
from test_training_sound import tone, write_with_sound
from training_runs import losses, train_here, write
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

import flexivid
from flexivid.diffusion import Diffusion
from flexivid.model.families import family_of
from flexivid.shapes.build import build_tokenizer
from flexivid.training.config import ClipsConfig, Config, DistillConfig, ValidationConfig
from flexivid.training.data.buckets import Bucket
from flexivid.training.data.clips import load_clip, load_sound
from flexivid.training.data.encoding import encode
from flexivid.training.data.latents import LatentCache, build_cache
from flexivid.training.data.sound import encode_sound
from flexivid.training.distill import load_base
from flexivid.training.forecast import check_model, forecast
from flexivid.training.modular import MiniMaxH3Pipeline, TextOnly
from flexivid.training.noise import STREAM_NOISE, STREAM_TIMESTEP, NoiseLevels, with_stream_noise
from flexivid.training.student import build_student, distillation_loss, predict, weak_errors
from flexivid.training.validation import sample_budgets

FRAMES, HEIGHT, WIDTH, FPS = 22, 96, 128, 24
BUCKET = f"{FRAMES}x{HEIGHT}x{WIDTH}"
TOKENS = 2 * 37  # of sound, of which 40 a second and channel: round(22 / 24 * 40)
SOUND, RATE = "audio_hidden_states", 32000
CAPTIONS = {"low": "a red circle", "higher": "a large blue square moving left", "silent": "a green cross"}
SIZES = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH}


@pytest.fixture(autouse=True)
def short_clips(monkeypatch):
    """It makes clips of five seconds and more, whose sound is hundreds of tokens."""
    monkeypatch.setattr(MiniMaxH3ModularPipeline, "min_duration", 0.0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def clips(tmp_path) -> Path:
    """One with sound, one whose sound is another, one without; with captions of different lengths."""
    folder, sounds = tmp_path / "clips", {"low": tone(0.95, 300.0), "higher": tone(0.95, 2000.0), "silent": None}
    for name, sound in sounds.items():
        path = write_with_sound(folder / f"{name}.mp4", sound, frames=FRAMES, size=(HEIGHT, WIDTH), fps=FPS)
        path.with_suffix(".txt").write_text(CAPTIONS[name])
    return folder


def tiny_parts() -> dict:
    """All that the pipeline makes a clip from text with. Its text is that of the 50th layer of a Qwen3-VL."""
    torch.manual_seed(5)
    tokenizer, layers = build_tokenizer(), {"num_hidden_layers": 51, "num_attention_heads": 2, "intermediate_size": 16}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {"hidden_size": TEXT, "head_dim": 8, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    vision = {"hidden_size": 8, "depth": 1, "intermediate_size": 8, "num_heads": 2, "patch_size": 14}
    vision |= {"out_hidden_size": TEXT, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = Qwen3VLConfig(text_config=text | layers | {"rope_scaling": rope}, vision_config=vision)
    video = AutoencoderKLMiniMaxH3(
        block_out_channels=(4,) * 6,
        layers_per_block=1,
        norm_num_groups=2,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        decoder_attention_head_dim=16,
        decoder_num_register_tokens=1,
        latents_mean=torch.randn(24).tolist(),
        latents_std=torch.empty(24).uniform_(0.5, 2).tolist(),
    )
    statistics = {"latents_mean": torch.randn(32).tolist(), "latents_std": torch.empty(32).uniform_(0.5, 2).tolist()}
    sound = AutoencoderKLMiniMaxH3Audio(
        encoder_dim=2, latent_dim=64, num_attention_heads=2, decoder_dim=128, **statistics
    )
    return {
        "transformer": tiny("minimax-h3"),
        "text_encoder": Qwen3VLForConditionalGeneration(config).eval(),
        "tokenizer": tokenizer,
        "vae": video.eval(),
        "audio_vae": sound.eval(),
        "scheduler": MiniMaxH3Scheduler(shift=12.0),
        "audio_scheduler": MiniMaxH3Scheduler(shift=3.0),
    }


def stock_pipeline(**parts) -> MiniMaxH3ModularPipeline:
    """That of diffusers, from text. Its processor of images wants torchvision."""
    pipe = MiniMaxH3ModularPipeline(blocks=MiniMaxH3Blocks().get_workflow("t2va"))
    pipe.update_components(**parts | {"processor": TextOnly()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cache_of(pipe, folder: Path, **more) -> LatentCache:
    settings = {"buckets": [BUCKET], "fps": FPS, "max_sequence_length": 16, "held_out": 0, "drop_caption": 0.0}
    source = {} if "prompts" in more else {"folder": folder}
    config = ClipsConfig(cache=folder.parent / "cache", **source, **settings | more)
    return build_cache(config, pipe, Accelerator(cpu=True))


def name_of(place) -> str:
    return Path(place.name).stem


def state_of(pipe, x_0: torch.Tensor, conditions: dict, timestep: torch.Tensor):
    """Noisy video and sound, and the noise of the latter."""
    family, generator = family_of(pipe.transformer), torch.Generator().manual_seed(4)
    levels = NoiseLevels(Diffusion(family.prediction, family.time_scale), 12.0, (1, 2, 2), family, 3.0)
    noise = torch.randn(x_0.shape, generator=generator)
    conditions = with_stream_noise(conditions, family, len(x_0), generator)
    return levels.state(x_0, noise, timestep, conditions), conditions[STREAM_NOISE]


@torch.no_grad()
def passed(transformer, run) -> list[dict]:
    """The arguments of every forward that `run` makes."""
    seen = []

    def keep(module, args, kwargs):
        seen.append({name: value.clone() for name, value in kwargs.items() if torch.is_tensor(value)})

    handle = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    run()
    handle.remove()
    return seen


def test_a_step_passes_what_the_stock_pipeline_passes(clips):
    """Every argument, at the first step of the stock pipeline and later ones, but the latents of another clip.

    A batch of clips, with captions of different lengths and at different steps, is one forward each. The timestep of
    sound, which training finds from that of the video, is the scheduler's but for float32.
    """
    parts = tiny_parts()
    pipe, transformer = MiniMaxH3Pipeline(**parts), parts["transformer"]
    cache, family = cache_of(pipe, clips), family_of(transformer)
    places = cache.places[BUCKET]
    pipeline = stock_pipeline(**parts)
    calls = [{"prompt": CAPTIONS[name_of(place)], **SIZES, "num_inference_steps": 6} for place in places]
    stock = [passed(transformer, lambda call=call: pipeline(**call)) for call in calls]
    assert [len(calls) for calls in stock] == [5] * 3
    for steps in ((0, 1, 3), (1, 3, 0), (3, 0, 1)):
        given = [calls[step] for calls, step in zip(stock, steps, strict=True)]
        of_video = [one["timestep"][one["timestep_indices"][one["video_indices"][-1]]] for one in given]
        state, _ = state_of(pipe, *cache._read(BUCKET, places, [False] * 3), torch.stack(of_video))
        arguments = (transformer, family, state.x_t, state.timestep, state.conditions)
        trained = passed(transformer, lambda arguments=arguments: predict(*arguments))
        assert len(trained) == 3 and len({len(one["text_indices"]) for one in given}) > 1
        for told, stocks, step in zip(trained, given, steps, strict=True):
            assert told.keys() == stocks.keys()
            assert len(stocks["timestep"]) == (1 if step == 0 else 2)
            assert told["timestep"][0] == stocks["timestep"][0]
            torch.testing.assert_close(told["timestep"], stocks["timestep"], atol=1e-6, rtol=0)
            text = "encoder_hidden_states"  # which shards hold in half precision
            assert torch.equal(told[text].half(), stocks[text].half())
            for name in told.keys() - {"hidden_states", SOUND, text, "timestep"}:
                assert torch.equal(told[name], stocks[name]) and told[name].dtype == stocks[name].dtype, name
            assert all(told[name].shape == stocks[name].shape for name in ("hidden_states", SOUND))


def test_sound_is_as_noisy_as_in_the_same_step_of_its_own_schedule(clips):
    pipe = MiniMaxH3Pipeline(**tiny_parts())
    cache = cache_of(pipe, clips)
    x_0, conditions = cache._read(BUCKET, cache.places[BUCKET], [False] * 3)
    for scheduler in (pipe.scheduler, pipe.audio_scheduler):
        scheduler.set_timesteps(9)
    for video, sound in zip(pipe.scheduler.timesteps, pipe.audio_scheduler.timesteps, strict=True):
        state, noise = state_of(pipe, x_0, conditions, video.expand(3))
        torch.testing.assert_close(state.conditions[STREAM_TIMESTEP], sound.expand(3), atol=1e-6, rtol=0)
        expected = sound * conditions[SOUND] + (1 - sound) * noise
        torch.testing.assert_close(state.conditions[SOUND], expected, atol=1e-5, rtol=1e-5)
    assert STREAM_NOISE not in state.conditions and conditions[SOUND].shape == (3, TOKENS, 32) and noise.std() > 0.8


def test_clips_are_encoded_as_the_pipeline_encodes_what_it_is_given(clips, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipe = MiniMaxH3Pipeline(**tiny_parts())
    cache = cache_of(pipe, clips)
    x_0, conditions = cache._read(BUCKET, cache.places[BUCKET], [False] * 3)
    step, state = MiniMaxH3Ref2VAReferenceEncoderStep(), PipelineState()
    for place, latents, sound in zip(cache.places[BUCKET], x_0, conditions[SOUND], strict=True):
        frames = load_clip(Path(place.name), [Bucket.parse(BUCKET)], FPS)[1]
        heard = load_sound(Path(place.name), Bucket.parse(BUCKET), FPS, RATE)
        pixels = ((frames + 1) * 127.5)[None]
        with torch.no_grad():
            expected = encode_vae_condition(pipe.vae, pixels, pipe.pixel_mean, pipe.pixel_std)
        torch.testing.assert_close(latents[None], expected, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(encode(pipe.vae, frames[None]), expected, atol=2e-3, rtol=2e-3)
        reference = SimpleNamespace(kind="audio", has_audio=True, audio=heard)
        state.set("normalized_references", [reference])
        (rows,) = step(pipe, state)[1].get("audio_condition_latents")
        assert torch.equal(encode_sound(pipe, heard, TOKENS).half(), rows[:TOKENS].half())
        assert torch.equal(sound.half(), rows[:TOKENS].half())
    assert (conditions[SOUND][0] - conditions[SOUND][1]).abs().max() > 1e-3


def test_teacher_samples_are_what_the_stock_pipeline_ends_with(tmp_path):
    parts, prompts = tiny_parts(), tmp_path / "prompts.txt"
    prompts.write_text("a large blue square\n")
    cache = cache_of(MiniMaxH3Pipeline(**parts), tmp_path / "none", prompts=prompts, teacher_steps=4)
    x_0, conditions = cache._read(BUCKET, cache.places[BUCKET], [False])
    call = SIZES | {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}
    stock = stock_pipeline(**parts)
    # Of its sound, what its decoder is given.
    ends = stock(prompt="a large blue square", **call, output=["latents", "audio_latents"])
    torch.testing.assert_close(x_0, ends["latents"], atol=2e-3, rtol=2e-3)
    both = torch.cat(list(ends["audio_latents"].mT))
    torch.testing.assert_close(conditions[SOUND][0], both, atol=2e-3, rtol=2e-3)


def settings_of(tmp_path: Path, **source) -> dict:
    stock_pipeline(**tiny_parts()).save_pretrained(str(tmp_path / "base"), overwrite_modular_index=True)
    data = {"cache": str(tmp_path / "cache"), "buckets": [BUCKET], "fps": FPS, "max_sequence_length": 16}
    return {
        "objective": "distill",
        "base": str(tmp_path / "base"),
        "steps": 2,
        "batch_size": 2,
        "flow_shift": 12.0,
        "log_every": 1,
        "sample_every": 1000,
        "clips": data | {"drop_caption": 0.0} | {name: str(value) for name, value in source.items()},
        "distill": {"modes": ["1x4x4"], "rank": 1, "correction_gap": 0.2},
    }


@pytest.mark.parametrize("source", ["folder", pytest.param("prompts", marks=pytest.mark.slow)])
def test_two_steps_and_a_sample(tmp_path, clips, source, monkeypatch, capsys):
    monkeypatch.setattr("flexivid.training.distill.SIGMAS", (0.9,))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS.values()))
    sources = {"folder": {"folder": clips}, "prompts": {"prompts": prompts, "teacher_steps": 3}}
    settings = settings_of(tmp_path, **sources[source])
    path, output = write(tmp_path, "run", settings)
    shifts = []

    def keep(diffusion, flow_shift, patch_size, family, stream_shift):
        shifts.append((flow_shift, stream_shift))
        return NoiseLevels(diffusion, flow_shift, patch_size, family, stream_shift)

    monkeypatch.setattr("flexivid.training.distill.NoiseLevels", keep)
    assert train_here(path) == 0 and shifts == [(12.0, 3.0)]
    assert np.isfinite(losses(output)).all() and len(losses(output)) == 2
    assert "ModularPipeline" in (output / "result/README.md").read_text()
    capsys.readouterr()
    assert train_here(path, "--dry-run") == 0
    assert "TFLOP a step" in capsys.readouterr().out
    pipe = stock_pipeline(**load_base(Config(**settings, output=output)).components)
    flexivid.enable(pipe, adapter=output / "result", budget=0.9, order="interleaved")
    latents = pipe(prompt="a red circle", **SIZES, num_inference_steps=7, output="latents")
    assert latents.isfinite().all() and flexivid.summary(pipe).ratio <= 0.9


@pytest.mark.slow
def test_its_config_trains_a_tiny_model(tmp_path, clips, monkeypatch):
    """With gradient checkpointing: several clips of different lengths are forwards of their own there too."""
    monkeypatch.setattr("flexivid.training.distill.SIGMAS", (0.9,))
    path = Path(__file__).parents[1] / "configs/minimax-h3-lora.yaml"
    tiny = {"base": settings_of(tmp_path)["base"], "output": tmp_path / "out", "clips.folder": clips}
    tiny |= {"clips.cache": tmp_path / "cache", "clips.buckets": f"[{BUCKET}]", "clips.max_sequence_length": 16}
    small = {"steps": 2, "batch_size": 2, "base_dtype": "float32", "sample_every": 1000, "distill.rank": 1}
    small |= {"validation.prompts": "[]", "validation.budgets": "null", "validation.steps": "null"}
    overrides = [word for name, value in (tiny | small).items() for word in (f"--{name}", str(value))]
    assert train_here(path, *overrides) == 0
    assert (tmp_path / "out/result/flexivid.safetensors").exists()


def test_pictures_of_validation_prompts(tmp_path, clips):
    pipe = MiniMaxH3Pipeline(**tiny_parts())
    pipe.set_progress_bar_config(disable=True)
    call = SIZES | {"prompt": "a red circle", "num_inference_steps": 3}
    made = pipe(**call, generator=torch.Generator().manual_seed(0))
    stock = stock_pipeline(**pipe.components)
    expected = stock(**call, output_type="np", generator=torch.Generator().manual_seed(0), output="videos")
    assert made.frames.shape == (1, FRAMES, HEIGHT, WIDTH, 3) and np.array_equal(made.frames, expected)
    assert made.audio.isfinite().all()
    config = Config(**settings_of(tmp_path, folder=clips), output=tmp_path / "out")
    settings = ValidationConfig(prompts=["a red circle"], budgets=[1.0, 0.9], steps=6)
    config = config.model_copy(update={"validation": settings})
    flex = build_student(pipe.transformer, config.distill)._flex[0]
    sample_budgets(pipe, flex, config, Accelerator(cpu=True), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_gradients_reach_every_lora(clips):
    pipe = MiniMaxH3Pipeline(**tiny_parts())
    cache = cache_of(pipe, clips)
    student = build_student(pipe.transformer, DistillConfig(modes=["1x4x4"], rank=4))
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)  # they start at zero, and so would the gradients of the others
    x_0, conditions = cache._read(BUCKET, cache.places[BUCKET], [False] * 3)
    state, noise = state_of(pipe, x_0, conditions, torch.tensor([0.1, 0.5, 0.9]))
    errors = weak_errors(student, student._flex[0], ["1x4x4"], state)
    distillation_loss(errors).backward()
    loras = {name: weight for name, weight in student.named_parameters() if "lora_" in name}
    assert loras and all(weight.grad is not None and weight.grad.any() for weight in loras.values())
    assert all(weight.grad.any() for weight in student.weak_modes.parameters() if weight.requires_grad)
    # Video looks at sound: had it another noise level, teacher and student would be asked something else.
    with torch.no_grad():
        others = state.conditions | {SOUND: noise}
        right, wrong = (
            predict(pipe.transformer, family_of(pipe.transformer), state.x_t, state.timestep, conditions)
            for conditions in (state.conditions, others)
        )
    assert (right - wrong)[2].abs().max() > 1e-4


def test_a_caption_that_is_too_long_is_skipped_with_the_reason(clips):
    pipe = MiniMaxH3Pipeline(**tiny_parts())
    cache = cache_of(pipe, clips, max_sequence_length=3)
    assert [Path(name).stem for name, _ in cache.broken] == ["higher"]
    assert cache.broken[0][1] == "its caption has 6 tokens, clips.max_sequence_length is 3"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"objective": "few", "distill": None, "clips": {"drop_caption": None}},
            "makes sound, which few does not train: use distill",
        ),
        ({"distill": {"modes": ["1x4x4"], "on_policy": 0.5}}, "on_policy is for pipelines such as Wan's"),
        (
            {"distill": {"modes": ["1x4x4-guided"], "guidance_scale": 3.0}},
            "has its guidance in its weights: it takes no guided modes",
        ),
        ({"flow_shift": 3.0}, "flow_shift is 3.0, and the scheduler of .*base has 12.0"),
        ({"clips": {"first_frame": True}}, "MiniMax-H3 is trained on text alone, .* clips.first_frame must be false"),
        ({"clips": {"drop_caption": 0.1}}, "clips.drop_caption is 0.1: .* set it to 0"),
        (
            {"clips": {"folder": None, "prompts": __file__, "teacher_guidance": 3.0}},
            "clips.teacher_guidance would do nothing: guidance is in the model's weights; leave it out",
        ),
        (
            {"validation": {"prompts": ["a red circle"], "guidance_scale": 3.0}},
            "validation.guidance_scale would do nothing",
        ),
        ({"clips": {"fps": 16}}, "clips.fps is 16: the model makes clips of 24 frames a second"),
        ({"clips": {"buckets": ["21x64x96"]}}, r"bucket 21x64x96 does not fit .*: 5 \+ a multiple of 17 frames"),
        ({"clips": {"buckets": ["379x64x96"]}}, "bucket 379x64x96 does not fit the model: .* 0 to 15 seconds of them"),
        ({"clips": {"buckets": ["22x64x80"]}}, "bucket 22x64x80 does not fit the model: .* multiples of 32"),
    ],
)
def test_what_is_not_built_is_refused_before_anything_is_loaded(tmp_path, clips, monkeypatch, more, said):
    settings = settings_of(tmp_path, folder=clips) | {"output": tmp_path / "out"}
    data = settings["clips"] | more.get("clips", {})
    settings |= more | {"clips": {name: value for name, value in data.items() if value is not None}}
    monkeypatch.setattr(MiniMaxH3Pipeline, "from_pretrained", None)
    config = Config(**{name: value for name, value in settings.items() if value is not None})
    with pytest.raises(ValueError, match=said) as caught:
        check_model(config)
    assert "\n" not in str(caught.value)


def test_folders_that_are_not_whole_and_other_modular_pipelines_are_refused(tmp_path, clips, capsys):
    path, _ = write(tmp_path, "run", settings_of(tmp_path, folder=clips))
    (tmp_path / "base/audio_vae").rename(tmp_path / "elsewhere")
    assert train_here(path) == 2
    assert capsys.readouterr().err.strip().endswith("is incomplete: it has no folder audio_vae")
    WanModularPipeline().save_pretrained(str(tmp_path / "wan"), overwrite_modular_index=True)
    assert train_here(path, "--base", str(tmp_path / "wan")) == 2
    assert "wan is a WanModularPipeline: of a modular pipeline only MiniMax-H3" in capsys.readouterr().err


def test_a_forecast_in_half_precision(tmp_path, clips):
    settings = settings_of(tmp_path, folder=clips) | {"output": tmp_path / "out"}
    assert "TFLOP a step" in forecast(Config(**settings), 1, mixed_precision=True)


def test_of_text_no_token_is_of_an_image():
    processor = SimpleNamespace(image_token_ids=[7], video_token_ids=[8], audio_token_ids=[9])
    rows = [[1, 2, 3], [4]]
    assert TextOnly().create_mm_token_type_ids(rows) == Qwen3VLProcessor.create_mm_token_type_ids(processor, rows)
