#!/usr/bin/env bash
# Guess:   get_avg_fps() of decord, and average_rate of PyAV, are frames over seconds.
# Happens: for Matroska and WebM both repeat the nominal rate of the header (DefaultDuration), whatever the frames do.
#          A camera set to 30 that gives 9.2 frames a second in the dark is "30.0", so a clip sampled at a wanted rate
#          by that figure covers a third of the motion. The same packets in mp4 come out at 9.57: there the rate is
#          frames over the header's duration, in which the last frame lasts next to nothing. With B-frames
#          or without, only the timestamps of the single frames (get_frame_timestamp) are right.
# Where:   decord 0.6.0, av 18.1.0.
# Seen:    mkv  true 9.20  decord 30.00  PyAV 30.00  by timestamps 9.20  length by the rate 0.60 s, true 1.85 s
#          webm true 9.20  decord 30.00  PyAV 30.00  by timestamps 9.20  length by the rate 0.60 s, true 1.85 s
#          mp4  true 9.20  decord 9.57  PyAV 9.57  by timestamps 9.20  length by the rate 1.88 s, true 1.85 s
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q decord==0.6.0 av==18.1.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
from fractions import Fraction

import av
import decord
import numpy as np

CLOCK, TRUE = Fraction(1, 1000), 9.2
TIMES = [round(i * 1000 / TRUE) for i in range(18)]


def write(path, codec, options):
    """18 frames at 9.2 a second in a stream whose nominal rate is 30."""
    with av.open(path, "w") as out:
        stream = out.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = CLOCK
        for i, time in enumerate(TIMES):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, CLOCK
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


for path, codec, options, expected in (
    ("a.mkv", "libx264", {"bf": "2", "g": "12"}, 30.0),
    ("b.webm", "libvpx-vp9", {}, 30.0),
    ("c.mp4", "libx264", {"bf": "2", "g": "12"}, 9.57),
):
    write(path, codec, options)
    with av.open(path) as clip:
        average = float(clip.streams.video[0].average_rate)
    reader = decord.VideoReader(path)
    starts = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    timed = float((len(starts) - 1) / (starts[-1] - starts[0]))
    rate = reader.get_avg_fps()
    length = len(reader) / rate
    print(f"{path[2:]:4} true {TRUE:.2f}  decord {rate:.2f}  PyAV {average:.2f}  by timestamps {timed:.2f}", end="  ")
    print(f"length by the rate {length:.2f} s, true {TIMES[-1] / 1000:.2f} s")
    assert len(reader) == 18 and abs(timed - TRUE) < 0.01
    assert abs(rate - expected) < 0.01 and abs(average - expected) < 0.01
PY
