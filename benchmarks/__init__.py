"""How fast the code is: time and memory of scans, steps, decoding and serving, by ``python -m benchmarks.NAME``.

What a model remembers is measured by the tasks in ``pipelines.benchmarks``, through the stage evaluate; here only of
adapters that lie outside of a run (``real_text``, ``memory_curves``).
"""
