"""All parameters of a training run in one vector, and AdamW on that vector.

The models here are small: hundreds of tensors of a few thousand numbers each. One vector makes an optimizer step a dozen
kernels instead of thousands, makes a checkpoint four tensors, and lets every decision (clipping, skipping a step that is not
finite) happen on the device, so that a whole training step can be captured as a CUDA graph.

The master copy, its average (EMA) and Adam's moments are fp32; the modules compute with a copy in `dtype` (bf16 on a GPU).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGN = 64  # numbers: 128 bytes in bf16, which matrix units and TMA loads ask of a tensor's start


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWConfig:
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01  # on matrices and filters, not on biases, norms and tables
    clip: float = 1.0  # largest norm of the gradient
    ema_decay: float = 0.999  # reached gradually: min(ema_decay, (1 + step) / (10 + step))


class FlatParameters:
    """Moves the parameters of `modules` into vectors and optimizes them.

    After construction the modules' parameters are views of `working`; `step_with` updates them in place. Names are
    "<module key>.<parameter name>". With `channels_last` filters lie in memory as cuDNN likes them.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        config: AdamWConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool = False,
    ) -> None:
        self.config = config
        self.modules = dict(modules)
        self.names = [f"{key}.{name}" for key, module in modules.items() for name, _ in module.named_parameters()]
        parameters = [p for module in modules.values() for p in module.parameters()]
        self.permuted = [channels_last and p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1 for p in parameters]
        self.shapes = [p.shape for p in parameters]
        self.offsets, end = [], 0
        for p in parameters:
            self.offsets.append(end)
            end += math.ceil(p.numel() / ALIGN) * ALIGN
        self.master = torch.zeros(end, device=device)
        decays = torch.zeros(end, device=device)
        for p, view, decay in zip(parameters, self.views(self.master), self.views(decays), strict=True):
            view.copy_(p.detach())
            decay.fill_(float(p.ndim >= 2))
        self.decays = decays
        self.ema = self.master.clone()
        self.first, self.second = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.step, self.lr = torch.zeros((), device=device), torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.gradient = torch.zeros_like(self.master)
        self.working = self.master if dtype == torch.float32 else self.master.to(dtype)
        for module in modules.values():
            module.to(device=device)
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.use(self.working)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' shapes over a vector, in the order of `names`."""
        views = []
        for shape, offset, permuted in zip(self.shapes, self.offsets, self.permuted, strict=True):
            segment = flat[offset : offset + shape.numel()]
            if permuted:
                views.append(segment.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2))
            else:
                views.append(segment.view(shape))
        return views

    def use(self, flat: Tensor) -> None:
        """Let the modules compute with the values of `flat` (for example the average, to evaluate)."""
        for p, view in zip(self.parameters, self.views(flat), strict=True):
            p.data = view

    def state_dict(self, key: str, *, average: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Weights of one module on the CPU under its own names, contiguous; from the EMA unless `average` is false."""
        views = self.views(self.ema if average else self.master)
        prefix = f"{key}."
        return {
            name.removeprefix(prefix): view.to(dtype).cpu().contiguous()
            for name, view in zip(self.names, views, strict=True)
            if name.startswith(prefix)
        }

    def step_with(self, loss: Tensor) -> Tensor:
        """Differentiate `loss` and update. Returns the gradient's norm.

        Nothing changes if loss or norm is not finite, except `skipped`.
        """
        config = self.config
        gradients = torch.autograd.grad(loss, self.parameters)
        torch._foreach_copy_(self.views(self.gradient), list(gradients))
        with torch.no_grad():
            norm = self.gradient.norm()
            finite = torch.isfinite(norm) & torch.isfinite(loss.detach())
            keep = finite.float()
            g = torch.nan_to_num(self.gradient, nan=0.0, posinf=0.0, neginf=0.0).mul_(
                (config.clip / (norm + 1e-6)).clamp(max=1).nan_to_num()
            )
            beta1, beta2 = config.betas
            self.step += keep
            self.skipped += 1 - keep
            self.first.lerp_(g, (1 - beta1) * keep)
            self.second.lerp_(g.square_(), (1 - beta2) * keep)
            correction1, correction2 = (-torch.expm1(self.step.clamp(min=1) * math.log(beta)) for beta in config.betas)
            update = (self.second / correction2).sqrt_().add_(config.eps).reciprocal_().mul_(self.first).div_(correction1)
            update.addcmul_(self.master, self.decays, value=config.weight_decay)
            self.master.sub_(update.mul_(self.lr * keep))
            decay = ((1 + self.step) / (10 + self.step)).clamp(max=config.ema_decay)
            self.ema.lerp_(self.master, (1 - decay) * keep)
            if self.working is not self.master:
                self.working.copy_(self.master)
        return norm

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, on the CPU."""
        tensors = {"master": self.master, "ema": self.ema, "first": self.first, "second": self.second}
        return {name: tensor.cpu() for name, tensor in tensors.items()} | {"step": self.step.cpu(), "skipped": self.skipped.cpu()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over a snapshot. Raises ValueError if it is of another model."""
        if state["master"].shape != self.master.shape:
            raise ValueError(
                f"got a checkpoint of {state['master'].numel()} numbers; this model has {self.master.numel()}. "
                "Remove the work folder, or use the sizes that it was made with"
            )
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)
        if self.working is not self.master:
            self.working.copy_(self.master)
