"""The filter of the spectrum experiment."""

import pytest
import torch

from spectrum import low_pass


@pytest.mark.parametrize("axes", [(-3,), (-2, -1)])
def test_low_pass_keeps_what_is_slow_and_takes_what_alternates(axes):
    slow = torch.ones(1, 1, 16, 16, 16)
    assert torch.allclose(low_pass(slow, axes, 0.5), slow, atol=1e-6)
    alternating = torch.ones(1, 1, 16, 16, 16)
    for axis in axes:
        signs = torch.tensor([1.0, -1.0]).repeat(alternating.shape[axis] // 2)
        alternating = alternating * signs.view([-1 if i == axis else 1 for i in range(-5, 0)])
    assert low_pass(alternating, axes, 0.5).square().mean() < 0.1 * alternating.square().mean()
    assert torch.allclose(low_pass(alternating, axes, 1.0), alternating, atol=1e-5)


def test_low_pass_does_not_wrap_the_end_into_the_beginning():
    step = (torch.arange(8) >= 6).float().view(1, 1, 8, 1, 1)
    filtered = low_pass(step, (-3,), 0.5).flatten()
    assert filtered[0].abs() < 0.1 and filtered[-1] > 0.8
