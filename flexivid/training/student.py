"""The student of a distillation: a frozen transformer, what is trained beside it, and the losses that train it.

Trained are the coarse embedders, heads and patch-size embeddings, and a LoRA per weak mode; the base stays frozen,
so that the powerful mode stays exact.
"""

from operator import itemgetter

import torch
from diffusers.training_utils import cast_training_params

from flexivid.model.adapter import load_adapter, read_config
from flexivid.model.call import parts_of
from flexivid.model.family import Family
from flexivid.model.flexible import FlexTransformer
from flexivid.model.lora import add_lora
from flexivid.patches.sizes import parse_mode
from flexivid.tensors import on_rows
from flexivid.training.config import DistillConfig
from flexivid.training.noise import CHANNELS, CLEAN, STREAM_NOISE, STREAM_TIMESTEP, TEXT_LENGTH, State
from flexivid.training.parallel.sharding import block_classes


def arguments_of(family: Family, x_t: torch.Tensor, timestep: torch.Tensor, conditions: dict) -> dict:
    """Those of a forward at latents x_t (B, C, T, H, W).

    conditions: its other arguments, and what `noise` names beside them. Where all tokens are one sequence these are of
    one clip, and on the meta device as `Family.completed` leaves them.
    """
    if family.sequence is not None:
        text = conditions["encoder_hidden_states"][:, : int(conditions[TEXT_LENGTH][0])]
        streams = [conditions[name] for name in family.streams]
        noise_levels = float(timestep[0]), float(conditions[STREAM_TIMESTEP][0])
        call = family.sequence.laid_out(x_t, text, *streams, *noise_levels)
        # Layouts are read from values, which there are none of on the meta device.
        return on_rows(family.completed(call) if x_t.is_meta else call, lambda tensor: tensor.to(x_t.device))
    beside = [conditions[CHANNELS].to(x_t)] if CHANNELS in conditions else []
    others = {name: value for name, value in conditions.items() if name not in (CHANNELS, CLEAN, STREAM_NOISE)}
    return others | family.arguments_for(torch.cat([x_t, *beside], 1)) | {"timestep": timestep}


def predict(transformer: torch.nn.Module, family: Family, x_t, timestep, conditions: dict) -> torch.Tensor:
    """One forward, see `arguments_of`: the network's output, (B, C, T, H, W) float32.

    One a clip where all tokens are one sequence: clips have texts of different lengths in it, and one noise level each.
    """
    if family.sequence is not None and len(x_t) > 1:
        clips = [slice(number, number + 1) for number in range(len(x_t))]
        conditions_of = [on_rows(conditions, itemgetter(clip)) for clip in clips]
        outputs = [
            predict(transformer, family, x_t[clip], timestep[clip], own)
            for clip, own in zip(clips, conditions_of, strict=True)
        ]
        return torch.cat(outputs)
    call = arguments_of(family, x_t, timestep, conditions)
    output, *_ = parts_of(transformer(**call, return_dict=False))
    return family.latents(call | {"hidden_states": output}).float()


class Student(torch.nn.Module):
    """The transformer and its weak modes in one module, so that data parallelism sees every trained parameter."""

    def __init__(self, flex: FlexTransformer):
        super().__init__()
        self.transformer, self.weak_modes = flex.transformer, flex.weak_modes.requires_grad_(True)
        self._flex = [flex]  # in a list: it is no submodule
        self._no_split_modules = block_classes(flex.transformer)  # what accelerate shards by

    def forward(self, patch_sizes: list[str], x_t, timestep, conditions: dict) -> list[torch.Tensor]:
        """The network's output at each of the patch sizes."""
        flex, predictions = self._flex[0], []
        for patch_size in patch_sizes:
            flex.fix(patch_size)
            predictions.append(predict(self.transformer, flex.family, x_t, timestep, conditions))
        return predictions


def build_student(transformer: torch.nn.Module, settings: DistillConfig, component: str = "transformer") -> Student:
    """Freezes the transformer and attaches trainable weak modes and LoRA, from the stock weights or an adapter.

    Raises ValueError if that adapter is one of other modes, another rank or parametrisation, or of another model.
    """
    transformer.requires_grad_(False)
    flex = FlexTransformer(transformer, settings.modes, settings.parametrisation)
    if settings.adapter is None:
        add_lora(flex, settings.rank)
    else:
        config = read_config(settings.adapter)
        # Guided modes may be new.
        known = [mode for mode in settings.modes if mode in config.patch_sizes or not parse_mode(mode)[1]]
        asked = {"patch_sizes": known, "parametrisation": settings.parametrisation, "lora_rank": settings.rank}
        if config.guidance_scale is not None:
            asked["guidance_scale"] = settings.guidance_scale
        if differing := [
            f"{key} {getattr(config, key)} != {value}" for key, value in asked.items() if getattr(config, key) != value
        ]:
            raise ValueError(f"cannot go on from {settings.adapter}: {', '.join(differing)}")
        load_adapter(settings.adapter, config, {component: flex})
    flex.guidance_scale = settings.guidance_scale
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    student = Student(flex)
    # A frozen base may be in half precision; what is trained never is.
    cast_training_params(student, dtype=torch.float32)
    return student


def unfrozen_student(transformer: torch.nn.Module, settings: DistillConfig) -> Student:
    """Attaches weak modes, and no LoRA: all weights are trained with them."""
    return Student(FlexTransformer(transformer.requires_grad_(True), settings.modes, settings.parametrisation))


def weak_errors(student: torch.nn.Module, flex: FlexTransformer, patch_sizes: list[str], state: State) -> torch.Tensor:
    """x0_weak - x0_powerful, (modes, B, C, T, H, W); gradients reach the weak part only.

    A guided mode learns what guidance makes of two powerful predictions: u + w (c - u) (Meng et al., arXiv 2210.03142).
    """
    arguments = (state.x_t, state.timestep, state.conditions)
    guided = [parse_mode(patch_size)[1] for patch_size in patch_sizes]
    with torch.no_grad():
        (powerful,) = with_guidance = student([flex.powerful], *arguments)
        if any(guided):
            (unconditional,) = student([flex.powerful], state.x_t, state.timestep, state.unconditional)
            with_guidance = unconditional + flex.guidance_scale * (powerful - unconditional)
    weak = student(patch_sizes, *arguments)
    targets = [with_guidance if is_guided else powerful for is_guided in guided]
    differences = [output - target for output, target in zip(weak, targets, strict=True)]
    return torch.stack([state.x0_difference(flex.diffusion, difference) for difference in differences])


def distillation_loss(errors: torch.Tensor) -> torch.Tensor:
    """|| x0_weak - x0_powerful ||^2, mean over modes and clips (FlexiDiT, section 3.2, in x0)."""
    return errors.square().mean()


def corrected_distillation_loss(
    errors: torch.Tensor, errors_before: torch.Tensor, corrected: torch.Tensor, anchor: float
) -> torch.Tensor:
    """What is left of a weak prediction's error in an interleaved schedule (`budget.py`), and a share of the whole.

    There a weak step at t predicts x0_weak(t) + [x0_powerful(t_k) - x0_weak(t_k)], so that its error is e(t) - e(t_k):
    a weak mode may be wrong, as long as it stays equally wrong until the next powerful step.

    errors: e(t), (modes, B, C, T, H, W). errors_before: e(t_k) of the same clips and noise. corrected: (B,), whether
    there was a powerful step before. anchor: weight of || e(t) ||^2.
    """
    left = errors - corrected.view(1, -1, 1, 1, 1, 1) * errors_before
    return left.square().mean() + anchor * errors.square().mean()
