"""flexivid in ComfyUI: this folder goes into `custom_nodes` (README.md)."""

from .nodes import FlexividLoad, FlexividSample

NODE_CLASS_MAPPINGS = {"FlexividLoad": FlexividLoad, "FlexividSample": FlexividSample}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FlexividLoad": "Load video pipeline (flexivid)",
    "FlexividSample": "Sample video (flexivid)",
}
