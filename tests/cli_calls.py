"""Calls of the command line in this process, on tiny runs of the digits."""

from typer.testing import CliRunner

from fedprior.cli import app

TINY = """
[run]
rounds = 3
cohort = 2
[data]
name = "digits"
clients = 5
holdout = 0.2
[algorithm]
name = "fedprox"
precision = 2
batch_size = "none"
"""
SMALL = ["--rounds", "2", "--clients", "5", "--cohort", "2", "--quiet"]


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(*arguments):
    """The one line on stderr of a command that is refused."""
    result = call(*arguments, code=2)
    assert "Traceback" not in result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("fedprior: "), result.stderr
    return result.stderr
