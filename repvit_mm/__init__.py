"""RepViT for MMDetection, MMSegmentation and every other library that stands on MMEngine."""

from ._versions import check_frameworks

check_frameworks()

from .hooks import FuseOnDeployHook  # noqa: E402
from .reparam import switch_to_deploy  # noqa: E402
from .repvit import RepViT  # noqa: E402

__version__ = '0.1.0'
__all__ = ['FuseOnDeployHook', 'RepViT', 'switch_to_deploy']
