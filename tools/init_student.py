"""`fdd student` from a checkout."""

from megatron_fdd.cli.init_student import command

if __name__ == "__main__":
    command()
