"""Batch jobs: from a file of prompts to a file of answers, resumable."""
