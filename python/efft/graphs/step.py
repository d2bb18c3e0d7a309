"""Define :func:`graph_step`, which captures a complete training step as a CUDA graph."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from efft.graphs import capture as capturing
from efft.graphs.capture import Constants, Inputs, arguments_of, capture, device_of, random_state_kept

_NAME = "graph_step"
#: Settings of a parameter group of an optimizer that may change between two steps. The graph reads them from a tensor.
_READ = ("lr",)
#: Settings that do not affect a step.
_IGNORED = ("params", "initial_lr", "name", "param_names", "max_lr", "min_lr", "swa_lr")


def graph_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., Tensor],
    example: Any,
    *,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
) -> GraphStep:
    """Capture a training step of ``model``, which must be on one GPU, as a CUDA graph.

    The result is called once per batch and returns the loss. It computes exactly what this loop computes (without a
    ``scaler`` or ``clip_norm``, the lines with them do not apply)::

        for batch in batches:
            with torch.autocast("cuda", autocast):
                value = loss(model, *batch)
            scaler.scale(value / accumulate).backward()
            if this is the last of ``accumulate`` batches:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

    The calls up to the first update run without a graph, because the first update creates the state of the optimizer.
    Then the step is captured, and all later calls copy the batch and launch the graph. A graph contains numbers and
    addresses as constants. Learning rates may change between two calls, by a scheduler or by hand. After any other
    change that the graph cannot follow, such as another mode, a merged update, new parameters or new state of the
    optimizer, the next call raises an error.

    Args:
        model: a model on one GPU, adapted or not, in the mode in which it is trained.
        optimizer: an optimizer of its parameters that never waits for the GPU: one of ``torch.optim`` with
            ``capturable=True``, or ``torch.optim.SGD`` with ``fused=True``. With ``scaler``, ``fused=True`` is needed
            too.
        loss: returns the scalar loss of a batch. It is called as ``loss(model, *batch)``, or ``loss(model, **batch)``
            if the batch is a mapping.
        example: a batch with the sizes and dtypes of all later ones: a tuple or a mapping of tensors. Values that are
            not tensors become constants of the graph.
        autocast: dtype of mixed precision; None for none.
        scaler: scales the loss, for ``autocast=torch.float16``.
        accumulate: number of batches whose gradients are averaged for one update.
        clip_norm: largest norm of the gradients; None for no limit.

    Returns:
        A function from a batch (the arguments of ``loss`` after the model) to its loss, which is a new tensor that
        requires no gradient.

    Raises:
        ValueError: the model, the optimizer, the scaler or the example cannot be used; the message states the reason.
        RuntimeError: ``loss`` or its backward pass cannot be captured; the message contains torch's reason.
    """
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"{_NAME}: accumulate must be a number of batches of at least 1, got {accumulate!r}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"{_NAME}: clip_norm must be a positive number or None, got {clip_norm!r}")
    if not torch.is_grad_enabled():
        raise RuntimeError(f"{_NAME}: gradients are disabled here: call it outside of no_grad and inference_mode")
    device, example = device_of(_NAME, model), arguments_of(_NAME, example)
    _check_optimizer(model, optimizer, device)
    _check_scaler(optimizer, scaler, autocast)
    return GraphStep(model, optimizer, loss, example, device, autocast, scaler, accumulate, clip_norm)


class GraphStep:
    """Run training steps from a CUDA graph. :func:`graph_step` creates objects of this class."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor],
        example: Any,
        device: torch.device,
        autocast: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
        accumulate: int,
        clip_norm: float | None,
    ) -> None:
        self._model, self._optimizer, self._loss, self._device = model, optimizer, loss, device
        self._autocast, self._scaler = autocast, scaler
        self._accumulate, self._clip_norm = accumulate, clip_norm
        self._graphs = capturing.graphs_on(device)
        self._batches = 0  # since the last update
        self._inputs = Inputs(_NAME, example, device)
        self._value = torch.zeros((), device=device)
        self._rates = [torch.tensor(0.0, device=device) for _ in optimizer.param_groups]
        self._set: list[object] = [None for _ in optimizer.param_groups]  # the rates that the tensors contain
        self._replays: dict[bool, Callable[[], None]] = {}  # by whether the optimizer updates the weights
        self._grads: list[tuple[nn.Parameter, Tensor]] = []
        self._constants: Constants | None = None
        self._settings: list[dict[str, Any]] = []
        self._state: dict[tuple[Tensor, str], int] = {}
        # torch would warn that the first update runs without a graph, which is intended. This attribute prevents it.
        optimizer.__dict__["_warned_capturable_if_run_uncaptured"] = True
        self._try()

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch and return its loss, a new tensor ``[]`` in fp32 on the GPU.

        Raises:
            TypeError: positional and named arguments are mixed.
            ValueError: the batch has other sizes, dtypes or constants than the example.
            RuntimeError: something changed since the capture that the graph cannot follow.
        """
        if args and kwargs:
            raise TypeError(f"{_NAME}: pass the batch either by position or by name, as the example is arranged")
        last = self._batches == self._accumulate - 1
        if self._replays:
            self._check()
        self._inputs.fill(kwargs or args)
        self._set_rates()
        if self._replays:
            self._replays[last]()
            for p, _ in self._grads if last else ():
                # A replay runs no Python, so torch does not notice the update by itself.
                torch.autograd.graph.increment_version(p)
        else:
            with self._rates_as_tensors():
                self._graphs.warm_up(functools.partial(self._run, last))
        self._batches = 0 if last else self._batches + 1
        value = self._value.clone()
        if last and not self._replays:
            self._capture()
        return value

    def _run(self, last: bool) -> None:
        """Compute the gradients of a batch and, if it is the last one, update the weights."""
        self._backward()
        if not last:
            return
        if self._scaler is not None:
            if self._clip_norm is not None:
                self._scaler.unscale_(self._optimizer)
                self._clip()
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            self._clip()
            self._optimizer.step()
        torch._foreach_zero_([grad for _, grad in self._grads])

    def _backward(self) -> None:
        for p, grad in self._grads:
            p.grad = grad  # the caller may have called optimizer.zero_grad()
        batch = self._inputs.value
        # The cache of autocast would keep tensors of one graph for the next one.
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None, cache_enabled=False):
            value = self._loss(self._model, **batch) if isinstance(batch, Mapping) else self._loss(self._model, *batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{_NAME}: loss must return a tensor with one element, got {got}")
        self._value.copy_(value.detach().reshape(()))
        value = value / self._accumulate if self._accumulate > 1 else value
        (value if self._scaler is None else self._scaler.scale(value)).backward()

    def _clip(self) -> None:
        if self._clip_norm is not None:
            trained = [p for group in self._optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self._clip_norm)

    def _try(self) -> None:
        """Find out which parameters get gradients, and whether the forward and backward pass can be captured.

        Gradients that exist already are kept, as if earlier batches had been accumulated. Buffers and random generators
        are restored.
        """
        trained = _trained(self._model, self._optimizer)
        before = {p: p.grad for p in trained}
        buffers = [(b, b.detach().clone()) for b in self._model.buffers()]
        with random_state_kept(self._device):
            for p in trained:
                p.grad = None
            try:
                self._graphs.warm_up(self._backward)
                reached = [p for p in trained if p.grad is not None]
                if not reached:
                    raise ValueError(f"{_NAME}: the loss does not depend on any parameter of the optimizer")
                for p in reached:
                    # This tensor exists before the capture, so its memory does not belong to the graph.
                    p.grad = torch.zeros_like(p, memory_format=torch.preserve_format)
                self._graphs.warm_up(self._backward)
                capture(self._graphs, self._backward, f"{_NAME}: the forward and backward pass")
            except BaseException:
                for p, grad in before.items():
                    p.grad = grad
                raise
            finally:
                with torch.no_grad():
                    for buffer, value in buffers:
                        buffer.copy_(value)
        with torch.no_grad():
            for p in trained:
                own, earlier = p.grad, before[p]
                if own is None:
                    p.grad = earlier
                    continue
                own.zero_() if earlier is None else own.copy_(earlier)
                self._grads.append((p, own))

    def _capture(self) -> None:
        with self._rates_as_tensors():
            for last in (True,) if self._accumulate == 1 else (False, True):
                self._replays[last] = capture(self._graphs, functools.partial(self._run, last), f"{_NAME}: the step")
        self._constants = Constants(self._model)
        self._settings = [_settings(group) for group in self._optimizer.param_groups]
        self._state = _addresses(self._optimizer)

    def _check(self) -> None:
        """Raise RuntimeError if the graph would no longer compute the same as the loop in :func:`graph_step`."""
        assert self._constants is not None
        self._constants.check(_NAME)
        groups = self._optimizer.param_groups
        if len(groups) != len(self._settings):
            raise RuntimeError(f"{_NAME}: the optimizer got another group since the capture: create a new {_NAME}")
        for i, (group, before) in enumerate(zip(groups, self._settings, strict=True)):
            now = _settings(group)
            if now != before:
                name = next(key for key in {**before, **now} if now.get(key) != before.get(key))
                raise RuntimeError(
                    f"{_NAME}: {name!r} of the optimizer's group {i} was {before.get(name)!r} at the capture and is "
                    f"{now.get(name)!r}: only the learning rate may change, so create a new {_NAME}"
                )
        if _addresses(self._optimizer) != self._state:
            raise RuntimeError(
                f"{_NAME}: the state of the optimizer was replaced since the capture, for example by load_state_dict: "
                f"create a new {_NAME}"
            )

    def _set_rates(self) -> None:
        """Copy the learning rates that changed since the last call to the tensors that the graph reads."""
        for i, (group, tensor) in enumerate(zip(self._optimizer.param_groups, self._rates, strict=True)):
            rate = group["lr"]
            if isinstance(rate, Tensor):
                tensor.copy_(rate.reshape(()), non_blocking=True)
            elif rate != self._set[i]:
                tensor.fill_(rate)
                self._set[i] = rate

    @contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """Let the optimizer read its learning rates from the tensors of the graph."""
        groups = self._optimizer.param_groups
        before = [group["lr"] for group in groups]
        for group, tensor in zip(groups, self._rates, strict=True):
            group["lr"] = tensor
        try:
            yield
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that require a gradient: first those of the optimizer, then all others of the model."""
    own = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    known = {id(p) for p in own}
    return own + [p for p in model.parameters() if p.requires_grad and id(p) not in known]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a group that a graph contains as constants."""
    settings = {key: value for key, value in group.items() if key not in (*_READ, *_IGNORED)}
    tensors = {key: (id(value), value._version) for key, value in settings.items() if isinstance(value, Tensor)}
    return {**settings, **tensors, "params": [id(p) for p in group["params"]]}


def _addresses(optimizer: torch.optim.Optimizer) -> dict[tuple[Tensor, str], int]:
    """Return the addresses of all tensors in the state of an optimizer."""
    return {
        (p, key): value.data_ptr()
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Raise ValueError if a step of the optimizer cannot be captured."""
    kind = type(optimizer).__name__
    own = {id(p) for p in model.parameters()}
    for i, group in enumerate(optimizer.param_groups):
        if any(id(p) not in own for p in group["params"]):
            raise ValueError(f"{_NAME}: group {i} of the {kind} has parameters that are not part of the model")
        if "capturable" in group:
            # On a CPU, where tests emulate graphs, only the fused form keeps its counters in tensors.
            if not group["capturable"] and not (device.type == "cpu" and group.get("fused")):
                raise ValueError(
                    f"{_NAME}: expected an optimizer that can be captured, but group {i} of the {kind} has "
                    f"capturable=False: create it with capturable=True"
                )
        elif not group.get("fused"):
            advice = "with fused=True" if "fused" in group else "torch.optim.AdamW(..., capturable=True), for example"
            raise ValueError(
                f"{_NAME}: expected an optimizer that can be captured, but {kind} does not read its learning rate "
                f"from a tensor without waiting for the GPU: use {kind + ' ' if 'fused' in group else ''}{advice}"
            )


def _check_scaler(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, autocast: torch.dtype | None
) -> None:
    """Raise ValueError if a scaler is missing, or if the optimizer would wait for the GPU because of it."""
    if scaler is None or not scaler.is_enabled():
        if autocast == torch.float16:
            raise ValueError(
                f"{_NAME}: gradients in float16 underflow without a scaler: pass scaler=torch.amp.GradScaler(), or "
                "use autocast=torch.bfloat16"
            )
        return
    supported = getattr(optimizer, "_step_supports_amp_scaling", False)
    if not supported or "grad_scaler" in inspect.signature(optimizer.step).parameters:
        raise ValueError(
            f"{_NAME}: with a scaler, expected an optimizer that skips a step on the GPU if a gradient overflows, but "
            f"this {type(optimizer).__name__} lets the host decide: create it with fused=True"
        )
