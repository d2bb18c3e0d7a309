"""Test adapted models in the training loops of transformers' Trainer and of accelerate.

With the mixin ``AdapterCheckpoints``, the Trainer saves only the adapter in its checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import efft
from efft.integrations.trainer import AdapterCheckpoints

pytestmark = pytest.mark.slow  # trains with transformers' Trainer

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'efft-kernels[train]'")


def make(adapted: bool = True) -> nn.Module:
    """Return a tiny ViT, adapted by default; all calls use the same initial head and factors."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "image_size": 16, "patch_size": 8, "num_labels": 3}
    config = transformers.ViTConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    model: nn.Module = transformers.ViTForImageClassification(config)
    return efft.apply(model, efft.EfftConfig(rank=4)) if adapted else model


def examples(n: int = 12) -> list[dict[str, Any]]:
    """Return images whose mean depends on their class."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator) + i % 3 - 1, "labels": i % 3} for i in range(n)
    ]


def trainer(model: nn.Module, out: Path, steps: int, kind: Any = None, **settings: Any) -> Any:
    usual: dict[str, Any] = {"learning_rate": 2e-2, "lr_scheduler_type": "constant", "save_steps": 4}
    arguments = transformers.TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=6,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **usual | settings,
    )
    kind = kind or transformers.Trainer
    return kind(model, arguments, train_dataset=examples(), eval_dataset=examples())


class AdapterTrainer(AdapterCheckpoints, transformers.Trainer):  # type: ignore[misc]
    """Define a trainer as in the documentation of ``AdapterCheckpoints``."""


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model.eval()(torch.stack([e["pixel_values"] for e in examples()])).logits
    return y


def test_trainer_trains_resumes_and_saves(tmp_path: Path) -> None:
    whole = trainer(make(), tmp_path / "whole", steps=8)
    whole.train()
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    expected = logits(whole.model)
    untrained = make()
    frozen = {n: p for n, p in untrained.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, frozen[n]) for n, p in whole.model.named_parameters() if n in frozen)

    trainer(make(), tmp_path / "parts", steps=4).train()
    resumed = trainer(make(), tmp_path / "parts", steps=8)
    # transformers 5 renames the base's tensors in a checkpoint and does not find them when it resumes. This does not
    # matter, because these tensors are frozen and equal to those of the new model.
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert torch.equal(logits(resumed.model), expected)

    efft.save_adapter(resumed.model, tmp_path / "adapter")
    assert torch.equal(logits(efft.load_adapter(make(adapted=False), tmp_path / "adapter")), expected)
    efft.merge(resumed.model)
    resumed.model.save_pretrained(tmp_path / "merged", state_dict=efft.merged_state_dict(resumed.model))
    merged = transformers.ViTForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_trainer_checkpoints_only_the_adapter_under_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
    from efft.integrations.peft import EfftPeftConfig

    def under_peft() -> Any:
        base = make(adapted=False)
        return peft.get_peft_model(base, EfftPeftConfig(rank=4))

    whole = trainer(under_peft(), tmp_path / "whole", steps=8)
    whole.train()
    trainer(under_peft(), tmp_path / "parts", steps=4).train()
    checkpoint = tmp_path / "parts" / "checkpoint-4"
    assert not (checkpoint / "model.safetensors").exists()
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
        assert all("efft_banks" in name or "classifier" in name for name in file.keys())  # noqa: SIM118  # no mapping
    resumed = trainer(under_peft(), tmp_path / "parts", steps=8)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_trainer_checkpoints_only_the_adapter(tmp_path: Path) -> None:
    whole = trainer(make(), tmp_path / "whole", 8, AdapterTrainer)
    whole.train()
    trainer(make(), tmp_path / "parts", 4, AdapterTrainer).train()
    checkpoint = tmp_path / "parts" / "checkpoint-4"
    assert not list(checkpoint.glob("model*")) + list(checkpoint.glob("pytorch_model*"))
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
        assert all(name.startswith(("efft.", "classifier.")) for name in file.keys())  # noqa: SIM118  # no mapping
    resumed = trainer(make(), tmp_path / "parts", 8, AdapterTrainer)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = logits(whole.model)
    assert torch.equal(logits(resumed.model), expected)
    resumed.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(efft.load_adapter(make(adapted=False), tmp_path / "saved")), expected)


def test_trainer_uses_the_rates_of_the_configuration(tmp_path: Path) -> None:
    model = make(adapted=False)
    efft.apply(model, efft.EfftConfig.auto(rank=4, rates={"cores": 3.0, "biases": 2.0}))
    optimizer = trainer(model, tmp_path, 1, AdapterTrainer, weight_decay=0.1).create_optimizer()
    of = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for group in efft.parameter_groups(model, 2e-2):
        expected = {"cores": 6e-2, "biases": 4e-2}.get(group["name"], 2e-2)
        assert [of[id(p)][0] for p in group["params"]] == pytest.approx([expected] * len(group["params"]))
    assert len(of) == sum(p.requires_grad for p in model.parameters())
    decays = {name: of[id(p)][1] for name, p in model.named_parameters() if p.requires_grad}
    assert all(decay == (0.0 if name.endswith("bias") else 0.1) for name, decay in decays.items())
    own = torch.optim.SGD(model.parameters(), lr=0.5)
    kept = AdapterTrainer(model, trainer(model, tmp_path, 1).args, optimizers=(own, None))
    assert kept.create_optimizer() is own
    assert len(own.param_groups) == 1


def test_trainer_loads_the_best_adapter(tmp_path: Path) -> None:
    """The loss decreases. If the highest loss counts as the best, the best checkpoint is not the last one."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    runner = trainer(make(), tmp_path, 6, AdapterTrainer, **best, **evaluation)
    runner.train()
    checkpoint = Path(runner.state.best_model_checkpoint)
    losses = {line["step"]: line["eval_loss"] for line in runner.state.log_history if "eval_loss" in line}
    assert checkpoint.name == f"checkpoint-{max(losses, key=losses.__getitem__)}"
    assert max(losses, key=losses.__getitem__) != 6, "the best checkpoint must not be the last one"
    assert torch.equal(logits(runner.model), logits(efft.load_adapter(make(adapted=False), checkpoint)))


