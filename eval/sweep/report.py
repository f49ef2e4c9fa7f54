"""report.html: one self-contained page, clips of all arms in sync, a budget slider and the table of results."""

import base64
import json
import os
from pathlib import Path

from sweep.metrics import HIGHER_IS_BETTER

TEMPLATE = Path(__file__).with_name("report_template.html")
MARK = "/*RESULTS*/null"


def write_report(results: dict, sampler, prompts: list[str], path: Path) -> None:
    """Puts the first clip of each of `prompts` from every arm into the page: reading it fetches nothing."""
    clips = {clip.prompt: clip.file_name for clip in sampler.clips if clip.index == 0}
    videos = {
        row["arm"]: {
            prompt: base64.b64encode((sampler.folder / "videos" / row["arm"] / clips[prompt]).read_bytes()).decode()
            for prompt in prompts
        }
        for row in results["arms"]
    }
    data = {"results": results, "prompts": prompts, "videos": videos, "higher_is_better": HIGHER_IS_BETTER}
    # "</" would end the script that the data is in.
    text = json.dumps(data).replace("</", "<\\/")
    page = TEMPLATE.read_text().replace(MARK, text)
    beside = path.with_suffix(".partial")
    beside.write_text(page)
    os.replace(beside, path)
