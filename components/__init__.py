"""The steps of the pipeline, one file a step, in data order.

Each step is a config dataclass, pure functions, and `run(config, inputs, outputs)`; `python -m components` is the
command line of all of them.
"""
