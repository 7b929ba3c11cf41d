"""RepViT, FastViT and MobileOne for MMDetection, MMSegmentation and every other library that stands on MMEngine."""

from ._versions import check_frameworks

check_frameworks()

from .compat.openmmlab import offer_configs  # noqa: E402
from .fastvit import FastViT  # noqa: E402
from .hooks import FuseOnDeployHook  # noqa: E402
from .mobileone import MobileOne  # noqa: E402
from .reparam import switch_to_deploy  # noqa: E402
from .repvit import RepViT  # noqa: E402
from .resume import ResumableCheckpointHook, ResumableIterBasedTrainLoop  # noqa: E402

offer_configs(__name__, f'{__name__}.repvit')

__version__ = '0.1.0'
__all__ = [
    'FastViT',
    'FuseOnDeployHook',
    'MobileOne',
    'RepViT',
    'ResumableCheckpointHook',
    'ResumableIterBasedTrainLoop',
    'switch_to_deploy',
]
