"""What a model folder is, and everything known of a model before an engine loads it."""
