"""Where the embedded model and its adapters lie, and how they are sampled."""

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
MODEL = ASSETS / "shapes"
ADAPTER = ASSETS / "shapes-flex"
FEW_ADAPTER = ASSETS / "shapes-few"  # four steps without guidance, by its recipe

# Arguments of the pipeline call. Text is padded to 32 tokens: the pipeline's own 512 would cost more than a weak mode.
SAMPLING = {
    "num_frames": 17,
    "height": 64,
    "width": 64,
    "num_inference_steps": 40,
    "guidance_scale": 4.0,
    "max_sequence_length": 32,
}
# The same by the names of `stock_pipelines.ARGUMENTS`.
USUAL = {
    "frames": SAMPLING["num_frames"],
    "height": SAMPLING["height"],
    "width": SAMPLING["width"],
    "steps": SAMPLING["num_inference_steps"],
    "guidance_scale": SAMPLING["guidance_scale"],
    "text_length": SAMPLING["max_sequence_length"],
    "fps": 8,
}
