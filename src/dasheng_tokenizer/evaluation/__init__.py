"""Evaluation: figures that say how good a reconstruction is."""
