"""C++ that encodes and decodes the shipped formats on a CPU."""
