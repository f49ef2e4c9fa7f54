"""The page: its parts, and what happens when somebody touches them."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

import gradio as gr
import torch

from flexivid.app import markup
from flexivid.app.planner import Plan, Planner
from flexivid.app.sampler import Arm, Sampler
from flexivid.command_line import MISTAKES, count, seed
from flexivid.commands.sample_options import DEFAULT_PROMPT
from flexivid.sampling.budget import check_budget
from flexivid.stock_pipelines import unknown_words

HERE = Path(__file__).parent
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONOSPACED = ["ui-monospace", "Menlo", "Consolas", "monospace"]


@dataclass(frozen=True)
class Asked:
    """What a visitor has asked for."""

    prompt: str
    budget: float | None
    plan: Plan
    seed: int


class Page:
    """arguments: of every clip, and where the page begins."""

    def __init__(self, planner: Planner, sampler: Sampler, arguments: argparse.Namespace):
        self._planner, self._sampler, self._arguments = planner, sampler, arguments

    def plan(self, budget: float | None, steps: float | None) -> Plan:
        """budget: None for a recipe. Raises ValueError that says what is wrong with them."""
        if self._arguments.recipe is None:
            check_budget(budget)
        return self._planner.plan(budget, whole_number(steps, count, "steps "))

    def move_dial(self, budget: float | None, steps: float | None):
        """What the budget buys, and whether there is anything to sample."""
        try:
            return markup.plan_markup(self.plan(budget, steps)), gr.Button(interactive=True)
        except ValueError as error:
            return markup.refusal_markup(str(error)), gr.Button(interactive=False)

    def ask(self, prompt: str, budget: float | None, steps: float | None, seed_: float | None):
        """What is to be sampled, or None, and for the page what is to be known of it, the clips and the downloads."""
        try:
            prompt = prompt.strip()
            if not prompt:
                raise ValueError("the prompt is empty; give it some words")
            plan = self.plan(budget, steps)
            asked = Asked(prompt, budget, plan, whole_number(seed_, seed, ""))
        except ValueError as error:
            return None, markup.refusal_markup(str(error)), gr.skip(), gr.skip()
        unknown = unknown_words(self._sampler.pipe, prompt)
        note = f"The model does not know the word {', '.join(map(repr, unknown))}." if unknown else ""
        return asked, markup.note_markup(note), self._arms(plan, {}, "queued"), ""

    def sample(self, asked: Asked | None) -> Iterator[tuple]:
        """What is to be known, the clips and the downloads: again with every clip that is there."""
        if asked is None:
            yield gr.skip(), gr.skip(), gr.skip()
            return
        done, downloads = {}, ""
        yield gr.skip(), self._arms(asked.plan, done, "sampling"), downloads
        try:
            for arm in self._sampler.run(asked.prompt, asked.budget, asked.plan, asked.seed):
                done[arm.name] = arm
                downloads = markup.downloads_markup(arm) if arm.clip else downloads
                yield gr.skip(), self._arms(asked.plan, done, "sampling"), downloads
        except (*MISTAKES, torch.OutOfMemoryError) as error:
            yield markup.refusal_markup(str(error)), self._arms(asked.plan, done, "idle"), downloads

    def _arms(self, plan: Plan, done: dict[str, Arm], progress: markup.Progress) -> str:
        return markup.arms_markup(plan, done, f"{self._arguments.width}/{self._arguments.height}", progress)

    def build(self) -> gr.Blocks:
        begin = self._arguments
        plan = self.plan(begin.budget, begin.steps)
        html = partial(gr.HTML, apply_default_css=False)
        with gr.Blocks(title="flexivid", analytics_enabled=False) as blocks:
            html(self._masthead())
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=320):
                    example = "" if begin.model else DEFAULT_PROMPT
                    prompt = gr.Textbox(example, label="Prompt", lines=2, max_length=2000, elem_id="prompt")
                    with gr.Row():
                        steps = gr.Number(
                            begin.steps, label="Steps", min_width=100, elem_id="steps", interactive=begin.recipe is None
                        )
                        seed_ = gr.Number(begin.seed, label="Seed", min_width=100, elem_id="seed")
                    button = gr.Button("Sample", variant="primary", elem_id="sample")
                with gr.Column(scale=7, min_width=320):
                    budget = self._dial(plan)
                    planned = html(markup.plan_markup(plan), elem_id="plan")
            note = html("", elem_id="note")
            arms = html(self._arms(plan, {}, "idle"), elem_id="clips")
            downloads = html("", elem_id="downloads")

            gr.on(
                [steps.change] if begin.recipe else [budget.change, steps.change],
                self.move_dial,
                [budget, steps],
                [planned, button],
                queue=False,  # beside a clip that is being sampled
                show_progress="hidden",
                trigger_mode="always_last",
                api_visibility="private",
            )
            asked = gr.State()
            gr.on(
                [button.click, prompt.submit],
                self.ask,
                [prompt, budget, steps, seed_],
                [asked, note, arms, downloads],
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            ).then(
                self.sample,
                asked,
                [note, arms, downloads],
                concurrency_limit=1,  # one clip at a time on one device
                show_progress="hidden",
                api_visibility="private",
            )
        return blocks

    def _dial(self, plan: Plan) -> gr.Slider | gr.State:
        """Where a budget is chosen; what a recipe decides instead has none."""
        begin = self._arguments
        if begin.recipe is None:
            return gr.Slider(0.005, 1, begin.budget, step=0.005, label="Budget: share of the FLOPs", elem_id="budget")
        without_guidance = begin.guidance_scale <= 1 < begin.full["guidance_scale"]
        scale = begin.full["guidance_scale"] if without_guidance else None
        gr.HTML(markup.recipe_markup(plan.steps, plan.full_steps, scale), apply_default_css=False, elem_id="recipe")
        return gr.State()

    def _masthead(self) -> str:
        begin = self._arguments
        size = f"{begin.frames} frames of {begin.width} x {begin.height}"
        model = begin.model or "the small embedded model"
        ours = "at a budget" if begin.recipe is None else "by the recipe of a few-step adapter"
        return (
            f'<header class="masthead"><h1>flexivid</h1><p>{escape(model)} on {begin.device}, {size}: '
            f"the same prompt and seed in full, in fewer steps, and {ours}</p></header>"
        )


def whole_number(value: float | None, kind: Callable[[str], int], name: str) -> int:
    """As the command line takes it. Raises ValueError, whose sentence begins with the name."""
    text = "nothing" if value is None else f"{value:.0f}" if value % 1 == 0 else str(value)
    try:
        return kind(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name}{error}") from None


def serve(blocks: gr.Blocks, host: str, port: int | None, folder: Path) -> None:
    """Serves the page until it is interrupted. folder: of the files that it may show.

    Nothing is asked of any other server, by this one or by the page.
    """
    script = (HERE / "page.js").read_text(encoding="utf-8")
    _, address, _ = blocks.queue().launch(
        server_name=host,
        server_port=port,
        allowed_paths=[str(folder)],
        theme=gr.themes.Base(primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=MONOSPACED),
        css_paths=[HERE / "page.css"],
        head=f"<script>{script}</script>",
        footer_links=[],
        ssr_mode=False,  # it would start node, where there is one
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"The page is at {address} until this is stopped with Ctrl-C.", flush=True)
    blocks.block_thread()
