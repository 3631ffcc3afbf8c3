"""The demo page itself: what is where, which button calls what, and how it is served."""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.demo.pictures import latent_picture, similarity_picture, spectrograms
from dasheng_tokenizer.demo.workbench import Clip, Reconstruction, Workbench, bundled_clips
from dasheng_tokenizer.errors import DashengTokenizerError
from dasheng_tokenizer.files import require_extra

if TYPE_CHECKING:
    import gradio
    from matplotlib.figure import Figure

Result = TypeVar("Result")

Player = tuple[int, npt.NDArray[np.int16]]
"""What an audio player takes: Hz, (samples, channels)."""

TITLE = "DashengTokenizer"

MAX_FILE_SIZE = "32mb"

CONCURRENT, WAITING = 2, 32
"""Jobs that run side by side, and visitors who may wait for one."""

SWEEP_SECONDS, KEPT_SECONDS = 60, 300
"""How often old files of visitors are deleted, and how old they may get."""

MAX_STEPS = 100

_INTRODUCTION = """# DashengTokenizer
Audio becomes one vector every 40 ms: the embedding of a frozen semantic encoder plus that of one linear acoustic layer.
From this one stream come back the sound, what it means, cleaner speech and new sounds.
Clips up to {seconds:g} s; they are deleted within {minutes:g} minutes.
"""

_INSIDE = """The tokenizer's embedding (`unified`) adds two up. Left to right: how alike each moment of the clip is
to each other by the sum and by either part; below, which of the bundled clips it is nearest to by the mean of each."""

_PROMPTS = (
    "a flute playing a single note, C4",
    "a snare drum hit",
    "the sound of footsteps",
    "an excerpt of orchestral fantasy game music",
)


def build_page(bench: Workbench) -> gradio.Blocks:
    """Lay out the page.

    Args:
        bench: the models behind it.

    Raises:
        MissingExtraError: gradio is not installed (extra `demo`).
    """
    gr = require_extra("gradio", "demo")
    require_extra("matplotlib", "demo")
    page: gradio.Blocks = gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(SWEEP_SECONDS, KEPT_SECONDS), fill_width=True
    )
    with page:
        gr.Markdown(_INTRODUCTION.format(seconds=bench.max_seconds, minutes=(KEPT_SECONDS + SWEEP_SECONDS) / 60))
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                clip = gr.Audio(
                    sources=["upload", "microphone"], type="filepath", label="Your clip", elem_id="clip", buttons=[]
                )
                names = [path.stem for path in bundled_clips()]
                gr.Examples(
                    [[str(path)] for path in bundled_clips()],
                    clip,
                    label="or one of these",
                    example_labels=names,
                    examples_per_page=len(names),
                )
            with gr.Column(scale=2, min_width=480):
                with gr.Tab("Reconstruct"):
                    _reconstruction(gr, bench, clip)
                with gr.Tab("Look inside"):
                    _embeddings(gr, bench, clip)
                with gr.Tab("Enhance speech"):
                    _enhancement(gr, bench, clip)
                with gr.Tab("Generate"):
                    _generation(gr, bench)
    page.queue(default_concurrency_limit=CONCURRENT, max_size=WAITING)
    return page


def launch_page(
    bench: Workbench, host: str = "127.0.0.1", port: int | None = 7860, open_browser: bool = False, block: bool = True
) -> gradio.Blocks:
    """Serve the page until interrupted. Files of visitors lie in a folder of their own, which goes with the server.

    Args:
        bench: the models behind it.
        host: address to listen on; the default is reached from this machine alone.
        port: None takes a free one.
        open_browser: show the page.
        block: False returns at once; `close()` ends the server, and the folder goes with the process.

    Raises:
        MissingExtraError: see `build_page`.
        OSError: the port is taken.
    """
    scratch = TemporaryDirectory(prefix="dasheng-tokenizer-demo-", ignore_cleanup_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = scratch.name  # read when components are made
    page = build_page(bench)
    page.scratch = scratch  # type: ignore[attr-defined]  # lives as long as the page
    try:
        page.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            prevent_thread_lock=not block,
            share=False,
            max_file_size=MAX_FILE_SIZE,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            theme=_theme(),
        )
    except BaseException:
        scratch.cleanup()
        raise
    if block:
        scratch.cleanup()
    return page


# ---------------------------------------------------------------------- what is behind each tab


def _reconstruction(gr: Any, bench: Workbench, clip: Any) -> None:
    button = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
    player = gr.Audio(label="Reconstruction", interactive=False, elem_id="reconstruction", buttons=["download"])
    figures = gr.Markdown(elem_id="figures")
    spectra, latent = gr.Plot(label="Spectrograms", show_label=False), gr.Plot(label="Latent", show_label=False)

    def run(path: str | None) -> tuple[Player, str, Figure, Figure]:
        original = bench.read(path)
        made = bench.reconstruct(original)
        return (
            _player(made.clip),
            reconstruction_table(made),
            spectrograms({"original": original, "reconstruction": made.clip}),
            latent_picture(made.tokens.latents[0], bench.tokenizer.frame_rate),
        )

    button.click(_told(gr, run), clip, [player, figures, spectra, latent], api_name="reconstruct")


