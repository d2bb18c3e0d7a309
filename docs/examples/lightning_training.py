"""Train an adapted model with Lightning, and save only the adapter."""

import tempfile

import lightning
import timm
import torch

import efft


class Classifier(lightning.LightningModule):
    """Train the factors and the head of a timm model."""

    def __init__(self):
        super().__init__()
        self.model = timm.create_model("test_vit", num_classes=4)  # for real work: pretrained=True
        efft.apply(self.model, efft.EfftConfig(rank=8, scale=2.0))
        self.losses = []

    def training_step(self, batch, index):
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.model(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(efft.parameter_groups(self.model, lr=1e-2))


torch.manual_seed(0)
labels = torch.arange(16) % 4
images = torch.randn(16, 3, 160, 160) + 0.5 * torch.randn(4, 3, 160, 160)[labels]  # noise plus one pattern per class
batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)

task = Classifier()
frozen = {name: p.clone() for name, p in task.named_parameters() if not p.requires_grad}
trainer = lightning.Trainer(max_epochs=6, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(task, batches)
print(f"loss {task.losses[0]:.2f} -> {task.losses[-1]:.2f}")
assert all(torch.equal(p, frozen[name]) for name, p in task.named_parameters() if name in frozen)

with tempfile.TemporaryDirectory() as folder:
    efft.save_adapter(task.model, folder)  # a checkpoint of Lightning would contain the complete model
    with efft.disabled(task.model):
        base = task.model.eval()(images)
    efft.load_adapter(task.model, folder)
assert not torch.allclose(task.model(images), base)
