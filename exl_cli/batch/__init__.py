"""Batch jobs: a file of prompts to a file of answers, which go on where they stopped."""
