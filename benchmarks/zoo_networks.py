"""The networks of `zoo.py`: small members of the families that users bring, with random weights, none of it downloaded.

Each library is imported when one of its networks is built, so that a missing one costs its own networks only.
"""

import importlib
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import zoo_own
from torch import Tensor, nn

Inputs = Callable[[int, torch.Generator], Any]
"""Makes a batch of a number of items, in the form that a dataset yields: a tensor, a tuple, or a dictionary."""

CLASSES: Final = 10
SETTLING_BATCHES: Final = 4
SMALLEST: Final = 1e-3
"""A parameter below it throughout was set to zero, or nearly so, for the sake of a training that never happens here."""


@dataclass(frozen=True)
class Network:
    """One architecture.

    Attributes:
        family: where it comes from.
        build: makes it.
        inputs: makes what it reads.
    """

    family: str
    build: Callable[[], nn.Module]
    inputs: Inputs


def torchvision() -> torch.library.Library | None:
    """Import torchvision, without its operators where they are missing.

    Its usual wheel is built for the torch that is its like; beside a torch that was built for CPUs alone its own
    operators are not loaded, and the import fails because it describes two of them to torch. They are declared here,
    without code, which is enough: no network here calls them.

    Returns:
        The declarations, which last as long as this object does; `None` where none were needed.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        declared = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return declared
    except ImportError:
        pass  # its networks will say so
    return None


DECLARED: Final = torchvision()


def images(size: int, channels: int = 3) -> Inputs:
    """Make images of a square size."""
    return fields(channels, size, size)


def fields(channels: int, *size: int) -> Inputs:
    """Make signals, images or volumes with mean 0 and deviation 1: coarse structures, and noise upon them."""

    def make(count: int, generator: torch.Generator) -> Tensor:
        coarse = torch.randn(count, channels, *(max(1, s // 8) for s in size), generator=generator)
        x = nn.functional.interpolate(coarse, size=size) + torch.randn(count, channels, *size, generator=generator) / 2
        return (x - x.mean()) / x.std()

    return make


def named(name: str, inputs: Inputs) -> Inputs:
    """Pass what is made by the name of an argument."""
    return lambda count, generator: {name: inputs(count, generator)}


def words(length: int, vocabulary: int) -> Inputs:
    """Make tokens and a mask that hides the last ones of every second item."""

    def make(count: int, generator: torch.Generator) -> dict[str, Tensor]:
        mask = torch.ones(count, length, dtype=torch.long)
        mask[::2, -(length // 4) :] = 0
        return {"input_ids": torch.randint(vocabulary, (count, length), generator=generator), "attention_mask": mask}

    return make


def seed_of(name: str) -> int:
    """Return the seed that belongs to a name."""
    return zlib.crc32(name.encode())


def built(name: str) -> tuple[nn.Module, Callable[[int], Any]]:
    """Make a network in eval mode, with parameters and statistics as after a training, and what makes its inputs.

    Args:
        name: one of `NETWORKS`.
    """
    torch.manual_seed(seed_of(name))
    generator = torch.Generator().manual_seed(seed_of(name))
    network = NETWORKS[name]
    model = network.build().eval()
    batches = [network.inputs(8, generator) for _ in range(SETTLING_BATCHES)]
    _settle(model, batches)
    return model, lambda count: network.inputs(count, generator)


@torch.no_grad()
def _settle(model: nn.Module, batches: list[Any]) -> None:
    """Vary the factors of norms, give a value to what starts at zero, and collect the statistics of BatchNorms."""
    norms = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight") and bool((parameter == 1).all()):
            parameter.uniform_(0.5, 1.5)
        elif bool((parameter.abs() < SMALLEST).all()):
            parameter.normal_(0, 0.1)
    momenta = [(norm, norm.momentum) for norm in norms]
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None
    for batch in batches if norms else []:
        call(model, batch)
    for norm, momentum in momenta:
        norm.eval()
        norm.momentum = momentum


def call(model: Any, item: Any) -> Any:
    """Call a model with an item of a dataset."""
    if isinstance(item, dict):
        return model(**item)
    return model(*item) if isinstance(item, (tuple, list)) else model(item)


def _timm(name: str, size: int = 64, **settings: Any) -> Network:
    def build() -> nn.Module:
        return importlib.import_module("timm").create_model(name, num_classes=CLASSES, **settings)

    return Network("timm", build, images(size))


def _timm_networks() -> Iterator[tuple[str, Network]]:
    for name in TIMM_CONVOLUTIONAL.split():
        yield f"timm/{name}", _timm(name)
    for name, (size, settings) in TIMM_SHORTENED.items():
        yield f"timm/{name}", _timm(name, size, **settings)


TIMM_CONVOLUTIONAL: Final = """
    resnet10t resnet18 resnet14t legacy_seresnet18 resnext26ts seresnext26ts gcresnext26ts resnet32ts dla46_c dla46x_c
    vgg11_bn ese_vovnet19b_slim_dw cs3darknet_focus_s cspnext_tiny hrnet_w18_small inception_next_atto rexnet_100
    ghostnet_050 ghostnetv2_100 repghostnet_050 hardcorenas_a mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050
    mobilenetv3_large_075 mobilenetv4_conv_small_035 efficientnet_lite0 efficientnet_b0 efficientnet_es mnasnet_small
    semnasnet_075 spnasnet_100 fbnetc_100 tinynet_e mixnet_s lcnet_035 lcnetv2_small regnetx_002 regnety_002
    regnetz_005 nf_regnet_b0 nf_resnet26 mobileone_s0 repvgg_a0 gernet_s convnext_atto convnext_atto_ols
    convnextv2_atto edgenext_xx_small fastvit_t8 repvit_m0_9 starnet_s050 fasternet_t0 mambaout_femto efficientvim_m1
    shvit_s1 lowformer_b0 cpubone_nano iformer_t swiftformer_xs efficientvit_b0 mobilevit_xxs mobilevitv2_050
    poolformer_s12 poolformerv2_s12 pvt_v2_b0 hgnetv2_b0 test_byobnet test_convnext test_convnext2 test_efficientnet
    test_efficientnet_gn test_efficientnet_ln test_efficientnet_evos test_resnet test_nfnet test_mambaout
