"""Trains the embedded model and flexivid adapters.

    accelerate launch flexivid/train.py --config configs/shapes-vae.yaml
    accelerate launch flexivid/train.py --config configs/shapes-base.yaml --optim.lr 1e-3
    accelerate launch flexivid/train.py --config configs/shapes-flex.yaml

A run writes checkpoints, `log.jsonl`, pictures and its result to the config's `output`; started again, it goes on
from its last checkpoint.
"""

import os
import signal
import sys
import warnings
from datetime import timedelta
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
from flexivid.training.checkpoints import check_checkpoint  # noqa: E402
from flexivid.training.config import load_config  # noqa: E402
from flexivid.training.distill import build_student  # noqa: E402
from flexivid.training.forecast import check_model, forecast  # noqa: E402
from flexivid.training.loop import check_optimizer, clips_per_part, train  # noqa: E402
from flexivid.training.parallel.sharding import check_sharding  # noqa: E402


def build_objective(config, accelerator):
    if config.objective == "pretrain" and not (config.base and config.base.is_dir()):
        raise ValueError(f"base must be the folder of what pretrain starts from, not {config.base}")
    if config.objective == "vae":
        from flexivid.shapes.vae import VaeObjective as Objective
    elif config.objective == "pretrain":
        from flexivid.shapes.pretrain import PretrainObjective as Objective
    elif config.objective == "shared":
        from flexivid.training.shared import SharedObjective as Objective
    else:
        from flexivid.training.distill import DistillObjective as Objective
    return Objective(config, accelerator)


def check_login(repository: str) -> None:
    """Raises ValueError if an adapter could not be uploaded once it is trained."""
    try:
        HfApi().whoami()
    except OSError as error:
        raise ValueError(f"push_to_hub {repository} needs a login, `hf auth login`: {error}") from None


def check_student(config) -> None:
    """Raises ValueError for modes, an adapter and an attention backend that the base cannot be trained with."""
    transformer = getattr(inputs.empty_pipeline(config.base), config.component)
    with warnings.catch_warnings(action="ignore"), torch.device("meta"):
        build_student(transformer, config.distill, config.component)
    try:
        if config.attention_backend is not None:
            transformer.set_attention_backend(config.attention_backend)
    except (RuntimeError, ImportError) as error:  # for one that is not installed
        raise ValueError(f"attention_backend {config.attention_backend} cannot be used here: {error}") from None


def dry_run(config, accelerator) -> int:
    if config.objective != "distill":
        raise ValueError(f"--dry-run is for distill, not for {config.objective}")
    text = forecast(config, accelerator.num_processes, accelerator.mixed_precision == "bf16")
    accelerator.print(text)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file; --section.key value overrides a setting")
    parser.add_argument("--dry-run", action="store_true", help="print what a distillation will cost, and stop")
    diffusers_logging.set_verbosity_error()
    try:
        arguments, overrides = parser.parse_known_args(argv)
        config = load_config(arguments.config, overrides)
        has_modes = config.objective in ("distill", "shared")
        if has_modes and config.base is None:
            raise ValueError("base must be the pipeline that is trained, a folder or a hub id")
        inputs.check_output_folder(config.output)
        if has_modes and not arguments.dry_run:  # which needs configs alone
            inputs.check_model(config.base)
        check_checkpoint(config)
        check_optimizer(config)
        # Weak modes are drawn per step, so that the parameters of the others get no gradient in it.
        unused = DistributedDataParallelKwargs(find_unused_parameters=has_modes)
        # The others wait while the main one samples or encodes.
        patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
        accelerator = Accelerator(
            kwargs_handlers=[unused, patience], log_with=config.trackers, project_dir=config.output
        )
        if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
            raise ValueError(
                "started as several processes that do not see each other: accelerate launch, on a CPU --cpu"
            )
        if missing := set(config.trackers) - {tracker.value for tracker in accelerator.log_with}:
            raise ValueError(f"the tracker {missing.pop()} is not installed: install it, or leave it out of trackers")
        check_sharding(accelerator, config)
        clips_per_part(config, config.batch_size, accelerator.num_processes)
        if has_modes:
            check_model(config)
        if has_modes and not arguments.dry_run:
            check_student(config)
        if arguments.dry_run:
            return dry_run(config, accelerator)
        share_cores(int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
        if config.push_to_hub is not None:
            check_login(config.push_to_hub)
        objective = build_objective(config, accelerator)
    except MISTAKES as error:
        return refuse(error)
    train(config, objective, accelerator)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save
    # Not within `train`: the models must be gone before the processes part, or they may wait for each other for ever.
    del objective
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
