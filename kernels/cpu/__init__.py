"""One-pass C++ for what torch's operators do in many passes on a CPU. Inductor's toolchain builds
and caches it for the processor at hand."""
