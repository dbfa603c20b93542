"""One file per `bridle` command: `HELP`, `add_arguments(parser)` and `run(args) -> exit code`."""
