"""The flags of ``python -m ray_jobs.submit`` itself, which stand before the job's name."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ray_jobs.submitted_flags import jobs

__all__ = ["PROG", "read_flags"]

PROG = "python -m ray_jobs.submit"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def read_flags(description: str) -> argparse.Namespace:
    """Read the command line; `command` is the job and its flags, as they stand."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog=PROG, description=description.strip(), formatter_class=shape, allow_abbrev=False)
    add = parser.add_argument
    add("--jobs-address", metavar="URL", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS)")
    add("--submission-id", metavar="ID", help="the job's id (default: one that Ray makes up)")
    add("--entrypoint-num-cpus", type=float, metavar="N", help="CPUs that the driver reserves (default: none)")
    add("--entrypoint-num-gpus", type=float, metavar="N", help="GPUs that the driver reserves (default: none)")
    add("--entrypoint-memory", type=int, metavar="BYTES", help="memory that the driver reserves (default: none)")
    add(
        "--env",
        type=_pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the job; may be repeated",
    )
    add("--no-wait", action="store_true", help="do not follow the job; print its id")
    add("--logs", metavar="ID", help="follow a job that is there")
    add("--stop", metavar="ID", help="stop a job, and wait until it has ended")
    add("command", nargs=argparse.REMAINDER, metavar="JOB FLAGS", help=f"one of {', '.join(jobs())}, and its flags")
    given = parser.parse_args()
    given.env = dict(given.env)
    if sum(map(bool, (given.command, given.logs, given.stop))) != 1:
        parser.error("takes one of: a job and its flags, --logs ID, --stop ID")
    return given


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"got {text}; takes NAME=VALUE")
    return name, value
