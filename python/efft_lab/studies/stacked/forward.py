"""Compute the forward pass of timm's ViT for K runs at once.

For an input x of an adapted linear layer, the update adds ``x D G`` to the output. D and G are the operands of the
layer (:mod:`efft_lab.studies.stacked.operands`). A leading dimension K has one entry per run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from efft_lab.studies.stacked.operands import Operands, operands_of
from efft_lab.studies.stacked.start import Start


class Forward:
    """Compute the logits of K runs from the shared frozen parameters and the trained parameters of each run.

    Args:
        starts: the start of each run. The names and shapes of their parameters must be equal, except for the shapes of
            the classifier.
        classes: number of outputs of each run.
        kinds: maps the name of each trained parameter to its kind, such as "cores" or "norms.bias". All other
            parameters are frozen and are taken from the first start.
        amp: dtype for autocast (fp32 or bf16).
        device: the device of the runs.
        drop_path: rate of stochastic depth in the last block. The rate grows linearly from 0 in the first block, as in
            timm.
    """

    def __init__(
        self,
        starts: Sequence[Start],
        classes: Sequence[int],
        kinds: Mapping[str, str],
        amp: torch.dtype,
        device: torch.device,
        drop_path: float = 0.0,
    ) -> None:
        self.runs, self.first, self.kinds, self.amp, self.device = len(starts), starts[0], kinds, amp, device
        self.depth = 1 + max(int(n.split(".")[1]) for n in self.first.parameters if n.startswith("blocks."))
        self.drop_path = torch.linspace(0, drop_path, self.depth).tolist()
        self.scales = {
            name: torch.tensor([start.scales[name] for start in starts], device=device) for name in self.first.scales
        }
        self.keep = None
        if any(start.dropout for start in starts):
            self.keep = torch.tensor([1 - start.dropout for start in starts], device=device)
        # Frozen matrices are stored in the dtype to which autocast would cast them in every step.
        self.frozen = {
            name: value.to(device, amp if value.dim() > 1 and name.endswith(".weight") else value.dtype)
            for name, value in self.first.parameters.items()
            if name not in kinds
        }
        most = max(classes)
        self.shapes = {name: self.first.parameters[name].shape for name in kinds}
        for name in ("head.weight", "head.bias"):
            self.shapes[name] = torch.Size([most, *self.shapes[name][1:]])
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.forbidden = torch.zeros(self.runs, 1, most, device=device)
        for run, n in enumerate(classes):
            self.forbidden[run, :, n:] = -torch.inf

    def flat(self, starts: Sequence[Start]) -> Tensor:
        """Return the initial values of the trained parameters of all runs, fp32 [K, parameters].

        If a run has fewer classes than another run, its classifier is padded with zeros.
        """
        runs = []
        for start in starts:
            parts = [start.parameters[name].flatten().float() for name in self.shapes]
            parts = [functional.pad(part, (0, n - len(part))) for part, n in zip(parts, self.sizes, strict=True)]
            runs.append(torch.cat(parts))
        return torch.stack(runs).to(self.device)

    def parameters(self, flat: Tensor) -> dict[str, Tensor]:
        """Return all parameters by name. Trained parameters are views of ``flat`` and have the shape [K, ...]."""
        parts = flat.split(self.sizes, 1)
        trained = {n: part.unflatten(1, s) for (n, s), part in zip(self.shapes.items(), parts, strict=True)}
        return {**self.frozen, **trained}

    def __call__(self, flat: Tensor, images: Tensor, training: bool) -> Tensor:  # -> [K, batch, most classes]
        """Compute the logits of every run.

        Args:
            flat: the trained parameters, [K, parameters].
            images: the images of each run, [K, batch, 3, size, size].
            training: whether to use dropout and stochastic depth.
        """
        p = self.parameters(flat)
        with torch.autocast(self.device.type, enabled=False):
            operands = operands_of(p, self.first, self.scales, self.keep if training else None)
        runs, batch, width = self.runs, images.shape[1], p["pos_embed"].shape[-1]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == torch.bfloat16):
            patches = _patches(images, self.first.patch)  # [K, batch * patches, pixels]
            x = self.linear(p, {}, "patch_embed.proj", patches).view(runs, batch, -1, width)
            token = self.aligned(p, "cls_token", 4).expand(runs, batch, 1, width)
            x = torch.cat([token, x], 2) + self.aligned(p, "pos_embed", 4)
            tokens = x.shape[2]
            x = x.flatten(1, 2)  # [K, batch * tokens, d]
            for i in range(self.depth):
                name = f"blocks.{i}"
                h = self.linear(p, operands, f"{name}.attn.qkv", self.norm(p, f"{name}.norm1", x))
                q, k, v = h.view(runs * batch, tokens, 3, self.first.heads, -1).permute(2, 0, 3, 1, 4)
                h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
                h = self.linear(p, operands, f"{name}.attn.proj", h)
                x = x + self.kept(self.scaled(p, f"{name}.ls1.gamma", h), self.drop_path[i] * training, batch)
                h = self.linear(p, operands, f"{name}.mlp.fc1", self.norm(p, f"{name}.norm2", x))
                h = self.linear(p, operands, f"{name}.mlp.fc2", functional.gelu(h))
                x = x + self.kept(self.scaled(p, f"{name}.ls2.gamma", h), self.drop_path[i] * training, batch)
            x = self.norm(p, "norm", x.view(runs, batch, tokens, width)[:, :, 0])
            return self.linear(p, {}, "head", x).float() + self.forbidden

    def aligned(self, p: Mapping[str, Tensor], name: str, dims: int) -> Tensor:
        """Return a parameter in a shape that broadcasts to a tensor with ``dims`` dimensions [K, ...].

        A trained parameter gets dimensions of size 1 between K and its own dimensions.
        """
        value = p[name]
        if name not in self.kinds:
            return value
        own = self.shapes[name]
        while len(own) > 1 and own[0] == 1:  # leading dimensions of size 1 in timm
            own = own[1:]
        return value.view(self.runs, *[1] * (dims - 1 - len(own)), *own)

    def kept(self, x: Tensor, drop: float, batch: int) -> Tensor:  # [K, batch * tokens, d]
        """Apply stochastic depth to the output x of a branch: set it to 0 for some images, and rescale the others."""
        if drop == 0:
            return x
        keep = torch.rand(len(x), batch, 1, 1, device=x.device) >= drop
        return (x.unflatten(1, (batch, -1)) * keep / (1 - drop)).flatten(1, 2)

    def scaled(self, p: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        return x * self.aligned(p, name, x.dim()) if name in p else x

    def norm(self, p: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:  # [K, n, d]
        shape, eps = x.shape[-1:], self.first.eps
        if f"{name}.weight" not in self.kinds:
            return functional.layer_norm(x, shape, p[f"{name}.weight"], p[f"{name}.bias"], eps)
        plain = functional.layer_norm(x, shape, eps=eps)
        return torch.addcmul(self.aligned(p, f"{name}.bias", 3), plain, self.aligned(p, f"{name}.weight", 3))

    def linear(self, p: Mapping[str, Tensor], operands: Operands, name: str, x: Tensor) -> Tensor:
        """Compute a linear layer with its gain and its update, ``x Wᵀ * gain + x D G + b``, for x [K, n, d_in].

        If W and b are both frozen, b is instead added before the multiplication with the gain. Otherwise, b is added
        together with the update, as ``[x D, 1] [G; b]``.
        """
        W, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        if W.dtype != x.dtype and self.amp != torch.float32:
            x = x.to(self.amp)
        own = f"{name}.weight" in self.kinds
        trained = f"{name}.bias" in self.kinds
        if own:
            y = torch.bmm(x, W.flatten(2).mT.to(x.dtype))
        else:
            y = functional.linear(x, W.flatten(1), None if trained else bias)
        if f"{name}.gain" in p:
            y = y * p[f"{name}.gain"][:, None].to(y.dtype)
        if name not in operands and not (trained or own):
            return y
        rows = [bias if trained else bias.expand(self.runs, -1)] if trained or own else []
        D, G = operands.get(name, (x.new_zeros(1, x.shape[-1], 0), y.new_zeros(self.runs, 0, y.shape[-1])))
        spare = 8 - D.shape[-1] % 8 if rows or D.shape[-1] % 8 else 0  # Tensor Cores need a multiple of 8
        h = torch.bmm(x, functional.pad(D.to(x.dtype), (0, spare)).expand(self.runs, -1, -1))
        if rows:
            h = h + (torch.arange(h.shape[-1], device=self.device) == D.shape[-1])
        up = torch.cat([G, *(row[:, None] for row in rows)], 1).to(x.dtype)
        return torch.baddbmm(y, h, functional.pad(up, (0, 0, 0, h.shape[-1] - up.shape[1])))


def _patches(images: Tensor, size: int) -> Tensor:  # [K, batch, 3, S, S] -> [K, batch * patches, 3 * size * size]
    runs, channels = images.shape[0], images.shape[2]
    grid = images.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # [K, batch, 3, rows, size, columns, size]
    return grid.permute(0, 1, 3, 5, 2, 4, 6).reshape(runs, -1, channels * size * size)
