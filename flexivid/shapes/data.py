"""Training data of the shapes world: cached latents of rendered clips and the text embeddings of their captions."""

import hashlib
import math
from dataclasses import astuple
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from flexivid.files import replacing
from flexivid.shapes.world import all_scenes, sample_clips
from flexivid.tensors import fingerprint
from flexivid.training.config import DataConfig
from flexivid.training.data.encoding import encode
from flexivid.training.objective import ALL

SHARD = 500  # clips a file, so that a kill loses at most one


HELD_OUT_CLIPS = 8  # that errors are measured on; their layouts are drawn from another seed than those of training


def check_words(config: DataConfig) -> None:
    """Raises ValueError if `config.word_weights` names what is no word of the world."""
    known = {word for scene in all_scenes() for word in astuple(scene)}
    if unknown := sorted(set(config.word_weights) - known):
        raise ValueError(f"data.word_weights names {', '.join(unknown)}; the words are {', '.join(sorted(known))}")


def world_fingerprint() -> str:
    """A short hash of what the world renders, so that latents of another world are not taken for it."""
    clips, _ = sample_clips(64, torch.Generator().manual_seed(0), frames=3, size=16)
    return hashlib.sha256(((clips + 1) * 127.5).byte().numpy().tobytes()).hexdigest()[:8]


def scene_weights(config: DataConfig) -> torch.Tensor:
    """How often each scene is drawn: the product of its words' weights."""
    weights = [math.prod(config.word_weights.get(word, 1.0) for word in astuple(scene)) for scene in all_scenes()]
    return torch.tensor(weights)


@torch.no_grad()
def embed_captions(config: DataConfig, tokenizer, text_encoder) -> torch.Tensor:
    """Text embeddings of all scenes and then of the empty caption, a row each, of the shortest text length."""
    texts = [scene.caption for scene in all_scenes()] + [""]
    tokens = tokenizer(texts, padding="max_length", max_length=min(config.text_lengths), return_tensors="pt")
    states = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    # Pipelines zero what lies behind the end of the text.
    return states * tokens.attention_mask.unsqueeze(-1)


def draw_texts(config: DataConfig, embeddings: torch.Tensor, captions: torch.Tensor, generator, rows: slice) -> dict:
    """Conditions of some captions, given as rows of `embeddings`: some dropped, all of one text length.

    rows: of these captions that are wanted.
    """
    dropped = torch.rand(len(captions), generator=generator) < config.drop_caption
    lengths, shares = zip(*config.text_lengths.items(), strict=True)
    length = lengths[torch.multinomial(torch.tensor(shares), 1, generator=generator).item()]
    drawn = embeddings[torch.where(dropped, len(embeddings) - 1, captions)[rows]]
    return {"encoder_hidden_states": torch.nn.functional.pad(drawn, (0, 0, 0, length - drawn.shape[1]))}


class _Texts:
    """Text embeddings of the world's captions, a row each, the empty one last."""

    text_embeddings: torch.Tensor

    def unconditional(self, x_0: torch.Tensor, conditions: dict) -> dict:
        """The conditions of these clips with the empty caption."""
        text = conditions["encoder_hidden_states"]
        return {"encoder_hidden_states": self.empty_text(text.shape[1]).expand_as(text)}

    def empty_text(self, length: int) -> torch.Tensor:
        """The embedding of the empty caption, (1, length, dim)."""
        empty = self.text_embeddings[-1:]
        return torch.nn.functional.pad(empty, (0, 0, 0, length - empty.shape[1]))


class ShapesCaptions(_Texts):
    """Captions of the world, none of a held-out combination, and no clips: latents of `size` (T, H, W), no channels."""

    def __init__(self, config: DataConfig, size: tuple[int, int, int], tokenizer, text_encoder):
        self.config, self.size = config, size
        self.weights = scene_weights(config) * torch.tensor([not scene.held_out for scene in all_scenes()])
        self.text_embeddings = embed_captions(config, tokenizer, text_encoder)

    def batch(self, count: int, generator: torch.Generator, rows: slice = ALL) -> tuple[torch.Tensor, dict]:
        """Latents (B, 0, T, H, W) and {"encoder_hidden_states": (B, length, dim)}, of these rows of `count`."""
        captions = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        texts = draw_texts(self.config, self.text_embeddings, captions, generator, rows)
        return torch.empty(len(captions[rows]), 0, *self.size), texts


class ShapesData(_Texts):
    """Random access to (latents, text embeddings) of `config.clips` clips, none of them a held-out combination.

    Latents are encoded once, into `config.cache`, under the fingerprints of the encoder and of the world; text
    embeddings are one row a caption, the empty one last. A clip is drawn in proportion to the product of its words'
    `config.word_weights`.
    """

    held_out = HELD_OUT_CLIPS

    def __init__(self, config: DataConfig, vae, tokenizer, text_encoder):
        self.config, self.vae = config, vae
        folder = config.cache / f"{fingerprint(vae.encoder)}-{world_fingerprint()}-{config.frames}x{config.size}"
        counts = [min(SHARD, config.clips - start) for start in range(0, config.clips, SHARD)]
        progress = tqdm(enumerate(counts), total=len(counts), desc="latents")
        shards = [self._shard(vae, folder, index, count) for index, count in progress]
        self.latents = torch.cat([shard["latents"] for shard in shards])
        self.captions = torch.cat([shard["captions"] for shard in shards])
        self.weights = scene_weights(config)[self.captions]
        self.text_embeddings = embed_captions(config, tokenizer, text_encoder)

    def _shard(self, vae, folder: Path, index: int, count: int) -> dict[str, torch.Tensor]:
        path = folder / f"{index:04d}-{count}.safetensors"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            generator = torch.Generator().manual_seed(10_000_000 + index)
            clips, scenes = sample_clips(count, generator, self.config.frames, self.config.size)
            rows = {scene: row for row, scene in enumerate(all_scenes())}
            latents = torch.cat([encode(vae, part) for part in clips.split(25)])
            captions = torch.tensor([rows[scene] for scene in scenes])
            with replacing(path) as partial:
                save_file({"latents": latents.half(), "captions": captions}, partial)
        return load_file(path)

    def batch(
        self, count: int, generator: torch.Generator, rows: slice = ALL, images: bool = False
    ) -> tuple[torch.Tensor, dict]:
        """Latents (B, C, T, H, W), T = 1 for `images`, and {"encoder_hidden_states": (B, length, dim)}.

        These are of some rows of `count` clips that are drawn.
        A clip's first latent frame is the latent of its first image, because the VAE is causal.
        """
        picks = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        latents = self.latents[picks[rows], :, :1] if images else self.latents[picks[rows]]
        return latents.float(), draw_texts(self.config, self.text_embeddings, self.captions[picks], generator, rows)

    def validation(self) -> list[tuple[torch.Tensor, dict]]:
        """Clips that are rendered for this alone."""
        generator = torch.Generator().manual_seed(20_000_000)
        clips, scenes = sample_clips(HELD_OUT_CLIPS, generator, self.config.frames, self.config.size)
        rows = {scene: row for row, scene in enumerate(all_scenes())}
        text = self.text_embeddings[[rows[scene] for scene in scenes]]
        device = next(self.vae.parameters()).device
        return [(encode(self.vae, clips.to(device)).float().cpu(), {"encoder_hidden_states": text})]
