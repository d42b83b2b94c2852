"""The command line: `check` of a machine or of ranks, `report` of a finished run. Imports no framework by itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import hvd_accordion
from hvd_accordion.cli import check, run_report
from hvd_accordion.cli.reference_model import BACKWARD_SECONDS, PARAMETERS, PARAMETERS_ALLOWED
from hvd_accordion.utils import validation

CHECK = """\
Looks at this machine: versions, what Horovod was built with and whether it fits the installed torch and TensorFlow,
Horovod's settings, cores and threads, whether hosts' names can be resolved. Started on several ranks,

    horovodrun -np 2 -H host1:1,host2:1 python -m hvd_accordion check

it also compares the ranks, measures the link between them and tells for a network of ResNet-18's form what gradients would
take dense, under PowerSGD and under TopK, and whether compression would pay. The ranks are idle then: beside a training
everything takes longer, dense gradients most of all. Exit status 1 if something is broken."""

REPORT = """\
Tables of a finished run that MLflowLogger wrote: its parameters, traffic by epoch, regimes and compression of each layer;
and its pictures, compression.png and regimes.png. Exit status 2 where there is no such run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Carries out a command line, by default this process's own; returns the exit status."""
    args = parser().parse_args(argv)
    if args.command == "check":
        return check.main(args.parameters, args.backward_seconds, args.framework, args.hosts)
    return run_report.main(args.run, args.tracking_uri, args.out)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="hvd-accordion",
        description="Adaptive gradient compression for Horovod: looks at a machine or at a finished run.",
        epilog="COMMAND --help tells more of each. Also as: python -m hvd_accordion",
    )
    top.add_argument("--version", action="version", version=f"hvd_accordion {hvd_accordion.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    one = _command(commands, "check", "what is built, what is set wrong, how fast the ranks' link is", CHECK)
    one.add_argument(
        "--parameters",
        type=_number("--parameters", lambda text: int(float(text)), validation.integer, *PARAMETERS_ALLOWED),
        default=PARAMETERS,
        metavar="N",
        help="size of the network to predict for, in values (default: %(default)s, ResNet-18)",
    )
    one.add_argument(
        "--backward-seconds",
        type=_number("--backward-seconds", float, _seconds, 0.0, 3600.0),
        default=BACKWARD_SECONDS,
        metavar="S",
        help="seconds of its backward pass, which hides what travels meanwhile (default: %(default)s)",
    )
    one.add_argument(
        "--framework",
        choices=check.FRAMEWORKS,
        help="what the ranks measure by (default: the first of these that is installed with Horovod)",
    )
    one.add_argument(
        "-H", "--hosts", default="", metavar="HOSTS", help="names to resolve, as horovodrun takes them: host1:2,host2:2"
    )

    two = _command(commands, "report", "tables and pictures of a finished run, from MLflow", REPORT)
    two.add_argument("run", metavar="RUN", help="id of the MLflow run, or its name: then the latest of that name")
    two.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server or database, such as sqlite:///mlflow.db (default: MLflow's own setting, MLFLOW_TRACKING_URI)",
    )
    two.add_argument(
        "--out", default=".", metavar="FOLDER", help="where the pictures go; made if missing (default: here)"
    )
    return top


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, short: str, long: str
) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    made: argparse.ArgumentParser = commands.add_parser(name, help=short, description=long, formatter_class=raw)
    return made


def _seconds(name: str, value: float, low: float, high: float) -> float:
    return validation.real(name, value, low, high, open_low=False)


def _number(
    name: str, convert: Callable[[str], float], checked: Callable[..., float], low: float, high: float
) -> Callable[[str], float]:
    """A type for argparse, which shows the message of no error but its own."""

    def parse(text: str) -> float:
        try:
            return checked(name, convert(text), low, high)
        except (ValueError, TypeError, OverflowError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
