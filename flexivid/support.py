"""What works with which family, and what is left out: the tables of docs/models.md."""

FEATURES = ("text-to-video", "image-to-video", "cache", "compile", "offload", "user LoRA", "train")
# By family, in the order of FEATURES. `yes` is what a test does on a small random pipeline of the real classes, `-`
# what diffusers 0.42 does not do itself. cache: FirstBlockCache; compile: compile_repeated_blocks(fullgraph=True);
# offload: enable_model_cpu_offload and enable_group_offload.
SUPPORT = {
    "wan": ("yes", "yes", "yes", "yes", "yes", "yes", "yes"),
    "wan-vace": ("control", "control", "yes", "yes", "yes", "yes", "yes"),
    "wan-animate": ("-", "control", "-", "yes", "yes", "yes", "no"),
    "chronoedit": ("-", "edits", "-", "yes", "yes", "yes", "no"),
    "anyflow": ("yes", "yes", "-", "yes", "yes", "yes", "no"),
    "skyreels-v2": ("yes", "untested", "-", "yes", "yes", "yes", "yes"),
    "ltx": ("yes", "yes", "yes", "yes", "yes", "yes", "yes"),
    "ltx-2": ("yes", "yes", "-", "-", "yes", "yes", "no"),
    "cogvideox": ("yes", "yes", "yes", "-", "yes", "yes", "yes"),
    "consisid": ("-", "face", "-", "-", "yes", "yes", "no"),
    "cosmos": ("yes", "yes", "-", "-", "yes", "yes", "no"),
    "hunyuan-video": ("yes", "untested", "yes", "yes", "yes", "yes", "yes"),
    "hunyuan-video-1.5": ("yes", "yes", "-", "yes", "yes", "yes", "yes"),
    "motif-video": ("yes", "untested", "yes", "yes", "yes", "yes", "no"),
    "kandinsky5": ("yes", "-", "-", "yes", "yes", "yes", "untested"),
    "mochi": ("yes", "-", "yes", "-", "yes", "yes", "yes"),
    "allegro": ("yes", "-", "-", "-", "yes", "-", "-"),
    "easyanimate": ("yes", "no", "-", "-", "yes", "-", "-"),
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
    "Training of LTX-2": "its sound has noise levels of its own, which would have to be drawn as well",
    "Training of MotifVideo, Wan-Animate, ChronoEdit": "their images and videos are not built",
    "Training of AnyFlow": "would have to draw the timesteps that steps go to as well",
    "Cosmos 1.0": "inputs and outputs are those of EDM, and learned positions are added again in every block",
    "Cosmos-Transfer": "what its controlnet adds to blocks is of the tokens of the base patch size",
    "EasyAnimate by image, video or control": "its forward joins them to the latents, beside which they must be folded",
    "HunyuanVideo Framepack": "frames before a section stand on its token grid, and would have to be averaged with it",
    "Helios": "its rope makes positions of a chunk and of the frames before it, and would have to tell them apart",
    "Kandinsky 6": "one timestep is told of video and sound, and on a coarse grid that of the video alone changes",
    "SANA-WM": "its attention goes by rays of a camera, which its forward makes for tokens of the base patch size",
    "MiniMax-H3, Cosmos 3": "text, video and sound are one sequence of tokens, in which indexes say where each stands",
    "Wan-Animate 2": "keeps keys and values of what it is shown, of tokens of one patch size",
    "Kandinsky5 image-to-video": "the first frame is clean, and its timestep does not say so",
    "Kandinsky5 with attention_type nabla": "what attends to what depends on values, so that it has no fixed cost",
    "FLUX, SD3": "images; FLUX packs patches in its pipeline, and does not tell its transformer their grid",
}
