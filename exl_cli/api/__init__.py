"""The Python API: `Model`, its streams, the engine thread, and the records that `--json` prints."""
