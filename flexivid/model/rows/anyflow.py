"""AnyFlow (arXiv 2605.13724): Wan2.1 as a flow map, which is told the timestep that a step goes to as well."""

from dataclasses import replace

import torch

from flexivid.model.family import centred_tables
from flexivid.model.rows.common import example_tensors
from flexivid.model.rows.wan import WAN
from flexivid.patches.folding import Folding


def _anyflow_rope(module, stock, folding: Folding, layout_cfg, device) -> dict[str, torch.Tensor]:
    """Phasors (1, 1, tokens, D / 2), for queries and keys alike, from the sizes of the token grid."""
    frames, *sides = folding.grid
    base = stock(layout_cfg={**layout_cfg, "total_frames": frames, "full_frame_shape": tuple(sides)}, device=device)
    table = base["query"][0, 0]
    phasors = torch.complex(*centred_tables((table.real, table.imag), folding, token_axis=0))[None, None]
    return {"query": phasors, "key": phasors}


def _anyflow_example(config, size, length):
    call = example_tensors(config, size, length, "text_dim")
    timesteps = {
        "timestep": torch.empty(1, size[0], device="meta"),
        "r_timestep": torch.empty(1, size[0], device="meta"),
    }
    return call | ANYFLOW.arguments_for(call["hidden_states"]) | timesteps


ANYFLOW = replace(
    WAN,
    name="anyflow",
    transformer_class="AnyFlowTransformer3DModel",
    centred=_anyflow_rope,
    positions_of_sizes=False,  # it is asked by keyword, and keeps its table itself
    guidance="batched",
    example=_anyflow_example,
    layout="b t c h w",
    frame_timesteps="b t",
    # From t to r the coarse pass goes from t' to r', both the noise levels of a mean: `diffusion` says why that is
    # the one consistent choice, and tests/test_flow_maps.py what others get wrong. Clean frames of image-to-video are
    # told r as the others are, as in the stock pipeline.
    destination="r_timestep",
    loose="its positions come as a table for queries and one for keys, and those of mixed tokens do not",
)
