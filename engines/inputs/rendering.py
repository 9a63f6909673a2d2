"""Renders a chat template: the program of the process that `template.py` starts.

A template is a program of others, which may loop, recurse and grow. It gets a sandbox, and this process a
limit of its CPU time and memory. It reads {"template", "conversations"} from stdin, and writes {"texts"}, one
per conversation, or {"error"} with what went wrong and whether the template could be read at all.
"""

import contextlib
import json
import sys

MEMORY_BYTES = 256 << 20
CPU_SECONDS = 0.5  # Qwen's template takes 10 ms
TEXT_CHARACTERS = 1 << 20


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    request = json.loads(sys.stdin.buffer.read())
    limit()
    # As transformers does: trimmed blocks, loop controls, in a sandbox.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    readable = False
    answer: dict[str, object]
    try:
        template = environment.from_string(request["template"])
        readable = True
        texts = [
            template.render(messages=messages, add_generation_prompt=True)
            for messages in request["conversations"]
        ]
        if sum(map(len, texts)) > TEXT_CHARACTERS:
            raise MemoryError
        answer = {"texts": texts}
    except MemoryError:
        answer = {"error": "it takes too much memory", "readable": readable}
    except Exception as error:  # it may raise anything that an expression can
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        answer = {"error": said[:200], "readable": readable}
    sys.stdout.buffer.write(json.dumps(answer).encode())


def limit() -> None:
    """Limit what this process may still use, where the system can: Windows cannot."""
    if sys.platform == "win32":
        return
    import resource
    import signal

    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process, in any operation
    with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


if __name__ == "__main__":
    main()
