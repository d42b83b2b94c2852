"""The command line: `check` examines a machine or ranks, `report` shows a finished run. Imports no framework itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import hvd_accordion
from hvd_accordion.cli import check, run_report
from hvd_accordion.cli.reference_model import BACKWARD_SECONDS, PARAMETERS, PARAMETERS_ALLOWED
from hvd_accordion.utils import validation

CHECK = """\
Examines this machine: versions, Horovod's build and whether it fits the installed torch and TensorFlow, Horovod's
settings, cores and threads, and whether host names can be resolved. Started on several ranks,

    horovodrun -np 2 -H host1:1,host2:1 python -m hvd_accordion check

it also compares the ranks and measures the link between them. For a network like ResNet-18 it predicts the time of the
exchange dense, with PowerSGD and with TopK, and whether compression would be faster. The measurement assumes that the
ranks are otherwise idle: during a training run every exchange takes longer, dense ones most of all. The exit status is 1
if something is broken."""

REPORT = """\
Prints tables of a finished run that MLflowLogger wrote: its parameters, traffic by epoch, regimes and compression of each
layer. Saves its figures, compression.png and regimes.png. The exit status is 2 if there is no such run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    Args:
        argv: the arguments, by default those of this process.
    """
    args = parser().parse_args(argv)
    if args.command == "check":
        return check.main(args.parameters, args.backward_seconds, args.framework, args.hosts)
    return run_report.main(args.run, args.tracking_uri, args.out)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="hvd-accordion",
        description="Adaptive gradient compression for Horovod: examines a machine, shows a finished run.",
        epilog="COMMAND --help describes each command. Also available as: python -m hvd_accordion",
    )
    top.add_argument("--version", action="version", version=f"hvd_accordion {hvd_accordion.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    check_parser = _command(
        commands, "check", "shows versions, wrong settings and the speed of the link between ranks", CHECK
    )
    check_parser.add_argument(
        "--parameters",
        type=_number("--parameters", lambda text: int(float(text)), validation.integer, *PARAMETERS_ALLOWED),
        default=PARAMETERS,
        metavar="N",
        help="parameters of the network to predict for (default: %(default)s, ResNet-18)",
    )
    check_parser.add_argument(
        "--backward-seconds",
        type=_number("--backward-seconds", float, _seconds, 0.0, 3600.0),
        default=BACKWARD_SECONDS,
        metavar="S",
        help="seconds of its backward pass, which overlaps with communication (default: %(default)s)",
    )
    check_parser.add_argument(
        "--framework",
        choices=check.FRAMEWORKS,
        help="framework used for the measurement (default: the first that is installed)",
    )
    check_parser.add_argument(
        "-H",
        "--hosts",
        default="",
        metavar="HOSTS",
        help="host names to resolve, in the form of horovodrun: host1:2,host2:2",
    )

    report_parser = _command(
        commands, "report", "prints tables and saves figures of a finished run, from MLflow", REPORT
    )
    report_parser.add_argument(
        "run", metavar="RUN", help="id of the MLflow run, or its name, for the latest run of that name"
    )
    report_parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server or database, such as sqlite:///mlflow.db (default: MLFLOW_TRACKING_URI)",
    )
    report_parser.add_argument(
        "--out",
        default=".",
        metavar="FOLDER",
        help="folder of the figures, created if missing (default: current folder)",
    )
    return top


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, short: str, long: str
) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    command: argparse.ArgumentParser = commands.add_parser(name, help=short, description=long, formatter_class=raw)
    return command


def _seconds(name: str, value: float, low: float, high: float) -> float:
    return validation.real(name, value, low, high, open_low=False)


def _number(
    name: str, convert: Callable[[str], float], checked: Callable[..., float], low: float, high: float
) -> Callable[[str], float]:
    """Returns an argument type. argparse shows messages only of its own error class, so others are converted."""

    def parse(text: str) -> float:
        try:
            return checked(name, convert(text), low, high)
        except (ValueError, TypeError, OverflowError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
