"""What torch's operators do on a CPU in many passes, in one: C++ that Inductor's toolchain builds,
and caches, for the processor it runs on."""
