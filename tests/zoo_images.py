"""The zoo's models of images: convolutional networks, mixers and a transformer."""

from functools import partial

from flax import nnx
from models.convnext import ConvNeXt
from models.densenet import DenseNet
from models.efficientnet import MBConv
from models.inception import Inception
from models.mixer import Mixer, NnxMixer
from models.mobilenet import MobileNetV2
from models.resnet import CifarResNet
from models.unet import UNet
from models.vit import ViT
from zoo_registry import (
    attention,
    conv,
    dense,
    linen,
    model,
    names,
    nnx_model,
    once,
    values,
)

# --- Convolutional networks -----------------------------------------------------------------------

# (batch, 8, 8, 3) images; three stages of 2, 4 and 8 channels at 8, 4 and 2 pixels a side.
RESNET = {
    "flops": {
        "stem": conv(2 * 64, 3, 3, 2),
        "stage 1": conv(2 * 64, 3, 2, 2) + conv(2 * 64, 3, 2, 2),
        "stage 2": conv(2 * 16, 3, 2, 4) + conv(2 * 16, 3, 4, 4),
        "stage 3": conv(2 * 4, 3, 4, 8) + conv(2 * 4, 3, 8, 8),
        "linear": dense(2, 8, 3),
    },
    "sites": once(
        "params/{conv1,linear}/kernel", "params/{layer1_0,layer2_0,layer3_0}/{conv1,conv2}/kernel"
    ),
    "elsewhere": names(
        "params/linear/bias",
        "params/bn1/{scale,bias}",
        "params/{layer1_0,layer2_0,layer3_0}/{bn1,bn2}/{scale,bias}",
        "batch_stats/bn1/{mean,var}",
        "batch_stats/{layer1_0,layer2_0,layer3_0}/{bn1,bn2}/{mean,var}",
    ),
}


@model(**RESNET)
def resnet_train():
    module = CifarResNet(blocks=1, width=2, classes=3)
    return linen(module, values(2, 8, 8, 3), train=True, mutable=["batch_stats"])


@model(**RESNET)
def resnet_eval():
    return linen(CifarResNet(blocks=1, width=2, classes=3), values(2, 8, 8, 3))


@model(
    flops={
        "stem": conv(2 * 16, 3, 3, 4),
        "block 0": conv(2 * 16, 3, 4, 2) + conv(2 * 16, 3, 6, 2),
        "transition": conv(2 * 16, 1, 8, 4),
        "block 1": conv(2 * 4, 3, 4, 2),
        "linear": dense(2, 6, 3),
    },
    sites=once(
        "{stem,linear}/kernel", "{blocks/0/0,blocks/0/1,blocks/1/0,transitions/0}/conv/kernel"
    ),
    elsewhere=names(
        "linear/bias",
        "{norm,blocks/0/0/norm,blocks/0/1/norm,blocks/1/0/norm,transitions/0/norm}"
        "/{scale,bias,mean,var}",
    ),
)
def densenet_train():
    build = partial(DenseNet, (2, 1), growth=2, stem=4, classes=3)
    return nnx_model(build, values(2, 4, 4, 3), mutable=nnx.BatchStat, train=True)


