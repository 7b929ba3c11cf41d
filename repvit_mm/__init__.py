"""RepViT, FastViT and MobileOne for MMDetection, MMSegmentation and every other library that stands on MMEngine.

Importing this package registers the backbones. Without torch and MMEngine it can be imported all the same: exported
files run with :mod:`repvit_mm.deploy.runtimes` and :mod:`repvit_mm.deploy.predict`, and asking for what needs the two
raises an ImportError that says so.
"""

from ._versions import check_frameworks, missing_frameworks

__version__ = '0.1.0'
__all__ = [
    'CompileHook',
    'FastViT',
    'FiniteLossHook',
    'FuseOnDeployHook',
    'HalfPrecisionHook',
    'MobileOne',
    'RepViT',
    'RepViTRoadmap',
    'RepViTRoadmapClassifier',
    'ResumableCheckpointHook',
    'ResumableIterBasedTrainLoop',
    'StageDecayOptimWrapperConstructor',
    'switch_to_deploy',
]

_missing = missing_frameworks()

if not _missing:
    check_frameworks()

    from . import normalization  # noqa: F401  warns from here on
    from .compat.openmmlab import build_inherited_collate_functions, offer_configs, offer_configs_of_forks
    from .fastvit import FastViT
    from .hooks import CompileHook, FiniteLossHook, FuseOnDeployHook, HalfPrecisionHook
    from .mobileone import MobileOne
    from .optim import StageDecayOptimWrapperConstructor
    from .reparam import switch_to_deploy
    from .repvit import RepViT
    from .resume import ResumableCheckpointHook, ResumableIterBasedTrainLoop
    from .roadmap import RepViTRoadmap, RepViTRoadmapClassifier

    offer_configs(__name__, f'{__name__}.repvit')
    offer_configs_of_forks()
    build_inherited_collate_functions()


def __getattr__(name: str) -> object:
    """Called for what is not there (PEP 562)."""
    if _missing and name in __all__:
        wanted = ' '.join(f"'{requirement}'" for requirement in _missing)
        raise ImportError(
            f'repvit_mm.{name} needs what is not installed here: pip install {wanted}; '
            'running exported files needs neither, see repvit_mm.deploy.runtimes and tools/predict.py'
        )
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
