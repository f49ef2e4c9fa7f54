#!/usr/bin/env bash
# Guess:   FlowMatchEulerDiscreteScheduler(shift=12) and set_shift(12) give the same noise levels, and with more steps
#          its error goes to zero.
# Happens: shift=12 shifts the smallest of the 1000 trained levels when it is built, and set_timesteps takes this as
#          the end of its grid and shifts it again. The last step starts at 0.126 whatever the number of steps, and
#          its error stays: a reference with 1000 steps is hardly better than one with 400. set_shift shifts once,
#          ends at 0.012 and converges; so do the levels of UniPC with flow_shift=12, handed over as sigmas. At 25 and
#          50 steps the high end does no harm.
# Where:   diffusers 0.42.1, torch 2.13.0; data of a normal distribution, of which velocity and exact end are known.
# Seen:    last noise level and error for 25, 50, 100, 400, 1000 steps
#          shift=12        0.126, 0.269  0.126, 0.160  0.126, 0.101  0.126, 0.055  0.126, 0.045
#          set_shift(12)   0.012, 0.347  0.012, 0.181  0.012, 0.093  0.012, 0.024  0.012, 0.010
#          UniPC's sigmas  0.339, 0.351  0.205, 0.188  0.118, 0.098  0.040, 0.026  0.023, 0.010
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

SHIFT, STD = 12.0, 0.5  # Wan2.2's shift; the data's standard deviation, of which velocity and exact end are known
torch.manual_seed(0)
noise = torch.randn(1, 4, 8, 8, 8, dtype=torch.float64)


def built(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps)
    return scheduler


def set_later(steps):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_shift(SHIFT)
    scheduler.set_timesteps(steps)
    return scheduler


def as_unipc(steps):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}
    other = UniPCMultistepScheduler(**flow)
    other.set_timesteps(steps)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=other.sigmas[:-1].numpy())
    return scheduler


def error(scheduler):
    x = noise
    variances = [(1 - float(sigma)) ** 2 * STD**2 + float(sigma) ** 2 for sigma in scheduler.sigmas]
    for timestep, sigma, variance in zip(scheduler.timesteps, scheduler.sigmas, variances):
        velocity = x * (float(sigma) - (1 - float(sigma)) * STD**2) / variance
        x = scheduler.step(velocity, timestep, x).prev_sample
    exact = noise * (variances[-1] / variances[0]) ** 0.5
    return float((x - exact).norm() / exact.norm())


STEPS = (25, 50, 100, 400, 1000)
for name, make in {"shift=12": built, "set_shift(12)": set_later, "UniPC's sigmas": as_unipc}.items():
    schedulers = [make(steps) for steps in STEPS]
    lasts, errors = [float(s.sigmas[-2]) for s in schedulers], [error(s) for s in schedulers]
    print(f"{name:15}", "  ".join(f"{last:.3f}, {e:.3f}" for last, e in zip(lasts, errors)))
    if make is built:
        assert min(lasts) > 0.12 and errors[-1] > 0.04
    else:
        assert lasts[-1] < 0.03 and errors[-1] < 0.02
PY
