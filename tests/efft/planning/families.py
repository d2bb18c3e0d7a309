"""Create tiny models of many families of architectures, with random weights and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Inputs = Mapping[str, Any]
Family = Callable[[], tuple[nn.Module, Inputs]]


def make(name: str) -> tuple[nn.Module, Inputs]:
    """Return a model of the family in float64 and evaluation mode, and inputs for it; all calls return equal values.

    Noise is added to all parameters, because some norms and scales start at zero, and other layers would then have no
    gradient.
    """
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    model = model.eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, inputs


def output_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the first floating-point tensor of the model's output."""
    positional = [inputs["x"]] if "x" in inputs else []
    found: Any = model(*positional, **{k: v for k, v in inputs.items() if k != "x"})
    for attribute in ("logits", "last_hidden_state"):
        found = getattr(found, attribute, found)
    if isinstance(found, Mapping):
        found = next(iter(found.values()))
    return found[0] if isinstance(found, (tuple, list)) else found


def _images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _words(n: int = 12) -> Tensor:
    return torch.randint(2, 60, (2, n), generator=torch.Generator().manual_seed(1))


def _timm(name: str, size: int, **changes: Any) -> Family:
    """Return a function that creates a timm model. ``name`` is its name, or a "module.Class" of timm.models."""

    def build() -> tuple[nn.Module, Inputs]:
        timm = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'")
        module, _, kind = name.partition(".")
        if kind:
            return getattr(getattr(timm.models, module), kind)(num_classes=5, **changes), {"x": _images(size)}
        return timm.create_model(name, num_classes=5, **changes), {"x": _images(size)}

    return build


def _mvit() -> tuple[nn.Module, Inputs]:
    mvit = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'").models.mvitv2
    sizes = mvit.MultiScaleVitCfg(depths=(2, 2), embed_dim=8, num_heads=1, stride_q=((1, 1), (2, 2)))
    return mvit.MultiScaleVit(sizes, img_size=32, num_classes=5), {"x": _images(32)}


def _regnet() -> tuple[nn.Module, Inputs]:
    regnet = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'").models.regnet
    sizes = regnet.RegNetCfg(w0=8, wa=8, wm=2, group_size=8, depth=8, se_ratio=0.25)
    return regnet.RegNet(sizes, num_classes=5), {"x": _images(32)}


def _resmlp() -> tuple[nn.Module, Inputs]:
    mixer = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'").models.mlp_mixer
    norm, block = mixer.Affine, mixer.ResBlock
    return mixer.MlpMixer(5, 32, 3, 8, 2, 16, 4, block_layer=block, norm_layer=norm), {"x": _images(32)}


_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def _hugging_face(kind: str, config: str, inputs: Callable[[], Inputs], **sizes: Any) -> Family:
    """Return a function that creates a model of transformers, from the names of its class and of its configuration."""

    def build() -> tuple[nn.Module, Inputs]:
        transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
        settings = getattr(transformers, f"{config}Config")(**sizes)
        # Other implementations do not support float64.
        settings._attn_implementation = settings._experts_implementation = "eager"
        return getattr(transformers, kind)(settings), inputs()

    return build


def _text() -> Inputs:
    return {"input_ids": _words()}


def _translation() -> Inputs:
    return {"input_ids": _words(), "decoder_input_ids": _words(7)}


def _causal(name: str, **sizes: Any) -> Family:
    """Return a function that creates a language model without a cache. ``sizes`` extends the usual settings."""
    usual = {**_SMALL, "num_key_value_heads": 1, "vocab_size": 64, "use_cache": False, "pad_token_id": 0}
    return _hugging_face(f"{name}ForCausalLM", name, _text, **{**usual, **sizes})


def _encoder(name: str, **sizes: Any) -> Family:
    """Return a function that creates a text encoder. ``sizes`` extends the usual settings."""
    usual = {**_SMALL, "vocab_size": 64, "num_labels": 5, "pad_token_id": 0}
    return _hugging_face(f"{name}ForSequenceClassification", name, _text, **{**usual, **sizes})


