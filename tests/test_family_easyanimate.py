"""EasyAnimate: a forward that gives as many channels as it is given, of which a residual head has more."""

import pytest
import torch
from families import CHANNELS, attach, inputs, tiny

from flexivid.patches.folding import folding_for


@pytest.mark.parametrize(("parametrisation", "given"), [("snr", 5), ("direct", 4)])
def test_empty_channels_are_given_and_left_out(parametrisation, given):
    transformer = tiny("easyanimate")
    flex = attach(transformer, ["1x4x4"], parametrisation)
    flex.fix("1x4x4")
    taken, embedded = [], []
    transformer.proj.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    flex.weak_modes["1x4x4"].embedder.register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    call = inputs(transformer, (5, 8, 12))
    with torch.no_grad():
        assert transformer(**call)[0].shape == call["hidden_states"].shape
    assert taken[0].shape[1] == given * CHANNELS and not taken[0][:, 4 * CHANNELS :].any()
    folded = folding_for((5, 8, 12), (1, 2, 2), (1, 2, 2), True).fold(call["hidden_states"])
    found = embedded[0].unflatten(0, (2, 5)).transpose(1, 2)
    torch.testing.assert_close(found / found.norm(), folded / folded.norm())  # at another noise level
