"""How fast, how small and how exact the losses are, measured by one registry of cases.

``python -m benchmarks.run`` measures, ``python -m benchmarks.report`` shows, ``python -m
benchmarks.crossover`` finds the dispatcher's thresholds; docs/performance.md says how to read them.
"""
