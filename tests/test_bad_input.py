"""A user's mistake is one sentence on stderr and exit code 2, before weights are read and with nothing written."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from conftest import tiny_pipeline, tiny_transformer, write_clip
from safetensors.torch import load_file, save_file
from test_flexible import WEAK, attach, config_of

import flexivid
from flexivid.model.adapter import LORA_NAME, save_adapter
from flexivid.shapes.embedded import ADAPTER

ROOT = Path(__file__).parents[1]
FILES = {
    "t2v": "pipelines/t2v.py",
    "train": "flexivid/train.py",
    "adapters": "flexivid/commands/adapters.py",
    **{path.stem: f"eval/{path.name}" for path in (ROOT / "eval").glob("*.py")},
}
# What is right, so that nothing is wrong but what a line of the table adds.
RIGHT = {
    "t2v": "--model {there}/model --steps 4 --frames 9 --height 32 --width 32 --prompt circle "
    "--device cpu --output {out}/clip.mp4",
    "train": "--config {there}/train.yaml --output {out}",
    "vbench_sweep": "--methods steps --device cpu --output {out}",
    "calibrate": "--steps 8 --output {out}",
    "schedules": "--schedules 1x2x2:40 --captions 1",
    "latency": "--device cpu --denoise-only --output {out}",
    "adherence": "--arms adapter-0.25 --output {out}",
    "spectrum": "--output {out}",
    "x0_error": "--adapters {adapter} --output {out}",
    "budget_picture": "--output {out}/budgets.png",
    "planning": "--runs 1 --output {out}/planning.json",
    "data_speed": "--config {there}/train.yaml",
    "pareto": "--output {out}/pareto.png {there}/results.json",
    "adapters": "merge --output {out} {adapter}",
}
WRITES_AT_ONCE = ("pareto", "adapters", "planning")  # no model is loaded before

# script: (arguments that are added to the right ones, what is said)
TABLE = {
    "t2v": [
        ("--budget 0", "--budget must be a number above 0 and up to 1"),
        ("--budget nan", "not nan"),
        ("--budget inf", "not inf"),
        ("--budget half", "not 'half'"),
        ("--budget 0.01", "the least is"),
        ("--steps 0", "--steps must be at least 1"),
        ("--steps 2.5", "not 2.5"),
        ("--steps 99999999999", "below 10**9"),
        ("--frames -4", "--frames must be at least 1"),
        ("--frames 10", "1 + a multiple of 4, such as 9"),
        ("--height 36", "a multiple of 8, such as 40"),
        ("--width big", "not big"),
        ("--fps 0", "--fps must be at least 1"),
        ("--guidance-scale nan", "not nan"),
        ("--guidance-scale -3", "0 or more"),
        ("--seed 1.5", "the seed must be"),
        ("--seed 99999999999999999999", "below 2**63"),
        ("--modes 4x4", "has 2 numbers instead of 3"),
        ("--modes 1x3x3", "not an integer multiple"),
        ("--modes 0x4x4", "each number must be at least 1"),
        ("--schedule 1x4x4:3", "adds up to 3 steps"),
        ("--schedule 1x2x2:4 --budget 0.5", "--budget: not allowed with argument --schedule"),
        ("--schedule 1x4x4:x", "is not patch size:number of steps"),
        ("--schedule 1x2x2+1x4x4@1.5:4", "between 0 and 1, not '1.5'"),
        ("--schedule 1x2x2+1x4x4@0.5:4", "the first step has no x0 yet"),
        ("--schedule {there}/empty.json", "is not JSON"),
        ("--schedule {there}/broken.json", "is not JSON"),
        ("--schedule {there}/latin.json", "latin.json"),
        ("--schedule {there}/list.json", "holds no schedule"),
        ("--schedule {there}/folder.json", "folder.json"),
        ("--schedule {there}/missing.json", "missing.json: No such file"),
        ("--guidance strong", "invalid choice: 'strong'"),
        ("--order random", "invalid choice: 'random'"),
        ("--guidance kept --order weak-first", "kept guidance goes with interleaved only"),
        ("--dtype float8", "invalid choice: 'float8'"),
        ("--device banana", "'banana' is no device"),
        ("--device cuda:9", "no CUDA device 9"),
        ("--device meta", "no device meta here"),
        ("--prompts {there}/missing.txt", "no file"),
        ("--prompts {there}/folder", "is a folder"),
        ("--prompts {there}/empty.txt", "holds no prompt"),
        ("--prompts {there}/latin.txt", "latin.txt"),
        ("--prompt", "expected one argument"),
        ("--model {there}/nowhere", "no model_index.json"),
        ("--model {there}/folder", "no model_index.json"),
        ("--model {there}/latin.txt", "no model_index.json"),
        ("--model {there}/broken-index", "is not JSON"),
        ("--model {there}/list-index", "holds no object"),
        ("--model {there}/nameless-index", "has no _class_name"),
        ("--model {there}/unknown-class", "has no TimeMachinePipeline"),
        ("--model {there}/without-weights", "transformer has no weights"),
        ("--model {there}/pickled", "are .bin files, whose loading can run code"),
        ("--model {there}/without-vae", "has no folder vae"),
        ("--model {there}/cut-weights", "is not a whole safetensors file"),
        ("--adapter {there}/nowhere", "neither a folder nor a hub id"),
        ("--adapter {there}/empty.txt", "neither a folder nor a hub id"),
        ("--adapter {there}/folder", "has no flexivid_config.json"),
        ("--adapter {there}/own-adapter --adapter-subfolder second", "has no flexivid_config.json"),
        ("--adapter {there}/own-adapter --adapter-revision v1", "a revision is of a hub id"),
        ("--adapter-revision v1", "revision is about an adapter; give one"),
        ("--adapter {there}/other-adapter", "num_layers 3 != 2"),
        ("--adapter {there}/without-tensors", "flexivid.safetensors is missing"),
        ("--adapter {there}/cut-adapter", "is not a whole safetensors file"),
        ("--adapter {there}/broken-config", "is not JSON"),
        ("--adapter {there}/latin-config", "is not JSON"),
        ("--adapter {there}/unknown-key", "colour: Extra inputs"),
        ("--image {there}/missing.png", "trained on text alone"),
        ("--output {out}/clip.gif", "must be an .mp4 file"),
        ("--output {out}", "must be an .mp4 file"),
        ("--output {there}/folder.mp4", "is a folder"),
        ("--output {there}/empty.txt/clip.mp4", "empty.txt is a file"),
        ("--output /proc/here/clip.mp4", "/proc/here is not writable"),
        ("--colour red", "unrecognized arguments: --colour red"),
        ("--guid kept", "unrecognized arguments: --guid kept"),
    ],
    "train": [
        ("--config {there}/missing.yaml", "no config file at"),
        ("--config shapes", "none of that name ships with flexivid"),
        ("--config {there}/folder", "Is a directory"),
        ("--config {there}/empty.txt", "holds NoneType, not a mapping"),
        ("--config {there}/latin.txt", "latin.txt"),
        ("--config {there}/broken.yaml", "is not YAML"),
        ("--config {there}/list.json", "holds list, not a mapping"),
        ("--config {there}/unknown.yaml", "colour: Extra inputs are not permitted"),
        ("--colour red", "colour: Extra inputs are not permitted"),
        ("--steps", "has no value"),
        ("--steps 0", "greater than 0"),
        ("--steps many", "steps: Input should be a valid integer"),
        ("--steps.more 3", "steps is 2 in the config, and no section"),
        ("--steps {open}", "is not YAML"),
        ("steps 3", "expected an override such as"),
        ("--batch_size -1", "greater than 0"),
        ("--micro_batches 3", "cannot be split evenly"),
        ("--optim.lr .nan", "train.yaml: optim.lr: Input should be a finite number"),
        ("--objective vae --clips null --compile true", "train.yaml: vae does not read compile"),
        ("--optim.lr .inf", "finite number"),
        ("--optim.lr 0", "greater than 0"),
        ("--optim.ema 2", "less than or equal to 1"),
        ("--optim.name sgd", "Input should be"),
        ("--optim.name adamw8bit", "pip install bitsandbytes"),
        ("--objective win", "Input should be"),
        ("--base null", "base must be the pipeline"),
        ("--base {there}/nowhere", "no model_index.json"),
        ("--base {there}/cut-weights", "is not a whole safetensors file"),
        ("--distill.modes [4x4]", "has 2 numbers instead of 3"),
        ("--distill.modes [1x3x3]", "not an integer multiple"),
        ("--distill.modes []", "modes"),
        ("--distill.rank 0", "greater than 0"),
        ("--distill.adapter {there}/nowhere", "has no flexivid_config.json"),
        ("--distill.rank 3 --distill.adapter {there}/own-adapter", "cannot go on from"),
        ("--distill.rank 4 --distill.modes {weak} --distill.adapter {there}/cut-adapter", "is not a whole safetensors"),
        ("--attention_backend magic", "magic"),
        ("--flow_shift 5", "flow_shift is 5.0, and the scheduler"),
        ("--clips.folder {there}/nowhere", "does not exist"),
        ("--clips.folder {there}/folder", "no clips in"),
        ("--clips.folder null --clips.prompts {there}/missing.txt", "missing.txt"),
        ("--clips.folder null --clips.prompts {there}/empty.txt", "empty.txt"),
        ("--clips.folder null", "give clips.folder or clips.prompts"),
        ("--clips.buckets [5x32]", "a bucket is frames x height x width"),
        ("--clips.buckets [5x33x32]", "multiple"),
        ("--clips.first_frame true", "model was trained on text alone: it has no channels for an image"),
        (
            "--base {there}/sister-model --clips.first_frame true",
            "takes image beside the prompt, which is built for",
        ),
        ("--base {there}/edit-model", "LucyEditPipeline takes video beside the prompt, which is built for Wan"),
        ("--base {there}/control-model", "none of the 1 clips has one or a mask: put a.control.mp4"),
        (
            "--base {there}/control-model --objective shared --distill.rank null",
            "shared cannot train: use distill",
        ),
        ("--base {there}/control-model --validation.prompts {open}a]", "there can be no validation.prompts"),
        ("--base {there}/control-model --distill.on_policy 0.5", "on_policy has none: set it to 0"),
        (
            "--base {there}/control-model --clips.folder null --clips.prompts {there}/empty.txt",
            "WanVACEPipeline takes a control video beside the prompt, which is made of clips: give clips.folder",
        ),
        ("--trackers [abacus]", "abacus"),
        ("--output {there}/empty.txt", "empty.txt is a file"),
        ("--output {there}/empty.txt/run", "empty.txt is a file"),
        ("--output /proc/here", "/proc/here is not writable"),
        ("--output {there}/cut-run", "checkpoint-00000002.safetensors"),
        ("--output {there}/foreign-run", "checkpoint-00000002.safetensors"),
    ],
    "vbench_sweep": [
        ("--budgets 0", "above 0"),
        ("--budgets 1", "nothing to compare"),
        ("--budgets nan", "not nan"),
        ("--methods magic", "invalid choice: 'magic'"),
        ("--batch 0", "--batch must be at least 1"),
        ("--batch many", "not many"),
        ("--rounds 0", "must be at least 1"),
        ("--videos-per-prompt -1", "must be at least 1"),
        ("--max-prompts 0", "must be at least 1"),
        ("--report-prompts -1", "must be at least 1"),
        ("--steps 0", "--steps must be at least 1"),
        ("--height 60 --width 60", "a multiple of 8, such as 64"),
        ("--height 64 --width 32", "is square"),
        ("--frames 16", "1 + a multiple of 4"),
        ("--guidance-scale inf", "not inf"),
        ("--seed -1", "the seed must be"),
        ("--device cuda:9", "no CUDA device 9"),
        ("--device banana", "'banana' is no device"),
        ("--modes 4x4", "has 2 numbers instead of 3"),
        ("--methods training-free --modes 1x3x3", "not an integer multiple"),
        ("--methods low-resolution --height 72 --width 72", "multiples of 16"),
        ("--prompts {there}/missing.txt", "no file"),
        ("--prompts {there}/folder", "is a folder"),
        ("--prompts {there}/empty.txt", "holds no prompt"),
        ("--prompts {there}/latin.txt", "latin.txt"),
        ("--prompts {there}/twice.txt", "there twice"),
        ("--model {there}/nowhere --prompts shapes", "no model_index.json"),
        ("--model {there}/cut-weights --prompts shapes", "is not a whole safetensors file"),
        ("--methods adapter --adapter {there}/nowhere", "neither a folder nor a hub id"),
        ("--methods adapter --adapter {there}/other-adapter", "this model's transformer differs"),
        ("--methods adapter --adapter {there}/cut-embedded", "is not a whole safetensors file"),
        ("--methods calibrated --schedules {there}/missing.json", "missing.json: No such file"),
        ("--methods calibrated --schedules {there}/broken.json", "is not JSON"),
        ("--methods calibrated --schedules {there}/no-budget.json", "names no budget"),
        ("--dimensions beauty", "no dimension beauty"),
        ("--vbench-cache {there}/empty.txt", "must be a folder"),
        ("--output {there}/empty.txt", "empty.txt is a file"),
        ("--output {there}/other-sweep", "holds a sweep with another"),
        ("--output {there}/broken-sweep", "is not JSON"),
    ],
    "calibrate": [
        ("--budgets 0", "above 0"),
        ("--budgets 0.001", "the least is"),
        ("--budgets half", "not 'half'"),
        ("--steps 0", "--steps must be at least 1"),
        ("--max-prompts 0", "must be at least 1"),
        ("--prompts 16", "there is no file 16"),
        ("--prompts {there}/empty.txt", "holds no prompt"),
        ("--prompts {there}/latin.txt", "latin.txt"),
        ("--model {there}/nowhere", "no model_index.json"),
        ("--model {there}/image-model", "this script measures WanPipelines"),
        ("--adapter {there}/nowhere", "neither a folder nor a hub id"),
        ("--adapter {there}/other-adapter", "this model's transformer differs"),
        ("--adapter {there}/cut-embedded", "is not a whole safetensors file"),
        ("--output {there}/empty.txt", "empty.txt is a file"),
        ("--output /proc/here", "not writable"),
    ],
    "schedules": [
        ("--schedules 1x2x2:3", "adds up to 3 steps"),
        ("--schedules 1x2x2+1x4x4@0.5:40", "the first step has no x0 yet"),
        ("--schedules 1x2x2:39,1x2x2+1x4x4@2:1", "between 0 and 1, not '2'"),
        ("--schedules 1x2x2:39,1x2x2+1x8x8@0.5:1", "1x8x8 in the schedule is not a patch size of this model"),
        ("--captions 0", "must be at least 1"),
        ("--skip -1", "must be at least 1"),
        ("--skip 99999", "leaves no caption"),
        ("--model {there}/nowhere", "no model_index.json"),
        ("--adapter {there}/nowhere", "neither a folder nor a hub id"),
        ("--dtype float8", "invalid choice: 'float8'"),
    ],
    "latency": [
        ("--architecture wan9", "invalid choice: 'wan9'"),
        ("--budgets 1", "above 0 and below 1"),
        ("--budgets nan", "not nan"),
        ("--budgets 0.001", "the least is"),
        ("--batch 0", "must be at least 1"),
        ("--batch 2 -2", "must be at least 1"),
        ("--rounds 0", "must be at least 1"),
        ("--steps x", "not x"),
        ("--height 60", "a multiple of 8, such as 64"),
        ("--frames 16", "1 + a multiple of 4"),
        ("--device cuda:9", "no CUDA device 9"),
        ("--device banana", "'banana' is no device"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--output {there}/empty.txt/here", "empty.txt is a file"),
        ("--output /proc/here", "not writable"),
    ],
    "adherence": [
        ("--seen 0", "--seen must be at least 1"),
        ("--held-out -1", "--held-out must be at least 1"),
        ("--seeds 0", "--seeds must be at least 1"),
        ("--batch 0", "--batch must be at least 1"),
        ("--arms best", "there is no arm best"),
        ("--arms direct-adapter-0.25", "there is no arm direct-adapter-0.25"),
        ("--dtype float16", "invalid choice: 'float16'"),
        ("--model {there}/nowhere", "no model_index.json"),
        ("--model {there}/without-weights", "transformer has no weights"),
        ("--adapter {there}/nowhere", "neither a folder nor a hub id"),
        ("--adapter {there}/other-adapter", "this model's transformer differs"),
        ("--output {there}/empty.txt", "empty.txt is a file"),
        ("--output {there}/other-adherence", "is of another model, adapter, dtype or other prompts"),
        ("--output {there}/broken-adherence", "is not JSON"),
    ],
    "spectrum": [
        ("--cutoff 1", "above 0 and below 1"),
        ("--cutoff nan", "not nan"),
        ("--every 0", "--every must be at least 1"),
        ("--max-prompts 0", "must be at least 1"),
        ("--prompts -3", "there is no file -3"),
        ("--prompts {there}/folder", "is a folder"),
        ("--model {there}/nowhere", "no model_index.json"),
        ("--model {there}/cut-weights", "is not a whole safetensors file"),
        ("--output {there}/empty.txt", "empty.txt is a file"),
    ],
    "x0_error": [
        ("--clips 0", "--clips must be at least 1"),
        ("--adapters {there}/nowhere", "neither a folder nor a hub id"),
        ("--adapters {there}/other-adapter", "this model's transformer differs"),
        ("--model {there}/folder", "no model_index.json"),
        ("--output {there}/empty.txt", "empty.txt is a file"),
    ],
    "planning": [
        ("--runs 0", "--runs must be at least 1"),
        ("--output {there}/planning.txt", "the output must be an .json file"),
        ("--output {there}/empty.txt/planning.json", "empty.txt is a file"),
    ],
    "budget_picture": [
        ("--budgets 2", "above 0 and up to 1"),
        ("--budgets 0.01", "the least is"),
        ("--seed -1", "the seed must be"),
        ("--output {out}/budgets.mp4", "must be an .png or"),
        ("--output {there}/folder.png", "is a folder"),
    ],
    "data_speed": [
        ("--config {there}/missing.yaml", "no config file at"),
        ("--config {there}/unknown.yaml", "colour: Extra inputs are not permitted"),
        ("--rounds 0", "--rounds must be at least 1"),
        ("--clips null", "names no folder of clips"),
        ("--clips.folder {there}/nowhere", "does not exist"),
        ("--base {there}/nowhere", "nowhere"),
        ("--objective shared --distill.rank null", "must be of the objective distill"),
        ("--before {there}/folder", "folder has no flexivid/train.py"),
        ("--processes 0", "--processes must be at least 1"),
        ("--precision fp8", "invalid choice: 'fp8'"),
        ("--output {there}/empty.txt/speed.json", "empty.txt is a file"),
    ],
    "pareto": [
        ("{there}/missing.json", "missing.json: No such file"),
        ("{there}/broken.json", "is not JSON"),
        ("{there}/latin.json", "latin.json is not UTF-8 text"),
        ("{there}/list.json", "holds no object"),
        ("{there}/no-budget.json", "is no results.json"),
        ("--metrics beauty", "invalid choice: 'beauty'"),
        ("--metrics ssim", "no arm has the metric ssim"),
        ("--leave-out magic", "there is no method magic"),
        ("--output {out}/pareto.txt", "must be an .png file"),
        ("--output {there}/empty.txt/pareto.png", "empty.txt is a file"),
    ],
    "adapters": [
        ("{there}/nowhere", "has no flexivid_config.json"),
        ("{there}/empty.txt", "has no flexivid_config.json"),
        ("{there}/broken-config", "is not JSON"),
        ("{there}/latin-config", "is not JSON"),
        ("{there}/cut-second", "is not a whole safetensors file"),
        ("{there}/second", "has no lora_adapter_metadata"),
        ("{there}/other-adapter", "differ in"),
        ("{adapter}", "both have weights for transformer"),
        ("--output {there}/empty.txt", "empty.txt is a file"),
        ("--output {there}/other-adapter", "is not empty"),
        ("{there}/own-adapter --output {there}/own-adapter", "is not empty"),
        ("--colour red", "unrecognized arguments"),
    ],
}
LINUX = Path("/proc").is_dir()  # where nobody can write
CASES = [(script, *case) for script, cases in TABLE.items() for case in cases if LINUX or "/proc" not in case[0]]


def write_files(there: Path) -> None:
    latin = "caf\xe9 au lait\n".encode("latin-1")
    texts = {
        "empty.txt": "\n \n",
        "twice.txt": "a circle\na circle\n",
        "empty.json": "",
        "broken.json": '{"schedule": [',
        "list.json": "[]",
        "no-budget.json": '{"schedule": [["1x2x2", "1x2x2"]]}',
        "broken.yaml": "steps: [1\n",
        "other-sweep/sweep.json": '{"seed": 7}',
        "broken-sweep/sweep.json": "{",
        "other-adherence/full-seed0.json": '{"identity": "another", "shown": []}',
        "broken-adherence/full-seed0.json": "{",
        "folder/notes.md": "",
        "cut-run/checkpoint-00000002.safetensors": "cut",
    }
    for name, text in texts.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text(text)
    for name in ("latin.txt", "latin.json"):
        (there / name).write_bytes(latin)
    for name in ("folder.mp4", "folder.png", "folder.json", "foreign-run"):
        (there / name).mkdir()
    row = {"arm": "full", "method": "full", "flops_ratio": 1.0, "seconds_ratio": 1.0}
    row["metrics"] = {"psnr": {"mean": 30.0, "low": 29.0, "high": 31.0}}
    (there / "results.json").write_text(json.dumps({"arms": [row]}))


def write_models(there: Path) -> None:
    tiny_pipeline().save_pretrained(there / "model")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(there / "model", there / name))

    def index(name: str, change) -> None:
        path = copy(name) / "model_index.json"
        path.write_text(change(json.loads(path.read_text())))

    index("broken-index", lambda content: "{")
    index("list-index", lambda content: "[]")
    index("nameless-index", lambda content: json.dumps(content).replace("_class_name", "class"))
    index("unknown-class", lambda content: json.dumps({**content, "_class_name": "TimeMachinePipeline"}))
    classes = {"image": "WanImageToVideo", "sister": "SkyReelsV2", "edit": "LucyEdit", "control": "WanVACE"}
    for name, pipeline in classes.items():
        named = {"_class_name": f"{pipeline}Pipeline"}
        index(f"{name}-model", lambda content, named=named: json.dumps(content | named))
    shutil.rmtree(copy("without-vae") / "vae")
    (copy("without-weights") / "transformer/diffusion_pytorch_model.safetensors").unlink()
    pickled = copy("pickled") / "transformer/diffusion_pytorch_model.safetensors"
    pickled.rename(pickled.with_suffix(".bin"))
    weights = copy("cut-weights") / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copy(there / "model/transformer/diffusion_pytorch_model.safetensors", there / "foreign-run" / CHECKPOINT)


CHECKPOINT = "checkpoint-00000002.safetensors"


def write_adapters(there: Path) -> None:
    for name, layers in (("own-adapter", 2), ("other-adapter", 3)):
        flex = attach(tiny_transformer(num_layers=layers))
        save_adapter(there / name, config_of(flex), {"transformer": flex})

    def copy(name: str, source: Path = there / "own-adapter") -> Path:
        return Path(shutil.copytree(source, there / name))

    (copy("without-tensors") / "flexivid.safetensors").unlink()
    for name, source in (("cut-adapter", there / "own-adapter"), ("cut-embedded", ADAPTER)):
        weights = copy(name, source) / "flexivid.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    for name, source in (("cut-second", there / "cut-embedded"), ("second", ADAPTER)):
        config = copy(name, source) / "flexivid_config.json"
        config.write_text(config.read_text().replace('"transformer"', '"transformer_2"'))
    save_file(load_file(there / "second" / LORA_NAME), there / "second" / LORA_NAME)  # without its metadata
    (copy("broken-config") / "flexivid_config.json").write_text("{")
    (copy("latin-config") / "flexivid_config.json").write_bytes(b'{"format": "\xe9"}')
    config = copy("unknown-key") / "flexivid_config.json"
    config.write_text(config.read_text().replace("{", '{"colour": "red",', 1))


def write_configs(there: Path) -> None:
    write_clip(there / "clips/a.mp4")
    (there / "clips/a.txt").write_text("a circle")
    clips = {"folder": str(there / "clips"), "cache": str(there / "cache"), "buckets": ["5x32x32"]}
    config = {"objective": "distill", "base": str(there / "model"), "steps": 2, "batch_size": 2, "clips": clips}
    config |= {"distill": {"modes": ["1x4x4"], "rank": 2}, "output": str(there / "unused")}
    (there / "train.yaml").write_text(yaml.safe_dump(config))
    (there / "unknown.yaml").write_text(yaml.safe_dump(config | {"colour": "red"}))


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("there")
    for write in (write_files, write_models, write_adapters, write_configs):
        write(folder)
    return folder


@pytest.fixture
def call(there, tmp_path, monkeypatch):
    """Runs a script's main with some arguments beside the right ones. Returns its exit code."""

    def read_weights(*args, **kwargs):
        raise AssertionError("weights were read")

    def run(script: str, words: str) -> int:
        places = {"there": there, "out": tmp_path / "out", "adapter": ADAPTER}
        filled = f"{RIGHT[script]} {words}".format(**places, open="[", weak=f"[{','.join(WEAK)}]")
        return main_of(script)(filled.split())

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", read_weights)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return run


