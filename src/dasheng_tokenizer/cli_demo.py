"""The command `demo`."""

from __future__ import annotations

import argparse
import sys


def add_demo_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` to the commands."""
    text = "web page: reconstruct, compare, enhance and generate in the browser"
    command = commands.add_parser("demo", help=text, description=text)
    command.add_argument("--model", metavar="M", help="tokenizer folder or hub name (default: the embedded one)")
    command.add_argument("--enhancer", metavar="E", help="enhancer folder (default: the embedded one)")
    command.add_argument("--generator", metavar="G", help="generator folder or hub name (default: the embedded one)")
    command.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    command.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    command.add_argument("--port", type=int, default=7860, metavar="P", help="port, 0 for a free one (default: 7860)")
    command.add_argument("--max-seconds", type=float, default=60.0, metavar="S", help="longest clip (default: 60)")
    command.add_argument("--open", action="store_true", help="open the page in the browser")


def run_demo(arguments: argparse.Namespace) -> int:
    """Serve the page until interrupted.

    Raises:
        ConfigurationError: a port or length out of range, the port is taken, or no such device.
        CheckpointError, MissingExtraError, ModelMismatchError: see `Workbench.load` and `build_page`.
    """
    from dasheng_tokenizer.demo import Workbench, launch_page
    from dasheng_tokenizer.errors import ConfigurationError
    from dasheng_tokenizer.files import require_extra

    if not 0 <= arguments.port < 65536:
        raise ConfigurationError(f"port {arguments.port} is none; choose one from 1 to 65535, or 0 for a free one")
    if not 0 < arguments.max_seconds <= 3600:
        raise ConfigurationError(f"--max-seconds {arguments.max_seconds:g} must be above 0 and at most 3600")
    require_extra("gradio", "demo")  # before time is spent on models
    bench = Workbench.load(
        arguments.model, arguments.enhancer, arguments.generator, arguments.device, arguments.max_seconds
    )
    for what, why in bench.missing.items():
        print(f"no {what} on the page: {why}", file=sys.stderr)
    try:
        launch_page(bench, arguments.host, arguments.port or None, arguments.open)
    except (OSError, ValueError) as error:  # gradio has both
        raise ConfigurationError(
            f"the page cannot be served at {arguments.host}:{arguments.port}, where another program may be listening; "
            f"choose another --port, or 0 for a free one ({error})"
        ) from error
    return 0
