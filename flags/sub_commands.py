"""Commands with sub-commands: which one was asked for, and the help that lists them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from errors import UserError


def chosen(commands: Mapping[str, type], argv: Sequence[str] | None, doc: str, call: str) -> tuple[str, list[str]]:
    """The sub-command and the words behind it; -h and --help print the list and end the program.

    Args:
        commands: sub-command -> its flags, whose docstring's first line says what it does.
        argv: None: the program's own.
        doc: the module's docstring.
        call: a call that works, for messages.

    Raises:
        UserError: none of them comes first.
    """
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help"):
        program = call.partition(f" {next(word for word in call.split() if word in commands)}")[0]
        parser = argparse.ArgumentParser(prog=program, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        listed = parser.add_subparsers(metavar="COMMAND")
        for command, kind in commands.items():
            listed.add_parser(command, help=(kind.__doc__ or "").partition("\n")[0])
        parser.print_help()
        sys.exit(0)
    if name not in commands:
        raise UserError(f"{name or 'no sub-command'}: needs one of {', '.join(commands)} first, e.g. {call}")
    return name, rest