def main_of(script: str):
    name = {"t2v": "pipelines.t2v", "train": "flexivid.train", "adapters": "flexivid.commands.adapters"}.get(
        script, script
    )
    return importlib.import_module(name).main


def contents(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("script", RIGHT)
def test_what_the_table_adds_to_is_right(call, script, tmp_path, monkeypatch):
    monkeypatch.setattr(flexivid, "plan", lambda *args, **kwargs: None)  # a second each
    if script in WRITES_AT_ONCE:
        assert call(script, "") == 0 and (tmp_path / "out").exists()
    else:
        with pytest.raises(AssertionError, match="weights were read"):
            call(script, "")


@pytest.mark.parametrize(("script", "words", "said"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_one_sentence_and_code_2(call, there, tmp_path, capfd, script, words, said):
    before = contents(there)
    assert call(script, words) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and said in lines[-1]
    assert len(lines) == 1, lines
    assert not (tmp_path / "out").exists() and contents(there) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("t2v", "--steps 0 --output {out}/clip.mp4", "--steps must be at least 1"),
        ("flexivid", "merge {there}/nowhere --output {out}", "has no flexivid_config.json"),
    ],
)
def test_as_a_process(there, tmp_path, script, words, said):
    start = ["-m", "flexivid"] if script == "flexivid" else [FILES[script]]
    command = [sys.executable, *start, *words.format(there=there, out=tmp_path / "out").split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and said in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
