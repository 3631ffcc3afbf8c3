"""Writes the averaged weights of a checkpoint of a run, finished or not, as a `save_pretrained` folder.

python recipes/export_checkpoint.py RECIPE CHECKPOINT OUT [key=value …]     (the key=value pairs of the run)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dasheng_tokenizer.generation.training import averaged_generator
from dasheng_tokenizer.generation.training_configuration import load_generator_recipe
from dasheng_tokenizer.training import build_model
from dasheng_tokenizer.training.checkpoint_tensors import open_tensors
from dasheng_tokenizer.training.configuration import load_recipe, read_settings
from dasheng_tokenizer.training.loop import seed_everything
from dasheng_tokenizer.training.tokenizer_state import remove_injection

PREFIX, HELD = "average.tokenizer.", "module.tokenizer."


def main() -> None:
    """Build the model of the recipe, put the averaged weights into it, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("checkpoint", type=Path, help="such as runs/default/checkpoints/step-00002500")
    parser.add_argument("output", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if read_settings(arguments.recipe, arguments.overrides).get("kind") == "generator":
        recipe = load_generator_recipe(arguments.recipe, arguments.overrides)
        averaged_generator(recipe, arguments.checkpoint).save_pretrained(arguments.output)
        return
    config = load_recipe(arguments.recipe, arguments.overrides)
    seed_everything(config.seed)  # a fresh encoder, without semantic_weights, is the one of the run
    model = build_model(config)
    if config.latent == "semantic":
        remove_injection(model)
    if config.freeze_acoustic:
        model.freeze_acoustic_layer()
    state = json.loads((arguments.checkpoint / "state.json").read_text(encoding="utf-8"))
    tensors = open_tensors(arguments.checkpoint, state).state("")
    averaged = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
    if set(averaged) != {name for name, _ in model.trainable_parameters()}:
        raise SystemExit(f"{arguments.checkpoint} does not fit the recipe {arguments.recipe}")
    # A checkpoint also holds what was made from the data: statistics, and an acoustic layer that does not learn.
    held = {key.removeprefix(HELD): tensor for key, tensor in tensors.items() if key.startswith(HELD)}
    model.load_state_dict({**held, **averaged}, strict=False)
    model.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
