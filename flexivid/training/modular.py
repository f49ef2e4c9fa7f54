"""MiniMax-H3, a modular pipeline only, called as the stock pipelines of diffusers are: a clip with sound from text."""

from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    MiniMaxH3Blocks,
    MiniMaxH3ModularPipeline,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
)
from diffusers.modular_pipelines.modular_pipeline import PipelineState, SequentialPipelineBlocks
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

PARTS = {
    "transformer": MiniMaxH3Transformer3DModel,
    "text_encoder": Qwen3VLForConditionalGeneration,
    "vae": AutoencoderKLMiniMaxH3,
    "audio_vae": AutoencoderKLMiniMaxH3Audio,
    "tokenizer": AutoTokenizer,
    "scheduler": MiniMaxH3Scheduler,
    "audio_scheduler": MiniMaxH3Scheduler,
}
WEIGHTS = ("transformer", "text_encoder", "vae", "audio_vae")


class TextOnly:
    """In the place of the processor of images, which wants torchvision, and of text only says that it is none."""

    def create_mm_token_type_ids(self, rows: list[list[int]]) -> list[list[int]]:
        return [[0] * len(row) for row in rows]


class MiniMaxH3Pipeline(MiniMaxH3ModularPipeline):
    """Its workflow of text alone, of the parts that this takes. Frames and references are not built."""

    register_modules = MiniMaxH3ModularPipeline.update_components

    def __init__(
        self, transformer, scheduler, audio_scheduler, vae=None, audio_vae=None, text_encoder=None, tokenizer=None
    ):
        blocks = MiniMaxH3Blocks().get_workflow("t2va")
        super().__init__(blocks=blocks)
        kept = {name: block for name, block in blocks.sub_blocks.items() if not name.startswith("decode")}
        self.to_latents = SequentialPipelineBlocks.from_blocks_dict(kept)
        parts = {"vae": vae, "audio_vae": audio_vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        schedulers = {"scheduler": scheduler, "audio_scheduler": audio_scheduler}
        self.update_components(transformer=transformer, **schedulers, processor=TextOnly(), **parts)

    @classmethod
    def from_pretrained(
        cls, model: str | Path, dtype: dict[str, torch.dtype], use_safetensors: bool = True
    ) -> "MiniMaxH3Pipeline":
        """Its parts from the subfolders of a folder or hub id; those with weights in the `dtype` of their name, or
        else of `default`."""
        parts = {}
        for name, part in PARTS.items():
            more = {"dtype": dtype.get(name, dtype["default"]), "use_safetensors": use_safetensors}
            parts[name] = part.from_pretrained(str(model), subfolder=name, **(more if name in WEIGHTS else {}))
        return cls(**parts)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        num_frames: int = 124,
        height: int = 768,
        width: int = 1344,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        output_type: str = "np",
    ) -> SimpleNamespace:
        """frames: (1, T, H, W, 3), or for `latent` latents (1, C, T', H', W'). audio: (1, 2, samples), or latents
        (2, C, L) of both channels. Latents are as the transformer sees them."""
        given = {name: value for name, value in locals().items() if name != "self"}
        blocks, state = self.to_latents if output_type == "latent" else self._blocks, PipelineState()
        for expected in blocks.inputs:
            state.set(expected.name, given.get(expected.name, expected.default), expected.kwargs_type)
        _, state = blocks(self, state)
        if output_type == "latent":
            return SimpleNamespace(frames=state.get("latents"), audio=state.get("audio_latents"))
        return SimpleNamespace(frames=state.get("videos"), audio=state.get("audio"))
