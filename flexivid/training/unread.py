"""Settings that would do nothing, because the objective or another setting leaves them unread: they are refused."""

from collections.abc import Callable

from pydantic import BaseModel

REMEDY = "leave it out; on the command line, null takes a setting out"

# Settings and sections that not every objective reads -> those that do.
READ_BY = {
    "component": {"distill"},
    "flow_shift": {"pretrain", "distill", "shared", "few"},
    "base_dtype": {"distill", "shared", "few"},
    "gradient_checkpointing": {"pretrain", "distill", "shared", "few"},
    "compile": {"pretrain", "distill", "shared", "few"},
    "attention_backend": {"pretrain", "distill", "shared", "few"},
    "push_to_hub": {"distill", "few"},
    "data.clips": {"pretrain", "distill", "shared"},
    "data.cache": {"pretrain", "distill", "shared"},
    "data.text_lengths": {"pretrain", "distill", "shared", "few"},
    "data.drop_caption": {"pretrain", "distill", "shared"},
    "data.word_weights": {"pretrain", "distill", "shared", "few"},
    "clips": {"distill", "shared", "few"},
    "clips.drop_caption": {"distill", "shared"},
    "clips.teacher_steps": {"distill", "shared"},
    "clips.teacher_guidance": {"distill", "shared"},
    "clips.held_out": {"distill", "shared"},
    "validation": {"distill", "shared", "few"},
    "validation.budgets": {"distill", "shared"},
    "validation.guidance_scale": {"distill", "shared"},
    "vae": {"vae"},
    "transformer": {"pretrain"},
    "distill": {"distill", "shared"},
    **{
        f"distill.{name}": {"distill"}
        for name in (
            *("modes_per_step", "mode_weights", "rank", "adapter", "correction_gap", "anchor"),
            *("on_policy", "on_policy_every", "on_policy_clips", "on_policy_budget"),
        )
    },
    "distill.teacher_weight": {"shared"},
    "few": {"few"},
}

# (settings, why they are not read, when that is so)
NEEDS: list[tuple[tuple[str, ...], str, Callable[[BaseModel], bool]]] = [
    (("data",), "clips are trained on instead of the rendered world", lambda c: c.clips is not None),
    (("validation.prompts", "validation.budgets"), "they need clips", lambda c: c.clips is None),
    (
        ("validation.steps", "validation.guidance_scale"),
        "they need clips or distill.on_policy",
        lambda c: c.clips is None and not c.distill.on_policy and c.objective != "few",
    ),
    (
        ("clips.teacher_steps", "clips.teacher_guidance"),
        "they are for clips.prompts",
        lambda c: c.clips is not None and c.clips.prompts is None,
    ),
    (
        ("distill.on_policy_every", "distill.on_policy_clips", "distill.on_policy_budget"),
        "distill.on_policy is 0",
        lambda c: not c.distill.on_policy,
    ),
    (("few.warmup_every", "few.warmup_clips"), "few.warmup_steps is 0", lambda c: not c.few.warmup_steps),
    (("distill.anchor",), "distill.correction_gap is 0", lambda c: not c.distill.correction_gap),
    (("optim.muon_lr",), "optim.name is not muon", lambda c: c.optim.name != "muon"),
    (("vae.base_dim", "vae.z_dim", "vae.kl"), "they are those of base", lambda c: c.base is not None),
    (("vae.latent_noise",), "it is for a decoder that is trained on, from a base", lambda c: c.base is None),
    (("vae.image_batch",), "vae.image_steps is 0", lambda c: not c.vae.image_steps),
    (("transformer.image_batch",), "transformer.image_steps is 0", lambda c: not c.transformer.image_steps),
]


def _is_set(config: BaseModel, name: str) -> bool:
    """Whether somebody gave a value to `section.key`; `null` is none."""
    *sections, key = name.split(".")
    for section in sections:
        if section not in config.model_fields_set or getattr(config, section) is None:
            return False
        config = getattr(config, section)
    return key in config.model_fields_set and getattr(config, key) is not None


def check_all_is_read(config: BaseModel) -> None:
    """Raises ValueError that names the settings which nothing would read, and why. config: a `Config`."""
    unread = [name for name, readers in READ_BY.items() if config.objective not in readers and _is_set(config, name)]
    # Of a section that is not read as a whole, the section says it.
    unread = [name for name in unread if name.split(".")[0] not in unread or "." not in name]
    if unread:
        raise ValueError(f"{config.objective} does not read {', '.join(unread)}: {REMEDY}")
    for names, reason, applies in NEEDS:
        if applies(config) and (unread := [name for name in names if _is_set(config, name)]):
            raise ValueError(f"{', '.join(unread)} would not be read, because {reason}: {REMEDY}")
