"""The subcommands, one module each: they parse flags, call the core, and hand its results to the console."""
