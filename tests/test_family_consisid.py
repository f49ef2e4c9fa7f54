"""ConsisID: a face beside the text, of every clip or of all, and what it costs."""

import diffusers
import pytest
import torch
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline
from families import attach, inputs, tiny, tiny_pipeline, with_text

from flexivid.sampling.flops import FlopCounter
from flexivid.training.config import Config
from flexivid.training.forecast import check_model

FACE = ("id_cond", "id_vit_hidden")


def of_clip(value, index: int):
    """An argument's rows of one clip; rotary tables, in tuples, are for all."""
    if isinstance(value, list):
        return [of_clip(part, index) for part in value]
    return value[index : index + 1] if isinstance(value, torch.Tensor) else value


def test_every_clip_sees_its_own_face():
    transformer = tiny("consisid")
    flex = attach(transformer, ["1x4x4"])
    call = inputs(transformer, (5, 8, 12))
    alone = [{name: of_clip(value, index) for name, value in call.items()} for index in range(2)]
    counter = FlopCounter(flex)
    assert dict(counter.costs(call)) == dict(counter.costs(alone[0]))
    flex.fix("1x4x4")
    with torch.no_grad():
        both, (first, second) = transformer(**call)[0], (transformer(**each)[0] for each in alone)
        other = transformer(**alone[0] | {name: alone[1][name] for name in FACE})[0]
    torch.testing.assert_close(both, torch.cat([first, second]), atol=1e-4, rtol=1e-3)
    assert (other - first).abs().max() > 1e-3


def test_without_a_face():
    """As its class can be configured."""
    transformer = tiny("consisid", is_train_face=False)
    call = inputs(transformer, (5, 8, 12))
    assert not set(FACE) & set(call)
    attach(transformer, ["1x4x4"]).fix("1x4x4")
    with torch.no_grad():
        assert transformer(**call)[0].isfinite().all()


def test_training_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers, "ConsisIDPipeline", ConsisIDPipeline)  # which asks for OpenCV
    with_text(tiny_pipeline("consisid")[0]).save_pretrained(tmp_path / "base")
    clips = {"folder": tmp_path, "cache": tmp_path / "cache", "buckets": ["17x64x96"]}
    config = Config(
        objective="distill",
        base=tmp_path / "base",
        output=tmp_path / "out",
        steps=1,
        batch_size=1,
        clips=clips,
        distill={"modes": ["1x4x4"], "rank": 4},
    )
    with pytest.raises(ValueError, match="takes image beside the prompt, .* cannot be trained yet"):
        check_model(config)
