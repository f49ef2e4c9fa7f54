"""The stock layers that weak modes stand in for, patch embedder and output head, and what was done to them since.

A user's LoRA, a fused one, or any other change of their weights has to reach the weak modes too.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers.utils.peft_utils import scale_lora_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

CASTING = "layerwise_casting"  # the name of diffusers' hook
# Of a layer: its weight and its bias.
Weights = tuple[Tensor, Tensor]


def hook_of(layer: nn.Module, name: str):
    """A hook of diffusers by its name, or None."""
    registry = getattr(layer, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def working_dtype(layer: nn.Module) -> torch.dtype:
    """What a layer computes in: under diffusers' layerwise casting it is stored in less."""
    casting = hook_of(layer, CASTING)
    if casting is not None:
        return casting.compute_dtype
    stored = layer.weight if layer.bias is None else layer.bias
    return stored.dtype if stored.is_floating_point() else layer.compute_dtype  # as quantisers call it


def bias_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """The bias of a layer; zeros where it has none, beside its weight."""
    return weight.new_zeros(len(weight)) if layer.bias is None else layer.bias


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer in floating point, whatever a quantiser has made of it."""
    return dense_weights(layer)[0]


@torch.no_grad()
def dense_weights(layer: nn.Module) -> Weights:
    """The weight and bias of a layer in what it computes in.

    Raises ValueError if it is no linear layer or convolution over patches, or a quantiser's that cannot be asked.
    """
    try:
        weight, dtype = layer.weight, working_dtype(layer)
        offloaded = weight.device.type == "meta" and hasattr(layer, "_hf_hook")  # accelerate has it, and brings it
        if isinstance(weight, DTensor) or (type(weight) is nn.Parameter and not offloaded):
            return weight.to(dtype), bias_of(layer, weight).to(dtype)
        weight, bias = response(layer, layer)
    except Exception as error:
        raise ValueError(
            f"weak modes are made from the weights of the patch embedder and the output layer, and those of this "
            f"{type(layer).__name__} can be neither read nor asked for ({error}): do not quantise these two"
        ) from None
    return weight.to(dtype), bias.to(dtype)


@torch.no_grad()
def response(layer: nn.Module, base: nn.Module) -> Weights:
    """What a layer does to unit vectors, which is its weight and bias, float32. base: what `layer` may wrap.

    Quantisers store weights in their own ways, and peft adds to them in its own, but every layer can be asked.
    """
    # Long ones, beside which the bias is small, since the sum is rounded to the layer's precision.
    length, dtype, device = 1024, working_dtype(base), (base.weight if base.bias is None else base.bias).device
    device = getattr(getattr(base, "_hf_hook", None), "execution_device", None) or device
    shape = (base.in_features,) if hasattr(base, "in_features") else (base.in_channels, *base.kernel_size)
    count = torch.Size(shape).numel()
    units = torch.eye(count, device=device, dtype=dtype).view(count, *shape)
    with torch.autocast(device_type=units.device.type, enabled=False):
        bias = layer(torch.zeros_like(units[:1])).float().flatten()
        weight = (layer(length * units).flatten(1).float() - bias) / length
    return weight.T.reshape(-1, *shape), bias


class StockLayer:
    """An embedder or a head, wherever peft has put it.

    layer: the layer itself, on which hooks stay, whatever wraps it later.
    """

    def __init__(self, transformer: nn.Module, path: str):
        parent, _, self._name = path.rpartition(".")
        self._parent = transformer.get_submodule(parent)
        self.layer = self.outer
        for wrapper in _wrappers(self.outer):
            self.layer = wrapper.base_layer
        # Beside which the weak modes were made.
        self._first: Weights = tuple(tensor.clone() for tensor in dense_weights(self.layer))
        self._reference = self._present = self._first
        self._change: Weights | None = None
        self._seen: list = []
        self._settings: list = []
        self._adapters: list[Tensor] = []
        self._set_aside: list[tuple[BaseTunerLayer, str | list[str]]] = []

    def run(self, x: Tensor) -> Tensor:
        """What the layer gives with all that peft has wrapped around it, also where that is bypassed."""
        for wrapper, active in self._set_aside:
            wrapper._active_adapter = active
        try:
            return self.outer(x)
        finally:
            for wrapper, _ in self._set_aside:
                wrapper._active_adapter = []

    @property
    def outer(self) -> nn.Module:
        """The layer, or what peft has wrapped around it."""
        return self._parent._modules[self._name]

    def to_train_beside(self) -> Weights:
        """The weights that weak modes are trained beside: where frozen those of before, since FSDP leaves shards."""
        return dense_weights(self.layer) if self.layer.weight.requires_grad else self._first

    def trained_beside(self, reference: Weights) -> None:
        """Weak modes were trained beside these weights, in half precision: what differs now was done since.

        Raises ValueError if they are of another shape.
        """
        shapes, own = ([tuple(tensor.shape) for tensor in weights] for weights in (reference, self._reference))
        if shapes != own:
            raise ValueError(f"weights of shape {shapes} were stored where the model has {own}")
        weight = self.layer.weight
        lossy = type(weight) is not nn.Parameter or weight.is_meta or hook_of(self.layer, CASTING) is not None
        if not lossy and not _same_up_to_rounding(self._reference, reference):
            self._reference, self._present, self._seen = reference, reference, []

    def change(self, scale: float = 1.0, anew: bool = True) -> Weights | None:
        """By how much weight and bias now differ from the reference, float32; None where they do not.

        The same object until something changes. scale: of `attention_kwargs`, which holds for a user's LoRA. anew: look
        at the weights themselves. What is fused or written through `.data` leaves no mark, so that a pipeline's call
        has to begin with this; in the steps after, marks do, in microseconds.
        """
        outer, settings = self.outer, [scale]
        for wrapper in _wrappers(outer):
            if wrapper.disable_adapters and wrapper.merged:
                wrapper.unmerge()  # as its forward does
            settings += wrapper, tuple(wrapper.active_adapters), wrapper.disable_adapters, wrapper.merged_adapters[:]
            settings += getattr(wrapper, "scaling", {}).values()
        if anew or settings != self._settings:
            self._settings = settings
            self._adapters = [] if outer is self.layer else list(outer.parameters())
        marks = settings.copy()
        for tensor in (*self.layer._parameters.values(), *self._adapters):
            marks += _marks(tensor)
        if (anew or marks != self._seen) and self._is_readable():
            self._seen = marks
            present = self._weights_of(outer, scale)
            if not _equal(present, self._present):
                self._present = tuple(tensor.clone() for tensor in present)
                self._change = _difference(present, self._reference)
        return self._change

    def _is_readable(self) -> bool:
        if self.layer.weight.device.type == "meta":
            return hasattr(self.layer, "_hf_hook")
        offload = hook_of(self.layer, "group_offloading")  # to disk, memory is not filled between forwards
        return offload is None or offload.group.offload_to_disk_path is None

    @torch.no_grad()
    def _weights_of(self, outer: nn.Module, scale: float) -> Weights:
        weights = dense_weights(self.layer)
        active = [wrapper for wrapper in _wrappers(outer) if _is_active(wrapper)]
        if not active:
            return weights
        scaling = [(wrapper.scaling, dict(wrapper.scaling)) for wrapper in active if scale != 1]
        scale_lora_layers(outer, scale)
        try:
            adapted, plain = response(outer, self.layer), response(self.layer, self.layer)
        finally:
            for present, before in scaling:
                present.update(before)
        return tuple(
            tensor + (new - old).to(tensor.device) for tensor, new, old in zip(weights, adapted, plain, strict=True)
        )


@contextmanager
def bypassed(layers: Iterable[StockLayer]) -> Iterator[None]:
    """Within, what peft has wrapped around the layers gives what these give, and adds nothing of its own."""
    layers = list(layers)
    for stock in layers:
        stock._set_aside = [(wrapper, wrapper._active_adapter) for wrapper in _wrappers(stock.outer)]
        for wrapper, _ in stock._set_aside:
            wrapper._active_adapter = []
    try:
        yield
    finally:
        for stock in layers:
            for wrapper, active in stock._set_aside:
                wrapper._active_adapter = active
            stock._set_aside = []


def _wrappers(layer: nn.Module) -> Iterator[BaseTunerLayer]:
    """peft's, outermost first."""
    while isinstance(layer, BaseTunerLayer):
        yield layer
        layer = layer.base_layer


