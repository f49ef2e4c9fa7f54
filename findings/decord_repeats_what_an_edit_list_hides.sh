#!/usr/bin/env bash
# Guess:   a clip cut out of a longer mp4 without re-encoding has as many frames in decord as a player shows.
# Happens: the cut starts at a key frame before the wanted second, and an edit list hides what lies in between.
#          decord honours the edit list while decoding but not while counting: len() takes in the hidden frames,
#          frame 0 is the first shown one, and every index past the last shown one returns that last frame again.
#          Half a training clip stands still. decord says so at most in a warning on stderr, PyAV shows six frames.
# Where:   decord 0.6.0, av 18.1.0 (which writes the cut and decodes it for comparison).
# Seen:    PyAV shows 6 frames:   [180, 190, 200, 210, 220, 230]
#          decord counts 12:      [180, 190, 200, 210, 220, 230, 230, 230, 230, 230, 230, 230]
#          decord's clock starts at -0.5 s, before the clip
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

# 24 grey frames at 12 per second, frame i of brightness 10 i, a key frame every second
with av.open("long.mp4", "w") as out:
    stream = out.add_stream("libx264", rate=12, options={"g": "12", "bf": "0", "qp": "4"})
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    for i in range(24):
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * i, np.uint8), format="rgb24")))
    out.mux(stream.encode())

# Seconds 1.5 to 2, packets as they are: the key frame at 1.0 s comes along at a negative time.
with av.open("long.mp4") as src, av.open("cut.mp4", "w") as out:
    stream = src.streams.video[0]
    copy, start = out.add_stream_from_template(stream), int(1.5 / stream.time_base)
    src.seek(start, stream=stream)
    for packet in src.demux(stream):
        if packet.dts is not None:
            packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, copy
            out.mux(packet)


def tens(frame):
    return int(round(float(np.mean(frame)) / 10) * 10)


assert b"elst" in open("cut.mp4", "rb").read()
with av.open("cut.mp4") as clip:
    shown = [tens(frame.to_ndarray(format="rgb24")) for frame in clip.decode(video=0)]
reader = decord.VideoReader("cut.mp4")
read = [tens(frame) for frame in reader.get_batch(range(len(reader))).asnumpy()]
first = float(reader.get_frame_timestamp(0)[0])
print(f"PyAV shows {len(shown)} frames:   {shown}\ndecord counts {len(reader)}:      {read}")
print(f"decord's clock starts at {first} s")
assert shown == [180, 190, 200, 210, 220, 230]
assert len(reader) == 12 and read == shown + [230] * 6
assert first == -0.5
PY
