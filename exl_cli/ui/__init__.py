"""Everything shown to a person: console, progress, tables, live text."""
