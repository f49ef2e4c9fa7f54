"""Two processes share the tokens of a Wan transformer: what each of them gets, enabled before and after flexivid.

diffusers starts context parallel on accelerators only, so that it is told of one here.
"""

import torch
import torch.distributed
from conftest import forward_inputs, tiny_transformer
from diffusers import ContextParallelConfig
from torch.distributed.device_mesh import init_device_mesh

import flexivid


@torch.no_grad()
def main() -> None:
    torch.distributed.init_process_group("gloo")
    torch.accelerator.device_count = lambda: 1
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
    call = forward_inputs(width=16, length=8)

    def output(transformer):
        return transformer(**call, return_dict=False)[0]

    alone = tiny_transformer()
    stock = output(alone)
    flexivid.enable(alone, schedule="1x4x4")
    weak = output(alone)
    for flexivid_first in (False, True):
        transformer = tiny_transformer()
        if flexivid_first:
            flexivid.enable(transformer, schedule="1x4x4")
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
        if not flexivid_first:
            flexivid.enable(transformer, schedule="1x4x4")
        torch.testing.assert_close(output(transformer), weak, atol=1e-5, rtol=1e-5)
        flexivid.disable(transformer)
        torch.testing.assert_close(output(transformer), stock, atol=1e-5, rtol=1e-5)
    print("equal\n", end="", flush=True)  # in one piece: the other process prints too
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
