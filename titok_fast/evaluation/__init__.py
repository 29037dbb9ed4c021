"""Evaluation of reconstruction, generation and linear probing; figures name their network.

Ranks of a process group share one evaluation. Nothing is downloaded: weights are local files.
Reading order: pictures, networks, statistics, measure, reconstruction, generation, probe.
"""
