"""The committed prompt set that models are measured on: captions of seen and of held-out combinations.

Drawn once with a fixed seed: every word appears about equally often in each split, and so do pairs of words,
as far as the held-out rule permits. A prompt's reference clip is `render([scene], [fixed_layout(scene)])`.

    python -m flexivid.shapes.prompts          # writes prompts.json again, the same
"""

import itertools
import json
import random
from collections import Counter
from dataclasses import astuple
from pathlib import Path

from flexivid.files import write_text
from flexivid.shapes.world import FACTORS, Scene, all_scenes

PATH = Path(__file__).with_name("prompts.json")
SIZES = {"seen": 128, "held_out": 64}
SEED = 0


def _balanced(scenes: list[Scene], count: int, source: random.Random) -> list[Scene]:
    """`count` different scenes, each the one whose words, and then pairs of words, have appeared least so far."""
    # Ties go to chance: sorted by random keys, because Python promises only random() to stay the same for a seed.
    keys = {scene: source.random() for scene in scenes}
    waiting = [tuple(enumerate(astuple(scene))) for scene in sorted(scenes, key=keys.get)]
    kinds = [len({words[factor] for words in waiting}) for factor in range(len(FACTORS))]
    seen_words, seen_pairs, drawn = Counter(), Counter(), []

    def crowding_of_words(words) -> int:
        # A word of a factor with many words is expected less often, so each appearance weighs more.
        return sum(kinds[factor] * seen_words[factor, word] for factor, word in words)

    def crowding_of_pairs(words) -> int:
        return sum(seen_pairs[pair] for pair in itertools.combinations(words, 2))

    for _ in range(count):
        crowding = [crowding_of_words(words) for words in waiting]
        best = min(crowding)
        words = min((words for words, c in zip(waiting, crowding, strict=True) if c == best), key=crowding_of_pairs)
        waiting.remove(words)
        drawn.append(Scene(*(word for _, word in words)))
        seen_words.update(words)
        seen_pairs.update(itertools.combinations(words, 2))
    return drawn


def make_prompts() -> dict[str, list[Scene]]:
    """The prompt set, drawn anew. `load_prompts` reads the committed one."""
    source = random.Random(SEED)
    return {
        split: _balanced([s for s in all_scenes() if s.held_out == (split == "held_out")], count, source)
        for split, count in SIZES.items()
    }


def load_prompts() -> dict[str, list[Scene]]:
    """The committed prompt set: lists of scenes under "seen" and "held_out"."""
    scenes = {scene.caption: scene for scene in all_scenes()}
    return {split: [scenes[text] for text in texts] for split, texts in json.loads(PATH.read_text()).items()}


def main() -> None:
    captions = {split: [scene.caption for scene in scenes] for split, scenes in make_prompts().items()}
    write_text(PATH, json.dumps(captions, indent=1) + "\n")
    print(f"wrote {', '.join(f'{len(texts)} {split}' for split, texts in captions.items())} captions to {PATH}")


if __name__ == "__main__":
    main()
