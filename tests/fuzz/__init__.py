"""Fuzzers of everything that reads a file of others: python -m tests.fuzz [NAME ...] [--runs N | --seconds S]

Each mutates good files and expects only this project's errors, within two seconds and 256 MiB.
"""
