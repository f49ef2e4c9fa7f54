"""report.html: one self-contained page, the curve, clips of all arms in sync and the table of results."""

import base64
import json
import tempfile
from pathlib import Path

import av
import numpy as np

from flexivid.files import write_text
from flexivid.inputs import read_json
from flexivid.sampling.flops import flops_text
from flexivid.sweep.curve import DIRECTION, LOOKS, OTHER, curve_of
from flexivid.sweep.grids import grid_paths
from flexivid.sweep.metrics import HIGHER_IS_BETTER
from flexivid.sweep.sampling import Clip
from flexivid.video import write_mp4

TEMPLATE = Path(__file__).with_name("report_template.html")
PAGE_HEIGHT = 256
MARK = "/*RESULTS*/null"


def _as_text(clip: Path) -> str:
    """A clip as base64; one of more than PAGE_HEIGHT rows is made smaller first, or the page would be gigabytes."""
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        height, width, rate = stream.height, stream.width, stream.average_rate
        if height <= PAGE_HEIGHT:
            return base64.b64encode(clip.read_bytes()).decode()
        size = {"height": PAGE_HEIGHT, "width": 2 * round(PAGE_HEIGHT * width / height / 2)}
        frames = [frame.reformat(**size, format="rgb24").to_ndarray() for frame in container.decode(stream)]
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, "small.mp4")
        write_mp4(np.stack(frames), small, rate, crf=28)
        return base64.b64encode(small.read_bytes()).decode()


def shown_clips(clips: list[Clip], prompts: list[str]) -> tuple[Clip, ...]:
    """Of the clips of a sweep those that its page shows: the first one of each of `prompts`."""
    return tuple(clip for clip in clips if clip.index == 0 and clip.prompt in prompts)


def _grids(folder: Path, arm: str, clips: tuple[Clip, ...]) -> dict[str, dict]:
    """By prompt the clip with patch grids and what it shows, where that was written: an arm has it for weak steps only,
    and clips of a sweep that went on with more --report-prompts have none."""
    paths = {clip.prompt: grid_paths(folder, arm, clip.file_name) for clip in clips}
    return {
        prompt: {"video": _as_text(clip), **read_json(lines)}
        for prompt, (clip, lines) in paths.items()
        if lines.exists()
    }


def write_report(results: dict, sampler, prompts: list[str], path: Path) -> None:
    """Puts the first clip of each of `prompts` from every arm into the page: reading it fetches nothing."""
    folder, clips = sampler.folder, shown_clips(sampler.clips, prompts)
    videos = {
        row["arm"]: {clip.prompt: _as_text(folder / "videos" / row["arm"] / clip.file_name) for clip in clips}
        for row in results["arms"]
    }
    rows = results["arms"]
    data = {
        "results": results,
        "prompts": prompts,
        "videos": videos,
        "grids": {row["arm"]: _grids(folder, row["arm"], clips) for row in rows},
        "curve": curve_of(rows),
        "better": {name: DIRECTION[higher] for name, higher in HIGHER_IS_BETTER.items()},
        "colours": {row["method"]: LOOKS.get(row["method"], OTHER)[0] for row in rows},
        "flops": {row["arm"]: flops_text(row["flops"]) for row in rows},
    }
    # "</" would end the script that the data is in.
    text = json.dumps(data).replace("</", "<\\/")
    write_text(path, TEMPLATE.read_text(encoding="utf-8").replace(MARK, text))
