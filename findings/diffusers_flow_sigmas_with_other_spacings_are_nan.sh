#!/usr/bin/env bash
# Guess:   use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas can be had together with use_flow_sigmas:
#          noise levels between 0 and 1, spaced otherwise, or an error.
# Happens: UniPC, DPM-Solver++ and DEIS space the levels of a variance-preserving model, from 157 down, and leave out
#          the flow's and its flow_shift. 1 minus such a level is below zero, so its logarithm, and with it the clip,
#          is NaN. No error, no warning. The one exception is UniPC with Karras: it converts them, and still ignores
#          flow_shift. Only FlowMatchEulerDiscreteScheduler spaces flow sigmas so.
# Where:   diffusers 0.42.1, torch 2.13.0, scipy 1.17.1; one constant clip as the data, of which the velocity is known
#          exactly, 12 steps.
# Seen:    first noise level and end of the clip for the spacings karras, exponential, beta
#          UniPC            0.99 with any shift, ends at the data    157 with any shift, NaN    157 with any shift, NaN
#          DPM-Solver++     157 with any shift, NaN                  157 with any shift, NaN    157 with any shift, NaN
#          DEIS             157 with any shift, NaN                  157 with any shift, NaN    157 with any shift, NaN
#          FlowMatchEuler   1.00, ends at the data                   1.00, ends at the data     1.00, ends at the data
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 scipy==1.17.1 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import diffusers
import torch

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
target = 0.5  # the data: one clip, constant
torch.manual_seed(0)
noise = torch.randn(1, 4, 2, 8, 8)


def sample(name, shift, spacing, steps=12):
    """(first sigma, distance of the end to the data), with the exact velocity"""
    kind = getattr(diffusers, name)
    spacing = {spacing: True} if spacing else {}
    flow = {"shift": shift} if name.startswith("FlowMatch") else FLOW | {"flow_shift": shift}
    scheduler, x = kind(**flow, **spacing), noise
    scheduler.set_timesteps(steps)
    first = float(scheduler.sigmas[0])
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        x = scheduler.step((x - target) / sigma, timestep, x).prev_sample
    return first, float((x - target).abs().max())


for name in (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
):
    for spacing in (None, *SPACINGS):
        (first, end), (shifted, shifted_end) = (sample(name, shift, spacing) for shift in (1.0, 8.0))
        print(f"{name:31} {str(spacing):22} starts at {first:8.4f}, with shift 8 at {shifted:8.4f}, ends {end:.3f}")
        bad = spacing and not name.startswith("FlowMatch")
        if bad and (name, spacing) != ("UniPCMultistepScheduler", "use_karras_sigmas"):
            assert first == shifted > 100 and end != end
        else:
            assert first <= 1 and end < 0.5 and (first == shifted or not bad)
PY
