"""`flexivid/train.py` with FSDP over CPU processes, which accelerate itself starts on accelerators only."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import accelerate  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402


class Sharded(accelerate.Accelerator):
    def __init__(self, **settings):
        super().__init__(**settings)
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )

    def prepare(self, *parts):
        student, *optimizers = super().prepare(*parts)
        blocks = student.transformer.blocks
        assert isinstance(student, FSDPModule) and all(isinstance(block, FSDPModule) for block in blocks)
        assert all(isinstance(parameter, DTensor) for parameter in student.parameters())
        return student, *optimizers


accelerate.Accelerator = Sharded
sys.argv[0] = str(ROOT / "flexivid/train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