def _embeddings(gr: Any, bench: Workbench, clip: Any) -> None:
    gr.Markdown(_INSIDE)
    button = gr.Button("Compare", variant="primary", elem_id="compare")
    squares = gr.Plot(label="Similarity over time", show_label=False)
    table = gr.Dataframe(
        headers=["bundled clip", *bench.parts],
        label="Nearest bundled clips (cosine)",
        interactive=False,
        elem_id="nearest",
    )

    def run(path: str | None) -> tuple[Figure, list[list[Any]]]:
        embeddings = bench.embed(bench.read(path))
        rows = [[name, *(round(found[part], 2) for part in bench.parts)] for name, found in bench.nearest(embeddings)]
        squares = {str(part): held for part, held in bench.similarities(embeddings).items()}
        return similarity_picture(squares, bench.tokenizer.frame_rate), rows

    button.click(_told(gr, run), clip, [squares, table], api_name="compare")


def _enhancement(gr: Any, bench: Workbench, clip: Any) -> None:
    if bench.enhancer is None:
        gr.Markdown(f"Not on this page: {html.escape(bench.missing.get('enhancement', 'no enhancer was given'))}")
        return
    button = gr.Button("Enhance", variant="primary", elem_id="enhance")
    player = gr.Audio(label="Enhanced speech", interactive=False, elem_id="enhanced", buttons=["download"])
    spectra = gr.Plot(label="Spectrograms", show_label=False)

    def run(path: str | None) -> tuple[Player, Figure]:
        noisy = bench.read(path)
        clean = bench.enhance(noisy)
        return _player(clean), spectrograms({"your clip": noisy, "enhanced": clean})

    button.click(_told(gr, run), clip, [player, spectra], api_name="enhance")


def _generation(gr: Any, bench: Workbench) -> None:
    if bench.generator is None:
        gr.Markdown(f"Not on this page: {html.escape(bench.missing.get('generation', 'no generator was given'))}")
        return
    longest = min(bench.generator.max_seconds, bench.max_seconds)
    text = gr.Textbox(label="What should it sound like?", value=_PROMPTS[0], max_length=1000, elem_id="text")
    gr.Examples([[prompt] for prompt in _PROMPTS], text, label="for instance")
    with gr.Row():
        seconds = gr.Slider(0.2, longest, min(1.6, longest), step=0.1, label="Seconds")
        steps = gr.Slider(4, MAX_STEPS, 25, step=1, label="Steps")
        guidance = gr.Slider(0, 8, bench.generator.guidance, step=0.5, label="Guidance")
        seed = gr.Number(0, precision=0, minimum=0, label="Seed")
    button = gr.Button("Generate", variant="primary", elem_id="generate")
    player = gr.Audio(label="Generated", interactive=False, elem_id="generated", buttons=["download"])
    spectra = gr.Plot(label="Spectrogram", show_label=False)

    def run(text: str, seconds: float, steps: float, guidance: float, seed: float | None) -> tuple[Player, Figure]:
        made = bench.generate(text, min(seconds, longest), int(min(steps, MAX_STEPS)), guidance, int(seed or 0))
        return _player(made), spectrograms({text[:80].replace("$", r"\$"): made})

    inputs = [text, seconds, steps, guidance, seed]
    gr.on([button.click, text.submit], _told(gr, run), inputs, [player, spectra], api_name="generate")


# ---------------------------------------------------------------------- small things


def reconstruction_table(made: Reconstruction) -> str:
    """What there is to say about a reconstruction, as a table in Markdown."""
    tokens, rows = made.tokens, made.figures
    channels, count, width = tokens.latents.shape
    told = {
        "tokens": f"{count} a channel, {tokens.frame_rate:g} a second, {width} values each",
        "clip": f"{tokens.num_samples / tokens.sampling_rate:.2f} s, {channels} channel{'s' * (channels > 1)}, "
        f"{tokens.sampling_rate} Hz; {tokens.num_samples} samples went in and came out",
        "mel distance (lower is better)": _number(rows["mel_distance"]),
        "PESQ-WB (1 to 4.64)": _number(rows["pesq_wb"]),
        "STOI (0 to 1)": _number(rows["stoi"]),
    }
    first, *rest = (f"| {name} | {value} |" for name, value in told.items())
    return "\n".join([first, "|---|---|", *rest])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _player(clip: Clip) -> Player:
    """16 bit, so that the page plays it at its own level."""
    scaled = np.round(np.clip(clip.audio, -1, 1) * 32767)
    return clip.sampling_rate, scaled.T.astype(np.int16)


def _told(gr: Any, function: Callable[..., Result]) -> Callable[..., Result]:
    """Errors that this package names are shown to the visitor, without the folder where his file lies."""

    @wraps(function)
    def run(*inputs: Any) -> Result:
        try:
            return function(*inputs)
        except DashengTokenizerError as error:
            message = str(error)
            if inputs and isinstance(inputs[0], str):
                message = message.replace(inputs[0], Path(inputs[0]).name)
            raise gr.Error(html.escape(message), duration=None, print_exception=False) from error

    return run


def _theme() -> Any:
    """Fonts of the visitor's own machine: the usual theme asks a font server for them."""
    gr = require_extra("gradio", "demo")
    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="orange"
    )
