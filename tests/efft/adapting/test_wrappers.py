"""Test models inside DDP, FSDP and DataParallel, compiled models, and layers that compute their weights in each pass.

Such layers have a pruning mask, a weight norm or a spectral norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm

import efft
from efft.adapting.wrappers import unwrap

Make = Callable[..., nn.Module]


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", [ddp, fsdp, nn.DataParallel])
def test_what_is_wrapped_is_refused(wrap: Any, tiny_vit: Make, adapted_vit: Make, tmp_path: Path) -> None:
    efft.save_adapter(adapted_vit(), tmp_path)
    model = tiny_vit()
    wrapped = wrap(model)
    around = nn.ModuleList([wrapped])
    kind = type(wrapped).__name__
    inside = [] if wrap is nn.DataParallel else [(model, f"this VisionTransformer is inside a {kind}")]
    cases = [(wrapped, f"got a {kind}"), (around, f"this ModuleList contains a {kind}"), *inside]
    for target, got in cases:
        names = list(target.state_dict())
        with pytest.raises(
            ValueError, match=rf"expected a plain model, but {got}, .*call efft.apply on the plain model"
        ):
            efft.apply(target, efft.EfftConfig(rank=4))
        with pytest.raises(ValueError, match=rf"expected a plain model, but {got}, .*call efft.load_adapter on"):
            efft.load_adapter(target, tmp_path)
        assert list(target.state_dict()) == names


@pytest.mark.usefixtures("one_process")
def test_a_part_of_what_ddp_wraps_is_refused_and_another_model_is_not(tiny_vit: Make) -> None:
    model = tiny_vit()
    wrapped = ddp(nn.Sequential(model))
    with pytest.raises(ValueError, match="this VisionTransformer is inside a DistributedDataParallel"):
        efft.apply(model, efft.EfftConfig(rank=4))
    efft.apply(tiny_vit(), efft.EfftConfig(rank=4))
    wrapped.itself = [wrapped]  # creates a reference cycle, as hooks may do, which delays the deletion of the wrapper
    del wrapped
    efft.apply(model, efft.EfftConfig(rank=4))


@pytest.mark.usefixtures("one_process")
def test_a_part_of_what_fully_shard_shards_is_refused(tiny_vit: Make) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_vit()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="expected a whole model, but this Sequential is sharded by fully_shard"):
        efft.apply(model.blocks, efft.EfftConfig(targets=["qkv"], rank=4, head=[]))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", [ddp, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_the_wrapper_of_an_adapted_model_will_do(
    wrap: Any, adapted_vit: Make, tmp_path: Path, images: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted_vit().eval()
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    assert [n for n, _ in efft.named_factors(wrapped)] == [n for n, _ in efft.named_factors(model)]
    assert efft.count_parameters(wrapped) == efft.count_parameters(model)
    groups = [
        [(g["name"], [id(p) for p in g["params"]]) for g in efft.parameter_groups(m, 1e-3)] for m in (wrapped, model)
    ]
    assert groups[0] == groups[1]
    efft.print_trainable_parameters(wrapped)
    printed = capsys.readouterr().out
    efft.print_trainable_parameters(model)
    assert printed == capsys.readouterr().out
    nn.init.normal_(next(iter(efft.named_factors(model)))[1])
    for name, which in (("wrapped", wrapped), ("plain", model)):
        efft.save_adapter(which, tmp_path / name)
        efft.export_lora(which, tmp_path / f"lora_{name}")
    for name in ("{}", "lora_{}"):
        files = [load_file(tmp_path / name.format(k) / "adapter_model.safetensors") for k in ("wrapped", "plain")]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], value) for key, value in files[1].items())
    merged = [efft.merged_state_dict(m) for m in (wrapped, model)]
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][key], value) for key, value in merged[1].items())
    with torch.no_grad(), efft.disabled(wrapped):
        base = model(images)
    efft.load_adapter(wrapped, tmp_path / "plain")
    with torch.no_grad(), efft.disabled(model):
        assert torch.equal(model(images), base)


def test_compiled_parts(adapted_vit: Make, tmp_path: Path) -> None:
    """Names of compiled parts contain _orig_mod, which must not appear in files."""
    model = adapted_vit()
    plain, state = efft.count_parameters(model), efft.merged_state_dict(model)
    efft.save_adapter(model, tmp_path / "plain")
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.head = torch.compile(model.head, backend="eager")
    assert efft.count_parameters(model) == plain
    merged = efft.merged_state_dict(model)
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[key], value) for key, value in state.items())
    efft.save_adapter(model, tmp_path / "parts")
    files = [load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("parts", "plain")]
    assert files[0].keys() == files[1].keys()
    efft.load_adapter(model, tmp_path / "plain")
    efft.export_lora(model, tmp_path / "lora")


def masked(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)


@pytest.mark.parametrize(
    "put_on", [masked, parametrizations.weight_norm, parametrizations.spectral_norm, old_spectral_norm]
)
def test_weights_that_are_computed_are_not_merged(put_on: Any, adapted_vit: Make, tmp_path: Path) -> None:
    model = adapted_vit()
    put_on(model.blocks[1].mlp.fc1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for operation, run in {
        "merge": efft.merge,
        "merged_state_dict": efft.merged_state_dict,
        "export_lora": lambda m: efft.export_lora(m, tmp_path / "lora"),
        "remove": efft.remove,
    }.items():
        with pytest.raises(
            ValueError, match=rf"efft.{operation}: 'blocks\.1\.mlp\.fc1' computes its weight in each pass"
        ):
            run(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_mask_made_permanent_is_merged(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit().eval()
    masked(model.blocks[1].mlp.fc1)
    with torch.no_grad():
        live = model(images)
        prune.remove(model.blocks[1].mlp.fc1, "weight")
        efft.merge(model)
        torch.testing.assert_close(model(images), live, rtol=1e-4, atol=1e-4)
