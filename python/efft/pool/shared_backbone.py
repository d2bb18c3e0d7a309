"""Train several adapted models in one pass through the frozen backbone that they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from efft.adapting import buffers
from efft.adapting.adapter import SHARING, prepare, release
from efft.adapting.inject import Adapter, adapted_layers, adapter_of, remove
from efft.adapting.optimizing import parameter_groups
from efft.adapting.placing import linear_layers
from efft.adapting.sharding import check_whole
from efft.adapting.wrappers import check_unwrapped
from efft.pool.batches import Layouts
from efft.pool.joint import Each, JointDelta, Parts, Running
from efft.pool.selecting import to_device
from efft.pool.twin import twin_of
from efft_kernels.nn.adapt import read_layers, replace_modules
from efft_kernels.nn.frozen import dequantized


class SharedBackbone(nn.Module):
    """Train several models that were adapted from one base together, each as if it were trained alone.

    Every model keeps its own factors, scale, head, trained biases and norms, and factor dropout. Frozen modules process
    the samples of all models as one batch, and an adapted layer adds to each sample the update of its own model. The
    loss of a model therefore depends only on the parameters of that model, and the sum of all losses gives every
    parameter the gradient of its own model's loss. Each model can still be called, evaluated and saved as usual.

    The results are those of training each model alone, except that frozen matrix products with other numbers of rows
    may round differently. With the backend ``cpu``, the adapted layers compute exactly what they compute alone.

    Example::

        shared = efft.SharedBackbone((str(seed), make(seed)) for seed in range(8))  # make adapts a model
        optimizer = torch.optim.AdamW(shared.parameter_groups(lr=1e-3))
        outputs = shared({name: images[name] for name in shared.models})
        sum(loss(outputs[name], labels[name]) for name in outputs).backward()

    Args:
        models: the models by name, as a mapping or as pairs. A generator may create the pairs one at a time. Each model
            gets the frozen parameters of the first model before the next one is created, which frees memory.
        seeds: maps the name of each model to the seed of its random numbers in training (factor dropout). The numbers
            are those after ``torch.manual_seed(seed)`` in a training of this model alone. Without seeds, all models
            draw from torch's global random generator.

    Attributes:
        backbone: the frozen modules, through which all models run.

    Raises:
        ValueError: there is no model; a model is not adapted, or is merged, sharded or wrapped; the models adapt or
            train different modules; their frozen parameters differ; a weight other than that of a linear layer is
            adapted; a trained bias or norm belongs to a module with children; or the seeds have other names.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module] | Iterable[tuple[str, nn.Module]],
        seeds: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self._members = nn.ModuleList()
        self._names: list[str] = []
        for name, model in models.items() if isinstance(models, Mapping) else models:
            self._take(name, model)
        if not self._names:
            raise ValueError("SharedBackbone: expected at least one model, got none")
        if seeds is not None and set(seeds) != set(self._names):
            raise ValueError(f"SharedBackbone: expected a seed for each of {self._names}, got {sorted(seeds)}")
        self._streams = None if seeds is None else {name: self._stream_from(seed) for name, seed in seeds.items()}
        self._running: Running = ContextVar("running", default=None)
        self._layouts = Layouts()
        self.backbone = self._build()

    @property
    def models(self) -> dict[str, nn.Module]:
        """The adapted models by name."""
        return dict(zip(self._names, self._members, strict=True))

    def parameter_groups(
        self, lr: float | Mapping[str, float], weight_decay: float = 1e-4, **options: Any
    ) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups of all models (:func:`efft.parameter_groups`), for one optimizer.

        Args:
            lr: the learning rate of all models, or of each by name.
            weight_decay: the weight decay of factors and heads.
            options: further arguments of :func:`efft.parameter_groups`.

        Returns:
            The groups of all models, one model after another. The ``name`` of a group is ``model/kind``.

        Raises:
            KeyError: a model has no learning rate.
        """
        groups = []
        for name, model in self.models.items():
            rate = lr[name] if isinstance(lr, Mapping) else lr
            for group in parameter_groups(model, rate, weight_decay, **options):
                groups.append({**group, "name": f"{name}/{group['name']}"})
        return groups

    def forward(self, batches: Mapping[str, Any]) -> dict[str, Any]:
        """Run the models on their own batches, in one pass.

        Args:
            batches: maps the name of each model that takes part to its input: a tensor, a tuple of positional
                arguments, or a mapping of keyword arguments. The first dimension of every tensor indexes the samples;
                its size may differ between the models. Values other than tensors must be equal for all models.

        Returns:
            The output of each model, by name.

        Raises:
            ValueError: a name is unknown; the inputs do not fit together; a module that updates buffers is in training
                mode; or an output has no dimension for the samples, or compares samples with each other.
            RuntimeError: seeds were given, and a frozen module draws random numbers (dropout). A model that is trained
                alone would draw other numbers.
        """
        models = self.models
        unknown = [name for name in batches if name not in models]
        if unknown or not batches:
            raise ValueError(f"SharedBackbone: expected batches for some of {self._names}, got {list(batches)}")
        active = {name: models[name] for name in batches}
        off = [name for name, model in active.items() if not adapter_of(model).enabled]
        if off:
            raise ValueError(f"model {off[0]!r}: its update is merged or switched off (efft.disabled)")
        self._follow_modes(active)
        args, kwargs, sizes = _concatenated(batches)
        parts = self._parts(sizes)
        self._learn(args, kwargs, sum(sizes.values()))
        prepared = []
        try:
            for name, model in active.items():
                with self._stream(name):
                    prepared.append(model)
                    prepare(model, None)
            token = self._running.set(parts)
            before = None if self._streams is None else self._random_state()
            try:
                output = self.backbone(*args, **kwargs)
            finally:
                self._running.reset(token)
            if before is not None:
                self._check_random(before)
        except BaseException:
            for model in prepared:
                release(model, None, None)
            raise
        for model in prepared:
            release(model, None, output)
        return _split(output, parts)

    # --- construction -------------------------------------------------------------------------------------------------

    def _take(self, name: str, model: nn.Module) -> None:
        """Add a model, and let it use the frozen parameters of the first."""
        if not isinstance(name, str) or name in self._names:
            raise ValueError(f"SharedBackbone: expected a name of its own for each model, got {name!r}")
        adapter = adapter_of(model)
        check_whole(model, "SharedBackbone")
        check_unwrapped(model, "SharedBackbone")
        layers = linear_layers(adapted_layers(model))
        if not adapter.enabled or any(layer.merged for layer in layers.values()):
            raise ValueError(f"model {name!r}: its update is merged or switched off; call efft.unmerge(model) first")
        for layer in layers.values():
            layer.evaluated()  # raises ValueError if the layer computes something else than an update of its weight
        own = _trained(model, adapter)
        stray = [n for n, p in model.named_parameters() if p.requires_grad and n not in own]
        if stray:
            raise ValueError(
                f"model {name!r}: {stray[0]!r} is trained in addition to factors, head, biases and norms; freeze it, "
                "or name its module in head=[...] when you adapt the model"
            )
        if self._names:
            first: Any = self._members[0]
            _check_alike(name, model, self._names[0], first)
            _share(name, model, first, own)
        self._members.append(model)
        self._names.append(name)
        SHARING.add(adapter)

    def _build(self) -> nn.Module:
        """Return the modules of the first model, with joint layers in the places of those that differ."""
        models = self.models
        first = next(iter(models.values()))
        adapter = adapter_of(first)
        backbone = twin_of(first)
        copied = adapter_of(backbone)
        # The twin shares memory with the first model, whose trained values must not be reset.
        copied._base_extras, copied._base_buffers, copied._unknown = {}, {}, set()
        remove(backbone)
        own = _trained(first, adapter)
        shared = dict(first.named_parameters(remove_duplicate=False))
        for full in [n for n, _ in backbone.named_parameters(remove_duplicate=False) if n not in own]:
            owner, _, key = full.rpartition(".")
            backbone.get_submodule(owner)._parameters[key] = shared[full]
        self._statistics = buffers.statistics(backbone, adapter.head)
        layers = {name: linear_layers(adapted_layers(model)) for name, model in models.items()}
        new: dict[nn.Module, nn.Module] = {}
        for layer in adapter.layers:
            plain: Any = backbone.get_submodule(layer)
            new[plain] = JointDelta(plain, self._running, {name: of[layer] for name, of in layers.items()})
        for module in _owners(first, adapter):
            new[backbone.get_submodule(module)] = Each(
                self._running, {name: model.get_submodule(module) for name, model in models.items()}
            )
        replace_modules(backbone, new)
        for _, joint, _ in read_layers(backbone, JointDelta):
            joint.read = True
        backbone.requires_grad_(False)  # the models own what is trained
        pairs = {name: module for name, module in backbone.named_modules() if name}
        self.__dict__["_pairs"] = [(m, first.get_submodule(n)) for n, m in pairs.items() if not isinstance(m, Each)]
        return backbone

    # --- a pass -------------------------------------------------------------------------------------------------------

    def _follow_modes(self, active: Mapping[str, nn.Module]) -> None:
        modes = {model.training for model in active.values()}
        if len(modes) > 1:
            raise ValueError("SharedBackbone: expected all models in training mode or all in evaluation mode, got both")
        for module, like in self.__dict__["_pairs"]:
            module.training = like.training
        changing = next((n for n, m in self.backbone.named_modules() if m.training and m in self._statistics), None)
        if changing is not None:
            raise ValueError(
                f"{changing!r} updates its buffers in training, with the samples of all models: adapt the models with "
                "freeze_statistics=True, or train them one by one"
            )

    def _parts(self, sizes: Mapping[str, int]) -> Parts:
        device = next(self._members[0].parameters()).device
        numbers = [i for i, size in enumerate(sizes.values()) for _ in range(size)]
        each = torch.arange(len(sizes), device=device) if len(set(sizes.values())) == 1 else None
        return Parts(list(sizes), list(sizes.values()), to_device(numbers, torch.int64, device), each)

    def _learn(self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> None:
        """Find the place of the samples in the inputs of the joint layers, in the first passes."""
        if samples < 2 or self._layouts.attempts < 1:
            return
        joint: dict[str, Any] = {n: m for n, m in self.backbone.named_modules() if isinstance(m, (JointDelta, Each))}
        for module in joint.values():
            module.probing = True
        try:
            kinds = (JointDelta, Each)
            self._layouts.learn(joint, self.backbone, args, kwargs, samples, kinds=kinds, separate=True)
        finally:
            for module in joint.values():
                module.probing = False

    # --- random numbers -----------------------------------------------------------------------------------------------

    def _devices(self) -> list[torch.device]:
        device = next(self._members[0].parameters()).device
        return [device] if device.type == "cuda" else []

    def _random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices())]

    def _stream_from(self, seed: int) -> list[Tensor]:
        with torch.random.fork_rng(self._devices()):
            torch.manual_seed(seed)
            return self._random_state()

    @contextmanager
    def _stream(self, name: str) -> Iterator[None]:
        """Draw random numbers from the stream of a model."""
        if self._streams is None:
            yield
            return
        with torch.random.fork_rng(self._devices()):
            own, *others = self._streams[name]
            torch.set_rng_state(own)
            for state, device in zip(others, self._devices(), strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
            self._streams[name] = self._random_state()

    def _check_random(self, before: list[Tensor]) -> None:
        if all(map(torch.equal, before, self._random_state())):
            return
        drawing = [
            name
            for name, module in self.backbone.named_modules()
            if module.training and any(getattr(module, rate, 0) for rate in ("p", "drop_prob", "drop_rate"))
        ]
        where = f", probably {drawing[0]!r}," if drawing else ""
        raise RuntimeError(
            f"a frozen module{where} draws random numbers for all models at once, which a model that is trained alone "
            "would not draw: set the rates of dropout and drop path in the backbone to 0, or pass no seeds"
        )


def _trained(model: nn.Module, adapter: Adapter) -> set[str]:
    """Return the names of all parameters that a model trains: factors, head, biases and norms."""
    own = {f"efft.{name}" for name, _ in adapter.named_parameters(remove_duplicate=False)}
    for head in adapter.head:
        parameters = model.get_submodule(head).named_parameters(remove_duplicate=False)
        own |= {f"{head}.{name}" for name, _ in parameters}
    return own | set(adapter.extras)


def _owners(model: nn.Module, adapter: Adapter) -> list[str]:
    """Return the names of the modules of which every model has its own: the head, and those with trained parameters.

    Raises:
        ValueError: such a module has children, which the models would not share.
    """
    owners = list(adapter.head)
    for name in adapter.extras:
        module, _, _ = name.rpartition(".")
        if module in adapter.layers or any(module == h or module.startswith(f"{h}.") for h in adapter.head):
            continue
        if not module or any(model.get_submodule(module).children()):
            kind = type(model.get_submodule(module)).__name__
            raise ValueError(
                f"{name!r} is trained and belongs to a {kind}, which has submodules: train the models alone"
            )
        if module not in owners:
            owners.append(module)
    return owners


def _check_alike(name: str, model: nn.Module, other: str, first: nn.Module) -> None:
    """Raise ValueError unless two models adapt and train the same modules."""
    mine, its = adapter_of(model), adapter_of(first)
    for what, got, expected in (
        ("layers", mine.layers, its.layers),
        ("head", mine.head, its.head),
        ("trained biases and norms", mine.extras, its.extras),
    ):
        if set(got) != set(expected):
            differing = sorted(set(got) ^ set(expected))
            raise ValueError(
                f"expected the same {what} in all models, but {differing[0]!r} is among those of only one of {other!r} "
                f"and {name!r} ({len(differing)} differ)"
            )


def _share(name: str, model: nn.Module, first: nn.Module, own: set[str]) -> None:
    """Replace the frozen parameters of ``model`` by those of ``first``, which must have the same values."""
    theirs = dict(first.named_parameters(remove_duplicate=False))
    mine = {n: p for n, p in model.named_parameters(remove_duplicate=False) if n not in own}
    for full, parameter in mine.items():
        other = theirs.get(full)
        if other is None or other.shape != parameter.shape or other.dtype != parameter.dtype:
            raise ValueError(f"model {name!r}: the first model has no parameter {full!r} of this shape and dtype")
        if parameter is not other and not torch.equal(dequantized(parameter.detach()), dequantized(other.detach())):
            raise ValueError(f"model {name!r}: {full!r} differs from the first model's; adapt models of one base")
    originals = adapter_of(model)._originals
    for full in mine:
        owner, _, key = full.rpartition(".")
        model.get_submodule(owner)._parameters[key] = theirs[full]
        if owner in originals:  # the layer that efft.remove restores
            originals[owner]._parameters[key] = theirs[full]


def _concatenated(batches: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, int]]:
    """Return the arguments of one pass, and the number of samples of each model."""
    calls = {name: _as_call(batch) for name, batch in batches.items()}
    flat = {name: pytree.tree_flatten(call) for name, call in calls.items()}
    first, structure = next(iter(flat.values()))
    sizes: dict[str, int] = {}
    for name, (leaves, own) in flat.items():
        lengths = {t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()}
        if own != structure or len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"SharedBackbone: expected tensors with one number of samples, in the same arguments for all models, "
                f"got {sorted(lengths)} samples in the arguments {own} of {name!r}"
            )
        sizes[name] = lengths.pop()
    joined = []
    for position, like in enumerate(first):
        leaves = [values[position] for values, _ in flat.values()]
        if isinstance(like, Tensor) and like.dim():
            if any(not isinstance(t, Tensor) or t.shape[1:] != like.shape[1:] for t in leaves):
                raise ValueError(
                    "SharedBackbone: expected inputs that differ only in the number of samples, got shapes "
                    f"{[list(getattr(t, 'shape', ())) for t in leaves]}"
                )
            joined.append(torch.cat(leaves))
        elif any(value is not like and value != like for value in leaves):
            raise ValueError(f"SharedBackbone: expected the same value for all models, got {leaves}")
        else:
            joined.append(like)
    args, kwargs = pytree.tree_unflatten(joined, structure)
    return args, kwargs, sizes


def _as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def _split(output: Any, parts: Parts) -> dict[str, Any]:
    """Return the output of each model."""
    leaves, structure = pytree.tree_flatten(output)
    missing = [widths for padded, widths in parts.padded if all(padded is not leaf for leaf in leaves)]
    if missing:
        raise ValueError(
            f"the heads of the models have the widths {missing[0]}, and the model changes their output: expected heads "
            "that come last, or of one width"
        )
    split: list[list[Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == len(parts.numbers):
            widths = next((widths for padded, widths in parts.padded if padded is leaf), None)
            own = leaf.split(list(parts.sizes))
            split.append([t if widths is None else t[..., : widths[i]] for i, t in enumerate(own)])
        elif isinstance(leaf, Tensor) or not (leaf is None or isinstance(leaf, (bool, int, float, str))):
            got = f"shape {list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"SharedBackbone: expected outputs whose first dimension has {len(parts.numbers)} samples, got {got}; "
                "compute losses from the outputs of each model"
            )
        else:
            split.append([leaf] * len(parts.names))
    return {name: pytree.tree_unflatten([of[i] for of in split], structure) for i, name in enumerate(parts.names)}
