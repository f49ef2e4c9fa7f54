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
    "helios": ("yes", "untested", "-", "yes", "yes", "yes", "no"),
    "ltx": ("yes", "yes", "yes", "yes", "yes", "yes", "yes"),
    "ltx-2": ("yes", "yes", "-", "-", "yes", "yes", "yes"),
    "minimax-h3": ("yes", "yes", "-", "yes", "group", "yes", "yes"),
    "cogvideox": ("yes", "yes", "yes", "-", "yes", "yes", "yes"),
    "consisid": ("-", "face", "-", "-", "yes", "yes", "no"),
    "cosmos": ("yes", "yes", "-", "-", "yes", "yes", "no"),
    "hunyuan-video": ("yes", "untested", "yes", "yes", "yes", "yes", "yes"),
    "framepack": ("-", "yes", "-", "-", "yes", "yes", "no"),
    "hunyuan-video-1.5": ("yes", "yes", "-", "yes", "yes", "yes", "yes"),
    "motif-video": ("yes", "untested", "yes", "yes", "yes", "yes", "no"),
    "kandinsky5": ("yes", "-", "-", "yes", "yes", "yes", "no"),
    "kandinsky6": ("yes", "yes", "-", "yes", "yes", "yes", "no"),
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
    "Training of MotifVideo, Wan-Animate, ChronoEdit": "their images and videos are not built",
    "Training of AnyFlow": "would have to draw the timesteps that steps go to as well",
    "Training of Helios and Framepack": "would have to draw sections of clips with the frames beside them",
    "Cosmos 1.0": "inputs and outputs are those of EDM, and learned positions are added again in every block",
    "Cosmos-Transfer": "what its controlnet adds to blocks is of the tokens of the base patch size",
    "EasyAnimate by image, video or control": "its forward joins them to the latents, beside which they must be folded",
    "Helios by a pyramid": "its stages begin at noise that is alike within blocks, so that a mean over blocks keeps it",
    "Kandinsky 6 distilled, for PiflowScheduler": "its head predicts a velocity for each of ten places within a step",
    "Training of Kandinsky 6": "how its VAE of sound encodes clips is not built",
    "Kandinsky 6 super-resolution": "what attends to what depends on values, so that it has no fixed cost",
    "SANA-WM": "its attention goes by rays of a camera, which its forward makes for tokens of the base patch size",
    "Training of MiniMax-H3 with frames or references": "what its pipeline shows the text encoder of them is not built",
    "Cosmos 3": "takes lists of clips, with text and sound in one sequence of tokens, which no row describes yet",
    "Wan-Animate 2": "keeps keys and values of what it is shown, of tokens of one patch size",
    "Kandinsky5 image-to-video": "the first frame is clean, and its timestep does not say so",
    "Kandinsky5 with attention_type nabla": "what attends to what depends on values, so that it has no fixed cost",
    "FLUX, SD3": "images; FLUX packs patches in its pipeline, and does not tell its transformer their grid",
}
HEAD = """\
<!-- Made by `python -m flexivid models > docs/models.md`. -->
# Models

One row of [flexivid/model/rows](../flexivid/model/rows) a family. `yes` is tested on a small random pipeline of the
real classes of diffusers, never on published weights: none could be loaded where this was built. A dash is what
diffusers 0.42 does not do itself, `no` what flexivid refuses. Cache is FirstBlockCache, compile is
compile_repeated_blocks(fullgraph=True), offload is enable_model_cpu_offload and enable_group_offload. What the tests
do: [test_families](../tests/test_families.py) on transformers,
[test_family_pipelines](../tests/test_family_pipelines.py) and
[test_family_features](../tests/test_family_features.py) on pipelines,
[test_training_families](../tests/test_training_families.py) on training. Of LTX-Video the pipelines with conditions and
long clips work too ([test_family_ltx](../tests/test_family_ltx.py)), of Wan2.1 first and last frame, of Wan2.2 one
transformer alone ([test_family_wan](../tests/test_family_wan.py)), and Lucy Edit, which is Wan2.2's transformer with a
video beside the noise. `control` is a pipeline that follows a video: Wan-VACE one to keep, fill or follow, Wan-Animate
a pose and a face, plans and summaries being those of one segment. Reference images of Wan-VACE are frames before the
clip, and count as four of a plan's frames each; patches larger in time join the last of them with the first frame.

AnyFlow, and HunyuanVideo-1.5 with use_meanflow, are flow maps, told where a step goes as well as where it starts: a
weak pass goes from and to the noise levels that means have there ([test_flow_maps](../tests/test_flow_maps.py)).

Cosmos is Cosmos-Predict2.5, and Predict2 before it ([test_family_cosmos](../tests/test_family_cosmos.py)). Its forward
asks torchvision to resize a padding mask, in whose place the tests have torch, and its pipelines ask for a guardrail.

ConsisID makes a clip of a text and an image of a face ([test_family_consisid](../tests/test_family_consisid.py)). Every
weak pass looks at the face too. Its pipeline asks for OpenCV, which the tests do without. Its sizes below are those of
CogVideoX-5B, from which it is made, and of the face those that diffusers has by default: its config could not be read.

EasyAnimate is 5.1, from text. What is counted below of it and of Allegro are diffusers' defaults: their configs could
not be read.

Helios and Framepack make clips section after section, each beside frames that are there already. Those stay as they
are, at the patch sizes that the models have for them: the section alone is folded, and its tokens stand at the centres
of what they cover, among the others. Plans and summaries are those of one section, and shares hold for all
([test_family_sections](../tests/test_family_sections.py)).

MiniMax-H3 packs text, given frames, sound and the clip into one sequence of tokens, in which indices say what each is,
where it stands and how noisy it is. In a weak pass the clip alone has coarse tokens, behind the others, and all that
names tokens is made anew; each of the chunks that its VAE encodes by itself has a first frame that stands alone. From
text, first and last frame, and references (`transformer_ref`), at budgets and in every order
([test_family_minimax_h3](../tests/test_family_minimax_h3.py)). Guidance is in its weights, and its modular pipeline has
no guider: there is one forward a step, one fewer than the steps that it is asked for, which count the end. Plans are of
a clip from text: given frames cost tokens that they do not know of. `group` is enable_group_offload; modular pipelines
have no enable_model_cpu_offload. What is counted below are diffusers' defaults, of its class and of the canvas of its
pipeline, with 256 tokens of text, which it does not pad. It is trained on text alone, with its sound
([test_training_minimax_h3](../tests/test_training_minimax_h3.py)).

Kandinsky 6 tells video and sound one timestep, to a module each: in a weak pass the video is told that of its coarse
grid, and sound its own. An image is a latent frame behind the clip, clean and of a type of its own, which weak passes
keep apart from the frames of the clip ([test_family_kandinsky6](../tests/test_family_kandinsky6.py)). Plans are of a
clip from text. Models distilled for PiflowScheduler are refused. What is counted below has the config of Pro as other
libraries quote it.

LTX-2's sound stays as it is, a stream of few tokens beside the video; of the three forwards of its default step (both
branches of guidance, a perturbed one, one without sound) weak steps run the first, and keep what the others add
([test_family_ltx2](../tests/test_family_ltx2.py)). The column of guidance is that of stock pipelines: modular ones of
Wan and LTX-Video, whose guiders call the transformer once a branch, work too, also where guidance starts or stops
midway ([test_modular](../tests/test_modular.py)).
"""
