"""The command `keras-moe`: a verb for each thing it does.

A verb is a function that adds its arguments to a parser and returns what runs it, a
function of the parsed arguments that prints its result. Its docstring is its help.
`VERBS` lists them.
"""

import argparse
import dataclasses
import inspect
import json
import os
import sys

from keras_moe import checks, planning
from keras_moe.listing import list_presets
from keras_moe.units import count_text


def main(arguments=None):
    """Runs a command line.

    Args:
        arguments: list of str, those after the command's name; None for the
            process's.

    Returns:
        int, the exit status: 0, or 2 after an error, which is one line on stderr.

    Raises:
        SystemExit: for arguments that cannot be parsed, with status 2, and for
            `--help`, with 0.
    """
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads, such as `head`, has had enough. Python flushes once more at its
        # end, which must find somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"keras-moe {parsed.verb}: error: {message}", file=sys.stderr)
        return 2
    return 0


# --- Verbs ---


def list_verb(parser):
    """List the presets: sizes, licences and where weights are."""
    parser.add_argument("--family", help="of this family only, such as mixtral")
    _add_json(parser)

    def run(arguments):
        records = list_presets()
        if arguments.family is not None:
            families = sorted({record.family for record in records})
            checks.one_of("family", arguments.family, families)
            records = [r for r in records if r.family == arguments.family]
        if arguments.json:
            _print_json([dataclasses.asdict(record) for record in records])
            return
        head = ("preset", "parameters", "a token's", "weights", "licence")
        rows = [
            (
                record.name,
                count_text(record.total_parameters),
                count_text(record.active_parameters),
                record.weights or "none",
                record.licence or "",
            )
            for record in records
        ]
        _print_table([head, *rows], right=(1, 2))

    return run


def plan_verb(parser):
    """Say what a model takes: parameters, operations and memory."""
    defaults = inspect.signature(planning.plan).parameters
    parser.add_argument(
        "preset", metavar="PRESET", help="a preset's name, or a folder with config.json"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--sequence-length", type=int, help="tokens; default: the preset's context"
    )
    for name, example in (("dtype", "mixed_bfloat16"), ("optimizer", "lion")):
        default = defaults[name].default
        parser.add_argument(
            f"--{name}", default=default, help=f"such as {example}; default: {default}"
        )
    parser.add_argument(
        "--mesh",
        type=_axis_sizes,
        help="devices, such as batch=4,expert=8, the innermost axis last; the batch "
        "is that of all",
    )
    default = defaults["platform"].default
    parser.add_argument(
        "--platform", default=default, help=f"gpu, tpu or cpu; default: {default}"
    )
    _add_json(parser)

    def run(arguments):
        plan = planning.plan(
            arguments.preset,
            batch_size=arguments.batch_size,
            sequence_length=arguments.sequence_length,
            dtype=arguments.dtype,
            optimizer=arguments.optimizer,
            mesh=arguments.mesh,
            platform=arguments.platform,
        )
        if arguments.json:
            _print_json(plan.to_dict())
        else:
            print(plan)

    return run


VERBS = {"list": list_verb, "plan": plan_verb}


# --- What verbs share ---


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        # argparse would print the usage before it.
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser():
    parser = _Parser(
        prog="keras-moe", description="Mixture-of-experts models for Keras."
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        text = inspect.getdoc(verb)
        help = text.split("\n")[0].rstrip(".").lower()
        verb_parser = verbs.add_parser(name, help=help, description=text)
        verb_parser.set_defaults(run=verb(verb_parser))
    return parser


def _axis_sizes(text):
    """`"batch=4,expert=8"` as a dict."""
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not size.isdigit() or name in sizes:
            raise argparse.ArgumentTypeError(
                f"must be axes and sizes, such as batch=4,expert=8, not {text!r}"
            )
        sizes[name] = int(size)
    return sizes


def _add_json(parser):
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")


def _print_json(value):
    print(json.dumps(value, indent=2))


def _print_table(rows, right=()):
    """Prints rows of str in columns, those in `right` aligned at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
