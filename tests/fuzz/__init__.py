"""Random operations on a bounded cache, against a slow and obvious model of it.

PYTHONPATH=tests python -m fuzz --operations 20000 --seed 0     (make fuzz N=20000 SEED=0)
"""
