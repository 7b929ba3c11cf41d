"""Checks a config's data before training: what would ruin the run, and what the model will see."""

from .check import check_config, check_readable
from .records import DataError
from .report import Finding, Report

__all__ = ['DataError', 'Finding', 'Report', 'check_config', 'check_readable']
