"""The table of model families: one row each, from the modules of `rows`."""

import torch

from flexivid.model.family import Family, Same
from flexivid.model.rows.allegro import ALLEGRO
from flexivid.model.rows.anyflow import ANYFLOW
from flexivid.model.rows.cogvideox import COGVIDEOX
from flexivid.model.rows.consisid import CONSISID
from flexivid.model.rows.cosmos import COSMOS
from flexivid.model.rows.easyanimate import EASYANIMATE
from flexivid.model.rows.helios import HELIOS
from flexivid.model.rows.hunyuan import FRAMEPACK, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, MOTIF_VIDEO
from flexivid.model.rows.kandinsky import KANDINSKY5
from flexivid.model.rows.kandinsky6 import KANDINSKY6
from flexivid.model.rows.latte import DIT, LATTE, PIXART
from flexivid.model.rows.ltx import LTX
from flexivid.model.rows.ltx2 import LTX2
from flexivid.model.rows.minimax_h3 import MINIMAX_H3
from flexivid.model.rows.mochi import MOCHI
from flexivid.model.rows.sana import SANA_VIDEO
from flexivid.model.rows.wan import CHRONOEDIT, SKYREELS_V2, WAN, WAN_ANIMATE, WAN_VACE

FAMILIES = (
    WAN,
    WAN_VACE,
    WAN_ANIMATE,
    CHRONOEDIT,
    ANYFLOW,
    SKYREELS_V2,
    HELIOS,
    LTX,
    LTX2,
    MINIMAX_H3,
    COGVIDEOX,
    CONSISID,
    COSMOS,
    HUNYUAN_VIDEO,
    FRAMEPACK,
    HUNYUAN_VIDEO_15,
    MOTIF_VIDEO,
    KANDINSKY5,
    KANDINSKY6,
    MOCHI,
    ALLEGRO,
    EASYANIMATE,
    SANA_VIDEO,
    LATTE,
    DIT,
    PIXART,
)


_registered: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Adds the row of a model that is not in the table (docs/own-model.md); one registered before is replaced.

    Raises ValueError for a class that flexivid itself has a row for.
    """
    if any(row.transformer_class == family.transformer_class for row in FAMILIES):
        raise ValueError(f"{family.transformer_class} has a row already; register is for classes that have none")
    _registered[family.transformer_class] = family
    return family


def family_of(transformer: torch.nn.Module) -> Family:
    """The row of a transformer. Raises ValueError, which lists what is supported."""
    name = type(transformer).__name__
    for family in (*FAMILIES, *_registered.values()):
        if family.transformer_class == name:
            for setting, value in family.unsupported:
                if transformer.config.get(setting) == value:
                    raise ValueError(f"{name} with {setting} {value} is not supported: docs/models.md")
            for setting, value in family.required:
                value = transformer.config.get(value.setting) if isinstance(value, Same) else value
                found = transformer.config.get(setting)
                if (tuple(found) if isinstance(found, list) else found) != value:
                    raise ValueError(f"{name} with {setting} {found} is not supported: only {value} is")
            return family
    supported = ", ".join(family.transformer_class for family in FAMILIES)
    raise ValueError(
        f"flexivid does not know the transformer {name}; it supports {supported}, and what flexivid.register adds"
    )
