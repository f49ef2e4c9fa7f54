"""What steps at a mixed patch size need of the steps before: where detail was, and what blocks added to each token."""

import torch

from flexivid.diffusion import Diffusion, Level
from flexivid.model.call import Call
from flexivid.model.flexible import FlexTransformer
from flexivid.model.mixed import predict_mixed, stock_with_residual
from flexivid.patches.choose import detail, largest
from flexivid.patches.mixed import Selection
from flexivid.patches.sizes import MixedSize, is_mixed_size, parse_mixed_size
from flexivid.sampling.schedule import WITH_RESIDUAL

Held = dict[int, tuple[torch.Tensor, ...]]


class Mixing:
    """Of one run.

    guidance_scale: by which fine blocks are chosen in the guided x0. is_batched: a call holds both guidance branches,
    the unconditional clips first.
    residuals: by transformer and guidance branch, what its blocks have added to each base token when it was last fine,
    (B, base tokens, D) in the precision of the model: for Wan2.1-1.3B at 480x832x81 100 MB a clip.
    selection: the fine blocks of the last mixed step.
    """

    def __init__(self, guidance_scale: float, is_batched: bool):
        self.guidance_scale, self.is_batched = guidance_scale, is_batched
        self.residuals: dict[tuple[FlexTransformer, int], torch.Tensor] = {}
        self.selection: Selection | None = None

    def stock(self, flex: FlexTransformer, call: Call) -> tuple:
        """What the powerful mode gives; keeps what its blocks have added."""
        output, self.residuals[flex, call.branch] = stock_with_residual(flex, call)
        return output

    def counted(self, flex: FlexTransformer, branch: int, name: str) -> str:
        """A patch size as its FLOPs are counted, see `Schedule.counted_name`; of two transformers each has its own."""
        return name + WITH_RESIDUAL if is_mixed_size(name) and (flex, branch) in self.residuals else name

    def predict(
        self,
        flex: FlexTransformer,
        call: Call,
        level: Level,
        diffusion: Diffusion,
        name: str,
        held: Held,
    ) -> torch.Tensor:
        """What a mixed patch size predicts. held: what the last step leaves, see `Run`."""
        size = parse_mixed_size(name)
        if call.branch == 0:
            self.selection = self._chosen(flex, call, size, held)
        residual = self.residuals.get((flex, call.branch))
        if residual is not None:
            residual = residual[-len(call.latents) :]
        return predict_mixed(flex, call, size.coarse, self.selection, diffusion, level, residual)

    def _chosen(self, flex: FlexTransformer, call: Call, size: MixedSize, held: Held) -> Selection:
        """The fine blocks of a step, the same in both guidance branches: those with most detail in the guided x0."""
        folding = flex.family.folding(call.arguments, flex.weak_modes[size.coarse].multiple, flex.base_patch)
        batch, channels = len(call.latents), flex.weak_modes[size.coarse].out_channels
        conditional, unconditional = (held[branch][0][:, :channels] if branch in held else None for branch in (0, 1))
        if batch < len(conditional):  # guidance has ended in a pipeline that batches both branches
            conditional, self.is_batched = conditional[-batch:], False
        if self.is_batched:
            unconditional, conditional = conditional.chunk(2)
        if unconditional is not None:
            conditional = unconditional + self.guidance_scale * (conditional - unconditional)
        selection = largest(detail(conditional, folding), folding, size.share)
        return selection.repeated(2) if self.is_batched else selection

    def drop(self) -> None:
        """Lets go of every tensor."""
        self.residuals, self.selection = {}, None
