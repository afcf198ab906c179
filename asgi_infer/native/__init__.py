"""Control over the native threads that a model's libraries start. Usable alone, without a runner.

On Linux a native thread inherits its name, CPU affinity, niceness and OpenMP settings from the
thread that starts it. Whoever sets these on one thread *before* a library starts its pool there
has set them for the pool. Elsewhere than on Linux names, affinity and niceness are not set, and
that is said once.
"""

from .policy import NativePolicy, thread_count

__all__ = ["NativePolicy", "thread_count"]
