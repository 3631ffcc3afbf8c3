"""Gives a trained tokenizer a wider decoder that starts with what the narrow one has learnt; its latents stay.

    python recipes/widen_decoder.py --width 448 --intermediate 1344 -o runs/wide [--model FOLDER] [--seed 0]

Channels of the residual stream are copied, and whatever reads a channel shares its weight out among the copies
(Net2Net, Chen et al. 2016, arXiv 1511.05641). Units inside a block are new, and nothing reads them yet. A multiple of
the old width computes what the old decoder did, to rounding; at other widths the layer norms count some channels more
often than others, and some hundred steps make up for it. Go on from there:

    dasheng-tokenizer train --config recipes/default.yaml init=runs/wide acoustic_start.kind=random …
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.decoder import VocosDecoder

SPREAD = 0.5
"""Of the spread of a weight matrix: what is added to the weight of a copy and taken from the others: copies part."""


def shared_out(weight: Tensor, sources: Tensor, draw: torch.Generator) -> Tensor:
    """(out, old) weights → (out, new) ones that give the same sum over copies as the old ones over their sources."""
    one_of = nn.functional.one_hot(sources, weight.shape[1]).float()  # (new, old)
    copies = one_of.sum(0)  # (old,)
    noise = torch.randn(len(weight), len(sources), generator=draw) * weight.std() * SPREAD
    noise -= (noise @ one_of / copies)[:, sources]  # no sum over the copies of a channel; none where there is one copy
    return (weight / copies)[:, sources] + noise


@torch.no_grad()
def widen(model: DashengTokenizerModel, width: int, intermediate_size: int, seed: int = 0) -> DashengTokenizerModel:
    """The tokenizer with a decoder of the new sizes.

    Raises:
        ValueError: A new size is below the old one.
    """
    old_width, old_size = model.config.decoder_embed_dim, model.config.decoder_intermediate_size
    if width < old_width or intermediate_size < old_size:
        raise ValueError(
            f"the decoder has width {old_width} and intermediate size {old_size}: it can only become wider; give "
            f"--width and --intermediate of at least these, got {width} and {intermediate_size}"
        )
    draw = torch.Generator().manual_seed(seed)
    # Whole copies first, then as many drawn channels as are missing.
    missing = torch.randperm(old_width, generator=draw)[: width % old_width]
    sources = torch.cat([torch.arange(old_width).repeat(width // old_width), missing])  # (width,)

    wide = copy.deepcopy(model)
    wide.config.decoder_embed_dim, wide.config.decoder_intermediate_size = width, intermediate_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide.decoder = VocosDecoder(wide.config)
    kept = model.state_dict()
    for name, value in wide.state_dict().items():
        value.copy_(widened(name, kept[name], value, sources, draw))
    return wide


def widened(name: str, old: Tensor, fresh: Tensor, sources: Tensor, draw: torch.Generator) -> Tensor:
    """A tensor of the wide model from that of the old one and a freshly drawn one of the new shape."""
    if not name.startswith("decoder.") or name.startswith("decoder.head.istft"):
        return old
    if name == "decoder.head.out.bias":
        return old
    if name == "decoder.head.out.weight":
        return shared_out(old, sources, draw)
    if ".pwconv1." in name:  # reads the stream: new units get weights of their own
        known = shared_out(old, sources, draw) if old.ndim == 2 else old
        return torch.cat([known, fresh[len(old) :]])
    if ".pwconv2.weight" in name:  # writes the stream: new units write nothing yet
        unread = torch.zeros(len(sources), fresh.shape[1] - old.shape[1])
        return torch.cat([old[sources], unread], dim=1)
    return old[sources]


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--intermediate", type=int, required=True, help="units inside a block, 3 times the width")
    parser.add_argument("--model", help="folder of the old tokenizer (default: the embedded one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    model = DashengTokenizerModel.from_pretrained(arguments.model).float()
    try:
        wide = widen(model, arguments.width, arguments.intermediate, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    wide.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
