"""flexivid: run a pretrained video diffusion transformer with large patches on most steps, its own on a few."""

from flexivid.api import disable, enable, plan, summary
from flexivid.model.adapter import AdapterError
from flexivid.patches.tubelet import FlexTubeletEmbed, FlexTubeletUnembed
from flexivid.patches.tubelet_positions import FlexTubeletPositions
from flexivid.sampling.budget import BudgetError
from flexivid.sampling.schedule import Schedule
from flexivid.sampling.session import Summary

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "BudgetError",
    "FlexTubeletEmbed",
    "FlexTubeletPositions",
    "FlexTubeletUnembed",
    "Schedule",
    "Summary",
    "disable",
    "enable",
    "plan",
    "summary",
]
