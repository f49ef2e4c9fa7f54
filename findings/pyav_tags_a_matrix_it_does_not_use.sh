#!/usr/bin/env bash
# Guess:   codec_context.colorspace = BT.709 makes PyAV write BT.709, and reading to RGB forgets the tag.
# Happens: the other way round. In the writer the stream's matrix is a label: RGB frames are still converted with
#          BT.601, so every reader, PyAV and decord alike, then decodes with the wrong matrix and shows a dull green.
#          What steers the conversion is the colorspace of each RGB frame, a field that means nothing for RGB. The
#          reader does use the clip's tag, in to_ndarray(format="rgb24") too; a clip of BT.709 without a tag is
#          read as BT.601, even at 1280x720.
# Where:   av 18.1.0, decord 0.6.0.
# Seen:    (40, 200, 60) written, per way: luma and chroma in the file, RGB read by PyAV, RGB read by decord
#          no tag            (133, 90, 68)  (40, 200, 60)  (40, 200, 60)
#          tag on the stream (133, 90, 68)  (29, 176, 56)  (29, 176, 56)
#          and on the frames (150, 83, 63)  (40, 200, 61)  (40, 200, 61)
#          709, tag lost     (150, 83, 63)  (52, 227, 65)  (52, 227, 65)
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q av==18.1.0 decord==0.6.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import av
import decord
import numpy as np
from av.video.reformatter import Colorspace

GREEN = (40, 200, 60)
BT709 = int(Colorspace.ITU709)


def write(path, on_stream=False, on_frames=False, convert=False):
    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=8, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv444p"
        if on_stream:
            stream.codec_context.colorspace = BT709
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), GREEN, np.uint8), format="rgb24")
            if on_frames:
                frame.colorspace = BT709
            if convert:
                frame = frame.reformat(format="yuv444p", dst_colorspace=BT709)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def read(path):
    with av.open(path) as clip:
        frame = next(clip.decode(video=0))
        values = frame.to_ndarray()[:, 0, 0], frame.to_ndarray(format="rgb24")[8, 8]
    return [tuple(int(v) for v in value) for value in (*values, decord.VideoReader(path)[0].asnumpy()[8, 8])]


WRITTEN_601, WRITTEN_709 = (133, 90, 68), (150, 83, 63)
for name, how, in_file, seen in (
    ("no tag", {}, WRITTEN_601, GREEN),
    ("tag on the stream", {"on_stream": True}, WRITTEN_601, (29, 176, 56)),
    ("and on the frames", {"on_stream": True, "on_frames": True}, WRITTEN_709, GREEN),
    ("709, tag lost", {"convert": True}, WRITTEN_709, (52, 227, 65)),
):
    write("clip.mp4", **how)
    yuv, pyav, other = read("clip.mp4")
    print(f"{name:17} {yuv}  {pyav}  {other}")
    assert max(abs(a - b) for a, b in zip(yuv, in_file)) <= 1
    assert all(max(abs(a - b) for a, b in zip(rgb, seen)) <= 2 for rgb in (pyav, other))
PY
