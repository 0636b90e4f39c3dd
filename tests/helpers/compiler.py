"""Compiler flags and options for tests, which compile much and compute little."""

from sprint_jax.runtime import quick_compile

# XLA_FLAGS of this process and of all subprocesses. Each flag halves the time of compilation. Newer
# versions of jaxlib lack the second flag and refuse flags that they do not know.
XLA_FLAGS = quick_compile.flags()
# Options of jax.jit where compilation takes most of a test's time.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}
# Options of jax.jit for tests that compare programs bit by bit. The older loop emitter, which
# XLA_FLAGS choose, rounds differently from program to program.
SAME_BITS = dict(UNOPTIMIZED)
if "fusion_emitters" in XLA_FLAGS:
    SAME_BITS |= {"xla_cpu_use_fusion_emitters": True}
