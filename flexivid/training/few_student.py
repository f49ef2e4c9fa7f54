"""The three networks of a few-step distillation, which are one base: the student, its teacher, and the fake score.

The student has a LoRA for every patch size of its steps, the model's own among them, the fake score one at that patch
size, and the teacher none. They are switched, not copied.
"""

import torch
from diffusers.training_utils import cast_training_params

from flexivid.model.adapter import load_adapter, read_config
from flexivid.model.family import patch_size_of
from flexivid.model.flexible import FlexTransformer
from flexivid.model.lora import add_lora
from flexivid.patches.sizes import format_patch_size, parse_mode
from flexivid.training.few_config import FewConfig
from flexivid.training.student import Student, predict

STUDENT, TEACHER, FAKE = "student", "teacher", "fake-score"


class FewStudent(Student):
    """Student, fake score and teacher in one module, so that data parallelism sees every trained parameter."""

    def forward(self, who: str, patch_size: str, x_t, timestep, conditions: dict) -> torch.Tensor:
        """The network's output, (B, C, T, H, W) float32. who: STUDENT, TEACHER or FAKE."""
        flex = self._flex[0]
        flex.fix(patch_size, {STUDENT: flex.powerful, FAKE: FAKE, TEACHER: None}[who])
        return predict(self.transformer, flex.family, x_t, timestep, conditions)


def build_few_student(transformer: torch.nn.Module, settings: FewConfig) -> FewStudent:
    """Freezes the transformer and attaches trainable weak modes and LoRA, from the stock weights or an adapter.

    Raises ValueError if that adapter lacks a patch size, has another rank or parametrisation, or is of another model.
    """
    transformer.requires_grad_(False)
    powerful = format_patch_size(patch_size_of(transformer.config))
    weak = [name for name in dict.fromkeys(settings.patch_sizes) if name != powerful]
    flex = FlexTransformer(transformer, weak, settings.parametrisation)
    guided = any(parse_mode(name)[1] for name in weak)
    more = [FAKE] if powerful not in settings.patch_sizes else [powerful, FAKE]
    if settings.adapter is None:
        add_lora(flex, settings.rank, more)
    else:
        config = read_config(settings.adapter)
        asked = {"parametrisation": settings.parametrisation, "lora_rank": settings.rank}
        if guided and config.guidance_scale is not None:
            asked["guidance_scale"] = settings.guidance_scale
        problems = [
            f"{key} {getattr(config, key)} != {value}" for key, value in asked.items() if getattr(config, key) != value
        ]
        problems += [f"it has no patch size {name}" for name in weak if name not in config.patch_sizes]
        if problems:
            raise ValueError(f"cannot go on from {settings.adapter}: {', '.join(problems)}")
        load_adapter(settings.adapter, config, {"transformer": flex}, more)
    flex.guidance_scale = settings.guidance_scale if guided else None
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    student = FewStudent(flex)
    # A frozen base may be in half precision; what is trained never is.
    cast_training_params(student, dtype=torch.float32)
    return student


def is_of_fake_score(name: str) -> bool:
    """Whether a trained parameter is one of the fake score, by its name in the student."""
    return f"-{FAKE}." in name
