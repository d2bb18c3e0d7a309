"""Adapt a timm model, train it in a plain loop, save the adapter and load it into a fresh model."""

import tempfile

import timm
import torch

import efft

torch.manual_seed(0)
images = torch.randn(16, 3, 160, 160)
labels = torch.arange(16) % 4
images += 0.5 * torch.randn(4, 3, 160, 160)[labels]  # adds one pattern per class, so that there is something to learn

model = timm.create_model("test_vit", num_classes=4)  # for real work: pretrained=True
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
efft.apply(model, efft.EfftConfig(rank=8, scale=2.0))
optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=1e-2, weight_decay=1e-4))
for step in range(20):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    efft.save_adapter(model, folder)
    fresh = timm.create_model("test_vit", num_classes=4)
    fresh.load_state_dict(base)  # now it has the same backbone
    efft.load_adapter(fresh, folder)
torch.testing.assert_close(fresh.eval()(images), model.eval()(images))
print("the loaded adapter gives the same outputs")
