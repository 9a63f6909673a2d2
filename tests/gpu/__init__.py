"""What only a GPU can show, in one run: `python -m tests.gpu`. docs/gpu_check.md says what it does and how
to read its page.
"""
