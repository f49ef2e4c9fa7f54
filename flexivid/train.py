"""Trains the embedded model and flexivid adapters.

    flexivid train --config shapes-vae                                        # one process
    accelerate launch -m flexivid train --config shapes-base --optim.lr 1e-3  # as many as accelerate is configured for
    accelerate launch flexivid/train.py --config configs/shapes-flex.yaml     # the same, in a checkout

A run writes checkpoints, `log.jsonl`, pictures and its result to the config's `output`; started again, it goes on
from its last checkpoint. It exits with 2 for a mistake in what it was given, with 1 if it cannot go on.
"""

import os
import signal
import sys
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # Launched as a script, Python puts flexivid/ itself first on the path; what is imported is the package.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs  # noqa: E402
from diffusers.utils import logging as diffusers_logging  # noqa: E402
from huggingface_hub import HfApi  # noqa: E402

from flexivid import inputs  # noqa: E402
from flexivid.command_line import MISTAKES, Parser, refuse  # noqa: E402
from flexivid.devices import share_cores  # noqa: E402
from flexivid.shapes.data import check_words  # noqa: E402
from flexivid.shapes.pretrain import PretrainObjective, ShapesWorld  # noqa: E402
from flexivid.shapes.vae import VaeObjective  # noqa: E402
from flexivid.training.batches import clips_per_part  # noqa: E402
from flexivid.training.checkpoints import check_checkpoint  # noqa: E402
from flexivid.training.config import Config, load_config  # noqa: E402
from flexivid.training.distill import DistillObjective, build_student  # noqa: E402
from flexivid.training.few import FewObjective, build_few_student  # noqa: E402
from flexivid.training.few_forecast import few_forecast  # noqa: E402
from flexivid.training.finite import TrainingFailed  # noqa: E402
from flexivid.training.forecast import check_model, forecast  # noqa: E402
from flexivid.training.loop import train  # noqa: E402
from flexivid.training.meta import meta_pipeline  # noqa: E402
from flexivid.training.optimizers import check_optimizer  # noqa: E402
from flexivid.training.parallel.launch import from_main  # noqa: E402
from flexivid.training.parallel.sharding import check_sharding  # noqa: E402
from flexivid.training.shared import SharedObjective  # noqa: E402

OBJECTIVES = {
    "vae": VaeObjective,
    "pretrain": PretrainObjective,
    "distill": partial(DistillObjective, world=ShapesWorld()),
    "shared": partial(SharedObjective, world=ShapesWorld()),
    "few": partial(FewObjective, world=ShapesWorld()),
}
FORECASTS = {"distill": forecast, "few": few_forecast}
# Those that give a pipeline more patch sizes.
WITH_MODES = ("distill", "shared", "few")


def check_login(repository: str) -> None:
    """Raises ValueError if an adapter could not be uploaded once it is trained."""
    try:
        HfApi().whoami()
    except OSError as error:
        raise ValueError(f"push_to_hub {repository} needs a login, `hf auth login`: {error}") from None


def check_student(config) -> None:
    """Raises ValueError for modes, an adapter and an attention backend that the base cannot be trained with."""
    transformer = meta_pipeline(config).transformer
    with warnings.catch_warnings(action="ignore"), torch.device("meta"):
        if config.objective == "few":
            build_few_student(transformer, config.few)
        else:
            build_student(transformer, config.distill, config.component)
    try:
        if config.attention_backend is not None:
            transformer.set_attention_backend(config.attention_backend)
    except (RuntimeError, ImportError) as error:  # for one that is not installed
        raise ValueError(f"attention_backend {config.attention_backend} cannot be used here: {error}") from None


def missing_clips(config: Config) -> Path | None:
    """The folder or the file that a config names and that is not there: a dry run can do without."""
    source = config.clips and (config.clips.folder or config.clips.prompts)
    return source if source is not None and not source.exists() else None


def dry_run(config: Config, accelerator: Accelerator) -> None:
    if config.objective not in FORECASTS:
        raise ValueError(f"--dry-run is for {' and '.join(FORECASTS)}, not for {config.objective}")
    forecast_of = FORECASTS[config.objective]
    accelerator.print(forecast_of(config, accelerator.num_processes, accelerator.mixed_precision == "bf16"))
    if (missing := missing_clips(config)) is not None:
        accelerator.print(f"{missing} is not there yet: training needs it")


def launched(config: Config) -> Accelerator:
    """The processes of this launch. Raises ValueError for what they cannot do together, or with this config."""
    # Weak modes are drawn per step, so that the parameters of the others get no gradient in it.
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.objective in WITH_MODES)
    # The others wait while the main one samples or encodes.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(kwargs_handlers=[unused, patience], log_with=config.trackers, project_dir=config.output)
    if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
        raise ValueError("started as several processes that do not see each other: accelerate launch, on a CPU --cpu")
    if missing := set(config.trackers) - {tracker.value for tracker in accelerator.log_with}:
        raise ValueError(f"the tracker {missing.pop()} is not installed: install it, or leave it out of trackers")
    check_sharding(accelerator, config)
    clips_per_part(config, config.batch_size, accelerator.num_processes)
    from_main(accelerator, lambda: check_checkpoint(config))  # hashes the base
    return accelerator


def check_config(config: Config) -> None:
    """Raises ValueError for what can be seen before anything is started."""
    if config.objective in WITH_MODES and config.base is None:
        raise ValueError("base must be the pipeline that is trained, a folder or a hub id")
    check_words(config.data)
    check_optimizer(config)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="flexivid train", description=__doc__)
    parser.add_argument(
        "--config",
        required=True,
        help="YAML file, or the name of one that ships with flexivid; --section.key value overrides a setting",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what a distillation will cost, and stop")
    diffusers_logging.set_verbosity_error()
    try:
        arguments, overrides = parser.parse_known_args(argv)
        config = load_config(arguments.config, overrides)
        check_config(config)
        has_modes = config.objective in WITH_MODES
        inputs.check_output_folder(config.output)
        if has_modes and not arguments.dry_run:  # which needs configs alone
            inputs.check_model(config.base)
        accelerator = launched(config)
        if has_modes:
            check_model(config, with_clips=not arguments.dry_run or missing_clips(config) is None)
        if has_modes and not arguments.dry_run:
            check_student(config)
        if arguments.dry_run:
            dry_run(config, accelerator)
            return 0
        share_cores(int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
        if config.push_to_hub is not None:
            check_login(config.push_to_hub)
        objective = OBJECTIVES[config.objective](config, accelerator)
    except MISTAKES as error:
        return refuse(error)
    code = 0
    try:
        train(config, objective, accelerator)
    except TrainingFailed as error:
        if accelerator.is_main_process:
            print(f"\nerror: {error}", file=sys.stderr)
        code = 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save
    # Not within `train`: the models must be gone before the processes part, or they may wait for each other for ever.
    del objective
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return code


if __name__ == "__main__":
    sys.exit(main())
