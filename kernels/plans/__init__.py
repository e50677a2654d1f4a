"""Plans: what a fused call starts on a GPU, recorded once and replayed from C++."""
