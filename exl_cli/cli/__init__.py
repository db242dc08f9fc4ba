"""The subcommands, one module each: flags to values, values to the core, results to the console."""
