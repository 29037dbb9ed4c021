"""The command `titok-fast`, also `python -m titok_fast`: parsing, printing, exit status.

Results go to stdout, progress and errors to stderr. An error is one line and status 2; Ctrl-C and
SIGTERM are status 130. No file is left half written.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

import torch

from titok_fast.distributed import end_process
from titok_fast.models.attention import BackendError
from titok_fast.settings import __version__

_EPILOG = """\
examples:
  titok-fast sample
  titok-fast sample --model titok-l-32 --labels 1,7,282 --num 4 --out samples --grid sheet.png
  titok-fast reconstruct photos --model titok-l-32 --out back --side-by-side
  titok-fast tokenize photos --model titok-l-32 --out photos.npz
  titok-fast detokenize photos.npz --model titok-l-32 --out back
  titok-fast info titok-l-32
  titok-fast train fashion/stage1 training.max_train_steps=100
"""
_MAX_LINES = 4  # of a message; a wrong weight file can name hundreds of tensors
_REPORTED = (
    ValueError,
    OSError,
    ImportError,
    MemoryError,
    BackendError,
    torch.OutOfMemoryError,
)


class _Command(NamedTuple):
    module: str
    help: str
    add_arguments: str = "add_arguments"
    run: str = "run"


# modules are imported when their command runs: some take seconds
_COMMANDS = {
    "sample": _Command("sample", "draw images of classes"),
    "reconstruct": _Command(
        "images", "encode images and decode them", "add_reconstruct", "reconstruct"
    ),
    "tokenize": _Command("images", "turn images into token ids", "add_tokenize", "tokenize"),
    "detokenize": _Command("images", "turn token ids into images", "add_detokenize", "detokenize"),
    "info": _Command("info", "show what models cost, and what this processor does best"),
    "train": _Command("train", "train a tokenizer or a generator by a recipe"),
    "pretokenize": _Command("pretokenize", "turn a data set into token shards"),
    "convert": _Command("convert", "put trained models into one small folder"),
    "eval": _Command("evaluate", "measure reconstructions, samples and features"),
}


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as an exception, so that every error takes the same way out."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, or one process of it under torchrun.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        Exit status: 0 done, 2 an error that is reported on stderr, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace()
    # launchers end the others by SIGTERM when one process dies: that deserves a message too
    catches = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if catches else None
    try:
        args = build_parser(words[0] if words else None).parse_args(words)
        command = _COMMANDS[args.command]
        for line in getattr(import_module(f"titok_fast.cli.{command.module}"), command.run)(args):
            print(line)
    except KeyboardInterrupt:
        hint = getattr(args, "on_stop", "")
        return _fail(f"interrupted{'; ' if hint else ''}{hint}", 130)
    except _REPORTED as error:
        return _fail(f"error: {_one_line(error)}", 2)
    finally:
        if catches:
            signal.signal(signal.SIGTERM, before)
    return 0


def run() -> NoReturn:
    """The program `titok-fast`: `main`, then the end of the process."""
    end_process(main())


def _fail(message: str, status: int) -> int:
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank = f"rank {os.environ.get('RANK', '0')}: " if many else ""
    sys.stderr.write(f"titok-fast: {rank}{message}\n")
    return status


def _one_line(error: BaseException) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    more = [f"and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
    return "; ".join([*lines[:_MAX_LINES], *more]) or type(error).__name__


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The whole command line, for `main` and for documentation.

    Args:
        command: the one that will run; of the others only the name and a line of help are defined.
    """
    parser = _Parser(
        prog="titok-fast",
        description="Images as 32 to 256 tokens, and images drawn from tokens.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"titok-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, known in _COMMANDS.items():
        subparser = commands.add_parser(name, help=known.help)
        if name == command:
            module = import_module(f"titok_fast.cli.{known.module}")
            getattr(module, known.add_arguments)(subparser)
    return parser
