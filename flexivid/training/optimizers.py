"""Optimisers and the learning rate over the steps."""

from importlib.util import find_spec

import torch

from flexivid.training.config import Config, OptimConfig
from flexivid.training.few_student import is_of_fake_score


class FlatMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) that sees convolution kernels as (out, everything else) matrices."""

    def __init__(self, weights: list[torch.nn.Parameter], **settings):
        self.weights = weights
        # Views share storage with the weights. match_rms_adamw makes learning rates comparable to AdamW's.
        flat = [torch.nn.Parameter(weight.detach().flatten(1)) for weight in weights]
        super().__init__(flat, adjust_lr_fn="match_rms_adamw", **settings)

    def step(self, closure=None):
        for flat, weight in zip(self.param_groups[0]["params"], self.weights, strict=True):
            flat.grad = None if weight.grad is None else weight.grad.flatten(1)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True):
        super().zero_grad(set_to_none)
        for weight in self.weights:
            weight.grad = None


def check_optimizer(config: Config) -> None:
    """Raises ValueError if the optimiser is not installed."""
    if config.optim.name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise ValueError("optim.name adamw8bit is that of bitsandbytes, which is not here: pip install bitsandbytes")


def build_optimizers(config: Config, trainable: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon on hidden matrices and convolution kernels and AdamW on everything else.

    With `few` one for the student and one for the fake score. Each is the other's moving target: no momentum, as in
    DMD2 and Self-Forcing.
    """
    if config.objective != "few":
        return _optimizers(config.optim, trainable, betas=(0.9, 0.98))
    fake = {name: p for name, p in trainable.items() if is_of_fake_score(name)}
    student = {name: p for name, p in trainable.items() if name not in fake}
    parts = ((config.optim, student), (config.optim.model_copy(update={"lr": config.few.fake_lr}), fake))
    return [optimizer for optim, part in parts for optimizer in _optimizers(optim, part, betas=(0.0, 0.999))]


def _optimizers(
    optim: OptimConfig, trainable: dict[str, torch.nn.Parameter], betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    hidden = []
    if optim.name == "adamw8bit":  # Dettmers et al. 2022, arXiv 2110.02861
        from bitsandbytes.optim import AdamW8bit

        return [AdamW8bit(list(trainable.values()), lr=optim.lr, weight_decay=optim.weight_decay, betas=betas)]
    if optim.name == "muon":
        hidden = [name for name, p in trainable.items() if p.ndim >= 4 or (p.ndim == 2 and "blocks." in name)]
    rest = [p for name, p in trainable.items() if name not in hidden]
    optimizers = [torch.optim.AdamW(rest, lr=optim.lr, weight_decay=optim.weight_decay, betas=betas)]
    if hidden:
        weights = [trainable[name] for name in hidden]
        optimizers.append(FlatMuon(weights, lr=optim.muon_lr, weight_decay=optim.weight_decay))
    return optimizers


def learning_rate_factor(config: Config, step: int) -> float:
    """Linear warm-up, constant, linear decay to zero over the last `optim.decay` of the steps."""
    warmup = min(1.0, (step + 1) / max(config.optim.warmup, 1))
    decay_steps = max(config.optim.decay * config.steps, 1)
    return min(warmup, (config.steps - step) / decay_steps, 1.0)
