"""Which modules are the head of a task, over models of transformers, timm and torchvision."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import efft
from efft.heads import find_head, is_language_model

Make = Callable[..., nn.Module]

ONE, TOKENS = ["classifier"], ["qa_outputs"]
#: Classes of transformers and their heads, each with the default configuration on the meta device.
TRANSFORMERS: dict[str, list[str]] = {
    **dict.fromkeys(
        (
            *("ViTForImageClassification", "DeiTForImageClassification", "SwinForImageClassification"),
            *("Dinov2ForImageClassification", "ConvNextForImageClassification", "ResNetForImageClassification"),
            *("CLIPForImageClassification", "SiglipForImageClassification", "VivitForVideoClassification"),
            *("BertForSequenceClassification", "RobertaForSequenceClassification", "ElectraForSequenceClassification"),
            *("BertForTokenClassification", "BertForMultipleChoice", "CanineForSequenceClassification"),
            *("LongformerForSequenceClassification", "ASTForAudioClassification", "GPT2ForTokenClassification"),
            "SegformerForImageClassification",
        ),
        ONE,
    ),
    **dict.fromkeys(
        ("BertForQuestionAnswering", "BartForQuestionAnswering", "LlamaForQuestionAnswering", "T5ForQuestionAnswering"),
        TOKENS,
    ),
    **dict.fromkeys(("GPT2ForSequenceClassification", "LlamaForSequenceClassification"), ["score"]),
    **dict.fromkeys(("Wav2Vec2ForCTC", "HubertForCTC", "WavLMForCTC"), ["lm_head"]),
    **dict.fromkeys(
        ("Wav2Vec2ForSequenceClassification", "WhisperForAudioClassification"), ["projector", "classifier"]
    ),
    **dict.fromkeys(
        ("DetrForObjectDetection", "TableTransformerForObjectDetection", "YolosForObjectDetection"),
        ["class_labels_classifier", "bbox_predictor"],
    ),
    **dict.fromkeys(
        # Language models, whose heads are as pretrained as the rest; and bases, which have none.
        (
            *("BertForMaskedLM", "DistilBertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "BertForPreTraining"),
            *("T5ForConditionalGeneration", "BartForConditionalGeneration", "WhisperForConditionalGeneration"),
            *("ViTModel", "BertModel", "DetrModel", "CLIPModel", "SiglipVisionModel", "DINOv3ViTModel", "SwinBackbone"),
        ),
        [],
    ),
    "DistilBertForSequenceClassification": ["pre_classifier", "classifier"],
    "DebertaV2ForSequenceClassification": ["pooler", "classifier"],
    "BartForSequenceClassification": ["classification_head"],
    "XLNetForSequenceClassification": ["sequence_summary", "logits_proj"],
    "DeiTForImageClassificationWithTeacher": ["cls_classifier", "distillation_classifier"],
    "SegformerForSemanticSegmentation": ["decode_head"],
    "UperNetForSemanticSegmentation": ["decode_head", "auxiliary_head"],
    "DPTForDepthEstimation": ["neck", "head"],
    "DetrForSegmentation": [
        *("detr.class_labels_classifier", "detr.bbox_predictor", "mask_head", "bbox_attention"),
    ],
    "MaskFormerForInstanceSegmentation": ["class_predictor", "mask_embedder"],
    "ViTMAEForPreTraining": ["decoder"],
    "VitPoseForPoseEstimation": ["head"],
    "RTDetrForObjectDetection": [],  # its heads are inside what it calls its base: a warning says so
}

TORCHVISION = {
    **dict.fromkeys(("resnet18", "googlenet", "shufflenet_v2_x0_5", "r3d_18"), ["fc"]),
    **dict.fromkeys(("vit_b_32",), ["heads"]),
    **dict.fromkeys(
        ("swin_t", "swin_v2_t", "mvit_v2_s", "swin3d_t", "retinanet_resnet50_fpn", "ssd300_vgg16"), ["head"]
    ),
    **dict.fromkeys(("convnext_tiny", "efficientnet_b0", "densenet121", "vgg11", "fcn_resnet50", "maxvit_t"), ONE),
    "fasterrcnn_resnet50_fpn": ["rpn", "roi_heads"],
}

TIMM = {
    **dict.fromkeys(("beit_base_patch16_224", "cait_xxs24_224", "pit_ti_224", "xcit_nano_12_p16_224"), ["head"]),
    **dict.fromkeys(("swin_tiny_patch4_window7_224", "convnext_atto", "mvitv2_tiny", "hiera_tiny_224"), ["head.fc"]),
    **dict.fromkeys(("resnet18", "dla34", "selecsls42"), ["fc"]),
    **dict.fromkeys(("densenet121", "efficientnet_b0", "ghostnet_050"), ONE),
    **dict.fromkeys(("levit_128", "efficientformer_l1", "swiftformer_xs"), ["head", "head_dist"]),
    "inception_v4": ["last_linear"],
    "samvit_base_patch16": [],
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the hf extra")
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    assert find_head(model, None) == TRANSFORMERS[name]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision", reason="needs the vision extra").models
    backbone = (
        {"weights_backbone": None} if (TORCHVISION[name] != ["fc"] and "_resnet50" in name) or "ssd" in name else {}
    )
    extra = {"aux_logits": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **backbone, **extra)
    assert find_head(model, None) == TORCHVISION[name]


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm", reason="needs the vision extra")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert find_head(model, None) == TIMM[name]


def test_auxiliary_heads() -> None:
    models = pytest.importorskip("torchvision", reason="needs the vision extra").models
    with torch.device("meta"):
        segmenting = models.get_model("fcn_resnet50", weights=None, weights_backbone=None, aux_loss=True)
        inception = models.get_model("inception_v3", weights=None, init_weights=False)
    assert find_head(segmenting, None) == ["classifier", "aux_classifier"]
    assert find_head(inception, None) == ["AuxLogits", "fc"]


def test_a_head_of_transformers_inside_another_module() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the hf extra")
    with torch.device("meta"):
        inner = transformers.BertForQuestionAnswering(transformers.BertConfig(num_hidden_layers=1))
        language = transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=1))
    assert find_head(nn.Sequential(inner), None) == ["0.qa_outputs"]
    assert find_head(nn.Sequential(language), None) == []


def test_language_models(tiny_vit: Make) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the hf extra")
    config = transformers.Wav2Vec2Config(num_hidden_layers=1)
    with torch.device("meta"):
        assert not is_language_model(transformers.Wav2Vec2ForCTC(config)), "its vocabulary is the task's"
    assert not is_language_model(tiny_vit())


def test_a_model_without_a_head_is_named(tiny_vit: Make) -> None:
    config: dict[str, Any] = {"rank": 2}
    with pytest.warns(
        UserWarning, match="found no head in this VisionTransformer, so nothing but the factors is trained"
    ):
        efft.apply(tiny_vit(num_classes=0), efft.EfftConfig(**config))
    transformers = pytest.importorskip("transformers", reason="needs the hf extra")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        efft.apply(tiny_vit(num_classes=0), efft.EfftConfig(**config, head=[]))
        efft.apply(llama, efft.EfftConfig(**config))
    assert not llama.lm_head.weight.requires_grad


def test_shared_heads_are_saved_once(tmp_path: Any) -> None:
    """As detectors have one for each layer of the decoder, all the same."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, one = nn.Linear(4, 4), nn.Linear(4, 2)
            self.head = nn.ModuleList([one, one])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head[1](self.body(x))
            return y

    config = efft.EfftConfig(targets=["body"], rank=2)
    model, x = efft.apply(Detector(), config), torch.randn(3, 4)
    again = Detector()
    again.body.load_state_dict(model.body.state_dict())
    efft.save_adapter(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(efft.load_adapter(again, tmp_path)(x), model(x))


def test_its_place_before() -> None:
    assert importlib.import_module("efft.targets").find_head is find_head