@model(
    flops={
        "stem": conv(2 * 16, 3, 3, 2),  # 8 pixels a side become 4
        "stage 0, depthwise and project": conv(2 * 16, 3, 1, 2) + conv(2 * 16, 1, 2, 2),
        "stage 1, block 0, expand": conv(2 * 16, 1, 2, 6),
        "stage 1, block 0, depthwise and project": conv(2 * 4, 3, 1, 6) + conv(2 * 4, 1, 6, 3),
        "stage 1, block 1, expand": conv(2 * 4, 1, 3, 9),
        "stage 1, block 1, depthwise and project": conv(2 * 4, 3, 1, 9) + conv(2 * 4, 1, 9, 3),
        "head": conv(2 * 4, 1, 3, 5),
        "linear": dense(2, 5, 3),
    },
    sites=once(
        "params/{stem,head,linear}/kernel",
        "params/stage0_0/{depthwise,project}/kernel",
        "params/{stage1_0,stage1_1}/{expand,depthwise,project}/kernel",
    ),
    elsewhere=names(
        "params/linear/bias",
        "params/{stem_bn,head_bn,stage0_0/depthwise_bn,stage0_0/project_bn}/{scale,bias}",
        "params/{stage1_0,stage1_1}/{expand_bn,depthwise_bn,project_bn}/{scale,bias}",
        "batch_stats/{stem_bn,head_bn,stage0_0/depthwise_bn,stage0_0/project_bn}/{mean,var}",
        "batch_stats/{stage1_0,stage1_1}/{expand_bn,depthwise_bn,project_bn}/{mean,var}",
    ),
)
def mobilenet():
    module = MobileNetV2(((1, 2, 1, 1), (3, 3, 2, 2)), stem=2, head=5, classes=3)
    return linen(module, values(2, 8, 8, 3))


@model(
    flops={
        "expand": conv(2 * 16, 1, 4, 8),
        "depthwise": conv(2 * 16, 3, 1, 8),
        "gate": conv(2, 1, 8, 2) + conv(2, 1, 2, 8),
        "project": conv(2 * 16, 1, 8, 4),
    },
    sites=once("{expand,depthwise,gate/reduce,gate/expand,project}/kernel"),
    elsewhere=names(
        "gate/{reduce,expand}/bias",
        "{expand_norm,depthwise_norm,project_norm}/{scale,bias,mean,var}",
    ),
)
def efficientnet_block():
    return nnx_model(partial(MBConv, 4, 4, expansion=2, squeeze=0.5), values(2, 4, 4, 4))


@model(
    flops={
        "stem": conv(2 * 16, 2, 3, 4),
        "stage 0, depthwise": conv(2 * 16, 3, 1, 4),
        "stage 0, mlp": dense(2 * 16, 4, 16) + dense(2 * 16, 16, 4),
        "down": conv(2 * 4, 2, 4, 6),
        "stage 1, depthwise": conv(2 * 4, 3, 1, 6),
        "stage 1, mlp": dense(2 * 4, 6, 24) + dense(2 * 4, 24, 6),
        "linear": dense(2, 6, 3),
    },
    sites=once(
        "params/{stem,down1,linear}/kernel", "params/{stage0_0,stage1_0}/{depthwise,up,down}/kernel"
    ),
    elsewhere=names(
        "params/{stem,down1,linear}/bias",
        "params/{stem_norm,norm1,norm}/{scale,bias}",
        "params/{stage0_0,stage1_0}/{depthwise/bias,norm/scale,norm/bias,up/bias,down/bias,gamma}",
    ),
)
def convnext():
    module = ConvNeXt((1, 1), (4, 6), patch=2, kernel_size=3, classes=3)
    return linen(module, values(2, 8, 8, 3))


@model(
    flops={
        "down 0": conv(2 * 16, 3, 3, 2) + conv(2 * 16, 3, 2, 2),
        "down 1": conv(2 * 4, 3, 2, 4) + conv(2 * 4, 3, 4, 4),
        "up": conv(2 * 16, 2, 4, 2),  # transposed: counted on its 4x4 output
        "merge": conv(2 * 16, 3, 4, 2) + conv(2 * 16, 3, 2, 2),
        "head": conv(2 * 16, 1, 2, 3),
    },
    sites=once("{down/0,down/1,merge/0}/{conv1,conv2}/kernel", "{up/0,head}/kernel"),
    elsewhere=names(
        "{down/0,down/1,merge/0}/{conv1/bias,conv2/bias,norm1/scale,norm1/bias,norm2/scale,norm2/bias}",
        "{up/0,head}/bias",
    ),
)
def unet():
    return nnx_model(partial(UNet, (2, 4), outputs=3, groups=1), values(2, 4, 4, 3))


