"""Probes: what `offload probe` measures of a machine, one file for each kind of figure.

subject.py says what is measured for (a model's shapes, formats and files), effort.py how long, sampling.py how;
survey.py runs them all and puts the figures into a profile.
"""
