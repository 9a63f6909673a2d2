"""What other exporters and runtimes make of the same weights. Nothing of the project depends on them."""

from collections.abc import Callable

Step = tuple[Callable[[], object], int]  # a decode step, and the bytes of the weights that it reads
Steps = dict[int, Step]  # by the number of rows
