"""`flexivid/train.py` with ZeRO over CPU processes, which accelerate itself starts on accelerators only.

The stage is that of FLEXIVID_ZERO_STAGE.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["DS_ACCELERATOR"] = "cpu"
STAGE = int(os.environ.get("FLEXIVID_ZERO_STAGE", "2"))

import accelerate  # noqa: E402
import deepspeed  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DeepSpeedPlugin, DistributedType  # noqa: E402
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402


class Zero(accelerate.Accelerator):
    def __init__(self, **settings):
        super().__init__(**settings)
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        plugin = DeepSpeedPlugin(zero_stage=STAGE)
        plugin.set_mixed_precision(self.state._mixed_precision)
        plugin.select(_from_accelerator_state=True)
        self.state.deepspeed_plugins = {"default": plugin}
        self.native_amp = False
        self.deepspeed_engine_wrapped = None

    def prepare(self, *parts):
        engine, optimizer = super().prepare(*parts)
        assert isinstance(engine, deepspeed.DeepSpeedEngine) and isinstance(optimizer.optimizer, DeepSpeedZeroOptimizer)
        assert isinstance(self.deepspeed_engine_wrapped, DeepSpeedEngineWrapper)
        assert engine.zero_optimization_stage() == STAGE and engine.dp_world_size == self.num_processes
        (partition,) = optimizer.optimizer.optimizer.param_groups[0]["params"]
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        assert partition.dtype == torch.float32 and all(p.dtype == torch.float32 for p in trained)
        assert partition.numel() <= sum(p.numel() for p in trained) // self.num_processes + 8, "moments are not split"
        return engine, optimizer


accelerate.Accelerator = Zero
sys.argv[0] = str(ROOT / "flexivid/train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
