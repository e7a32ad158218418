"""The `den` command line: a command a file. PyTorch is imported when a command starts its work, not before."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from den.cli.common import UserError

COMMANDS = {
    "train": ("train", "Train", "train a DEN on one or several data sets"),
    "eval": ("evaluate", "Eval", "accuracy, cost and FLOPs of a trained DEN"),
    "bench": ("bench", "Bench", "time of the dense network against the frozen DEN"),
    "report": ("report", "Report", "tables and pictures of runs, beside the paper's, in one page"),
    "predict": ("predict", "Predict", "class, probability, path and cost of image files"),
}
USAGE = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0; 2 after an error of the user's, told in one line; 130 interrupted.

    argv: without the program's name; None: the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _dispatch(arguments)
        except UserError as error:
            print(f"den: {' '.join(str(error).split())}", file=sys.stderr)
            return USAGE
        except KeyboardInterrupt:
            print("den: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # the reader of a pipe, such as head, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else USAGE
    if arguments[0] == "--version":
        from den import __version__

        print(f"den {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise UserError(f"{name!r} is no command; the commands are {', '.join(COMMANDS)} (den --help)")
    module, kind, _ = COMMANDS[name]
    command = getattr(importlib.import_module(f"den.cli.{module}"), kind)
    parsed = parse(command, name, rest)
    if parsed is None:
        return 0
    parsed.run(rest)
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, _, what) in COMMANDS.items()]
    return "\n".join(
        (
            "usage: den COMMAND [OPTIONS]",
            "",
            "Deep Elastic Networks: each image chooses, block by block, how many channels of the network to run.",
            "",
            *lines,
            "",
            "den COMMAND --help describes every option. Results go to standard output, with --json for programs;",
            "progress and errors go to standard error. Exit status: 0, 2 after an error, 130 when interrupted.",
        )
    )


def parse(command: type, name: str, arguments: Sequence[str], default: Any = None) -> Any:
    """The command's options, or None when it was help that was asked for. Raises UserError for a usage error."""
    import tyro

    given = {} if default is None else {"default": default}
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                command,
                prog=f"den {name}",
                args=list(arguments),
                config=(tyro.conf.FlagCreatePairsOff,),
                **given,  # type: ignore[arg-type]
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        raise UserError(f"{_first_paragraph(shown.getvalue())} (den {name} --help)") from None


def _first_paragraph(box: str) -> str:
    """What tyro says in a box, without its title, its frame and the advice below its rule."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    paragraphs = re.split(r"\n[ │]*[─-]{4,}[ │]*\n", plain)
    framed = "╭" in plain  # where the terminal has no such characters, the title stands above a rule of its own
    text = paragraphs[0].partition("\n")[2] if framed else paragraphs[min(1, len(paragraphs) - 1)]
    text = " ".join(re.sub(r"[│╰╯─]", " ", text).split())
    return text[:1].lower() + text[1:] if text else "wrong usage"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"den: warning: {' '.join(str(message).split())}", file=sys.stderr)
