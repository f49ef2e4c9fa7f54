"""flexivid: run a pretrained video diffusion transformer with large patches on most steps, its own on a few."""

from flexivid.api import disable, enable
from flexivid.model.adapter import AdapterError
from flexivid.model.families import register
from flexivid.model.family import Family
from flexivid.patches.tubelet import FlexTubeletEmbed, FlexTubeletUnembed
from flexivid.patches.tubelet_positions import FlexTubeletPositions
from flexivid.running import costs, observe, plan, summary
from flexivid.sampling.budget import BudgetError
from flexivid.sampling.observe import Forward, Observer
from flexivid.sampling.schedule import Schedule
from flexivid.sampling.summary import Summary

__version__ = "0.2.0"
__all__ = [
    "AdapterError",
    "BudgetError",
    "FlexTubeletEmbed",
    "FlexTubeletPositions",
    "FlexTubeletUnembed",
    "Family",
    "Forward",
    "Observer",
    "Schedule",
    "Summary",
    "costs",
    "disable",
    "enable",
    "observe",
    "plan",
    "register",
    "summary",
]
