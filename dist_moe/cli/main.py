"""dist-moe: the command line. A mistake of the user's prints one message and exits with code 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence

import dist_moe
from dist_moe import screen
from dist_moe.cli import (
    bench,
    compress,
    config,
    data,
    evaluate,
    export,
    forest,
    import_,
    inspect,
    plan,
    report,
    reshard,
    search,
    sweep,
    train,
)
from dist_moe.engine.launch.signals import Interruption, interruptible, speaks_for_node
from dist_moe.errors import LaunchError, UserError

COMMANDS = (
    train,
    evaluate,
    search,
    compress,
    sweep,
    plan,
    config,
    data,
    inspect,
    report,
    export,
    import_,
    reshard,
    forest,
    bench,
)


def console_script() -> None:
    """Run the command line in a process of its own, and end the process with its exit code."""
    screen.guard_screen()
    # Ragged sizes fragment the memory of a GPU; torch reads this when it is imported.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        with interruptible():
            code = _run_to_the_end()
    except KeyboardInterrupt as interruption:
        number = getattr(interruption, "signal_number", signal.SIGINT)
        _tell(Interruption(number))
        os._exit(128 + number)  # at once: what libraries would still do at exit may wait for others
    sys.exit(code)


def _run_to_the_end() -> int:
    """Return the exit code, once all that was printed has been written, or is known to be lost."""
    try:
        code = main()
        sys.stdout.flush()
    except SystemExit as leaving:  # argparse: after --help, or a sentence of its own
        code = leaving.code if isinstance(leaving.code, int) else 0
    except OSError as error:
        if error is not screen.lost_output():
            raise
        code = 0
    lost = screen.lost_output()
    if lost is None or code:
        return code
    if screen.is_broken_pipe(lost):
        return screen.BROKEN_PIPE
    _tell(UserError(f"standard output could not be written: {lost.strerror}; make room, or send it elsewhere"))
    return UserError.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit code."""
    try:
        options = _parse(arguments)
        if options.output_is_optional:
            screen.make_output_optional()
        _check_temporary_directory()
        return int(options.run(options))
    except UserError as error:
        _tell(error)
        return error.exit_code


def _check_temporary_directory() -> None:
    """Raise UserError where there is none: libraries ask for it as soon as they are imported."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(f"{error.strerror}: set TMPDIR to a directory that can be written") from error


def _tell(error: BaseException) -> None:
    """Print an error, once on each machine unless each process has an error of its own."""
    if speaks_for_node() or isinstance(error, LaunchError):
        screen.say(f"dist-moe: {error}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may stand before and after options, which argparse alone does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    stray = [argument for argument in rest if argument.startswith("-") or "overrides" not in options]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-moe", description="Distributed training of sparse mixtures of experts.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {dist_moe.__version__}")
    # The deepspeed launcher puts this before the arguments of its own accord.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(output_is_optional=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser
