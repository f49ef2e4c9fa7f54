#!/usr/bin/env bash
# Guess:   a frame of decord is height x width x 3, and get_batch stacks what indexing returns.
# Happens: decoded rows are padded, and the reader takes bytes of a row over width for the number of channels. Where
#          that divides, as at width 48, reader[0] silently has 4 channels: the row's padding, and pixels out of
#          place. get_batch of the same clip raises, and names neither the width nor the cause. It does not matter how
#          the width comes about: a clip that wide, a 64x48 clip of a telephone held upright (rotation in the header,
#          which decord applies and PyAV doesn't), or VideoReader(width=48). Width 64 and 40 are fine.
#          decord2, the successor, has inherited it.
# Where:   decord 0.6.0 and decord2 3.4.0, x86-64 with AVX; av 18.1.0 writes the clips.
# Seen:    decord 0.6.0: 48 wide (32, 48, 4), turned (64, 48, 4), resized (48, 48, 4), 64 wide (32, 64, 3)
#          get_batch: Check failed: from_size == to_size (6144 vs. 4608) ... The size must exactly match
#          PyAV: turned clip (48, 64, 3), rotation -90
#          and the same from decord2 3.4.0
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
cd "$d"
cat > find.py <<'PY'
import struct

import av
import decord
import numpy as np


def write(path, width, height, turned=False):
    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(4):
            frame = np.full((height, width, 3), 60 * i, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    if turned:  # the matrix of a quarter turn in the track header, as telephones write it
        data = bytearray(open(path, "rb").read())
        at = data.index(b"tkhd") + 4 + 4 + 20 + 16
        data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
        open(path, "wb").write(data)


write("48.mp4", 48, 32)
write("64.mp4", 64, 32)
write("turned.mp4", 64, 48, turned=True)
shapes = [decord.VideoReader(name)[0].shape for name in ("48.mp4", "turned.mp4")]
shapes += [decord.VideoReader("64.mp4", width=48, height=48)[0].shape, decord.VideoReader("64.mp4")[0].shape]
print("decord {}: 48 wide {}, turned {}, resized {}, 64 wide {}".format(decord.__version__, *shapes))
assert shapes == [(32, 48, 4), (64, 48, 4), (48, 48, 4), (32, 64, 3)]
try:
    decord.VideoReader("48.mp4").get_batch([0, 1])
    raise SystemExit("get_batch reads it now")
except decord.DECORDError as error:
    print("get_batch:", str(error).splitlines()[0].partition("ndarray.cc")[2])
    assert "6144 vs. 4608" in str(error)
with av.open("turned.mp4") as clip:
    frame = next(clip.decode(video=0))
    print(f"PyAV: turned clip {frame.to_ndarray(format='rgb24').shape}, rotation {frame.rotation}")
    assert frame.rotation == -90 and frame.to_ndarray(format="rgb24").shape == (48, 64, 3)
PY
for reader in decord==0.6.0 decord2==3.4.0; do
    rm -rf venv
    python3 -m venv venv
    venv/bin/pip install -q "$reader" av==18.1.0 numpy==2.4.6
    venv/bin/python find.py
done
