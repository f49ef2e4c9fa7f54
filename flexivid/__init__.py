"""flexivid: run a pretrained video diffusion transformer with large patches on most steps, its own on a few."""

from flexivid.adapter import AdapterError
from flexivid.api import disable, enable, plan, summary
from flexivid.schedules import BudgetError, Schedule
from flexivid.session import Summary
from flexivid.tubelet import FlexTubeletEmbed, FlexTubeletUnembed

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "BudgetError",
    "FlexTubeletEmbed",
    "FlexTubeletUnembed",
    "Schedule",
    "Summary",
    "disable",
    "enable",
    "plan",
    "summary",
]
