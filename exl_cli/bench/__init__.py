"""Benchmarks: what to measure (`plan`), how (`runner`, `measure`, `machine`), and what to say of it.

`result` and `limits` hold the records and what the hardware allows, `outputs` JSON (see `schema.json`), CSV and
Markdown, `compare` the difference of two results, `report` the HTML. Nothing here sees a tensor.
"""
