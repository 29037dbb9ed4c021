"""The command `titok-fast`, also `python -m titok_fast.cli.main`: arguments, printing, exit status.

Results go to stdout, progress and errors to stderr. An error is one line and status 2; Ctrl-C is
status 130. No file is left half written.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

from titok_fast.cli import images as cli_commands
from titok_fast.cli.info import info
from titok_fast.cli.options import add_running, add_sampling, add_weights, labels, positive
from titok_fast.config import __version__
from titok_fast.costs import DTYPE_BYTES
from titok_fast.models.attention import BackendError
from titok_fast.presets import PRESETS

_EPILOG = """\
examples:
  titok-fast sample --model fashion-16 --num 100 --out clothes --grid clothes.png
  titok-fast sample --model titok-l-32 --labels 1,7,282 --num 4 --out samples --grid sheet.png
  titok-fast reconstruct photos --model titok-l-32 --out back --side-by-side
  titok-fast tokenize photos --model titok-l-32 --out photos.npz
  titok-fast detokenize photos.npz --model titok-l-32 --out back
  titok-fast info titok-l-32
  titok-fast train recipes/fashion/stage1.yaml training.max_train_steps=100
"""
_MAX_LINES = 4  # of a message; a wrong weight file can name hundreds of tensors


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as an exception, so that every error takes the same way out."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        Exit status: 0 done, 2 an error that is reported on stderr, 130 interrupted.
    """
    try:
        words = sys.argv[1:] if argv is None else argv
        args = build_parser(words[0] if words else None).parse_args(words)
        late = args.command in _LATE
        run = _late(args.command).run if late else _COMMANDS[args.command]
        for line in run(args):
            print(line)
    except KeyboardInterrupt:
        print("titok-fast: interrupted", file=sys.stderr)
        return 130
    except (
        ValueError, OSError, ImportError, MemoryError, BackendError, torch.OutOfMemoryError
    ) as error:  # fmt: skip
        print(f"titok-fast: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _late(command: str) -> Any:
    return import_module(_LATE[command][0])


def _one_line(error: BaseException) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    more = [f"and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
    return "; ".join([*lines[:_MAX_LINES], *more]) or type(error).__name__


def _info(args: argparse.Namespace) -> Iterator[str]:
    yield info(args.models, dtype=args.dtype, batch=args.batch_size)


_COMMANDS = {
    "sample": cli_commands.sample,
    "reconstruct": cli_commands.reconstruct,
    "tokenize": cli_commands.tokenize,
    "detokenize": cli_commands.detokenize,
    "info": _info,
}


# commands of their own modules, which are imported when they are asked for
_LATE = {
    "train": ("titok_fast.cli.train", "train a tokenizer or a generator by a recipe"),
    "pretokenize": ("titok_fast.cli.pretokenize", "turn a data set into token shards"),
    "convert": ("titok_fast.cli.convert", "put trained models into one small folder"),
    "eval": ("titok_fast.cli.evaluate", "measure reconstructions, samples and features"),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The whole command line, for `main` and for documentation.

    Args:
        command: the one that will run; of those in modules of their own, only its options are read.
    """
    parser = _Parser(
        prog="titok-fast",
        description="Pictures as 32 to 256 tokens, and pictures drawn from tokens.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"titok-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_sample(commands.add_parser("sample", help="draw pictures of classes"))
    _add_reconstruct(commands.add_parser("reconstruct", help="encode pictures and decode them"))
    _add_tokenize(commands.add_parser("tokenize", help="turn pictures into token ids"))
    _add_detokenize(commands.add_parser("detokenize", help="turn token ids into pictures"))
    _add_info(commands.add_parser("info", help="show sizes, costs and speed limits of the models"))
    for name, (_, help_text) in _LATE.items():
        late = commands.add_parser(name, help=help_text)
        if name == command:
            _late(name).add_arguments(late)
    return parser


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw pictures of classes: ImageNet's, or with fashion-16 ten kinds of clothes. Picture i "
        "depends on the seed, on i, on its label and on the sampling settings, never on the batch "
        "size."
    )
    parser.add_argument(
        "--labels", "--label", dest="labels", type=labels, action="extend", metavar="LIST",
        help="classes such as 1,7,282; may be given several times (default: all in turn)",
    )  # fmt: skip
    parser.add_argument(
        "--num", type=positive, metavar="N",
        help="pictures of each label (default: 1); without --labels, pictures in all (default: one "
        "of each class)",
    )  # fmt: skip
    _add_outputs(parser, "{index}_{label}.png")
    add_sampling(parser)
    _add_models(parser, generator=True)


def _add_reconstruct(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Encode pictures, decode them, and print the PSNR of each. Pictures are resized and "
        "cropped to the model's square first; PSNR is measured on that square. Without --out and "
        "--grid only numbers are printed."
    )
    _add_inputs(parser)
    parser.add_argument(
        "--side-by-side", action="store_true", help="write input and result next to each other"
    )
    _add_outputs(parser, "{index}_{name}.png")
    _add_models(parser)


def _add_tokenize(parser: argparse.ArgumentParser) -> None:
    parser.description = "Turn pictures into token ids, and write them with the pictures' names."
    _add_inputs(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="file to write: .npz or .json"
    )
    parser.add_argument(
        "--id-dtype", choices=("int16", "int32"),
        help="integer type of the ids in .npz (default: the smallest that holds the codebook)",
    )  # fmt: skip
    _add_force(parser)
    _add_models(parser)


def _add_detokenize(parser: argparse.ArgumentParser) -> None:
    parser.description = "Turn the ids in a file that `tokenize` wrote into pictures."
    parser.add_argument("ids", type=Path, metavar="FILE", help="ids to read: .npz or .json")
    _add_outputs(parser, "{index}_{name}.png")
    _add_models(parser)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show parameters, FLOPs, bytes and the least time per picture on some cards. Everything is "
        "computed from the models' shapes; nothing is measured or downloaded."
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL",
        help=f"models to show stage by stage (default: a line for each of {', '.join(PRESETS)})",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=tuple(DTYPE_BYTES), default="bfloat16",
        help="number format of weights and arithmetic (default: bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N",
        help="pictures at once, for the least times (default: 32)",
    )  # fmt: skip


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="PICTURE",
        help="picture file, or folder that is searched to any depth (jpg, png, webp)",
    )  # fmt: skip


def _add_outputs(parser: argparse.ArgumentParser, pattern: str) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder for PNG files named {pattern}"
    )
    parser.add_argument(
        "--grid", type=Path, metavar="FILE", help="PNG file that shows all pictures in rows"
    )
    _add_force(parser)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace files that exist already")


def _add_models(parser: argparse.ArgumentParser, *, generator: bool = False) -> None:
    """Which weights, and where they run."""
    group = parser.add_argument_group("model")
    add_weights(group, generator=generator)
    add_running(group)


if __name__ == "__main__":
    sys.exit(main())
