"""`fdd report` from a checkout."""

from megatron_fdd.cli.report import command
from megatron_fdd.host.process import end_with

if __name__ == "__main__":
    end_with(command)