@model(
    flops={
        "narrow": conv(2 * 9, 1, 4, 3),
        "middle": conv(2 * 9, 1, 4, 2) + conv(2 * 9, 3, 2, 3),
        "wide": conv(2 * 9, 1, 4, 2) + conv(2 * 9, 5, 2, 3),
        "pooled": conv(2 * 9, 1, 4, 2),
    },
    sites=once("params/{narrow,middle_in,middle_out,wide_in,wide_out,pooled}/kernel"),
    elsewhere=names("params/{narrow,middle_in,middle_out,wide_in,wide_out,pooled}/bias"),
)
def inception():
    return linen(Inception(3, (2, 3), (2, 3), 2), values(2, 3, 3, 4))


# --- Patches --------------------------------------------------------------------------------------

# 4x4 images are 4 patches of 2x2; width 4, 3 hidden across patches, 6 across channels.
MIXER_FLOPS = {
    "stem": conv(2 * 4, 2, 3, 4),
    "across patches": 2 * (dense(2 * 4, 4, 3) + dense(2 * 4, 3, 4)),
    "across channels": 2 * (dense(2 * 4, 4, 6) + dense(2 * 4, 6, 4)),
    "head": dense(2, 4, 3),
}


@model(
    flops=MIXER_FLOPS,
    sites=once(
        "params/{stem,head}/kernel", "params/{blocks_0,blocks_1}/{tokens,channels}/{up,down}/kernel"
    ),
    elsewhere=names(
        "params/{stem,head}/bias",
        "params/{norm,blocks_0/norm1,blocks_0/norm2,blocks_1/norm1,blocks_1/norm2}/{scale,bias}",
        "params/{blocks_0,blocks_1}/{tokens,channels}/{up,down}/bias",
    ),
)
def mixer():
    module = Mixer(width=4, blocks=2, tokens_hidden=3, channels_hidden=6, patch=2, classes=3)
    return linen(module, values(2, 4, 4, 3))


@model(
    flops=MIXER_FLOPS,
    sites=once("{stem,head}/kernel", "blocks/{0,1}/{tokens,channels}/{up,down}/kernel"),
    elsewhere=names(
        "{stem,head}/bias",
        "{norm,blocks/0/norm1,blocks/0/norm2,blocks/1/norm1,blocks/1/norm2}/{scale,bias}",
        "blocks/{0,1}/{tokens,channels}/{up,down}/bias",
    ),
)
def mixer_nnx():
    build = partial(NnxMixer, 4, width=4, blocks=2, hidden=(3, 6), patch=2, classes=3)
    return nnx_model(build, values(2, 4, 4, 3))


@model(
    flops={
        "stem": conv(2 * 4, 2, 3, 4),
        "q, k, v, out": 4 * dense(2 * 5, 4, 4),  # 4 patches and the class token
        "attention": attention(2, 2, 5, 5, 2),
        "mlp": dense(2 * 5, 4, 6) + dense(2 * 5, 6, 4),
        "head": dense(2, 4, 3),
    },
    sites=once(
        "{stem,head}/kernel",
        "blocks/0/attention/{query,key,value,out}/kernel",
        "blocks/0/{up,down}/kernel",
    ),
    elsewhere=names(
        "{token,positions}",
        "{stem,head}/bias",
        "{norm,blocks/0/norm1,blocks/0/norm2}/{scale,bias}",
        "blocks/0/attention/{query,key,value,out}/bias",
        "blocks/0/{up,down}/bias",
    ),
    unused=names("blocks/0/dropout/rngs/{key,count}"),
)
def vit():
    sizes = {"patch": 2, "dim": 4, "layers": 1, "heads": 2, "hidden": 6, "classes": 3}
    return nnx_model(partial(ViT, 4, **sizes, dropout=0.5), values(2, 4, 4, 3))