def test_trainer_reads_checkpoints_of_whole_models(tmp_path: Path) -> None:
    trainer(make(adapted=False), tmp_path, 4, AdapterTrainer).train()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists(), (
        "a model without an adapter must be saved completely"
    )
    resumed = trainer(make(adapted=False), tmp_path, 4, AdapterTrainer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_trainer_takes_a_quantized_model(tmp_path: Path) -> None:
    """Trainer rejects a model that seems to have only quantized weights. With the mixin, it trains the adapter."""
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'efft-kernels[dev]'")
    make(adapted=False).save_pretrained(tmp_path / "base")
    settings = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=["classifier"])
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base", quantization_config=settings)
    efft.apply(model, efft.EfftConfig(rank=4))
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path, 2)
    before = logits(model)
    runner = trainer(model, tmp_path, 4, AdapterTrainer)
    runner.train()
    assert not torch.equal(logits(model), before)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base", quantization_config=settings)
    assert torch.equal(logits(efft.load_adapter(again, tmp_path / "checkpoint-4")), logits(model))


def test_accelerate(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make()
    loader = torch.utils.data.DataLoader(examples(), batch_size=6)
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=1e-2))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(8):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])
    expected = logits(model)
    accelerator.save_state(tmp_path / "state")
    with torch.no_grad():
        for _, factor in efft.named_factors(accelerator.unwrap_model(model)):
            factor.zero_()
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(logits(model), expected)
    efft.save_adapter(accelerator.unwrap_model(model), tmp_path / "adapter")
    assert torch.equal(logits(efft.load_adapter(make(adapted=False), tmp_path / "adapter")), expected)
