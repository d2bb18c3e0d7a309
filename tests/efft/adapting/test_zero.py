"""Test ZeRO-3, which shards all parameters and gathers those of a module only while the module runs.

One test uses DeepSpeed and needs two processes. The other tests imitate in one process how ZeRO-3 empties parameters.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import efft

ROOT = Path(__file__).parents[3]


class _Again(torch.autograd.Function):
    """Return an alias of a tensor, and call ``function`` when the backward pass reaches that tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, function: Callable[[], None]) -> Tensor:
        ctx.function = function
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.function()
        return *grads, None


def keep_apart(model: nn.Module) -> None:
    """Empty the parameters of every module between its calls, and restore them when its backward pass begins."""
    for module in model.modules():
        content = {p: p.data for p in module.parameters(recurse=False)}

        def gather(*_: Any, content: dict[nn.Parameter, Tensor] = content) -> None:
            for parameter, data in content.items():
                parameter.data = data

        def release(
            module: nn.Module, _: Any, outputs: Any, content: dict[nn.Parameter, Tensor] = content, gather: Any = gather
        ) -> Any:
            for parameter in content:
                parameter.data = torch.empty(0)
            return tree_map_only(Tensor, lambda t: _Again.apply(t, gather) if t.requires_grad else t, outputs)

        if content:
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
            release(module, None, ())


@pytest.mark.parametrize(
    "config",
    [
        efft.EfftConfig(rank=4, scale=2.0, dropout=0.0),
        efft.EfftConfig(rank=4, trainable_scale=True, dropout=0.0),
        efft.methods.LoRAConfig(rank=2, scale=2.0),
        efft.methods.FacTTKConfig(rank=4, scale=2.0),
    ],
    ids=lambda config: config.method,
)
def test_factors_that_are_whole_while_their_module_is_called(
    config: Any, tiny_vit: Callable[..., nn.Module], randomize: Callable[..., nn.Module]
) -> None:
    plain = efft.apply(tiny_vit(), config)
    randomize(plain)
    apart, images = copy.deepcopy(plain), torch.randn(2, 3, 16, 16)
    keep_apart(apart)
    assert all(p.numel() == 0 for p in apart.parameters())
    losses = [model(images).square().mean() for model in (plain, apart)]
    assert all(p.numel() == 0 for p in apart.parameters())
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    theirs = dict(apart.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=0, atol=0)


DEEPSPEED = """
import os, sys
import deepspeed, timm, torch
import efft

deepspeed.init_distributed("gloo")
torch.manual_seed(0)
model = timm.create_model("test_vit", num_classes=3, img_size=32)
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
efft.apply(model, efft.EfftConfig(rank=4, scale=10.0, dropout=0.0))
expected = str(efft.count_parameters(model))
optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=1e-2))
stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": stage, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
images = torch.randn(2, 3, 32, 32)
for _ in range(2):
    engine.backward(engine(images).square().mean())
    engine.step()
live = engine(images).detach()
assert str(efft.count_parameters(model)) == expected
efft.save_adapter(model, sys.argv[1])
torch.distributed.barrier()
for function in (efft.merge, efft.remove, lambda model: efft.load_adapter(model, sys.argv[1])):
    try:
        function(model)
    except ValueError as error:
        assert "before deepspeed.initialize" in str(error)
    else:
        raise AssertionError("not refused")
plain = timm.create_model("test_vit", num_classes=3, img_size=32)
plain.load_state_dict(base)
before = plain(images)
efft.load_adapter(plain, sys.argv[1])
torch.testing.assert_close(plain(images), live)
assert (before - live).abs().max() > 1e-2
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(DEEPSPEED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*launch, str(tmp_path / "run.py"), str(tmp_path / "adapter")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
