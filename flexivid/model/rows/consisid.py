"""ConsisID (arXiv 2411.17440): CogVideoX image-to-video that looks at a face after every other block."""

from dataclasses import replace

import torch

from flexivid.model.rows.cogvideox import COGVIDEOX

# Of a face: the patches of EVA02-CLIP-L at 336 pixels, and its class token.
FACE_TOKENS = 577


def _consisid_example(config, size, length):
    call = COGVIDEOX.example(config, size, length)
    if config["is_train_face"]:
        call["id_cond"] = torch.empty(1, config["LFE_id_dim"], device="meta")
        features = torch.empty(1, FACE_TOKENS, config["LFE_vit_dim"], device="meta")
        call["id_vit_hidden"] = [features] * config["LFE_num_scale"]
    return call


CONSISID = replace(
    COGVIDEOX, name="consisid", transformer_class="ConsisIDTransformer3DModel", example=_consisid_example
)
