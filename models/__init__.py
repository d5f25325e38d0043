"""SMA, AZO and the networks built on them."""

from models import neurons  # before models.sma: it imports SpikingJelly without the warning of torch.jit
from models.hub import load
from models.ms_resnet import (
    MSResNet,
    ms_resnet18,
    ms_resnet34,
    ms_resnet104,
    sma_ms_resnet18,
    sma_ms_resnet34,
    sma_ms_resnet104,
)
from models.sma import SMA, SMA_L, attention_zoneout
from models.vgg import VGG8, sma_vgg8_cifar10dvs, sma_vgg8_dvs128, sma_vgg8_ncaltech101

__all__ = [
    "SMA",
    "SMA_L",
    "VGG8",
    "MSResNet",
    "attention_zoneout",
    "load",
    "ms_resnet18",
    "ms_resnet34",
    "ms_resnet104",
    "neurons",
    "sma_ms_resnet18",
    "sma_ms_resnet34",
    "sma_ms_resnet104",
    "sma_vgg8_cifar10dvs",
    "sma_vgg8_dvs128",
    "sma_vgg8_ncaltech101",
]
