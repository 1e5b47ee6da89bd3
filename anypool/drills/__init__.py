"""Drills: a fault made on purpose in a fleet that really runs, and the measurement of what it cost.

- `serve.run`: `anypool drill serve`, workers killed or stopped in the middle of their streams.
"""
