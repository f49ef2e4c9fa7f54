"""What `import flexivid` gives, imported when the first of it is asked for (`flexivid/__init__.py`)."""

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
