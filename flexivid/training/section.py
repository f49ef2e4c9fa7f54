"""What sections of the training configuration are made of."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from flexivid.shipped import shipped_path

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
ShippedPath = Annotated[Path, AfterValidator(shipped_path)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
