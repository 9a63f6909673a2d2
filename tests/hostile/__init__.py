"""Hostile, damaged and mistaken inputs to the installed program: python -m tests.hostile

Each case is one command line in a folder of its own. It must end with the exit code that it states, in three
lines that name what is wrong, without a traceback, and leave every file as it was.
"""
