"""How the shipped formats are encoded and decoded on a CPU, in C++."""
