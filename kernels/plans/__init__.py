"""Plans: the launches of a fused call on a GPU, recorded once and replayed from C++."""
