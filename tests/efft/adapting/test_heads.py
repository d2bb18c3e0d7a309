"""Test which modules count as the head of a task, on models of transformers, timm and torchvision."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import efft
from efft.adapting.heads import find_head, is_language_model

Make = Callable[..., nn.Module]

#: Names of head modules, and the classes of transformers that have them. The tests create a model of each class with
#: its default configuration on the meta device.
TRANSFORMERS = {
    ("classifier",): """
        ViTForImageClassification DeiTForImageClassification SwinForImageClassification Dinov2ForImageClassification
        ConvNextForImageClassification ResNetForImageClassification CLIPForImageClassification
        SiglipForImageClassification SegformerForImageClassification VivitForVideoClassification
        BertForSequenceClassification RobertaForSequenceClassification ElectraForSequenceClassification
        CanineForSequenceClassification LongformerForSequenceClassification BertForTokenClassification
        GPT2ForTokenClassification BertForMultipleChoice ASTForAudioClassification""",
    ("qa_outputs",): """
        BertForQuestionAnswering BartForQuestionAnswering LlamaForQuestionAnswering T5ForQuestionAnswering""",
    ("score",): "GPT2ForSequenceClassification LlamaForSequenceClassification",
    ("lm_head",): "Wav2Vec2ForCTC HubertForCTC WavLMForCTC",
    ("projector", "classifier"): "Wav2Vec2ForSequenceClassification WhisperForAudioClassification",
    ("class_labels_classifier", "bbox_predictor"): """
        DetrForObjectDetection TableTransformerForObjectDetection YolosForObjectDetection""",
    # These models have no head of a task. The heads of language models are pretrained like all other weights, and base
    # models have no head. The heads of RTDetr are inside its base model, where they are not found.
    (): """
        BertForMaskedLM DistilBertForMaskedLM GPT2LMHeadModel LlamaForCausalLM BertForPreTraining
        T5ForConditionalGeneration BartForConditionalGeneration WhisperForConditionalGeneration
        ViTModel BertModel DetrModel CLIPModel SiglipVisionModel DINOv3ViTModel SwinBackbone
        RTDetrForObjectDetection""",
    ("pre_classifier", "classifier"): "DistilBertForSequenceClassification",
    ("pooler", "classifier"): "DebertaV2ForSequenceClassification",
    ("classification_head",): "BartForSequenceClassification",
    ("sequence_summary", "logits_proj"): "XLNetForSequenceClassification",
    ("cls_classifier", "distillation_classifier"): "DeiTForImageClassificationWithTeacher",
    ("decode_head",): "SegformerForSemanticSegmentation",
    ("decode_head", "auxiliary_head"): "UperNetForSemanticSegmentation",
    ("neck", "head"): "DPTForDepthEstimation",
    ("detr.class_labels_classifier", "detr.bbox_predictor", "mask_head", "bbox_attention"): "DetrForSegmentation",
    ("class_predictor", "mask_embedder"): "MaskFormerForInstanceSegmentation",
    ("decoder",): "ViTMAEForPreTraining",
    ("head",): "VitPoseForPoseEstimation",
}
TORCHVISION = {
    ("fc",): "resnet18 googlenet shufflenet_v2_x0_5 r3d_18",
    ("heads",): "vit_b_32",
    ("head",): "swin_t swin_v2_t mvit_v2_s swin3d_t retinanet_resnet50_fpn ssd300_vgg16",
    ("classifier",): "convnext_tiny efficientnet_b0 densenet121 vgg11 fcn_resnet50 maxvit_t",
    ("rpn", "roi_heads"): "fasterrcnn_resnet50_fpn",
}
TIMM = {
    ("head",): "beit_base_patch16_224 cait_xxs24_224 pit_ti_224 xcit_nano_12_p16_224 volo_d1_224 crossvit_9_240",
    ("head.fc",): "swin_tiny_patch4_window7_224 convnext_atto mvitv2_tiny hiera_tiny_224 fastvit_t8 gcvit_xxtiny",
    ("fc",): "resnet18 dla34 selecsls42",
    ("classifier",): "densenet121 efficientnet_b0 ghostnet_050 hrnet_w18",
    ("head", "head_dist"): "levit_128 efficientformer_l1 swiftformer_xs",
    ("last_linear",): "inception_v4",
    (): "samvit_base_patch16",
}


def cases(table: dict[tuple[str, ...], str]) -> list[tuple[str, list[str]]]:
    return [(name, list(head)) for head, names in table.items() for name in names.split()]


@pytest.mark.parametrize(("name", "head"), cases(TRANSFORMERS))
def test_transformers(name: str, head: list[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    assert find_head(model, None) == head


@pytest.mark.parametrize(("name", "head"), cases(TORCHVISION))
def test_torchvision(name: str, head: list[str]) -> None:
    models = pytest.importorskip("torchvision", reason="needs torchvision: pip install 'efft-kernels[vision]'").models
    # By default, these models load the weights of their backbone.
    whole = any(kind in name for kind in ("resnet50", "vgg16"))
    backbone: dict[str, Any] = {"weights_backbone": None} if whole else {}
    extra: dict[str, Any] = {"aux_logits": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **backbone, **extra)
    assert find_head(model, None) == head


@pytest.mark.parametrize(("name", "head"), cases(TIMM))
def test_timm(name: str, head: list[str]) -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert find_head(model, None) == head


def test_auxiliary_heads() -> None:
    models = pytest.importorskip("torchvision", reason="needs torchvision: pip install 'efft-kernels[vision]'").models
    with torch.device("meta"):
        segmenting = models.get_model("fcn_resnet50", weights=None, weights_backbone=None, aux_loss=True)
        inception = models.get_model("inception_v3", weights=None, init_weights=False)
    assert find_head(segmenting, None) == ["classifier", "aux_classifier"]
    assert find_head(inception, None) == ["AuxLogits", "fc"]


def test_a_head_of_transformers_inside_another_module() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    with torch.device("meta"):
        inner = transformers.BertForQuestionAnswering(transformers.BertConfig(num_hidden_layers=1))
        language = transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=1))
    assert find_head(nn.Sequential(inner), None) == ["0.qa_outputs"]
    assert find_head(nn.Sequential(language), None) == []


def test_language_models(tiny_vit: Make) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    config = transformers.Wav2Vec2Config(num_hidden_layers=1)
    with torch.device("meta"):
        assert not is_language_model(transformers.Wav2Vec2ForCTC(config)), (
            "the vocabulary of this model belongs to its task"
        )
    assert not is_language_model(tiny_vit())


def test_a_model_without_a_head_is_named(tiny_vit: Make) -> None:
    config: dict[str, Any] = {"rank": 2}
    with pytest.warns(
        UserWarning, match="found no head in this VisionTransformer, so nothing but the factors is trained"
    ):
        efft.apply(tiny_vit(num_classes=0), efft.EfftConfig(**config))
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        efft.apply(tiny_vit(num_classes=0), efft.EfftConfig(**config, head=[]))
        efft.apply(llama, efft.EfftConfig(**config))
    assert not llama.lm_head.weight.requires_grad


def test_shared_heads_are_saved_once(tmp_path: Any) -> None:
    """Detectors have one head per decoder layer, and all of them share their weights."""

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
    assert importlib.import_module("efft.planning.targets").find_head is find_head