"""
"""Those that are taken as they are, on images of 64 x 64."""

NARROW: Final = {"channels": (16, 32, 64, 128)}
TINY_ViT: Final = {"img_size": 64, "depth": 2}

TIMM_SHORTENED: Final[dict[str, tuple[int, dict[str, Any]]]] = {
    "densenet121": (64, {"block_config": (3, 3, 3, 3)}),
    "dpn48b": (64, {"k_sec": (1, 1, 1, 1)}),
    "res2net50_14w_8s": (64, {"layers": (1, 1, 1, 1), **NARROW}),
    "resnet50": (64, NARROW),
    "ecaresnet26t": (64, NARROW),
    "skresnet18": (64, NARROW),
    "resnest14d": (64, NARROW),
    "resnetv2_18": (64, {"channels": (32, 64, 128, 256)}),
    "tresnet_m": (64, {"width_factor": 0.25}),
    "darknet53": (64, {}),
    "cspresnet50": (64, {}),
    "xception41": (64, {}),
    "inception_v3": (96, {}),
    "botnet26t_256": (64, {"img_size": 64}),
    "lambda_resnet26t": (64, {"img_size": 64}),
    "convmixer_768_32": (32, {}),
    "convformer_s18": (64, {}),
    "rdnet_tiny": (64, {"growth_rates": (16, 24, 32, 32, 32, 32, 48), "num_init_features": 16}),
    "nextvit_small": (64, {}),
    "efficientformer_l1": (224, {}),
    "efficientformerv2_s0": (64, {"img_size": 64}),
    "efficientvit_m0": (64, {"img_size": 64}),
    "levit_128s": (64, {"img_size": 64}),
    "levit_conv_128s": (64, {"img_size": 64}),
    "visformer_tiny": (64, {"img_size": 64}),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "coatnet_pico_rw_224": (64, {"img_size": 64}),
    "maxvit_pico_rw_256": (64, {"img_size": 64}),
    "vit_tiny_patch16_224": (64, TINY_ViT),
    "deit_tiny_distilled_patch16_224": (64, TINY_ViT),
    "deit3_small_patch16_224": (64, TINY_ViT),
    "beit_base_patch16_224": (64, {**TINY_ViT, "embed_dim": 192, "num_heads": 3}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 2}),
    "flexivit_small": (60, {"img_size": 60, "depth": 2}),
    "vit_relpos_small_patch16_224": (64, TINY_ViT),
    "vit_tiny_r_s16_p8_224": (128, {"img_size": 128, "depth": 2}),
    "vit_small_patch16_dinov3": (64, TINY_ViT),
    "cait_xxs24_224": (64, TINY_ViT),
    "convit_tiny": (64, TINY_ViT),
    "crossvit_9_240": (240, {"depth": ((1, 1, 0),) * 3}),
    "davit_tiny": (64, {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4)}),
    "focalnet_tiny_srf": (64, {}),
    "gcvit_xxtiny": (64, {"img_size": 64}),
    "hiera_tiny_224": (64, {"img_size": (64, 64), "stages": (1, 1, 1, 1)}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "nest_tiny": (64, {"img_size": 64}),
    "pit_ti_224": (64, {"img_size": 64}),
    "sequencer2d_s": (64, {"img_size": 64, "layers": (1, 1, 1, 1)}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "depths": (2, 2), "num_heads": (3, 6), "embed_dim": 48}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "depths": (2, 2), "num_heads": (3, 6), "embed_dim": 48}),
    "swinv2_cr_tiny_224": (64, {"img_size": 64, "depths": (2, 2), "num_heads": (3, 6), "embed_dim": 48}),
    "tiny_vit_5m_224": (64, {}),
    "tnt_s_patch16_224": (64, TINY_ViT),
    "twins_pcpvt_small": (64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "twins_svt_small": (64, {"img_size": 64, "depths": (1, 2, 2, 1)}),
    "vitamin_small_224": (64, {"img_size": 64}),
    "volo_d1_224": (64, {"img_size": 64}),
    "xcit_nano_12_p16_224": (64, TINY_ViT),
    "test_vit": (64, {"img_size": 64}),
}
"""Those that are made shorter or narrower, or whose images need another size, with what is passed on."""


def _transformers(model: str, configuration: str, inputs: Inputs, **settings: Any) -> Network:
    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        # The usual 0.02 is for widths of 768; here it would leave an output that does not depend on the input.
        return getattr(library, model)(getattr(library, configuration)(initializer_range=0.1, **settings))

    return Network("transformers", build, inputs)


ENCODER: Final = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
PIXELS: Final = named("pixel_values", images(64))
TEXT: Final = words(16, 200)
WINDOWS: Final = {
    "image_size": 64,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}

TRANSFORMERS: Final = {
    "bert": _transformers("BertForSequenceClassification", "BertConfig", TEXT, vocab_size=200, **ENCODER),
    "bert_model": _transformers("BertModel", "BertConfig", TEXT, vocab_size=200, **ENCODER),
    "distilbert": _transformers(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        TEXT,
        vocab_size=200,
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=128,
    ),
    "roberta": _transformers("RobertaForSequenceClassification", "RobertaConfig", TEXT, vocab_size=200, **ENCODER),
    "electra": _transformers("ElectraForSequenceClassification", "ElectraConfig", TEXT, vocab_size=200, **ENCODER),
    "albert": _transformers("AlbertForSequenceClassification", "AlbertConfig", TEXT, vocab_size=200, **ENCODER),
    "gpt2": _transformers(
        "GPT2LMHeadModel",
        "GPT2Config",
        TEXT,
        vocab_size=200,
        n_embd=64,
        n_layer=2,
        n_head=4,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "vit": _transformers("ViTForImageClassification", "ViTConfig", PIXELS, image_size=64, **ENCODER),
    "deit": _transformers("DeiTForImageClassification", "DeiTConfig", PIXELS, image_size=64, **ENCODER),
    "dinov2": _transformers("Dinov2ForImageClassification", "Dinov2Config", PIXELS, image_size=64, **ENCODER),
    "swin": _transformers("SwinForImageClassification", "SwinConfig", PIXELS, **WINDOWS),
    "swinv2": _transformers("Swinv2ForImageClassification", "Swinv2Config", PIXELS, **WINDOWS),
    "segformer": _transformers(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        PIXELS,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=64,
    ),
    "mobilevit": _transformers(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        PIXELS,
        image_size=64,
        hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[16, 24, 32, 48, 64, 80, 96],
    ),
    "mobilenet_v2": _transformers(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", PIXELS, depth_multiplier=0.5
    ),
    "resnet": _transformers(
        "ResNetForImageClassification",
        "ResNetConfig",
        PIXELS,
        embedding_size=16,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
    ),
    "regnet": _transformers(
        "RegNetForImageClassification",
        "RegNetConfig",
        PIXELS,
        embedding_size=16,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 2, 1],
        groups_width=16,
    ),
    "convnext": _transformers(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        PIXELS,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
    ),
    "poolformer": _transformers(
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        PIXELS,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
    ),
}


def _torchvision(name: str, size: int = 64, **settings: Any) -> Network:
    def build() -> nn.Module:
        return importlib.import_module("torchvision.models").get_model(name, num_classes=CLASSES, **settings)

    return Network("torchvision", build, images(size))


SEGMENTATION: Final = {"weights": None, "weights_backbone": None}

TORCHVISION: Final = {
    "resnet18": _torchvision("resnet18"),
    "alexnet": _torchvision("alexnet"),
    "googlenet": _torchvision("googlenet", aux_logits=False, init_weights=False),
    "shufflenet_v2_x0_5": _torchvision("shufflenet_v2_x0_5"),
    "squeezenet1_1": _torchvision("squeezenet1_1"),
    "mnasnet0_5": _torchvision("mnasnet0_5"),
    "mobilenet_v2": _torchvision("mobilenet_v2"),
    "mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "regnet_y_400mf": _torchvision("regnet_y_400mf"),
    "densenet121": _torchvision("densenet121"),
    "swin": Network(
        "torchvision",
        lambda: importlib.import_module("torchvision.models.swin_transformer").SwinTransformer(
            [4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=CLASSES
        ),
        images(64),
    ),
    "lraspp_mobilenet_v3_large": _torchvision("lraspp_mobilenet_v3_large", **SEGMENTATION),
    "deeplabv3_mobilenet_v3_large": _torchvision("deeplabv3_mobilenet_v3_large", aux_loss=False, **SEGMENTATION),
}


def _smp(architecture: str, encoder: str = "resnet18", size: int = 64, **settings: Any) -> Network:
    def build() -> nn.Module:
        library = importlib.import_module("segmentation_models_pytorch")
        return getattr(library, architecture)(encoder, encoder_weights=None, classes=4, **settings)

    return Network("segmentation-models-pytorch", build, images(size))


SMP: Final = {
    "unet_resnet18": _smp("Unet"),
    "unet_mobilenet_v2": _smp("Unet", "mobilenet_v2"),
    "unetplusplus_mobilenet_v2": _smp("UnetPlusPlus", "mobilenet_v2"),
    "fpn_mobilenet_v2": _smp("FPN", "mobilenet_v2"),
    "deeplabv3plus_mobilenet_v2": _smp("DeepLabV3Plus", "mobilenet_v2"),
    "deeplabv3_mobilenet_v2": _smp("DeepLabV3", "mobilenet_v2"),
    "linknet_mobilenet_v2": _smp("Linknet", "mobilenet_v2"),
    "manet_resnet18": _smp("MAnet"),
    "pspnet_mobilenet_v2": _smp("PSPNet", "mobilenet_v2"),
    "pan_mobilenet_v2": _smp("PAN", "mobilenet_v2", size=128),
    "segformer_mit_b0": _smp("Segformer", "mit_b0"),
    "upernet_efficientnet": _smp("UPerNet", "timm-mobilenetv3_small_minimal_100"),
}


def _monai(architecture: str, dimensions: int, size: int, **settings: Any) -> Network:
    def build() -> nn.Module:
        library = importlib.import_module("monai.networks.nets")
        return getattr(library, architecture)(spatial_dims=dimensions, in_channels=1, out_channels=2, **settings)

    return Network("MONAI", build, fields(1, *(size,) * dimensions))


CHANNELS: Final = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 1}
FEATURES: Final = {"features": (8, 8, 16, 32, 32, 8)}
KERNELS: Final = {
    "kernel_size": (3, 3, 3),
    "strides": (1, 2, 2),
    "upsample_kernel_size": (2, 2),
    "filters": (8, 16, 32),
}

MONAI: Final = {
    "unet_2d": _monai("UNet", 2, 32, **CHANNELS),
    "unet_2d_batch": _monai("UNet", 2, 32, norm="BATCH", **CHANNELS),
    "unet_3d": _monai("UNet", 3, 16, **CHANNELS),
    "basicunet_2d": _monai("BasicUNet", 2, 32, **FEATURES),
    "basicunet_3d": _monai("BasicUNet", 3, 32, **FEATURES),
    "dynunet_2d": _monai("DynUNet", 2, 32, **KERNELS),
    "dynunet_3d": _monai("DynUNet", 3, 16, **KERNELS),
    "segresnet_3d": _monai("SegResNet", 3, 16, init_filters=8),
    "attention_unet_2d": _monai("AttentionUnet", 2, 32, channels=(8, 16, 32), strides=(2, 2)),
    "densenet_3d": Network(
        "MONAI",
        lambda: importlib.import_module("monai.networks.nets").DenseNet(
            spatial_dims=3, in_channels=1, out_channels=2, init_features=8, growth_rate=4, block_config=(2, 2)
        ),
        fields(1, 16, 16, 16),
    ),
}


def _own(family: str, table: Mapping[str, tuple[Callable[[], nn.Module], Inputs]]) -> dict[str, Network]:
    return {name: Network(family, build, inputs) for name, (build, inputs) in table.items()}


def _pair(one: Inputs, two: Inputs) -> Inputs:
    return lambda count, generator: (one(count, generator), two(count, generator))


def _tokens(length: int, vocabulary: int) -> Inputs:
    return lambda count, generator: torch.randint(vocabulary, (count, length), generator=generator)


def _all_on(inputs: Inputs, builders: Mapping[str, Callable[[], nn.Module]]) -> dict[str, tuple[Any, Inputs]]:
    return {name: (build, inputs) for name, build in builders.items()}


NNCF_OTHERS: Final[dict[str, tuple[Callable[[], nn.Module], Inputs]]] = {
    "lenet": (zoo_own.lenet, images(32, 1)),
    "super_resolution": (zoo_own.super_resolution, _pair(images(16), images(16))),
    "product_and_convolution": (zoo_own.product_and_convolution, _pair(images(12), images(12))),
    "rotary_attention": (zoo_own.rotary_attention, _tokens(10, 50)),
    "embeddings": (zoo_own.embeddings, _tokens(10, 50)),
    "embedding_bag": (zoo_own.embedding_bag, _tokens(10, 50)),
    "attention": (lambda: zoo_own.attention(True), fields(6, 8)),
    "attention_sequence_first": (lambda: zoo_own.attention(False), fields(6, 8)),
    "sliced_gelu": (zoo_own.sliced_gelu, fields(5, 6)),
    "doubled_linear": (zoo_own.doubled_linear, lambda count, generator: torch.randn(count, 6, generator=generator)),
}


def _with_prefix(prefix: str, table: Mapping[str, Network]) -> dict[str, Network]:
    return {f"{prefix}/{name}": network for name, network in table.items()}


NETWORKS: Final[dict[str, Network]] = {
    **dict(_timm_networks()),
    **_with_prefix("transformers", TRANSFORMERS),
    **_with_prefix("torchvision", TORCHVISION),
    **_with_prefix("smp", SMP),
    **_with_prefix("monai", MONAI),
    **_with_prefix("1d", _own("1-D", _all_on(fields(2, 64), zoo_own.ONE_DIMENSION))),
    **_with_prefix("3d", _own("3-D", _all_on(fields(3, 8, 16, 16), zoo_own.THREE_DIMENSIONS))),
    **_with_prefix("nncf", _own("NNCF's tests", _all_on(images(32), zoo_own.NNCF_IMAGES) | NNCF_OTHERS)),
    **_with_prefix("construct", _own("constructs", _all_on(images(16), zoo_own.CONSTRUCTS))),
}
"""Every network by its name."""
