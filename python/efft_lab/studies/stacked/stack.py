"""Hold the state of K runs that form a stack, and advance them together step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from efft_lab.data.task import NORMALIZATIONS
from efft_lab.studies.stacked.forward import Forward
from efft_lab.studies.stacked.precondition import preconditioned
from efft_lab.studies.stacked.start import Start
from efft_lab.train import build
from efft_lab.train.config import TrainConfig


class Stack:
    """The state of K runs that train the same tensors.

    Args:
        starts: the start of each run. The names and shapes of their parameters must be equal, except for the shapes of
            the classifier.
        classes: number of outputs of each run.
        kinds: maps the name of each parameter that at least one run trains to its kind, such as "cores" or
            "norms.bias".
        rates: for each run, a mapping from kinds of parameters to peak learning rates. Parameters with the rate 0 are
            not trained.
        batches: positions in ``pixels`` of the images of each step and run, [steps, K, batch].
        pixels: uint8 images [n, 3, size, size] of all tasks.
        labels: the labels of these images, [n].
        config: configuration with the other settings, which are the same for all runs.
        updates_per_epoch: number of updates per epoch, for the schedule.
        precondition: whether to precondition gradients, see
            :func:`efft_lab.studies.stacked.precondition.preconditioned`.
        device: the device of the runs.
    """

    def __init__(
        self,
        starts: Sequence[Start],
        classes: Sequence[int],
        kinds: Mapping[str, str],
        rates: Sequence[Mapping[str, float]],
        batches: Tensor,
        pixels: Tensor,
        labels: Tensor,
        config: TrainConfig,
        updates_per_epoch: int,
        precondition: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device, self.config, self.precondition = torch.device(device), config, precondition
        self.pixels, self.labels = pixels.to(device), labels.to(device)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in NORMALIZATIONS["imagenet"])
        self.kinds = kinds
        amp = {"no": torch.float32, "bf16": torch.bfloat16}[config.amp]
        self.forward = Forward(starts, classes, kinds, amp, self.device, config.drop_path)
        self.flat = self.forward.flat(starts)
        peaks = torch.tensor([[rate.get(kind, 0.0) for kind in kinds.values()] for rate in rates])
        self.peaks = peaks.repeat_interleave(torch.tensor(self.forward.sizes), dim=1).to(device)
        self.m, self.v = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.t = torch.zeros(1, dtype=torch.int64, device=device)
        self.batches = batches.to(device)
        steps = len(batches)
        offset, slope = schedule(config, updates_per_epoch, steps)
        counts = torch.arange(1, steps + 1, dtype=torch.float64)
        table = [offset, slope, 1 - 0.9**counts, (1 - 0.999**counts).sqrt()]
        self.table = torch.stack(table, 1).float().to(device)  # [steps, 4]: schedule, and Adam's bias corrections
        self.losses = torch.zeros(steps, len(starts), device=device)

    def images(self, positions: Tensor) -> Tensor:
        """Return the normalized images [K, batch, 3, size, size] at positions [K, batch]."""
        return self.pixels[positions].float().div(255).sub(self.mean).div(self.std)

    def step(self) -> None:
        """Update every run once.

        All state is in tensors on the device, including the number of the step. A CUDA graph can therefore replay this
        function.
        """
        positions = self.batches.index_select(0, self.t)[0]  # [K, batch]
        offset, slope, one, two = self.table.index_select(0, self.t)[0].unbind()
        flat = self.flat.detach().requires_grad_()
        logits = self.forward(flat, self.images(positions), training=True)
        targets = self.labels[positions]
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses = losses.view(targets.shape).mean(1)
        (g,) = torch.autograd.grad(losses.sum(), flat)
        if self.precondition:
            self.turn(g)
        rate = torch.where(self.peaks > 0, self.peaks * slope + offset, 0.0)
        self.flat.mul_(1 - rate * self.config.weight_decay)
        self.m.lerp_(g, 0.1)
        self.v.mul_(0.999).addcmul_(g, g, value=0.001)
        self.flat.sub_(rate / one * self.m / (self.v.sqrt() / two + 1e-8))
        self.losses.index_copy_(0, self.t, losses.detach()[None])
        self.t.add_(1)

    def turn(self, g: Tensor) -> None:
        """Replace the gradients of the factors by preconditioned gradients, in place."""
        factors, gradients = self.forward.parameters(self.flat), self.forward.parameters(g)
        for bank in self.forward.scales:
            names = {factor: f"efft.{bank}.{factor}" for factor in "UCV"}
            of_bank = [{factor: all_[name] for factor, name in names.items()} for all_ in (factors, gradients)]
            for factor, value in preconditioned(*of_bank).items():
                of_bank[1][factor].copy_(value)

    def train(self, steps: int, graph: bool = False, due: Callable[[], bool] = lambda: False) -> bool:
        """Advance all runs by a number of steps.

        The function ``due`` is called every 20 steps. If it returns True, training stops, and the result is False.
        After the last step, the result is True.
        """
        replay = self.captured() if graph else self.step
        for step in range(steps):
            replay()
            if step % 20 == 19:
                if self.device.type == "cuda":  # the host can be many steps ahead of the GPU
                    torch.cuda.synchronize()
                if due():
                    return False
        return True

    def captured(self) -> Callable[[], None]:
        """Capture :meth:`step` as a CUDA graph, and return the function that replays it. The state is not changed."""
        kept = [(x, x.clone()) for x in (self.flat, self.m, self.v, self.t, self.losses)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recording):
            self.step()
        for x, value in kept:
            x.copy_(value)
        replay: Callable[[], None] = recording.replay
        return replay

    @torch.no_grad()
    def evaluate(self, positions: Tensor, batch: int = 250) -> Tensor:
        """Return the accuracy of each run, [K], on its images at the given positions, [K, n]."""
        right = torch.zeros(len(self.flat), device=self.device)
        for part in positions.to(self.device).split(batch, 1):
            predicted = self.forward(self.flat, self.images(part), training=False).argmax(-1)
            right += (predicted == self.labels[part]).sum(1)
        return right / positions.shape[1]


def schedule(config: TrainConfig, updates_per_epoch: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return two fp64 tensors [steps], offset and slope, that describe the learning rate of every update.

    The learning rate of a parameter group with the peak learning rate ``lr`` is ``offset + slope * lr``.
    """
    dummies = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 2.0)]
    optimizer = torch.optim.SGD(dummies)
    scheduler = build.make_scheduler(optimizer, config, updates_per_epoch)
    rates = []
    for update in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step_update(update + 1)
        if (update + 1) % updates_per_epoch == 0:
            scheduler.step(update // updates_per_epoch)
    low, high = torch.tensor(rates, dtype=torch.float64).unbind(1)
    return 2 * low - high, high - low
