"""Merge an adapter for inference, and export the merged model with torch.export."""

import timm
import torch

import efft

torch.manual_seed(0)
model = timm.create_model("test_vit", num_classes=4)
efft.apply(model, efft.EfftConfig(rank=8))
with torch.no_grad():  # stands for training
    for _, factor in efft.named_factors(model):
        factor.add_(0.1 * torch.randn_like(factor))
model.eval()
images = torch.randn(2, 3, 160, 160)
adapted = model(images)

weights = efft.merged_state_dict(model)  # a state dict for the plain architecture; the model is not changed
plain = timm.create_model("test_vit", num_classes=4).eval()
plain.load_state_dict(weights)
torch.testing.assert_close(plain(images), adapted, rtol=1e-3, atol=1e-3)

program = torch.export.export(plain, (images,))
torch.testing.assert_close(program.module()(images), adapted, rtol=1e-3, atol=1e-3)
print("merged and exported")
