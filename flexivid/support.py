"""What works with which family, and what is left out: the tables of docs/models.md."""

FEATURES = ("text-to-video", "image-to-video", "cache", "compile", "offload", "user LoRA", "train")
# By family, in the order of FEATURES. `yes` is what a test does on a small random pipeline of the real classes, `-`
# what diffusers 0.42 does not do itself. cache: FirstBlockCache; compile: compile_repeated_blocks(fullgraph=True);
# offload: enable_model_cpu_offload and enable_group_offload.
SUPPORT = {
    "wan": ("yes", "yes", "yes", "yes", "yes", "yes", "yes"),
    "wan-vace": ("control", "control", "yes", "yes", "yes", "yes", "untested"),
    "wan-animate": ("-", "control", "-", "yes", "yes", "yes", "untested"),
    "chronoedit": ("-", "edits", "-", "yes", "yes", "yes", "untested"),
    "anyflow": ("yes", "yes", "-", "yes", "yes", "yes", "no"),
    "skyreels-v2": ("yes", "untested", "-", "yes", "yes", "yes", "yes"),
    "helios": ("yes", "untested", "-", "yes", "yes", "yes", "no"),
    "ltx": ("yes", "yes", "yes", "yes", "yes", "yes", "yes"),
    "ltx-2": ("yes", "yes", "-", "-", "yes", "yes", "untested"),
    "cogvideox": ("yes", "yes", "yes", "-", "yes", "yes", "yes"),
    "cosmos": ("yes", "yes", "-", "-", "yes", "yes", "no"),
    "hunyuan-video": ("yes", "untested", "yes", "yes", "yes", "yes", "yes"),
    "framepack": ("-", "yes", "-", "-", "yes", "yes", "no"),
    "hunyuan-video-1.5": ("yes", "yes", "-", "yes", "yes", "yes", "untested"),
    "motif-video": ("yes", "untested", "yes", "yes", "yes", "yes", "untested"),
    "kandinsky5": ("yes", "-", "-", "yes", "yes", "yes", "untested"),
    "mochi": ("yes", "-", "yes", "-", "yes", "yes", "yes"),
    "sana-video": ("yes", "untested", "-", "-", "yes", "yes", "untested"),
    "latte": ("yes", "-", "-", "-", "yes", "-", "-"),
    "dit": ("images", "-", "-", "-", "yes", "-", "-"),
    "pixart": ("images", "-", "-", "-", "yes", "-", "-"),
}
LEFT_OUT = {
    "HunyuanVideo image-to-video with replaced tokens": "the first frame is clean, and its timestep does not say so",
    "SkyReels-V2 by diffusion forcing": "its pipelines give a timestep to each frame",
    "ChronoEdit with temporal reasoning": "goes to two frames midway, which cannot be planned",
    "AnyFlow-FAR": "keeps keys and values of earlier chunks, and a causal mask over them, of tokens of one patch size",
    "Training of AnyFlow": "would have to draw the timesteps that steps go to as well",
    "Training of Helios and Framepack": "would have to draw sections of clips with the frames beside them",
    "Allegro": "its pipeline passes tables and grids of one size in one argument",
    "Cosmos 1.0": "inputs and outputs are those of EDM, and learned positions are added again in every block",
    "Cosmos-Transfer": "what its controlnet adds to blocks is of the tokens of the base patch size",
    "EasyAnimate": "un-patchifies to as many channels as came in, which a residual head has not",
    "ConsisID": "a row like CogVideoX's, with a face beside the text, is not tested yet",
    "Helios by a pyramid": "its stages begin at noise that is alike within blocks, so that a mean over blocks keeps it",
    "Kandinsky 6": "one timestep is told of video and sound, and on a coarse grid that of the video alone changes",
    "SANA-WM": "its attention goes by rays of a camera, which its forward makes for tokens of the base patch size",
    "MiniMax-H3, Cosmos 3": "text, video and sound are one sequence of tokens, in which indexes say where each stands",
    "Wan-Animate 2": "keeps keys and values of what it is shown, of tokens of one patch size",
    "Kandinsky5 image-to-video": "the first frame is clean, and its timestep does not say so",
    "Kandinsky5 with attention_type nabla": "what attends to what depends on values, so that it has no fixed cost",
    "FLUX, SD3": "images; FLUX packs patches in its pipeline, and does not tell its transformer their grid",
}
