"""Model folders: everything about a model that is known before an engine loads it."""