def _is_active(wrapper: BaseTunerLayer) -> bool:
    """Whether its forward does more than that of its base layer."""
    idle = wrapper.disable_adapters or wrapper.merged
    return not idle and not wrapper._get_available_adapters().isdisjoint(wrapper.active_adapters)


def _marks(tensor: Tensor) -> tuple:
    """What changes with a tensor, as far as that can be seen without reading it."""
    if type(tensor) is nn.Parameter and not tensor.is_inference():
        return tensor.data_ptr(), tensor._version
    return (id(tensor),)


def _equal(weights: Weights, others: Weights) -> bool:
    return all(
        a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(weights, others, strict=True)
    )


def _same_up_to_rounding(weights: Weights, reference: Weights) -> bool:
    """Whether the reference, to which weights are compared, was only stored or loaded in another precision."""
    # Rounding to bfloat16, and what half precision loses below its smallest number.
    rounding = {"rtol": 2**-8, "atol": 1e-7}
    return all(
        torch.allclose(a.float(), b.to(a.device).float(), **rounding) for a, b in zip(weights, reference, strict=True)
    )


def _difference(weights: Weights, reference: Weights) -> Weights | None:
    if _same_up_to_rounding(weights, reference):
        return None
    return tuple(a.float() - b.to(a.device).float() for a, b in zip(weights, reference, strict=True))
