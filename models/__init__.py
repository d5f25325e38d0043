"""SMA, AZO and the networks built on them."""

from models import neurons  # before models.sma: it imports SpikingJelly without the warning of torch.jit
from models.sma import SMA, SMA_L, attention_zoneout
from models.vgg import VGG8, sma_vgg8_cifar10dvs, sma_vgg8_dvs128, sma_vgg8_ncaltech101

__all__ = [
    "SMA",
    "SMA_L",
    "VGG8",
    "attention_zoneout",
    "neurons",
    "sma_vgg8_cifar10dvs",
    "sma_vgg8_dvs128",
    "sma_vgg8_ncaltech101",
]