def _pictures(name: str, size: int, task: str = "ForImageClassification", **sizes: Any) -> Family:
    return _hugging_face(f"{name}{task}", name, lambda: {"pixel_values": _images(size)}, num_labels=5, **sizes)


def _torchvision(build: Callable[[Any], nn.Module], size: int) -> Family:
    def made() -> tuple[nn.Module, Inputs]:
        models = pytest.importorskip(
            "torchvision", reason="needs torchvision: pip install 'efft-kernels[vision]'"
        ).models
        return build(models), {"x": _images(size)}

    return made


def _sequence(n: int = 6) -> Tensor:
    return torch.randn(2, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _torchs_encoder() -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2), {"src": _sequence()}


def _torchs_decoder() -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerDecoder(layer, 2), {"tgt": _sequence(), "memory": _sequence(4)}


def _torchs_transformer() -> tuple[nn.Module, Inputs]:
    return nn.Transformer(16, 2, 2, 2, 32, batch_first=True), {"src": _sequence(), "tgt": _sequence(4)}


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
_STAGES = {"depths": (2, 2), "img_size": 32}

FAMILIES: dict[str, Family] = {
    # timm: transformers
    "vit": _timm("vit_tiny_patch16_224", 32, **_VIT),
    "deit3": _timm("deit3_small_patch16_224", 32, **_VIT),
    "beit": _timm("beit_base_patch16_224", 32, **_VIT),
    "eva02": _timm("eva02_tiny_patch14_224", 32, **_VIT),
    "aimv2": _timm("aimv2_large_patch14_224", 32, **_VIT),
    "swin": _timm("swin_tiny_patch4_window7_224", 32, embed_dim=8, num_heads=(1, 2), window_size=4, **_STAGES),
    "swinv2": _timm("swinv2_tiny_window8_256", 32, embed_dim=8, num_heads=(1, 2), window_size=4, **_STAGES),
    "pit": _timm("pit_ti_224", 64, img_size=64, base_dims=(8, 8), depth=(2, 2), heads=(1, 2), mlp_ratio=2),
    "mvitv2": _mvit,
    "hiera": _timm(
        "hiera_tiny_224",
        32,
        img_size=(32, 32),
        embed_dim=8,
        num_heads=1,
        stages=(1, 2),
        q_pool=1,
        mask_unit_size=(4, 4),
    ),
    "gcvit": _timm(
        "gcvit.GlobalContextVit", 32, embed_dim=8, num_heads=(1, 2), window_ratio=(8, 16), mlp_ratio=2, **_STAGES
    ),
    "cait": _timm("cait_xxs24_224", 32, **_VIT),
    "xcit": _timm("xcit_nano_12_p16_224", 32, **_VIT),
    "volo": _timm(
        "volo.VOLO", 32, img_size=32, layers=(2, 2), embed_dims=(16, 16), num_heads=(2, 2), stem_hidden_dim=8
    ),
    "tnt": _timm(
        "tnt.TNT",
        32,
        img_size=32,
        patch_size=8,
        embed_dim=16,
        inner_dim=8,
        depth=2,
        num_heads_inner=2,
        num_heads_outer=2,
    ),
    "crossvit": _timm("crossvit_tiny_240", 240, embed_dim=(16, 32), num_heads=(2, 2), depth=((1, 2, 0), (1, 2, 0))),
    "twins": _timm(
        "twins_svt_small", 64, img_size=64, embed_dims=(8, 16, 16, 16), depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 2)
    ),
    "levit": _timm(
        "levit_128s", 64, img_size=64, embed_dim=(16, 16, 16), key_dim=8, num_heads=(2, 2, 2), depth=(2, 2, 2)
    ),
    "coatnet": _timm(
        "coatnet_nano_rw_224",
        64,
        img_size=64,
        embed_dim=(32, 64),
        depths=(2, 2),
        stem_width=(8, 8),
        block_type=("C", "T"),
    ),
    "maxvit": _timm(
        "maxvit_tiny_rw_224",
        64,
        img_size=64,
        embed_dim=(32, 32),
        depths=(2, 2),
        stem_width=(8, 8),
        block_type=("M", "M"),
    ),
    "edgenext": _timm("edgenext_xx_small", 64, dims=(8, 16, 16, 16), depths=(2, 2, 2, 2), heads=(2, 2, 2, 2)),
    "fastvit": _timm("fastvit_sa12", 64, embed_dims=(16, 16, 16, 32), layers=(2, 2, 2, 2)),
    "davit": _timm("davit.DaVit", 64, embed_dims=(8, 16), depths=(2, 2), num_heads=(1, 2), window_size=4),
    "focalnet": _timm("focalnet.FocalNet", 64, embed_dim=8, depths=(2, 2), focal_levels=(2, 2), focal_windows=(3, 3)),
    # timm: MLPs and convolutions
    "mixer": _timm("mlp_mixer.MlpMixer", 32, img_size=32, patch_size=8, num_blocks=2, embed_dim=16),
    "resmlp": _resmlp,
    "poolformer": _timm("metaformer.MetaFormer", 64, dims=(8, 16, 16, 16), depths=(2, 2, 2, 2)),
    "convnext": _timm("convnext.ConvNeXt", 64, dims=(8, 16, 16, 16), depths=(2, 2, 2, 2)),
    "convnextv2": _timm(
        "convnext.ConvNeXt", 64, dims=(8, 16, 16, 16), depths=(2, 2, 2, 2), use_grn=True, ls_init_value=None
    ),
    "mambaout": _timm("test_mambaout", 32),
    "resnet": _timm("test_resnet", 32),
    "resnetv2": _timm("resnetv2.ResNetV2", 32, layers=(2, 2), channels=(32, 64), stem_chs=32, bottle_ratio=1),
    "nfnet": _timm("test_nfnet", 32),
    "regnet": _regnet,
    "efficientnet": _timm("test_efficientnet", 32),
    "mobilenetv3": _timm("mobilenetv3_small_050", 32),
    "mobilenetv4": _timm("mobilenetv4_conv_small_035", 32),
    "densenet": _timm("densenet.DenseNet", 32, growth_rate=8, block_config=(2, 2), bn_size=2),
    "repvit": _timm("repvit_m0_9", 32, embed_dim=(8, 16), depth=(2, 2)),
    # transformers: text
    "bert": _encoder("Bert"),
    "distilbert": _hugging_face(
        "DistilBertForSequenceClassification",
        "DistilBert",
        _text,
        n_layers=2,
        dim=16,
        hidden_dim=32,
        n_heads=2,
        vocab_size=64,
    ),
    "albert": _encoder("Albert", embedding_size=8),
    "deberta-v2": _encoder("DebertaV2", relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"]),
    "xlnet": _hugging_face(
        "XLNetForSequenceClassification", "XLNet", _text, d_model=16, n_layer=2, n_head=2, d_inner=32, vocab_size=64
    ),
    "funnel": _hugging_face(
        "FunnelForTokenClassification",
        "Funnel",
        _text,
        **{"block_sizes": [2, 2], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "vocab_size": 64},
    ),
    "gpt2": _hugging_face(
        "GPT2LMHeadModel", "GPT2", _text, n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, use_cache=False
    ),
    "gpt-neox": _causal("GPTNeoX"),
    "opt": _causal("OPT", ffn_dim=32, word_embed_proj_dim=16),
    "llama": _causal("Llama"),
    "qwen3": _causal("Qwen3", head_dim=16),
    "gemma": _causal("Gemma", head_dim=16),
    "gpt-oss": _causal(
        "GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    ),
    "mixtral": _causal("Mixtral", num_local_experts=4),
    "qwen3-moe": _causal("Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "deepseek-v3": _causal(
        "DeepseekV3",
        **{"num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
        **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
        **{"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_hidden_layers": 3},
    ),
    "llama4": _hugging_face(
        "Llama4ForCausalLM",
        "Llama4Text",
        _text,
        **{**_SMALL, "num_key_value_heads": 1, "vocab_size": 64, "head_dim": 8, "intermediate_size_mlp": 32},
        **{"num_local_experts": 4, "use_cache": False, "pad_token_id": 0, "interleave_moe_layer_step": 1},
    ),
    "mamba": _hugging_face(
        "MambaForCausalLM",
        "Mamba",
        _text,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        vocab_size=64,
        use_cache=False,
    ),
    "jamba": _causal(
        "Jamba",
        **{"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
        **{"expert_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 4},
    ),
    "zamba": _causal(
        "Zamba",
        **{"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 4},
        **{"num_key_value_heads": 2, "use_mamba_kernels": False, "n_mamba_heads": 2, "attention_hidden_size": 32},
    ),
    "t5": _hugging_face(
        "T5ForConditionalGeneration",
        "T5",
        _translation,
        **{"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64, "use_cache": False},
    ),
    "bart": _hugging_face(
        "BartForConditionalGeneration",
        "Bart",
        _translation,
        **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 64},
        **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "use_cache": False},
    ),
    # transformers: speech and pictures
    "whisper": _hugging_face(
        "WhisperForConditionalGeneration",
        "Whisper",
        lambda: {"input_features": _images(16)[:, 0], "decoder_input_ids": _words(7)},
        **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 64},
        **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "use_cache": False},
        **{"num_mel_bins": 16, "max_source_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **{"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    "wav2vec2": _hugging_face(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2",
        lambda: {"input_values": _images(24)[:, 0].flatten(1)},
        **{
            **_SMALL,
            "conv_dim": (8, 8, 8),
            "conv_stride": (5, 2, 2),
            "conv_kernel": (10, 3, 3),
            "num_conv_pos_embeddings": 4,
        },
        **{"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8},
    ),
    "vit-of-transformers": _pictures("ViT", 16, **_SMALL, image_size=16, patch_size=8),
    "dinov2": _pictures(
        "Dinov2",
        16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        use_swiglu_ffn=True,
    ),
    "clip": _hugging_face(
        "CLIPModel",
        "CLIP",
        lambda: {"input_ids": _words(), "pixel_values": _images(16)},
        text_config={**_SMALL, "vocab_size": 64, "eos_token_id": 2},
        vision_config={**_SMALL, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    ),
    "siglip": _hugging_face(
        "SiglipModel",
        "Siglip",
        lambda: {"input_ids": _words(), "pixel_values": _images(16)},
        text_config={**_SMALL, "vocab_size": 64, "projection_size": 16},
        vision_config={**_SMALL, "image_size": 16, "patch_size": 8},
    ),
    "segformer": _pictures(
        "Segformer",
        64,
        "ForSemanticSegmentation",
        **{"num_encoder_blocks": 2, "depths": [2, 2], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2]},
        **{
            "sr_ratios": [4, 2],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
    ),
    "detr": _pictures(
        "Detr",
        64,
        "ForObjectDetection",
        **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "num_queries": 4},
        **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
        backbone_config={"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 16]}
        | {"depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage4"]},
    ),
    # torchvision and torch
    "vit-of-torchvision": _torchvision(lambda m: m.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5), 32),
    "swin-of-torchvision": _torchvision(
        lambda m: m.SwinTransformer([4, 4], 8, [2, 2], [1, 2], [2, 2], num_classes=5), 32
    ),
    "torch's-encoder": _torchs_encoder,
    "torch's-decoder": _torchs_decoder,
    "torch's-transformer": _torchs_transformer,
}
