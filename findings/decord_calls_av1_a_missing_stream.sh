#!/usr/bin/env bash
# Guess:   a reader without a decoder for AV1 says that it lacks the decoder, and still tells the clip's length.
# Happens: decord's bundled FFmpeg has none, and the search for the "best" stream skips what cannot be decoded: the
#          clip opens as one without any video, "cannot find video stream with wanted index: -1". A filter that drops
#          what cannot be opened as broken drops every AV1 clip of a set; PyAV decodes all frames.
#          The other codecs of web video are read: h264, vp9, hevc.
# Where:   decord 0.6.0; av 18.1.0 writes the clips (libsvtav1 or libaom-av1).
# Seen:    libx264: decord 6 frames, PyAV 6
#          libvpx-vp9: decord 6 frames, PyAV 6
#          libx265: decord 6 frames, PyAV 6
#          AV1: PyAV 6 frames; decord: ERROR cannot find video stream with wanted index: -1
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q decord==0.6.0 av==18.1.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import av
import decord
import numpy as np


def frames(codec):
    """A clip of six frames; how many of them PyAV decodes."""
    with av.open("clip.mp4", "w") as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        for i in range(6):
            frame = np.full((128, 128, 3), 40 * i, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    with av.open("clip.mp4") as clip:
        return sum(1 for _ in clip.decode(video=0))


for codec in ("libx264", "libvpx-vp9", "libx265"):
    decoded = frames(codec)
    print(f"{codec}: decord {len(decord.VideoReader('clip.mp4'))} frames, PyAV {decoded}")
    assert decoded == len(decord.VideoReader("clip.mp4")) == 6
decoded = frames("libsvtav1" if "libsvtav1" in av.codecs_available else "libaom-av1")
try:
    decord.VideoReader("clip.mp4")
    raise SystemExit("decord opens AV1 now")
except decord.DECORDError as error:
    message = str(error)
print(f"AV1: PyAV {decoded} frames; decord: {message[message.index('ERROR') :].splitlines()[0]}")
assert decoded == 6 and "cannot find video stream with wanted index: -1" in message
PY
