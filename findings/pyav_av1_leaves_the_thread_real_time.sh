#!/usr/bin/env bash
# One would guess: encoding a clip changes nothing in the process that encodes it.
# What happens: libsvtav1, which PyAV ships, gives the thread that calls it the real-time policy SCHED_FIFO, priority 99,
# if the process is root, as in most containers, and does not take it back. Every process started from there inherits it.
# One that spins, a busy wait of an OpenMP runtime or a browser, then keeps its core from everything else.
# Seen with av 18.1.0, Linux, as root:
#     before: SCHED_OTHER 0
#     after libx264: SCHED_OTHER 0
#     after libsvtav1: SCHED_FIFO 99
#     a process started then: SCHED_FIFO 99
set -euo pipefail
[ "$(uname)" = Linux ] && [ "$(id -u)" = 0 ] || { echo "needs Linux and root: elsewhere the policy stays"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q av==18.1.0 numpy==2.4.6
cat > "$folder/encode.py" <<'PYTHON'
import os
import subprocess
import sys

import av
import numpy as np

NAMES = {os.SCHED_OTHER: "SCHED_OTHER", os.SCHED_FIFO: "SCHED_FIFO"}


def policy() -> str:
    return f"{NAMES[os.sched_getscheduler(0)]} {os.sched_getparam(0).sched_priority}"


def encode(codec: str) -> str:
    with av.open(f"{sys.argv[1]}/{codec}.mp4", "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for shade in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return policy()


asked = "import os; print(os.sched_getscheduler(0) == os.SCHED_FIFO, os.sched_getparam(0).sched_priority)"
seen = {"before": policy(), "after libx264": encode("libx264"), "after libsvtav1": encode("libsvtav1")}
child = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True).stdout.split()
seen["a process started then"] = "SCHED_FIFO 99" if child == ["True", "99"] else " ".join(child)
for when, what in seen.items():
    print(f"{when}: {what}")
assert list(seen.values()) == ["SCHED_OTHER 0", "SCHED_OTHER 0", "SCHED_FIFO 99", "SCHED_FIFO 99"], seen
PYTHON
"$folder/venv/bin/python" "$folder/encode.py" "$folder" 2>/dev/null
