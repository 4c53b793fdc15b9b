"""Which coefficients a schedule runs with, and how good the program is: a schedule → a fitted, rolled-out, scored
trial.
"""
